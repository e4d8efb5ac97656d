"""The tokenised domains, with a small tokenizer made here instead of a downloaded one."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from domains import CLOSED_DOMAINS, DATA, DOMAINS, collator, load_domains


@pytest.fixture(scope="module")
def tokenizer():
    byte_level = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="module")
def sets(tokenizer):
    return load_domains(tokenizer, rows_per_domain=20, eval_rows_per_domain=10, max_length=1000)


def test_each_domain_gives_the_rows_that_were_asked_for(sets):
    train, evaluation = sets
    assert sorted(train["domain"]) == sorted(DOMAINS * 20)
    assert {domain: len(rows) for domain, rows in evaluation.items()} == dict.fromkeys(DOMAINS, 10)
    assert set(CLOSED_DOMAINS) < set(DOMAINS)


@pytest.mark.slow
def test_no_row_is_in_both_splits_whatever_the_sizes(tokenizer, sets):
    most, _ = load_domains(tokenizer, rows_per_domain=300, eval_rows_per_domain=10, max_length=5000)
    _, evaluation = sets
    held_back = {prompt for rows in evaluation.values() for prompt in rows["prompt"]}
    assert held_back.isdisjoint(most["prompt"])


@pytest.mark.slow
def test_the_split_is_the_same_every_time_and_moves_with_the_seed(tokenizer, sets):
    again, _ = load_domains(tokenizer, rows_per_domain=20, eval_rows_per_domain=10, max_length=1000)
    other, _ = load_domains(tokenizer, rows_per_domain=20, eval_rows_per_domain=10, max_length=1000, seed=1)
    assert again["prompt"] == sets[0]["prompt"]
    assert other["prompt"] != sets[0]["prompt"]


def test_the_loss_falls_on_the_answer_and_its_end_only(tokenizer, sets):
    for row in sets[0]:
        answer_ids = [token for token, label in zip(row["input_ids"], row["labels"]) if label != -100]
        assert tokenizer.decode(row["input_ids"]) == row["prompt"] + row["answer"] + tokenizer.eos_token
        assert tokenizer.decode(answer_ids) == row["answer"] + tokenizer.eos_token


def test_the_collator_pads_labels_with_minus_100(tokenizer, sets):
    columns = ("input_ids", "attention_mask", "labels")
    batch = collator(tokenizer)([{name: sets[0][index][name] for name in columns} for index in range(4)])
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["labels"][padding] == -100).all()


def test_too_many_rows_are_refused_with_the_number_there_is(tokenizer):
    with pytest.raises(ValueError, match=r"boolq has \d+ rows of at most 1000 tokens"):
        load_domains(tokenizer, domains=("boolq",), rows_per_domain=9999, max_length=1000)


def test_an_unknown_domain_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"Unknown domains \['poetry'\]"):
        load_domains(tokenizer, domains=("poetry",))


def test_the_licence_note_names_every_file():
    note = (DATA.parent / "README.md").read_text()
    assert all(f"{domain}.jsonl" in note for domain in DOMAINS)
