"""What text of an example decides its cluster: its instruction, read from raw examples or from token ids."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from .chat_template import PATTERN_HINT, TurnMarks


PLACEHOLDER = re.compile(r"<\|?(?:image|video|audio)(?:[_ -]?\d+)?\|?>")
USER_ROLES = ("user", "human")
IGNORED_LABEL = -100


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
            f"instruction_pattern {compiled.pattern!r} has {compiled.groups} groups, but needs exactly one, around the "
            "instruction. Write groups that are for structure only as (?:...)."
        )
    return compiled


class PromptReader:
    r"""Reads the instruction back out of the token ids that a model receives.

    For prompts made with the chat template of the tokenizer the result equals [`instruction_text`] of the chat, with or
    without system prompt, answer, further turns, padding and repeated image tokens. The marks around a user turn are
    learnt from the template: it is rendered with known texts, and what always stands before and after them is kept.

    Without template and pattern the whole text counts, without special tokens; where labels are given, only the tokens
    before the first label that is not -100, so that the answer does not take part. So does a text that shows no mark of
    the template at all: it is no chat.

    Three things cannot be undone: what truncation cut off (where the first user turn is gone whole, the second counts); what a tokenizer does not keep (such as upper case); and a
    system prompt that the template writes into the user turn without a mark (Gemma 3), which is read as part of the
    instruction. Special tokens inside the turn are taken for image tokens and the like, and left out.

    Args:
        tokenizer: a tokenizer, or a processor that has one.
        instruction_pattern (`str`, *optional*):
            A regular expression with one group around the instruction, for prompts that are not made by the template.
            It sees the decoded text with special tokens; the first match counts and `.` matches line breaks too. What
            it finds is cleaned like everything else.

    Raises:
        ValueError: the pattern has not exactly one group, or the chat template has no mark before a user turn.

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
        self._special = re.compile("|".join(map(re.escape, longest_first))) if tokens else None
        self._marks: TurnMarks | None = None
        if self.instruction_pattern is None:
            template_owner = next((owner for owner in (processor, tokenizer) if _has_template(owner)), None)
            if template_owner is not None:
                self._marks = TurnMarks.learn(template_owner, tokens, tokenizer.bos_token)

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
            if (found := self._find(text)) and (clean := self._clean(found)):
                return clean
        if self._marks is not None:
            raise ValueError(
                f"Row {row} has no user turn as the chat template writes it ({_shown(self._marks.shown)} before "
                f"the text): {_shown(text)}. Make prompts with the chat template. {PATTERN_HINT}"
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
        if self._marks is None:
            return text
        turn = self._marks.first_user_turn(text)
        return text if turn is None and not self._marks.occur_in(text) else turn

    def _clean(self, text: str) -> str:
        return _clean(text if self._special is None else self._special.sub(" ", text))


def _has_template(owner: Any) -> bool:
    return bool(getattr(owner, "chat_template", None))


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
