"""Where the shared tests do not simply pass, and why. What is not listed here has to hold."""

from __future__ import annotations


# the version of transformers that the lists were made for; of others, only the comparison with native LLaVA counts
LISTED_FOR = "5.23"

_CLIP = (
    "LLaVA reads the hidden states of CLIP before its last layer norm, whose weights therefore get no gradient; "
    "upstream's own test of LLaVA leaves these tests out"
)

# suite → test → why native LLaVA and MoeLlava both fail it
BOTH_FAIL: dict[str, dict[str, str]] = {
    "modeling": {
        "test_training_gradient_checkpointing": _CLIP,
        "test_training_gradient_checkpointing_use_reentrant_false": _CLIP,
        "test_training_gradient_checkpointing_use_reentrant_true": _CLIP,
    },
}

# suite → test → why MoeLlava skips what native LLaVA passes
MOE_LLAVA_SKIPS: dict[str, dict[str, str]] = {}


def problem_with(suite: str, test: str, llava: str, moe_llava: str, *, is_listed_version: bool = True) -> str | None:
    """What is wrong about the two outcomes (`"passed"`, `"failed"` or `"skipped"`) of a test, if anything.

    MoeLlava may fail nothing that native LLaVA passes or skips, and skip nothing that it passes without a listed
    reason. On the version that the lists were made for, what both fail has to be listed too, and a list may name
    nothing else.
    """
    both_fail = test in BOTH_FAIL.get(suite, {})
    may_skip = test in MOE_LLAVA_SKIPS.get(suite, {})
    if moe_llava == "failed":
        if llava != "failed":
            return f"MoeLlava fails, and native LLaVA {llava} it."
        if is_listed_version and not both_fail:
            return "Both models fail, and BOTH_FAIL in expectations.py does not say why."
        return None
    if moe_llava == "skipped" and llava == "passed" and not may_skip:
        return "MoeLlava skips what native LLaVA passes, and MOE_LLAVA_SKIPS in expectations.py does not say why."
    if is_listed_version and both_fail:
        return f"BOTH_FAIL in expectations.py lists it, but MoeLlava {moe_llava} it. Take it off the list."
    if is_listed_version and may_skip and (llava, moe_llava) != ("passed", "skipped"):
        return f"MOE_LLAVA_SKIPS in expectations.py lists it, but MoeLlava {moe_llava} it. Take it off the list."
    return None
