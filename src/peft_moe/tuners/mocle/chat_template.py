"""What a chat template writes around a user turn, learnt by rendering turns with known texts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any


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


@dataclass(frozen=True)
class TurnMarks:
    """What a chat template writes around the text of a user turn, and around a system prompt inside of it."""

    shown: str
    before: re.Pattern[str]
    after: re.Pattern[str] | None
    system: re.Pattern[str] | None
    tokens: tuple[str, ...]
    """special tokens in what the template writes before and after a turn"""

    @classmethod
    def learn(cls, template_owner: Any, special_tokens: set[str], start_token: str | None) -> TurnMarks:
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
