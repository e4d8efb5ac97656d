"""What text of an example decides its cluster: its instruction, read from raw examples or from token ids."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


PLACEHOLDER = re.compile(r"<\|?(?:image|video|audio)(?:[_ -]?\d+)?\|?>")
PLACE_OF_INSTRUCTION = "{}"
USER_ROLES = ("user", "human")
IGNORED_LABEL = -100
SYSTEM, USER, ANSWER = "generalbehaviour", "firstquestion", "firstanswer"
"""texts of a marked turn: without whitespace, which templates strip, and in no template's own words"""
ROLES = {SYSTEM: "system", USER: "user", ANSWER: "assistant"}
WAYS_OUT = (
    r"Give instruction_pattern, a regular expression with one group around the instruction, such as "
    r"r'USER: (.*?) ASSISTANT:', or r'(.*)' for everything; or pass cluster_ids."
)

Texts = Iterable[str | Sequence[Mapping[str, Any]]]


def instruction_text(
    example: str | Sequence[Mapping[str, Any]], *, instruction_pattern: str | re.Pattern[str] | None = None
) -> str:
    """The instruction of a raw example: the text that decides its cluster.

    In a chat it is the first user turn. Placeholders of images, videos and audio (`<image>`, `<image_1>`, ...) are
    removed and runs of whitespace become one space, so that it does not matter how a prompt is laid out.

    The released code of MoCLE has single questions only, and encodes them whole; that the first turn of a longer chat
    decides is a choice of this package.

    Args:
        example (`str` or `Sequence[Mapping]`):
            A text, or a chat: messages `{"role": "user", "content": ...}`, where the content is a text or a list of
            parts such as `{"type": "text", "text": ...}` and `{"type": "image"}`; LLaVA's `{"from": "human", "value":
            ...}` is understood too.
        instruction_pattern (`str` or `re.Pattern`, *optional*):
            For texts that are whole prompts: group 1 of the first match is the instruction. `.` matches line breaks
            too. Chats do not need it and ignore it.

    Returns:
        `str`: the instruction, never empty.

    Raises:
        ValueError: there is no user turn, no text in it, no match, or `example` is something else.

    Example:

    ```py
    >>> instruction_text([{"role": "user", "content": "<image>\\nWhat colour  is the car?"}])
    'What colour is the car?'
    >>> instruction_text("USER: Hello. ASSISTANT: Hi.", instruction_pattern=r"USER: (.*?) ASSISTANT:")
    'Hello.'
    ```
    """
    if isinstance(example, str):
        pattern = compile_instruction_pattern(instruction_pattern)
        text = example if pattern is None else _match(pattern, example)
        if text is None:
            raise ValueError(
                f"instruction_pattern {_shown(instruction_pattern)} matches nothing in {_shown(example)}. Correct the "
                "pattern, or leave it out if the texts are instructions and not whole prompts."
            )
        found = example
    elif isinstance(example, Sequence) and all(isinstance(message, Mapping) for message in example):
        found = text = _content_text(_first_user_content(example))
    else:
        what = "a single message: wrap it in a list" if isinstance(example, Mapping) else f"a {type(example).__name__}"
        raise ValueError(f"An example is a text or a list of chat messages, but this is {what}.")
    if not (clean := _clean(text)):
        raise ValueError(
            f"The instruction is empty: {_shown(found)} holds no text apart from placeholders and whitespace. An "
            "example without an instruction has no cluster; leave it out."
        )
    return clean


def read_instructions(texts: Any, instruction_pattern: str | None, *, rows: Sequence[int] | None = None) -> list[str]:
    """The instruction of each text or chat.

    Args:
        texts (`Iterable`): N texts or chats, see [`instruction_text`].
        instruction_pattern (`str`, *optional*): see [`instruction_text`].
        rows (`Sequence[int]`, *optional*): the indices by which errors name the texts.

    Raises:
        ValueError: there are none, one has no instruction, or this is a single text or a data set.
    """
    is_single = isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Iterable)
    if is_single or hasattr(texts, "column_names"):
        raise ValueError(
            f"A list of texts or chats is needed, but this is a {type(texts).__name__}. Put a single one into a list; "
            "of a data set, give a column: dataset['prompt']."
        )
    instructions = []
    for index, text in enumerate(texts):
        try:
            instructions.append(instruction_text(text, instruction_pattern=instruction_pattern))
        except ValueError as error:
            raise ValueError(f"Text {index if rows is None else rows[index]}: {error}") from error
    if not instructions:
        raise ValueError("There are no texts to cluster.")
    return instructions


