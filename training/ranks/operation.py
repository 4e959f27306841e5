"""Where a thread stands, in words: the innermost frames of this project and the torch function that it sits in."""

from __future__ import annotations

import linecache
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = {"backbones", "clustering", "configs", "data", "evaluation", "partial_fc", "sharding.py", "train_dist.py",
             "training"}  # fmt: skip
_WRAPPERS = {"wrapper", "inner", "_fn", "_call_impl", "_wrapped_call_impl", "decorate_context"}
"""Names of torch's functions that only call the one that was meant."""
_SHOWN = 2
"""Frames of the project: a helper that holds the collective says little without the one that calls it."""


class _Frame(NamedTuple):
    file: str
    line: int
    function: str


def operation_of_thread(thread: int) -> str:
    """What the thread of that identifier does now; "" when it has ended. Costs some microseconds, and it nothing."""
    frame = sys._current_frames().get(thread)
    return "" if frame is None else operation_of_frame(frame)


def operation_of_frame(frame: FrameType) -> str:
    """What is done in this frame, which is the innermost, as "all_reduce in all_reduce_ (partial_fc/…:162)"."""
    return _words(_Frame(f.f_code.co_filename, line, f.f_code.co_name) for f, line in traceback.walk_stack(frame))


def operation_of_error(trace: TracebackType | None) -> str:
    """The same for where an exception came from."""
    frames = [_Frame(f.f_code.co_filename, line, f.f_code.co_name) for f, line in traceback.walk_tb(trace)]
    return _words(reversed(frames))


def _place(file: str) -> str:
    """The file's path in the project; "" for any other file, such as torch's in an environment within the project."""
    try:
        place = Path(file).resolve().relative_to(_ROOT)
    except ValueError:
        return ""
    return place.as_posix() if place.parts[0] in _PACKAGES else ""


def _words(innermost_first: Iterable[_Frame]) -> str:
    torch, ours = list[str](), list[str]()
    called = ""
    for frame in innermost_first:
        if place := _place(frame.file):
            # Straight into C++, without a frame of torch's: the line says what was called.
            called = (
                called or " of ".join(dict.fromkeys(torch[:1] + torch[-1:])) or linecache.getline(*frame[:2]).strip()
            )
            ours.append(f"{frame.function} ({place}:{frame.line})")
            if len(ours) == _SHOWN:
                break
        elif not ours and frame.function not in _WRAPPERS:
            torch.append(frame.function)
    return f"{called} in {' of '.join(ours)}" if ours else "".join(torch[:1])
