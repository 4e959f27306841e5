"""All places that a run reports to, as the training sees them: nothing that fails there reaches it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from configs.schema import RunConfig
from data.contact_sheet import Pixels
from training.sinks.base import Sink, said


class Sinks:
    """Tells every sink. One that fails is said, and told no more; the others and the training go on."""

    def __init__(self, sinks: Iterable[Sink] = (), say: Callable[[str], None] = print) -> None:
        self._sinks, self._say = list(sinks), say

    def start(self, config: RunConfig, output: Path, *, resumed: bool) -> None:
        """resumed: whether the run goes on from a checkpoint of this output folder."""

        def start(sink: Sink) -> None:
            if where := sink.start(config, output, resumed=resumed):
                self._say(f"{sink.name}: {where}")

        self._each(start)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values by their TensorBoard tags, after `step` optimizer steps."""
        now, kept = time.time(), {tag: float(value) for tag, value in values.items()}
        self._each(lambda sink: sink.scalars(step, kept, now))

    def picture(self, step: int, tag: str, picture: Pixels) -> None:
        """picture: uint8 (H, W, 3), RGB, which nobody changes afterwards. It goes to others: no faces."""
        self._each(lambda sink: sink.picture(step, tag, picture))

    def close(self, *, failed: bool = False) -> None:
        """May be called again. failed: the training ended by an error. Each sink may wait, so they end side by side."""

        def close(sink: Sink) -> None:
            self._tell(sink, lambda sink: sink.close(failed=failed))

        threads = [threading.Thread(target=close, args=[sink], daemon=True) for sink in self._sinks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _each(self, call: Callable[[Sink], None]) -> None:
        for sink in self._sinks:
            self._tell(sink, call)

    def _tell(self, sink: Sink, call: Callable[[Sink], None]) -> None:
        try:
            call(sink)
        except Exception as error:  # whatever a library raises
            self._sinks = [other for other in self._sinks if other is not sink]
            self._say(f"{sink.name}: cannot report ({said(error)}): training goes on without it")
