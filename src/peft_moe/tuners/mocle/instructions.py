"""What text of an example decides its cluster: its instruction, read from raw examples or from token ids."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import torch


PLACEHOLDER = re.compile(r"<\|?(?:image|video|audio)(?:[_ -]?\d+)?\|?>")
USER_ROLES = ("user", "human")
PATTERN_HINT = (
    r"Give instruction_pattern, a regular expression with one group around the instruction, such as "
    r"r'USER: (.*?) ASSISTANT:', or r'(.*)' for everything."
)
TURNS = (
    ("user", "firstquestion"),
    ("assistant", "firstanswer"),
    ("user", "secondquestion"),
    ("assistant", "secondanswer"),
)
SYSTEM_TURN = ("system", "generalbehaviour")
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
        self._marks: _TurnMarks | None = None
        if self.instruction_pattern is None:
            template_owner = next((owner for owner in (processor, tokenizer) if _has_template(owner)), None)
            if template_owner is not None:
                self._marks = _TurnMarks.learn(template_owner, tokens, tokenizer.bos_token)

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


@dataclass(frozen=True)
class _TurnMarks:
    """What a chat template writes around the text of a user turn, and around a system prompt inside of it."""

    shown: str
    before: re.Pattern[str]
    after: re.Pattern[str] | None
    system: re.Pattern[str] | None
    tokens: tuple[str, ...]
    """special tokens in what the template writes before and after a turn"""

    @classmethod
    def learn(cls, template_owner: Any, special_tokens: set[str], start_token: str | None) -> _TurnMarks:
        """Renders known turns and compares what stands around them."""
        renders = _Renders.of(template_owner)
        before = _common_suffix(renders.openings, special_tokens)
        for behind_system in renders.behind_system:
            shared = _common_suffix([before, behind_system], special_tokens)
            if any(map(str.isalnum, shared)):
                before = shared
        end_of_answer = commonprefix(renders.endings).strip()
        if end_of_answer and before.removeprefix(end_of_answer).strip():
            before = before.removeprefix(end_of_answer)
        # prompts may come without the token that starts a text
        if start_token and before.removeprefix(start_token).strip():
            before = before.removeprefix(start_token)
        before = before.strip()
        if not before:
            raise ValueError(
                "The chat template of the tokenizer writes nothing before a user turn by which it could be told from "
                f"the rest of a prompt. {PATTERN_HINT}"
            )
        after = _common_prefix(renders.closings, special_tokens)
        with_last = _common_prefix([after, *filter(str.strip, renders.last_closings)], special_tokens)
        if with_last.strip():
            after = with_last
        return cls(
            shown=before,
            before=re.compile(_loosely(before, is_apart=True)),
            after=re.compile(_loosely(after, is_apart=after[0].isspace())) if after.strip() else None,
            system=_system_marks(renders.with_system, before),
            tokens=tuple(sorted(token for token in special_tokens if token in f"{before} {after}")),
        )

    def occur_in(self, text: str) -> bool:
        """Whether `text` shows any mark of the template: one that shows none is no chat."""
        marks = [self.before, self.after, *(re.compile(re.escape(token)) for token in self.tokens)]
        return any(mark is not None and mark.search(text) for mark in marks)

    def first_user_turn(self, text: str) -> str | None:
        """The text of the first user turn, up to the end where nothing closes it; `None` without such a turn."""
        opening = self.before.search(text)
        if opening is None:
            return None
        turn = text[opening.end() :]
        if self.after is not None and (closing := self.after.search(turn)):
            turn = turn[: closing.start()]
        if self.system is not None and (inside := self.system.match(turn)):
            turn = turn[inside.end() :]
        return turn


@dataclass(frozen=True)
class _Renders:
    """Pieces of a chat template rendered with sentinels, by where they stand.

    `openings` stand before a user's text, `closings` between it and an assistant, `last_closings` after it at the end of
    a prompt, `endings` after an assistant's text; `with_system` is what stands before and behind a system prompt up to
    the first user's text.
    """

    openings: list[str]
    closings: list[str]
    last_closings: list[str]
    endings: list[str]
    with_system: list[tuple[str, str]]

    @property
    def behind_system(self) -> list[str]:
        """What stands between a system prompt and the first user's text."""
        return [behind for _, behind in self.with_system]

    @classmethod
    def of(cls, template_owner: Any) -> _Renders:
        """Renders chats of one to four turns, with and without a system prompt; what the template refuses is left out."""
        renders = cls([], [], [], [], [])
        for num_turns in (1, 2, 3, 4):
            turns = TURNS[:num_turns]
            for is_open in (True, False) if turns[-1][0] == "user" else (False,):
                for system in ([], [SYSTEM_TURN]):
                    text = _render(template_owner, [*system, *turns], add_generation_prompt=is_open)
                    if text is not None:
                        renders._add(_split_at(text, [content for _, content in turns]), is_open=is_open)
        if not renders.openings:
            raise ValueError(f"The chat template of the tokenizer cannot be rendered with a user turn. {PATTERN_HINT}")
        return renders

    def _add(self, pieces: list[str], *, is_open: bool) -> None:
        head, found, behind = pieces[0].partition(SYSTEM_TURN[1])
        if found:
            self.with_system.append((head, behind))
        else:
            self.openings.append(head)
        for index, piece in enumerate(pieces[1:]):
            is_last = index == len(pieces) - 2
            if index % 2:
                self.endings.append(piece)
            elif is_last and not is_open:
                self.last_closings.append(piece)
            else:
                self.closings.append(piece)
            if index % 2 and not is_last:
                self.openings.append(piece)


