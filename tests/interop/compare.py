"""Our side of `make interop`: mxnet reads what we write, and what it writes we read, and write alike.

compare.py PYTHON_WITH_MXNET: prints a line a check; 1 when one fails.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.interop import ours, theirs
from tests.interop.shared import ROOT


def main() -> int:
    def mxnet(*command: str) -> str:
        whole = [sys.argv[1], "-W", "ignore", *command]
        return subprocess.run(whole, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout

    failed = 0
    checks = [("mxnet reads", check) for check in ours.CHECKS] + [("by mxnet", check) for check in theirs.CHECKS]
    with tempfile.TemporaryDirectory() as folder:
        for direction, check in checks:
            name = f"{direction}: {check.__name__.replace('_', ' ')}"
            to = Path(folder) / direction.replace(" ", "_")
            to.mkdir(exist_ok=True)
            try:
                print(f"ok: {name}: {check(to, mxnet)}", flush=True)
            except (AssertionError, subprocess.CalledProcessError, ValueError, OSError) as error:
                failed += 1
                print(f"FAILED: {name}: {error}", flush=True)
    print(f"{len(checks) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