def check_text_settings(template: str, instruction_pattern: str | None) -> None:
    """Raise `ValueError` unless the template has one place for the instruction, and the pattern one group."""
    if template.count(PLACE_OF_INSTRUCTION) != 1:
        raise ValueError(
            f"The template of instructions has to contain {PLACE_OF_INSTRUCTION!r} exactly once, where the "
            f"instruction goes, but is {template!r}."
        )
    compile_instruction_pattern(instruction_pattern)


def compile_instruction_pattern(pattern: str | re.Pattern[str] | None) -> re.Pattern[str] | None:
    """`pattern` compiled, with `.` for line breaks too.

    Raises:
        ValueError: it is no regular expression or has not exactly one group.
    """
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern, re.DOTALL) if isinstance(pattern, str) else pattern
    except re.error as error:
        raise ValueError(f"instruction_pattern {pattern!r} is no regular expression: {error}.") from error
    if compiled.groups != 1:
        raise ValueError(
            f"instruction_pattern {compiled.pattern!r} has {compiled.groups} groups, but needs exactly one, around "
            "the instruction. Write groups that are for structure only as (?:...)."
        )
    return compiled


class PromptReader:
    r"""Reads the instruction back out of the token ids that a model receives.

    For prompts made with the chat template of the tokenizer the result equals [`instruction_text`] of the chat, with
    or without system prompt, answer, further turns, padding and repeated image tokens. The template is rendered once
    with a marked turn (and once more behind a marked system prompt); what it writes around the marks is looked for in
    the prompt, and the first user turn counts.

    Without template and pattern the whole text counts, without special tokens; where labels are given, only the tokens
    before the first label that is not -100, so that the answer does not take part. So does a text in which nothing of
    the template occurs: it is no chat.

    Three things cannot be undone: what truncation cut off (where the first user turn is gone whole, the second
    counts); what a tokenizer does not keep (such as upper case); and a system prompt that the template writes into the
    user turn without a mark (Gemma 3), which is read as part of the instruction. Special tokens inside the turn are
    taken for image tokens and the like, and left out.

    Args:
        tokenizer: a tokenizer, or a processor that has one.
        instruction_pattern (`str`, *optional*):
            A regular expression with one group around the instruction, for prompts that are not made by the template.
            It sees the decoded text with special tokens; the first match counts and `.` matches line breaks too. What
            it finds is cleaned like everything else.

    Raises:
        ValueError: the pattern has not exactly one group, or the chat template writes nothing before or nothing behind
            the text of a user.

    Example:

    ```py
    >>> reader = PromptReader(tokenizer)
    >>> batch = tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt", return_dict=True)
    >>> reader.read(**batch) == [instruction_text(chat) for chat in chats]
    True
    ```
    """

    def __init__(self, tokenizer: Any, *, instruction_pattern: str | re.Pattern[str] | None = None) -> None:
        processor, tokenizer = tokenizer, getattr(tokenizer, "tokenizer", tokenizer)
        self.tokenizer = tokenizer
        self.instruction_pattern = compile_instruction_pattern(instruction_pattern)
        tokens = _special_tokens(tokenizer) | _special_tokens(processor)
        longest_first = sorted(tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        owner = next((owner for owner in (processor, tokenizer) if getattr(owner, "chat_template", None)), None)
        self._turn = None
        if self.instruction_pattern is None and owner is not None:
            self._turn = _MarkedTurn.render(owner, self._special, tokenizer.bos_token or "")

    def read(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> list[str]:
        """The instructions of a batch. Waits for the device.

        Args:
            input_ids (`torch.Tensor`): shape `(B, S)`.
            attention_mask (`torch.Tensor`, *optional*): shape `(B, S)`, 0 on padding, which is then left out.
            labels (`torch.Tensor`, *optional*): shape `(B, S)`, -100 where there is no loss.

        Returns:
            `list[str]`: B instructions, none of them empty.

        Raises:
            ValueError: shapes differ, or a row has no instruction: no user turn as the template writes it, no match of
                the pattern, or no text.
        """
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has to be of shape (B, S), but is {tuple(input_ids.shape)}.")
        for name, tensor in (("attention_mask", attention_mask), ("labels", labels)):
            if tensor is not None and tensor.shape != input_ids.shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, but input_ids is {tuple(input_ids.shape)}.")
        rows = input_ids.tolist()
        masks = [[1] * len(ids) for ids in rows] if attention_mask is None else attention_mask.tolist()
        targets: list[Any] = [None] * len(rows) if labels is None else labels.tolist()
        return [self._read_row(*row) for row in zip(range(len(rows)), rows, masks, targets, strict=True)]

    def _read_row(self, row: int, ids: list[int], mask: list[int], targets: list[int] | None) -> str:
        kept = [index for index, is_token in enumerate(mask) if is_token]
        text = ""
        for part in _prompt_parts(kept, targets):
            text = self.tokenizer.decode(
                [ids[index] for index in part], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            if (found := self._find(text)) and (clean := _clean(self._special.sub(" ", found))):
                return clean
        if self._turn is not None:
            raise ValueError(
                f"Row {row} has no user turn as the chat template writes it ({_shown(self._turn.before)} before the "
                f"text): {_shown(text)}. Make prompts with the chat template. {WAYS_OUT}"
            )
        if self.instruction_pattern is not None:
            raise ValueError(
                f"instruction_pattern {self.instruction_pattern.pattern!r} matches no text in row {row}: "
                f"{_shown(text)}. Correct the pattern."
            )
        raise ValueError(f"Row {row} has no text apart from special tokens: {_shown(text)}.")

    def _find(self, text: str) -> str | None:
        if self.instruction_pattern is not None:
            return _match(self.instruction_pattern, text)
        if self._turn is None or not self._turn.traces.search(text):
            return text
        return _match(self._turn.pattern, text)


@dataclass(frozen=True)
class _MarkedTurn:
    """What a chat template writes around the first user turn, seen by rendering one with marks for its texts."""

    before: str
    pattern: re.Pattern[str]
    """group 1 is the text of the first user turn, up to the end where truncation left the turn open"""
    traces: re.Pattern[str]
    """what occurs in every text that the template has made, whole or cut"""

    @classmethod
    def render(cls, template_owner: Any, special: re.Pattern[str], start_token: str) -> _MarkedTurn:
        """The marks of a template. Prompts may come without the token that starts a text."""
        rendered = _render(template_owner, USER, ANSWER) or _render(template_owner, USER)
        if rendered is None:
            raise ValueError(f"The chat template of the tokenizer cannot be rendered with a user turn. {WAYS_OUT}")
        before, _, behind = rendered.partition(USER)
        before = before.removeprefix(start_token).strip()
        after = behind.partition(ANSWER)[0].strip()
        # generation prompts and the end of a text differ from what stands before an answer, but not where it begins
        if token := special.search(after):
            after = after[: token.start()].strip() or token.group()
        for mark, place in ((before, "before"), (after, "behind")):
            if not mark:
                raise ValueError(
                    f"The chat template of the tokenizer writes nothing {place} the text of a user by which it can be "
                    f"told from the rest of a prompt. {WAYS_OUT}"
                )
        opening = _loosely(before)
        with_system = _render(template_owner, SYSTEM, USER, ANSWER) or _render(template_owner, SYSTEM, USER) or ""
        head, _, behind_system = with_system.partition(USER)[0].removeprefix(start_token).partition(SYSTEM)
        if behind_system.strip() and head.strip().startswith(before):
            # Llama 2 writes the system prompt inside of the user turn
            within = head.strip().removeprefix(before)
            opening = rf"{opening}(?:\s*{_loosely(within)}.*?{_loosely(behind_system)})?"
        elif behind_system.strip():
            # this alone also finds the turn behind a system prompt of the template's own, which may hold the date
            opening = f"(?:{_loosely(behind_system)}|{opening})"
        tokens = {match.group() for match in special.finditer(before + after)}
        traces = "|".join(map(re.escape, sorted(tokens)))
        return cls(
            before,
            re.compile(rf"{opening}(.*?)(?:{_loosely(after)}|\Z)", re.DOTALL),
            re.compile("|".join(filter(None, (opening, _loosely(after), traces))), re.DOTALL),
        )


def _render(template_owner: Any, *marks: str) -> str | None:
    """The marks as the texts of a chat; `None` if the template refuses it, or does not write them in this order."""
    parts = [[{"type": "text", "text": mark}] for mark in marks]
    for contents in (marks, parts):
        chat = [{"role": ROLES[mark], "content": content} for mark, content in zip(marks, contents, strict=True)]
        is_open = marks[-1] == USER
        try:
            text = str(template_owner.apply_chat_template(chat, tokenize=False, add_generation_prompt=is_open))
        except Exception:  # a template is a foreign program and may raise anything
            continue
        if re.search(".*".join(marks), text, re.DOTALL):
            return text
    return None


def _loosely(mark: str) -> str:
    """A regular expression for `mark` with any whitespace, which tokenizers move, and not at the end of a word."""
    mark = mark.strip()
    is_word = re.match(r"\w", mark) is not None
    return (r"(?<!\w)" if is_word else "") + r"\s*".join(re.escape(c) for c in mark if not c.isspace())


def _special_tokens(owner: Any) -> set[str]:
    """Special tokens of a tokenizer, and those that a processor names, such as `image_token`."""
    tokens = {str(token) for token in getattr(owner, "all_special_tokens", ())}
    tokens |= {str(token) for token in getattr(owner, "added_tokens_decoder", {}).values() if token.special}
    named = (value for name, value in vars(owner).items() if name.endswith("_token"))
    tokens |= {str(value) for value in named if isinstance(value, str) or hasattr(value, "content")}
    return {token for token in tokens if token.strip()}


def _prompt_parts(kept: list[int], targets: list[int] | None) -> Iterator[list[int]]:
    """The tokens before the first one with a loss, if there are any, then all of them."""
    if targets is not None:
        first = next((position for position, index in enumerate(kept) if targets[index] != IGNORED_LABEL), 0)
        if first:
            yield kept[:first]
    yield kept


def _first_user_content(messages: Sequence[Any]) -> Any:
    roles = [message.get("role", message.get("from")) for message in messages]
    for role, message in zip(roles, messages, strict=True):
        if role in USER_ROLES:
            return message.get("content", message.get("value"))
    raise ValueError(
        f"A chat needs a user turn, but this one has {f'the roles {roles}' if roles else 'no messages'}. Roles stand "
        f"under 'role' or 'from', and the user is one of {list(USER_ROLES)}."
    )


def _content_text(content: Any) -> str:
    """The text of a message; parts that are no text separate words."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise ValueError(
            f"The content of a message is a text or a list of parts, but this is a {type(content).__name__}."
        )
    return "".join(map(_part_text, content))


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        return str(part.get("text") or "") if part.get("type", "text") == "text" else " "
    raise ValueError(f"A part of a message is a text or {{'type': ..., ...}}, but this is a {type(part).__name__}.")


def _match(pattern: re.Pattern[str], text: str) -> str | None:
    match = pattern.search(text)
    return match.group(1) if match else None


def _clean(text: str) -> str:
    return " ".join(PLACEHOLDER.sub(" ", unicodedata.normalize("NFC", text)).split())


def _shown(value: Any, length: int = 160) -> str:
    shown = repr(value)
    return shown if len(shown) <= length else f"{shown[: length - 3]}..."
