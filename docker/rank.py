"""One rank: train_dist.py, which also leaves its exit code where the launcher finds it.

torchrun ends with 1 whatever its ranks end with, and after a signal it does not tell at all; schedulers need to know a
stopped run (75) from one that cannot go on (2).
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import NoReturn

_TRAIN = Path(__file__).parents[1] / "train_dist.py"
_leave = os._exit


def _note(code: int) -> None:
    if os.getpid() == _RANK:  # a process forked from this one ends by os._exit too
        _CODE.write_text(str(code), encoding="utf-8")


def _exit(status: int) -> NoReturn:
    """In place of os._exit, by which a rank ends that has lost others: its main thread may never return."""
    _note(status)
    _leave(status)


if __name__ == "__main__":
    _RANK, _CODE = os.getpid(), Path(os.environ["CLUSTERFACE_EXIT_CODES"], os.environ["LOCAL_RANK"])
    _CODE.unlink(missing_ok=True)  # of an earlier start under the same torchrun
    os._exit = _exit
    sys.path[0] = str(_TRAIN.parent)
    try:
        runpy.run_path(str(_TRAIN), run_name="__main__")
    except SystemExit as end:
        _note(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
    except KeyboardInterrupt:
        raise  # Python then ends by SIGINT itself: as after any signal, the launcher says which
    except BaseException:
        _note(1)
        raise
