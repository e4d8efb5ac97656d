"""Which text decides the cluster of an example, and that it is read back out of token ids."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from peft_moe.tuners.mocle.instructions import PromptReader, instruction_text
from pretrained import smollm2_path


IMAGE_TOKENS = "<image>" * 576
QUESTION = "What is shown here?\nAnswer in one word -- or 2: é, 漢字, «quotes»."
SYSTEM = {"role": "system", "content": "You are terse. The user: nobody."}
FIRST = {"role": "user", "content": QUESTION}
ANSWER = {"role": "assistant", "content": "A cat."}
SECOND = {"role": "user", "content": "And how many?"}
SECOND_ANSWER = {"role": "assistant", "content": "Two."}

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% for message in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + message['role']"
    " + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% set loop_messages = messages[1:] %}"
    "{% else %}A chat between a curious user and an assistant.{% set loop_messages = messages %}{% endif %}"
    "{% for message in loop_messages %}{% if message['role'] == 'user' %}{{ ' USER: ' + message['content'] }}"
    "{% else %}{{ ' ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] +"
    " ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
LLAVA_PARTS = (
    "{% for message in messages %}{{ message['role'] | upper + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PHI_3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
THINKING = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n"
    "{% endif %}" + CHATML.replace("assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif")
)
EACH = "{{% for message in messages %}}{{{{ {} }}}}{{% endfor %}}"
TEMPLATES = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "llama_2": (LLAMA_2, []),
    "llama_3": (LLAMA_3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "vicuna": (VICUNA, []),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"]),
    "mistral": (MISTRAL, []),
    "phi_3": (PHI_3, ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]),
    "thinking": (THINKING, ["<|im_start|>", "<|im_end|>"]),
}
WITHOUT_SYSTEM = ("gemma", "mistral")
CHATS = {
    "prompt": [FIRST],
    "answered": [FIRST, ANSWER],
    "second turn": [FIRST, ANSWER, SECOND],
    "two turns": [FIRST, ANSWER, SECOND, SECOND_ANSWER],
}


def byte_tokenizer(template: str | None = None, extra: tuple[str, ...] | list[str] = (), *, spaces: bool = False):
    """One token per byte; or, with `spaces`, one per character with `▁` for spaces, as in Llama."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if spaces:
        vocabulary = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
        bpe = models.BPE({c: i for i, c in enumerate(vocabulary)}, [], byte_fallback=True, unk_token="<unk>")
        tokenizer = Tokenizer(bpe)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=list(extra),
    )
    wrapped.add_special_tokens({"additional_special_tokens": [*extra, "<image>"]})
    wrapped.chat_template = template
    return wrapped


def encoded(tokenizer, chats, *, side: str = "right", add_generation_prompt: bool = False) -> dict[str, torch.Tensor]:
    settings = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    return encoded_texts(tokenizer, [tokenizer.apply_chat_template(c, **settings) for c in chats], side=side)


def encoded_texts(tokenizer, texts, *, side: str = "right") -> dict[str, torch.Tensor]:
    batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side=side, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def with_answers_labelled(tokenizer, prompts, answers) -> dict[str, torch.Tensor]:
    """Right-padded prompts and answers; the loss falls on the answers."""
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer)]
        rows.append((ids[0] + ids[1], [-100] * len(ids[0]) + ids[1]))
    width = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
    }


@pytest.fixture(scope="module", params=TEMPLATES)
def templated(request):
    template, extra = TEMPLATES[request.param]
    return request.param, byte_tokenizer(template, extra)


def of_user(content) -> list[dict]:
    return [{"role": "user", "content": content}]


