"""What an optimizer keeps for a parameter, to be found from the parameter."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class Link(Generic[T]):
    """Leads to its target for as long as somebody else keeps that alive. Copied or pickled, it leads nowhere."""

    def __init__(self, target: T | None = None) -> None:
        self._reference = None if target is None else weakref.ref(target)

    def __call__(self) -> T | None:
        return None if self._reference is None else self._reference()

    def __reduce__(self) -> tuple[type[Link[T]], tuple[()]]:
        return Link, ()


def attach(parameter: Tensor, name: str, target: object | None) -> None:
    """Let `parameter` lead to the target under this name; None: to nothing."""
    setattr(parameter, name, Link(target))


def attached(parameter: Tensor, name: str) -> object | None:
    """The target, while it lives."""
    link = getattr(parameter, name, None)
    return link() if isinstance(link, Link) else None
