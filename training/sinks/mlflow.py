"""Runs in an experiment of MLflow."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.load import to_dict
from configs.monitor import MonitorConfig
from configs.schema import RunConfig
from data.contact_sheet import Pixels
from training.sinks.base import Names, keep_id, kept_id, library, plain, run_name

ID_FILE = "mlflow_run"
_SETTINGS_AT_A_TIME = 100
"""MLflow takes no more."""
_LONGEST_SETTING = 500
"""Signs, as of its older servers."""
_GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""What it says of a run that is not there."""


class MLflow:
    """A sink whose every method waits for the server."""

    name = "MLflow"

    def __init__(self, config: MonitorConfig) -> None:
        """Raises ConfigError without mlflow."""
        # What is told to one server concerns no other; and each of its own further tries would be a line of the log.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        self._mlflow = library("mlflow", "mlflow", "monitor.mlflow_uri")
        self._uri, self._experiment = config.mlflow_uri, config.mlflow_experiment
        self._names = Names(plain)
        self._client: Any = None
        self._run = ""

    def start(self, config: RunConfig, output: Path, *, resumed: bool) -> str:
        self._client = self._mlflow.MlflowClient(tracking_uri=self._uri)
        if not self._run and resumed:
            self._run = self._former(kept_id(output / ID_FILE))
        if not self._run:
            self._run = self._client.create_run(self._experiment_id(), run_name=run_name(output)).info.run_id
            keep_id(output / ID_FILE, self._run)
        run = self._client.get_run(self._run)
        # They cannot be changed there: what a resumed run has changed stays as it was.
        settings = [
            self._mlflow.entities.Param(f"{section}.{name}", (str(value) or "''")[:_LONGEST_SETTING])
            for section, values in to_dict(config).items()
            for name, value in values.items()
            if f"{section}.{name}" not in run.data.params
        ]
        for first in range(0, len(settings), _SETTINGS_AT_A_TIME):
            self._client.log_batch(self._run, params=settings[first : first + _SETTINGS_AT_A_TIME])
        self._client.update_run(self._run, status="RUNNING")
        if self._uri.startswith("http"):
            return f"{self._uri.rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/{self._run}"
        return f"run {self._run} of experiment {self._experiment} in {self._uri}"

    def scalars(self, step: int, values: Mapping[str, float], when: float) -> None:
        metrics = [
            self._mlflow.entities.Metric(self._names(tag), value, int(1000 * when), step)
            for tag, value in values.items()
        ]
        self._client.log_batch(self._run, metrics=metrics)

    def picture(self, step: int, tag: str, picture: Pixels) -> None:
        self._client.log_image(self._run, picture, artifact_file=f"pictures/{self._names(tag)}/step_{step:09d}.png")

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")

    def _former(self, identity: str) -> str:
        """The run to go on with; empty when there is none, or it was removed."""
        if not identity:
            return ""
        try:
            run = self._client.get_run(identity)
        except self._mlflow.MlflowException as error:
            if error.error_code in _GONE:
                return ""
            raise
        return identity if run.info.lifecycle_stage == "active" else ""

    def _experiment_id(self) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        return str(self._client.create_experiment(self._experiment) if found is None else found.experiment_id)