PATTERN = r"USER: (.*?) ASSISTANT:"
IMAGE = {"type": "image"}
RAW = {
    "a text": ("What is this?", None, "What is this?"),
    "layout": ("  What\n\nis\tthis? ", None, "What is this?"),
    "decomposed letters": ("cafe\u0301", None, "café"),
    "first of a chat": ([SYSTEM, FIRST, ANSWER, SECOND], None, instruction_text(QUESTION)),
    "parts": (
        of_user([{"type": "text", "text": "Compare"}, IMAGE, {"type": "text", "text": "this"}]),
        None,
        "Compare this",
    ),
    "parts as datasets store them": (
        of_user([{**IMAGE, "text": None}, {"type": "text", "text": "What?"}]),
        None,
        "What?",
    ),
    "LLaVA": ([{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}], None, "What?"),
    "pattern": ("A chat. USER: <image>\nWhat\nis it? ASSISTANT: A cat. USER: Why? ASSISTANT:", PATTERN, "What is it?"),
    "chats need no pattern": ([SECOND], PATTERN, "And how many?"),
}


class TestInstructionOfARawExample:
    @pytest.mark.parametrize(("example", "pattern", "expected"), RAW.values(), ids=RAW)
    def test_it_is_the_first_text_of_the_user_without_layout(self, example, pattern, expected):
        assert instruction_text(example, instruction_pattern=pattern) == expected

    @pytest.mark.parametrize("placeholder", ["<image>", "<video>", "<audio>", "<image_1>", "<|image_2|>", "<image1>"])
    def test_placeholders_are_removed(self, placeholder):
        assert instruction_text(f"{placeholder}\nCompare{placeholder}them.") == "Compare them."

    @pytest.mark.parametrize(
        "example, message",
        [
            ([SYSTEM, ANSWER], r"needs a user turn.*\['system', 'assistant'\]"),
            ([], "no messages"),
            (of_user([IMAGE]), "instruction is empty"),
            (" <image> ", "instruction is empty: ' <image> '"),
            (of_user(None), "instruction is empty"),
            (FIRST, "single message: wrap it in a list"),
            (3, "this is a int"),
            (["a", "b"], "this is a list"),
            (of_user(3), "content of a message .* int"),
        ],
        ids=["no user", "no turns", "only image", "placeholder", "no content", "dict", "int", "texts", "number"],
    )
    def test_what_was_found_is_named_where_there_is_no_instruction(self, example, message):
        with pytest.raises(ValueError, match=message):
            instruction_text(example)

    @pytest.mark.parametrize(
        "pattern, message",
        [
            ("USER: (.*)", "matches nothing in 'Hello'"),
            ("USER: .*", "has 0 groups"),
            ("(a)(b)", "2 groups"),
            ("(", "is no regular"),
        ],
    )
    def test_a_pattern_has_to_match_and_needs_one_group(self, pattern, message):
        with pytest.raises(ValueError, match=message):
            instruction_text("Hello", instruction_pattern=pattern)


