"""Counts collectives where torch dispatches them, whatever Python function they were called by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# By torch's name of the operator: a readable name, and what a rank sends, in units of (W - 1) / W of its largest
# argument. A ring sends no less; a reduce to one rank costs each of the others that array once, W - 1 of W on average.
_KNOWN = {
    "allgather_": ("all-gather", 1),
    "_allgather_base_": ("all-gather", 1),
    "allreduce_": ("all-reduce", 2),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_": ("reduce-scatter", 1),
    "reduce_": ("reduce", 1),
    "broadcast_": ("broadcast", 1),
    "alltoall_base_": ("all-to-all", 1),
}


def _bytes(values: Iterable[Any]) -> int:
    """Of all tensors among the values, nested lists included."""
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, (list, tuple)):
            total += _bytes(value)
    return total


class Tally(TorchDispatchMode):
    """Within `with Tally(W) as tally:`, the collectives of this process among W ranks, their backward's included."""

    def __init__(self, world_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.world_size = world_size
        self.calls: Counter[str] = Counter()
        """Calls by the collective's name."""
        self.sent = 0.0
        """Bytes that a rank sends, on average over ranks, by the algorithm that sends the fewest."""

    def __enter__(self) -> Tally:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Raises KeyError for a collective that this file does not know."""
        if func.namespace == "c10d":
            name, share = _KNOWN[func.__name__.partition(".")[0]]
            self.calls[name] += 1
            largest = max(_bytes([argument]) for argument in args)
            self.sent += share * largest * (self.world_size - 1) / self.world_size
        return func(*args, **(kwargs or {}))

    def __str__(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in self.calls.items())
