"""Ranks that lost each other: which exceptions say so, and the line that names who is missing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch.distributed as dist

EXIT_LOST = 76
"""EX_PROTOCOL of sysexits.h: ranks lost each other. The same command goes on from the newest checkpoint."""
SILENT_S = 2.5
"""A rank whose heartbeat stood still for so long, while it was looked at all the time, is called silent."""
_GLOO = re.compile(
    r"gloo.*(Connection (closed|reset) by peer|Connection (timed out|refused|aborted)|Timed out waiting \d+ms"
    r"|Broken pipe|No route to host|(Network|Host) is unreachable)|Application timeout caused pair closure",
    re.DOTALL,
)
_MISUSE = ("invalid usage", "invalid argument", "InvalidUsage", "InvalidArgument")
_CURE = "see to that rank's host and log; the same command goes on from the newest checkpoint"
_CURE_STORE = "see to the network and to that host; the same command goes on from the newest checkpoint"


class LostRankError(RuntimeError):
    """Ranks lost each other. The message names who, where and what to do; empty where another rank has said it."""


class Word(NamedTuple):
    """What a rank tells of itself with every heartbeat."""

    host: str
    pid: int
    step: int
    phase: str
    moves: int
    """Times that its main thread said where it is: grows with all progress."""
    idle: float
    """Seconds since then."""
    operation: str
    """What its main thread does; only told once it has been idle for a while."""
    ended: str
    """Why it ended; "" while it has not, "done" at a good end."""
    bereft: bool
    """Whether it ended because it lost others: then it is not the one to blame."""

    def who(self, rank: int) -> str:
        return f"rank {rank} ({self.host}, pid {self.pid})"

    def where(self) -> str:
        doing = f", {self.operation}" if self.operation else ""
        return f"step {self.step}, {self.phase}{doing}"


class Heard(NamedTuple):
    """A rank's newest word and for how many seconds there has been no newer one."""

    word: Word
    silent: float


def says_a_rank_is_lost(error: BaseException) -> bool:
    """Whether an exception out of a collective or the store means that others cannot be reached.

    False for everything that may be a bug of ours, such as ranks that come with different sizes.
    """
    text = str(error)
    if isinstance(error, dist.DistError):
        return not any(word in text for word in _MISUSE)
    return isinstance(error, RuntimeError) and _GLOO.search(text) is not None


def first_line(error: BaseException) -> str:
    """Kind and first line of an exception, without the place in somebody's C++ and advice around it."""
    words = re.sub(r"^\[[^\]]*\]\s*|\. This is typically caused by.*", "", str(error).strip()).splitlines()
    return f"{type(error).__name__}: {words[0][:300]}" if words else type(error).__name__


def whom_to_blame(heard: Mapping[int, Heard | None], *, rank: int, mine: Word, unreachable: str) -> tuple[str, str]:
    """Who is missing, and what to do about it. heard: of the other ranks, None of those that never spoke.

    unreachable: address of the store when this rank gets no answer from it, and so knows nothing new of others.
    """
    words = {other: each.word for other, each in heard.items() if each is not None}
    if failed := [r for r, word in words.items() if word.ended not in ("", "done") and not word.bereft]:
        return _each(f"{words[r].who(r)} ended at {words[r].where()} ({words[r].ended})" for r in failed), _CURE
    if unreachable:
        return f"rank {rank} cannot reach the store at {unreachable}: the network, or rank 0's host", _CURE_STORE
    quiet = [r for r, each in heard.items() if each is None or (not each.word.ended and each.silent >= SILENT_S)]
    if quiet:
        return _each(_silence(r, heard[r]) for r in quiet), _CURE
    if gone := [r for r, word in words.items() if word.ended]:
        return _each(f"{words[r].who(r)} ended at {words[r].where()} ({words[r].ended})" for r in gone), _CURE
    least = min(word.moves for word in words.values())
    late = [r for r, word in words.items() if word.moves == least and least < mine.moves]
    late = late or [r for r, word in words.items() if word.operation != mine.operation] or list(words)
    doing = (f"{words[r].who(r)} is alive, for {words[r].idle:.0f} s at {words[r].where()}" for r in late)
    return _each(doing), "see to what it waits for; if it only needs longer, raise train.timeout"


def _silence(rank: int, heard: Heard | None) -> str:
    if heard is None:
        return f"rank {rank} has never been heard of"
    word, seconds = heard
    return f"{word.who(rank)} has not been heard of for {seconds:.0f} s, last at {word.where()}"


def _each(parts: Iterable[str], most: int = 4) -> str:
    """Some of them: of a host that went down, its first ranks say all."""
    listed = list(parts)
    more = f"; and {len(listed) - most} more ranks" if len(listed) > most else ""
    return "; ".join(listed[:most]) + more