class TestPromptsOfChatTemplates:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_reading_gives_the_instruction_of_the_chat(self, templated, side):
        _, tokenizer = templated
        batch = encoded(tokenizer, list(CHATS.values()), side=side)
        assert PromptReader(tokenizer).read(**batch) == [instruction_text(QUESTION)] * len(CHATS)

    def test_a_generation_prompt_changes_nothing(self, templated):
        _, tokenizer = templated
        batch = encoded(tokenizer, [[FIRST], [FIRST, ANSWER, SECOND]], side="left", add_generation_prompt=True)
        assert PromptReader(tokenizer).read(**batch) == [instruction_text(QUESTION)] * 2

    @pytest.mark.parametrize("chat", CHATS)
    def test_a_system_prompt_is_no_instruction(self, templated, chat):
        name, tokenizer = templated
        if name in WITHOUT_SYSTEM:
            with pytest.raises(Exception, match="system|only user"):
                encoded(tokenizer, [[SYSTEM, *CHATS[chat]]])
            return
        batch = encoded(tokenizer, [[SYSTEM, *CHATS[chat]]])
        assert PromptReader(tokenizer).read(**batch) == [instruction_text(QUESTION)]

    def test_image_tokens_are_left_out(self, templated):
        _, tokenizer = templated
        chat = [{"role": "user", "content": f"{IMAGE_TOKENS}\nWhat is{IMAGE_TOKENS}this?"}, ANSWER]
        assert PromptReader(tokenizer).read(**encoded(tokenizer, [chat])) == ["What is this?"]

    def test_padding_may_come_without_a_mask(self, templated):
        _, tokenizer = templated
        batch = encoded(tokenizer, [[FIRST], [SECOND]], side="left")
        assert PromptReader(tokenizer).read(batch["input_ids"]) == [instruction_text(QUESTION), "And how many?"]

    def test_the_token_that_starts_a_text_may_be_missing(self, templated):
        _, tokenizer = templated
        text = tokenizer.apply_chat_template([SECOND], tokenize=False).removeprefix("<s>")
        assert PromptReader(tokenizer).read(**encoded_texts(tokenizer, [text])) == ["And how many?"]

    def test_labels_change_nothing(self, templated):
        _, tokenizer = templated
        batch = encoded(tokenizer, [CHATS["two turns"]])
        no_mask = {**batch, "labels": batch["input_ids"]}
        masked = {**batch, "labels": batch["input_ids"].clone()}
        masked["labels"][:, :-10] = -100
        reader = PromptReader(tokenizer)
        assert reader.read(**no_mask) == reader.read(**masked) == [instruction_text(QUESTION)]

    def test_a_tokenizer_that_marks_spaces_gives_the_same(self, templated):
        name, _ = templated
        template, extra = TEMPLATES[name]
        tokenizer = byte_tokenizer(template, extra, spaces=True)
        assert PromptReader(tokenizer).read(**encoded(tokenizer, [CHATS["two turns"]])) == [instruction_text(QUESTION)]

    def test_a_turn_that_truncation_left_open_is_read_to_its_end(self, templated):
        _, tokenizer = templated
        batch = encoded(tokenizer, [[{"role": "user", "content": "One two three four"}]])
        text = tokenizer.decode(batch["input_ids"][0])
        end = text.index(" four")
        cut = encoded_texts(tokenizer, [text[:end]])
        assert PromptReader(tokenizer).read(**cut) == ["One two three"]

    def test_a_text_without_any_mark_of_the_template_is_no_chat(self, templated):
        _, tokenizer = templated
        batch = encoded_texts(tokenizer, [tokenizer.apply_chat_template([FIRST], tokenize=False), "Just a  question"])
        assert PromptReader(tokenizer).read(**batch) == [instruction_text([FIRST]), "Just a question"]

    def test_only_the_prompt_of_a_text_without_marks_counts(self, templated):
        _, tokenizer = templated
        ids = encoded_texts(tokenizer, ["A question. An answer."])["input_ids"]
        labels = ids.clone()
        labels[:, : encoded_texts(tokenizer, ["A question."])["input_ids"].shape[1]] = -100
        assert PromptReader(tokenizer).read(ids, labels=labels) == ["A question."]

    def test_a_chat_whose_user_turn_was_cut_off_is_refused(self, templated):
        _, tokenizer = templated
        text = tokenizer.apply_chat_template([FIRST, {"role": "assistant", "content": "Yes."}], tokenize=False)
        cut = text[text.index(FIRST["content"]) + 3 :]
        with pytest.raises(ValueError, match=r"(?s)Row 0 has no user turn .*instruction_pattern"):
            PromptReader(tokenizer).read(**encoded_texts(tokenizer, [cut]))

    def test_a_processor_is_read_by_its_own_template_and_image_token(self):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = LLAVA_PARTS
        processor = SimpleNamespace(
            tokenizer=tokenizer,
            chat_template=LLAVA_PARTS,
            image_token="[PICTURE]",
            apply_chat_template=tokenizer.apply_chat_template,
        )
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        batch = encoded_texts(tokenizer, [text.replace("<image>", "[PICTURE]" * 300)])
        assert PromptReader(processor).read(**batch) == [instruction_text(chat)]

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            (
                EACH.format("message['content'] + eos_token"),
                "nothing before the text of a user.*instruction_pattern.*cluster_ids",
            ),
            (
                EACH.format("('Q: ' if message['role'] == 'user' else '') + message['content'] + '\n'"),
                "nothing behind the text of a user.*instruction_pattern.*cluster_ids",
            ),
            ("{{ raise_exception('no') }}", "cannot be rendered"),
        ],
        ids=["nothing before", "nothing behind", "raises"],
    )
    def test_a_template_without_marks_is_refused(self, template, message):
        with pytest.raises(ValueError, match=message):
            PromptReader(byte_tokenizer(template))

    @pytest.mark.parametrize(
        ("template", "chats"),
        [
            (
                "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}"
                "Q: {{ messages[0]['content'] }}\nA:",
                [[SECOND]],
            ),
            (
                EACH.format("message['role'] + ': ' + message['content'] | trim + '\n'"),
                [[SECOND], [SECOND, ANSWER, FIRST]],
            ),
            (
                EACH.format("'[' + message['role'] + ': ' + message['content'] + ']'"),
                [[SECOND], [SYSTEM, SECOND], [SECOND, ANSWER, FIRST]],
            ),
        ],
        ids=["one turn only", "no generation prompt", "a turn closed by less at the end than before an answer"],
    )
    def test_a_simple_template_is_enough(self, template, chats):
        tokenizer = byte_tokenizer(template)
        assert PromptReader(tokenizer).read(**encoded(tokenizer, chats)) == ["And how many?"] * len(chats)

    def test_the_system_prompt_of_a_template_may_have_changed_since(self):
        _, extra = TEMPLATES["thinking"]
        text = byte_tokenizer(THINKING, extra).apply_chat_template([SECOND, ANSWER], tokenize=False)
        tokenizer = byte_tokenizer(THINKING.replace("Today", "Tomorrow"), extra)
        assert PromptReader(tokenizer).read(**encoded_texts(tokenizer, [text])) == ["And how many?"]

    def test_an_unmarked_system_prompt_in_the_user_turn_counts_as_instruction(self):
        template = (
            GEMMA.replace("{{ raise_exception('no system role') }}", "")
            .replace(
                "{% for message in messages %}",
                "{% if messages[0]['role'] == 'system' %}{% set prefix = messages[0]['content'] + '\n\n' %}"
                "{% set rest = messages[1:] %}{% else %}{% set prefix = '' %}{% set rest = messages %}{% endif %}"
                "{% for message in rest %}",
            )
            .replace("{{ message['content'] | trim }}", "{{ (prefix if loop.first else '') + message['content'] }}")
        )
        tokenizer = byte_tokenizer(template, TEMPLATES["gemma"][1])
        terse = {"role": "system", "content": "Be terse."}
        batch = encoded(tokenizer, [[SECOND], [terse, SECOND, ANSWER]])
        assert PromptReader(tokenizer).read(**batch) == ["And how many?", "Be terse. And how many?"]


