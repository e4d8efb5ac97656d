"""State on a key-value cache goes where the sequences of the cache go, whatever the cache and the decoding loop."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from peft_moe.sequence_state import of_continued_cache, sequence_state
from tiny_models import tiny_llama


CACHES = {
    "dynamic": lambda: DynamicCache(config=tiny_llama().config),
    "grown-layer-by-layer": DynamicCache,
    "static": lambda: StaticCache(config=tiny_llama().config, max_cache_len=16),
    "encoder-decoder": lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()),
}
OPERATIONS = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "repeat-by-name": lambda cache: cache.batch_repeat_interleave(repeats=2),
    "crop": lambda cache: cache.crop(-2),
}


def keys_of(cache) -> torch.Tensor:
    """Keys of the first layer, `(B, S, H, D)`: what the state has to be after each operation."""
    inner = getattr(cache, "self_attention_cache", cache)
    return inner.layers[0].keys.transpose(1, 2)[:, : cache.get_seq_length()]


def filled(name: str, *, num_tokens: int = 5):
    """A cache of three sequences whose first keys are its state too."""
    cache = CACHES[name]()
    for layer in range(3):
        keys = torch.randn(3, 2, num_tokens, 4)
        inner = [cache.self_attention_cache, cache.cross_attention_cache] if name == "encoder-decoder" else [cache]
        for part in inner:
            part.update(keys, keys, layer)
    state = sequence_state(cache, create=True)
    state.keep(("test", "keys"), keys_of(cache).clone(), is_per_token=True)
    state.keep("first", keys_of(cache)[:, 0].clone())
    return cache, state


def assert_followed(cache, state) -> None:
    assert torch.equal(state.get(("test", "keys")), keys_of(cache))
    assert torch.equal(state.get("first"), keys_of(cache)[:, 0])


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", CACHES)
def test_state_follows_the_sequences(name, operation):
    cache, state = filled(name)
    if name == "static" and operation != "reorder":
        with pytest.raises(AttributeError):
            OPERATIONS[operation](cache)
        return
    OPERATIONS[operation](cache)
    assert_followed(cache, state)


@pytest.mark.parametrize(("name", "empty"), [(name, "reset") for name in CACHES] + [("dynamic", "crop")])
def test_an_emptied_cache_has_no_state(name, empty):
    cache, state = filled(name)
    cache.reset() if empty == "reset" else cache.crop(-cache.get_seq_length())
    assert state.get("first") is None and state.get(("test", "keys")) is None


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_have_a_state_that_follows_them(copied):
    cache, state = filled("dynamic")
    other = copied(cache)
    is_own = other.layers is not cache.layers
    assert (sequence_state(other) is not state) == is_own
    other.reorder_cache(torch.tensor([1, 0, 0]))
    assert_followed(other, sequence_state(other))
    assert_followed(cache, state)


def test_a_cache_is_freed_as_soon_as_nobody_holds_it():
    cache, _ = filled("dynamic")
    alive = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_with_a_state_says_the_same_about_itself(name):
    def said(cache):
        inner = getattr(cache, "self_attention_cache", cache)
        found = {what: getattr(inner, what) for what in ("is_compileable", "is_sliding", "is_initialized")}
        found |= {"len": len(cache), "seq_length": int(cache.get_seq_length()), "type": type(cache)}
        found["mask_sizes"] = inner.get_mask_sizes(1, 0)
        return found | {"iteration": len(list(cache))} if hasattr(cache, "__iter__") else found

    torch.manual_seed(0)
    with_state, _ = filled(name)
    without = copy.deepcopy(with_state)
    for attribute in [key for key in vars(without) if key not in vars(CACHES[name]())]:
        delattr(without, attribute)
    assert sequence_state(without) is None
    assert said(with_state) == said(without)


def test_there_is_no_state_without_a_cache():
    assert sequence_state(None, create=True) is None and sequence_state((), create=True) is None
    assert of_continued_cache(None) == {} and of_continued_cache(()) == {}
    assert of_continued_cache(DynamicCache()) == {"num_cached_tokens": 0}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
        {"num_beams": 2, "cache_implementation": "static"},
    ],
    ids=["greedy", "beams", "sampling", "guessed-tokens", "static", "static-beams"],
)
def test_state_follows_a_generation(settings):
    model, lengths = tiny_llama().eval(), []

    def check(module, args, kwargs):
        continued = of_continued_cache(kwargs.get("past_key_values"))
        if "sequence_state" in continued:
            assert_followed(kwargs["past_key_values"], continued["sequence_state"])
            lengths.append(continued["num_cached_tokens"])

    def keep(module, args, output):
        state = sequence_state(output.past_key_values, create=True)
        state.keep(("test", "keys"), keys_of(output.past_key_values).clone(), is_per_token=True)
        state.keep("first", keys_of(output.past_key_values)[:, 0].clone())

    model.register_forward_pre_hook(check, with_kwargs=True)
    model.register_forward_hook(keep)
    prompts = torch.randint(1, 20, (1 if "prompt_lookup_num_tokens" in settings else 3, 4)).repeat(1, 3)
    torch.manual_seed(0)
    model.generate(prompts, max_new_tokens=6, min_new_tokens=6, **settings)
    assert len(lengths) >= 2 and lengths == sorted(lengths)
