"""Ranks end with their launcher: one that was killed cannot stop them, and they would train on, seen by nobody."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def stop_with_launcher() -> None:
    """Get SIGTERM when torchrun ends without having ended this process: it then stops as when asked to.

    Only under torchrun, and on Linux. A launcher that died before this call is not noticed; where it keeps the run's
    store, the rank then fails to join its group.
    """
    if not sys.platform.startswith("linux") or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != launcher:  # it died between the two calls
        os.kill(os.getpid(), signal.SIGTERM)