class TestPromptsWithoutTemplate:
    def test_the_whole_text_counts_without_special_tokens(self):
        tokenizer = byte_tokenizer()
        batch = encoded_texts(tokenizer, ["<s>What is it?</s>", "<image><image> Why?"])
        assert PromptReader(tokenizer).read(**batch) == ["What is it?", "Why?"]

    def test_the_answer_does_not_take_part(self):
        tokenizer = byte_tokenizer()
        batch = with_answers_labelled(tokenizer, ["What is it?", "Why?"], [" A cat.</s>", " Because of it.</s>"])
        assert PromptReader(tokenizer).read(**batch) == ["What is it?", "Why?"]

    @pytest.mark.parametrize("first_label", [0, 1, None], ids=["everything", "all but the start token", "nothing"])
    def test_labels_that_leave_no_prompt_leave_the_whole_text(self, first_label):
        tokenizer = byte_tokenizer()
        batch = encoded_texts(tokenizer, ["<s>What is it? A cat."])
        labels = batch["input_ids"].clone()
        labels[:, :first_label] = -100
        assert PromptReader(tokenizer).read(**batch, labels=labels) == ["What is it? A cat."]

    def test_a_pattern_reads_the_same_from_tokens_and_from_text(self):
        tokenizer = byte_tokenizer()
        prompts = [f"<s>A chat. USER: {IMAGE_TOKENS}\nWhat is it? ASSISTANT: A cat.</s>", "USER: Why? ASSISTANT:"]
        read = PromptReader(tokenizer, instruction_pattern=PATTERN).read(**encoded_texts(tokenizer, prompts))
        assert read == [instruction_text(prompt, instruction_pattern=PATTERN) for prompt in prompts]
        assert read == ["What is it?", "Why?"]

    def test_a_pattern_goes_before_the_template_and_does_not_see_the_answer(self):
        tokenizer = byte_tokenizer(CHATML, TEMPLATES["chatml"][1])
        batch = with_answers_labelled(tokenizer, ["Question: What is it?"], [" A cat."])
        assert PromptReader(tokenizer, instruction_pattern="Question: (.*)").read(**batch) == ["What is it?"]

    def test_a_row_without_a_match_is_named(self):
        tokenizer = byte_tokenizer()
        reader = PromptReader(tokenizer, instruction_pattern="Question: (.*)")
        with pytest.raises(ValueError, match=r"'Question: \(\.\*\)' matches no text in row 1: 'Hello'"):
            reader.read(**encoded_texts(tokenizer, ["Question: What?", "Hello"]))

    def test_a_row_without_text_is_named(self):
        tokenizer = byte_tokenizer()
        with pytest.raises(ValueError, match="Row 1 has no text"):
            PromptReader(tokenizer).read(**encoded_texts(tokenizer, ["What?", "</s>"]))

    def test_shapes_have_to_agree(self):
        reader = PromptReader(byte_tokenizer())
        ids = torch.ones(2, 3, dtype=torch.long)
        with pytest.raises(ValueError, match=r"labels is \(2, 4\), but input_ids is \(2, 3\)"):
            reader.read(ids, labels=torch.ones(2, 4))
        with pytest.raises(ValueError, match=r"shape \(B, S\), but is \(3,\)"):
            reader.read(ids[0])


