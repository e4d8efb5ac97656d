"""Four real instruction domains, tokenised for a plain causal-LM Trainer: the loss falls on the answer only."""

from pathlib import Path

from datasets import Dataset, concatenate_datasets, load_dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase


DATA = Path(__file__).parent / "data" / "domains"
DOMAINS = ("commonsense_qa", "boolq", "mmlu_clinical", "truthful_qa")
CLOSED_DOMAINS = ("commonsense_qa", "boolq", "mmlu_clinical")


def load_domains(
    tokenizer: PreTrainedTokenizerBase,
    *,
    domains: tuple[str, ...] = DOMAINS,
    rows_per_domain: int = 320,
    eval_rows_per_domain: int = 64,
    max_length: int = 256,
    seed: int = 0,
) -> tuple[Dataset, dict[str, Dataset]]:
    """One shuffled training set of all domains, and one held-back set per domain.

    The split depends on `seed` alone, so no row count moves a row from one side to the other. Rows with the same
    instruction stay on one side. Rows longer than `max_length` tokens are left out.

    Returns:
        The training set and `{domain: evaluation set}`, both with `input_ids`, `attention_mask` and `labels` (-100 on
        the prompt), and with `domain`, `instruction`, `prompt` and `answer` as text, which a Trainer drops by itself.

    Raises:
        ValueError: If a domain is unknown or has fewer rows than asked for.
    """
    if unknown := sorted(set(domains) - set(DOMAINS)):
        raise ValueError(f"Unknown domains {unknown}: choose from {list(DOMAINS)}.")
    train, evaluation = [], {}
    for domain in domains:
        held_back, rest = _split(domain, seed)
        evaluation[domain] = _tokenize(held_back, tokenizer, domain, eval_rows_per_domain, max_length)
        train.append(_tokenize(rest, tokenizer, domain, rows_per_domain, max_length))
    return concatenate_datasets(train).shuffle(seed=seed), evaluation


def collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Pads a batch to its longest row, labels with -100."""
    return DataCollatorForSeq2Seq(tokenizer, padding="longest", label_pad_token_id=-100)


def format_prompt(tokenizer: PreTrainedTokenizerBase, instruction: str) -> str:
    """The instruction in the model's chat template, up to where the answer begins."""
    messages = [{"role": "user", "content": instruction}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _split(domain: str, seed: int, eval_share: float = 0.3) -> tuple[Dataset, Dataset]:
    rows = load_dataset("json", data_files=str(DATA / f"{domain}.jsonl"), split="train")
    instructions = sorted(set(rows["instruction"]))
    order = Dataset.from_dict({"instruction": instructions}).shuffle(seed=seed)["instruction"]
    held_back = set(order[: int(eval_share * len(instructions))])
    shuffled = rows.shuffle(seed=seed)
    side = [instruction in held_back for instruction in shuffled["instruction"]]
    return (
        shuffled.select([index for index, is_held_back in enumerate(side) if is_held_back]),
        shuffled.select([index for index, is_held_back in enumerate(side) if not is_held_back]),
    )


def _tokenize(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, domain: str, num_rows: int, max_length: int
) -> Dataset:
    def encode(row: dict[str, str]) -> dict[str, object]:
        prompt = format_prompt(tokenizer, row["instruction"])
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(row["answer"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        return {
            "input_ids": prompt_ids + answer_ids,
            "attention_mask": [1] * (len(prompt_ids) + len(answer_ids)),
            "labels": [-100] * len(prompt_ids) + answer_ids,
            "domain": domain,
            "prompt": prompt,
        }

    encoded = rows.map(encode, load_from_cache_file=False)
    fitting = encoded.filter(lambda row: len(row["input_ids"]) <= max_length, load_from_cache_file=False)
    if len(fitting) < num_rows:
        raise ValueError(
            f"{domain} has {len(fitting)} rows of at most {max_length} tokens on this side of the split, but "
            f"{num_rows} were asked for: ask for fewer, or raise max_length."
        )
    return fitting.select(range(num_rows))
