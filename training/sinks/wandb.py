"""Runs in a project of Weights & Biases."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.load import to_dict
from configs.monitor import MonitorConfig
from configs.schema import ConfigError, RunConfig
from data.contact_sheet import Pixels
from training.sinks.base import Names, keep_id, kept_id, library, plain, run_name, said
from training.sinks.queued import FLUSH_S

ID_FILE = "wandb_run"
_STEP = "step"
_TRIES = 7
"""Of a beginning online; each leaves a folder. Then all is kept in one for `wandb sync`."""


class WeightsAndBiases:
    """A sink that waits for the server when it starts, and for uploads when it is closed."""

    name = "Weights & Biases"

    def __init__(self, config: MonitorConfig) -> None:
        """Raises ConfigError without wandb, or when its own settings, of the environment and its files, are wrong."""
        # Reports on wandb itself, to its makers, which a process would wait for at its end.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._wandb = library("wandb", "wandb", "monitor.wandb_project")
        try:
            self._set_up()
        except Exception as error:  # whatever it raises
            raise ConfigError(f"monitor.wandb_project: wandb refuses its settings ({said(error)})") from None
        self._project, self._names = config.wandb_project, Names(plain)
        self._identity, self._tries = "", 0
        self._run: Any = None

    def start(self, config: RunConfig, output: Path, *, resumed: bool) -> str:
        if not self._identity:
            self._identity = (kept_id(output / ID_FILE) if resumed else "") or secrets.token_hex(4)
            keep_id(output / ID_FILE, self._identity)
        self._tries += 1
        try:
            self._run = self._begin(config, output)
        except Exception:  # whatever it raises
            with contextlib.suppress(SystemExit):
                self._wandb.teardown()  # its process keeps the identity of a run that did not begin
            self._set_up()
            raise
        # W&B's own step may not go back, as that of a resumed run does.
        self._run.define_metric("*", step_metric=_STEP)
        if self._run.offline:
            return f"kept in {Path(self._run.dir).parent}, which wandb sync sends"
        return str(self._run.url or "switched off by WANDB_MODE")

    def scalars(self, step: int, values: Mapping[str, float], when: float) -> None:
        self._run.log({self._names(tag): value for tag, value in values.items()} | {_STEP: step, "_timestamp": when})

    def picture(self, step: int, tag: str, picture: Pixels) -> None:
        self._run.log({self._names(tag): self._wandb.Image(picture), _STEP: step})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

    def _set_up(self) -> None:
        self._wandb.setup(self._wandb.Settings(silent=True))  # it would ask for a key at the terminal

    def _begin(self, config: RunConfig, output: Path) -> Any:
        settings = self._wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,  # the address of a remote may hold a password
            disable_code=True,
            stop_fn=lambda: None,  # a button on a page does not end a training
            init_timeout=FLUSH_S,  # the process would not end before
            finish_timeout=FLUSH_S - 2,
            finish_timeout_raises=True,
        )
        return self._wandb.init(
            project=self._project,
            id=self._identity,
            name=run_name(output),
            resume="allow",
            dir=str(output),
            mode="offline" if self._tries > _TRIES else None,
            config=to_dict(config),
            settings=settings,
        )
