"""The decision that the linears of one MLP share."""

from __future__ import annotations

from typing import Any

from ..experts_layer import Routed


class RouterScope:
    """The linears that follow one router, in the order in which they were found; the first one owns the router.

    The owner leaves its decision here in each forward, the others take it, each once. What is left over or missing shows
    that the linears were not called as one MLP, which is an error and not a reason to guess.

    Args:
        name (`str`): name of the MLP (or of the linear, with `router_scope="module"`).
        adapter_name (`str`): the adapter that this scope belongs to.
    """

    def __init__(self, name: str, adapter_name: str) -> None:
        self.name = name
        self.adapter_name = adapter_name
        self.members: list[str] = []
        self.num_experts = 0
        self._routed: Routed | None = None
        self._waiting: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """A decision belongs to a running forward; copies start without one."""
        return {**self.__dict__, "_routed": None, "_waiting": set()}

    def leave(self, routed: Routed) -> None:
        """Called by the owner."""
        self._waiting = set(self.members[1:])
        self._routed = routed if self._waiting else None

    def take(self, member: str, num_tokens: int) -> Routed:
        """Called by every other member, for `num_tokens` tokens."""
        routed = self._routed
        if routed is None or member not in self._waiting:
            raise RuntimeError(
                f"'{member}' follows the router of '{self.members[0]}', but was called before it or twice in one "
                "forward pass. This MLP does not call its linears in their usual order; use "
                'MoLEConfig(router_scope="module"), which gives each linear its own router.'
            )
        if routed.plan.num_tokens != num_tokens:
            raise RuntimeError(
                f"'{member}' received {num_tokens} tokens, but the router of '{self.members[0]}' routed "
                f'{routed.plan.num_tokens}. Use MoLEConfig(router_scope="module"), which gives each linear its own router.'
            )
        self._waiting.discard(member)
        if not self._waiting:
            self._routed = None
        return routed