def _render(template_owner: Any, turns: list[tuple[str, str]], *, add_generation_prompt: bool) -> str | None:
    """The rendered turns, or `None` if the template refuses them or leaves out their text."""
    as_text = [{"role": role, "content": content} for role, content in turns]
    as_parts = [{"role": role, "content": [{"type": "text", "text": content}]} for role, content in turns]
    for messages in (as_text, as_parts):
        try:
            text = template_owner.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception:  # a template is a foreign program and may raise anything
            continue
        position = 0
        for content in (content for role, content in turns if role != "system"):
            position = text.find(content, position) + 1
            if position == 0:
                break
        else:
            return str(text)
    return None


def _split_at(text: str, contents: list[str]) -> list[str]:
    pieces = []
    for content in contents:
        piece, _, text = text.partition(content)
        pieces.append(piece)
    return [*pieces, text]


def _system_marks(with_system: list[tuple[str, str]], before: str) -> re.Pattern[str] | None:
    """Finds a system prompt that stands, with a mark behind it, inside the first user turn."""
    opening = re.compile(_loosely(before, is_apart=True))
    for head, behind in with_system:
        start = opening.search(head)
        if start is not None and opening.search(behind) is None and behind.strip():
            mark = head[start.end() :]
            return re.compile(rf"\s*{_loosely(mark)}.*?{_loosely(behind)}", re.DOTALL)
    return None


def _common_suffix(texts: list[str], special_tokens: set[str]) -> str:
    """What all texts end with, beginning at no place inside a special token."""
    suffix = commonprefix([text[::-1] for text in texts])[::-1]
    return suffix[max(_overhang(text, len(text) - len(suffix), special_tokens)[1] for text in texts) :]


def _common_prefix(texts: list[str], special_tokens: set[str]) -> str:
    """What all texts begin with, ending at no place inside a special token."""
    prefix = commonprefix(texts)
    return prefix[: len(prefix) - max((_overhang(text, len(prefix), special_tokens)[0] for text in texts), default=0)]


def _overhang(text: str, position: int, special_tokens: set[str]) -> tuple[int, int]:
    """How many characters of the special token around `position` stand before and behind it; 0 and 0 without one."""
    for token in special_tokens:
        for start in range(max(0, position - len(token) + 1), position):
            if text.startswith(token, start) and start + len(token) > position:
                return position - start, start + len(token) - position
    return 0, 0


def _loosely(mark: str, *, is_apart: bool = False) -> str:
    """A regular expression for `mark` with any whitespace: tokenizers move it. `is_apart`: not at the end of a word."""
    characters = [re.escape(character) for character in mark if not character.isspace()]
    is_word = is_apart and bool(re.match(r"\w", mark.strip()))
    return (r"(?<!\w)" if is_word else "") + r"\s*".join(characters)


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
