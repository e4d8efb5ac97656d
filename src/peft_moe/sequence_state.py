"""State of the sequences in a key-value cache, which follows the cache through all that generation does to it.

A decoding loop reorders a cache (beams), repeats or selects its sequences, crops tokens that were guessed wrong,
empties it, and copies it to start again from one prompt. What belongs to a sequence has to go the same way.

transformers calls `reorder_cache`, `crop`, … on the cache, which calls them on every entry of `cache.layers`. The
state is no further entry of that list, although it would then be called by itself. The list has one entry per layer of
the model, on which `len(cache)`, `early_initialization`, legacy iteration and exports rely; a `DynamicCache` without a
config grows it by index, so that an entry of ours would take the place of a layer; and `is_compileable`,
`get_max_length` or `batch_size` ask each entry for attributes that differ between versions of transformers. Instead
the cache *instance* gets methods of its own, which call those of its class and then move the state; nothing else about
it changes. A copy made by `copy.deepcopy` has a state of its own. A pickled cache keeps the state, but has to be
continued once before the state follows it again.

The paged caches of continuous batching are no `Cache` and have none of these methods; their requests come and go by
name. [`sequence_state`] is the place to attach a state that follows those.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch


_ATTRIBUTE = "_peft_moe_sequence_state"


class SequenceState:
    """Tensors with one row per sequence of a key-value cache, each under a key of its owner.

    Keys have to be equal in a copy of the cache: strings, or tuples of strings.
    """

    def __init__(self) -> None:
        self._per_sequence: dict[Any, torch.Tensor] = {}
        self._per_token: dict[Any, torch.Tensor] = {}

    def get(self, key: Any) -> torch.Tensor | None:
        """What is kept under `key`, in the present order of the sequences, or `None`."""
        return self._per_sequence.get(key, self._per_token.get(key))

    def keep(self, key: Any, values: torch.Tensor, *, is_per_token: bool = False) -> None:
        """Keep a tensor, in place of what was kept under `key`.

        Args:
            values (`torch.Tensor` of shape `(B, …)`, or `(B, S, …)` with `is_per_token`): for B sequences.
            is_per_token (`bool`): whether the second axis goes over the S tokens in the cache, of which cropping
                removes the last ones.
        """
        self._per_sequence.pop(key, None)
        self._per_token.pop(key, None)
        (self._per_token if is_per_token else self._per_sequence)[key] = values

    def clear(self) -> None:
        """Forget everything."""
        self._per_sequence, self._per_token = {}, {}

    def crop(self, num_removed: int, num_left: int) -> None:
        """Remove the last tokens; sequences without any have no state."""
        if not num_left:
            self.clear()
        self._per_token = {key: values[:, : values.shape[1] - num_removed] for key, values in self._per_token.items()}

    def select(self, index: torch.Tensor) -> None:
        """Keep these sequences, in this order: `(B',)` int64, or `(B,)` bool."""
        self._change(lambda values: values[index.to(values.device)])

    def repeat(self, repeats: int) -> None:
        """Repeat each sequence, side by side."""
        self._change(lambda values: values.repeat_interleave(repeats, dim=0))

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for kept in (self._per_sequence, self._per_token):
            kept.update({key: change(values) for key, values in kept.items()})


_MOVES: dict[str, Callable[..., None]] = {
    "reorder_cache": SequenceState.select,
    "batch_select_indices": SequenceState.select,
    "batch_repeat_interleave": SequenceState.repeat,
    "reset": SequenceState.clear,
    "crop": SequenceState.crop,
}


class _Follower:
    """Stands in for one method of one cache: calls that of its class, and then moves the state.

    Refers to the cache weakly. A bound method would do, but would make a reference cycle of the cache, and the keys
    and values of each generation would fill the device until the garbage collector comes.
    """

    def __init__(self, cache: Any, name: str) -> None:
        self.cache = weakref.ref(cache)
        self.__name__ = name  # EncoderDecoderCache asks its methods for it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = self.cache()
        if cache is None:
            raise RuntimeError(
                "A shallow copy of a key-value cache has outlived the cache that it was made of. Use copy.deepcopy."
            )
        moved_by = (*args, *kwargs.values())
        num_before = _num_tokens(cache) if self.__name__ == "crop" else 0
        result = getattr(type(cache), self.__name__)(cache, *args, **kwargs)
        if self.__name__ == "crop":
            # counted: the argument is the length that stays in older versions of transformers, what goes in newer ones
            num_left = _num_tokens(cache)
            moved_by = (num_before - num_left, num_left)
        _MOVES[self.__name__](getattr(cache, _ATTRIBUTE), *moved_by)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """That of the copy of the cache, which is being made."""
        copied = memo.get(id(self.cache()))
        return self if copied is None else _Follower(copied, self.__name__)

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle holds the method of the class."""
        return getattr, (self.cache(), self.__name__)


def _num_tokens(cache: Any) -> int:
    return int(cache.get_seq_length())


def sequence_state(cache: Any, *, create: bool = False) -> SequenceState | None:
    """The state that follows a key-value cache, or `None` if there is none.

    Args:
        cache (`transformers.Cache` or `None`): of the sequences.
        create (`bool`): attach an empty state where there is none; not to what has no attributes, such as a tuple.
    """
    state: SequenceState | None = getattr(cache, _ATTRIBUTE, None)
    if state is None:
        if not create or not hasattr(cache, "__dict__"):
            return None
        state = SequenceState()
        setattr(cache, _ATTRIBUTE, state)
    for name in _MOVES:
        known = cache.__dict__.get(name)
        if hasattr(type(cache), name) and not (isinstance(known, _Follower) and known.cache() is cache):
            setattr(cache, name, _Follower(cache, name))
    return state


def of_continued_cache(cache: Any) -> dict[str, Any]:
    """What a pass, or a generation, has to know of the cache that it continues; nothing where there is no cache.

    Its `num_cached_tokens` (`int`), and the `sequence_state` of the sequences that are in it, if they have one.
    """
    if not hasattr(cache, "get_seq_length"):
        return {}
    num_cached_tokens = _num_tokens(cache)
    state = sequence_state(cache) if num_cached_tokens else None
    return {"num_cached_tokens": num_cached_tokens} | ({} if state is None else {"sequence_state": state})
