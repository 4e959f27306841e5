"""Entrypoint of the image: start this host's part of a training, wherever a scheduler or a person has put it.

    python -m docker.launch --config configs/demo.yaml --set data.path=/data/set …

Arguments are those of train_dist.py. What hosts there are is read from the environment (docs/cluster.md);
`--dry-run` as the first argument prints torchrun's command instead. As PID 1 it passes SIGTERM, SIGUSR1 and Ctrl-C on,
waits until the ranks have written their checkpoint, and ends with their exit code, where torchrun ends with 1.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from docker.placement import LaunchError, Placement, placement
from docker.torchrun import MEET_S, count_gpus, torchrun_arguments

EXIT_CODES = "CLUSTERFACE_EXIT_CODES"
"""Folder in which every rank of this host leaves its exit code (docker/rank.py)."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_BAD_ENVIRONMENT = 2
"""As of train_dist.py: what was asked for is not as expected, and another try would not help."""
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)
_RANK = Path(__file__).with_name("rank.py")


class _Ended(Exception):  # noqa: N818  an order, not an error
    """A signal came before there was a run to pass it on to."""


class Passing:
    """Passes the first signal on to torchrun, which passes it on to the ranks."""

    def __init__(self) -> None:
        self.got = 0
        """Its number; 0: none came."""
        self._child: subprocess.Popen[bytes] | None = None
        self._sent = False
        self._starting = False
        for number in _SIGNALS:
            signal.signal(number, self._pass)

    def _pass(self, number: int, _: FrameType | None) -> None:
        if self.got:
            return  # a save is under way, which torchrun's second signal would cut short
        self.got = number
        if self._child is not None:
            self._sent = True
            self._child.send_signal(number)
        elif not self._starting:
            raise _Ended

    def starting(self) -> None:
        """From here on a signal waits for `to`: raised in the midst of a start, it would leave torchrun alone."""
        self._starting = True

    def to(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        if self.got and not self._sent:  # not when it came just now, after the line above
            child.send_signal(self.got)


def wait_for_head(place: Placement, patience: float = MEET_S) -> str:
    """Wait until the head answers; the address by which others reach this host. Raises LaunchError.

    The head's pod may not have a name yet, or its image not be there: torchrun would give up after a minute.
    """
    if place.node_rank == 0:
        return place.head  # as the others know it; this host may have a loopback address by that name
    deadline, told = time.monotonic() + patience, ""
    while True:
        try:
            with socket.create_connection((place.head.strip("[]"), place.port), timeout=5) as here:
                return str(here.getsockname()[0])
        except OSError as error:
            reason = error.strerror or str(error)
        if place.node_rank is None:
            return ""  # this may be the head itself
        if time.monotonic() > deadline:
            raise LaunchError(
                f"{place.head}:{place.port}: expected node 0 to answer within {patience:.0f} s, got: {reason}: see "
                "whether it runs, and whether a firewall or network policy is between the hosts"
            )
        if told != reason:
            print(f"waiting for {place.head}:{place.port}: {reason}", file=sys.stderr, flush=True)
            told = reason
        time.sleep(1)


def exit_code(torchrun: int, ranks: Sequence[int], signalled: int) -> int:
    """What this process ends with.

    torchrun: its return code, negative for a signal. ranks: codes of the ranks, in the order in which they ended; the
    first that is not 0 is the cause, the others follow from it. signalled: number of the signal that was passed on.
    """
    if torchrun == 0:
        return 0
    if cause := next((code for code in ranks if code), 0):
        return cause
    return 128 + (signalled or -min(torchrun, 0)) if signalled or torchrun < 0 else torchrun


def _codes(folder: Path) -> list[int]:
    files = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    texts = [file.read_text(encoding="utf-8") for file in files]
    return [int(text) for text in texts if text]  # empty: killed as it wrote


def _run(command: Sequence[str], environment: Mapping[str, str], passing: Passing) -> int:
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)  # ranks whose torchrun is gone are this process's to wait for
    with tempfile.TemporaryDirectory(prefix="clusterface-") as folder:
        passing.starting()
        # A session of its own: Ctrl-C in a terminal comes to this process alone, and so to torchrun only once.
        with subprocess.Popen(command, env={**environment, EXIT_CODES: folder}, start_new_session=True) as child:
            passing.to(child)
            torchrun = child.wait()
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()
        return exit_code(torchrun, _codes(Path(folder)), passing.got)


def main(arguments: Sequence[str] | None = None) -> int:
    """The ranks' exit code: 0, 2, 75 or 76 as of train_dist.py; torchrun's where they left none; 128 and its number
    after a signal that came before there was anything to save; 2 when the environment describes no run.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    dry = given[:1] == ["--dry-run"]
    if given[:1] in ([], ["-h"], ["--help"]):
        print(__doc__)
        return 0 if given else _BAD_ENVIRONMENT
    environment = dict(os.environ)
    passing = Passing()
    try:
        place = placement(environment)
        gpus = count_gpus(environment)
        torchrun_arguments(environment, place, gpus=gpus, address="")  # before any waiting
        address = wait_for_head(place) if place.max_nodes > 1 and not dry else ""
        options = torchrun_arguments(environment, place, gpus=gpus, address=address)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return _BAD_ENVIRONMENT
    except _Ended:
        return 128 + passing.got
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(_RANK), *given[dry:]]
    print(shlex.join(command), file=sys.stdout if dry else sys.stderr, flush=True)
    if dry:
        return 0
    if "--nproc-per-node=1" not in options:
        environment.setdefault("OMP_NUM_THREADS", "1")  # as torchrun would, with ten lines of warning
    try:
        return _run(command, environment, passing)
    except _Ended:
        return 128 + passing.got


if __name__ == "__main__":
    sys.exit(main())
