"""What attacks have in common: an object that acts when it is unpickled, and command lines run in this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Say = Callable[[], str]


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.canary),)


def ended(main: Callable[[list[str]], int], *arguments: object) -> int:
    """Exit code of a command line in this process; an error leaves threads and group to the end of its process."""
    threads = torch.get_num_threads()
    try:
        return main([str(argument) for argument in arguments])
    finally:
        torch.set_num_threads(threads)
        if dist.is_initialized():
            dist.destroy_process_group()
