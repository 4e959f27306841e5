"""What the tests of other places to report to share."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np

from configs.load import load_config
from data.contact_sheet import Pixels
from training.sinks import Sinks, build_sinks

Report = Callable[..., Sinks]
"""`begin` in a folder of the test, its lines in the fixture `lines`."""
ODD = {"loss/total": 1.5, "verification/lfw é/tar@far=1e-3": 0.25, "verification/lfw_é/tar@far=1e-3": 0.75}
"""Tags with signs that places refuse, two of which are alike without them."""
NOT_FINITE = {"a/nan": math.nan, "a/inf": math.inf, "a/low": -math.inf}


def begin(output: Path, lines: list[str], *settings: str, resumed: bool = False) -> Sinks:
    """Sinks that have started on a run of these settings of `monitor`; what they say is added to `lines`."""
    output.mkdir(exist_ok=True)
    config = load_config(None, [f"train.output={output}", *(f"monitor.{setting}" for setting in settings)])
    sinks = build_sinks(config.monitor, lines.append)
    sinks.start(config, output, resumed=resumed)
    return sinks


def picture() -> Pixels:
    """100 x 200 pixels, no two rows of which are alike."""
    return np.random.default_rng(0).integers(0, 256, (100, 200, 3), dtype=np.uint8)


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