@pytest.fixture(scope="module")
def tokenizer():
    """That of SmolLM2, whose template always writes a system prompt."""
    return AutoTokenizer.from_pretrained(smollm2_path())


@pytest.mark.slow
class TestARealTokenizer:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_every_chat_gives_its_instruction(self, tokenizer, side):
        chats = [chat for turns in CHATS.values() for chat in (turns, [SYSTEM, *turns])]
        for add_generation_prompt in (False, True):
            batch = encoded(tokenizer, chats, side=side, add_generation_prompt=add_generation_prompt)
            assert PromptReader(tokenizer).read(**batch) == [instruction_text(chat) for chat in chats]

    def test_the_prompts_of_the_domains_give_their_instructions(self, tokenizer):
        from domains import collator, load_domains

        train, _ = load_domains(tokenizer, rows_per_domain=8, eval_rows_per_domain=2, max_length=400)
        batch = collator(tokenizer)(
            [{name: row[name] for name in ("input_ids", "attention_mask", "labels")} for row in train]
        )
        expected = [
            instruction_text(prompt, instruction_pattern=r"<\|im_start\|>user\n(.*?)<\|im_end\|>")
            for prompt in train["prompt"]
        ]
        assert PromptReader(tokenizer).read(**batch) == expected

    def test_images_are_left_out(self, tokenizer):
        chat = [{"role": "user", "content": f"{IMAGE_TOKENS}\n{QUESTION}"}]
        assert PromptReader(tokenizer).read(**encoded(tokenizer, [chat])) == [instruction_text(QUESTION)]
