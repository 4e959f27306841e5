"""Settings of other places that a run reports to, beside its own files and TensorBoard."""

from __future__ import annotations

from dataclasses import dataclass

from configs.addresses import holds_credentials
from configs.checks import ConfigError, require

_NOT_IN_PROJECTS = "/\\#?%:"
"""Signs that Weights & Biases takes in no project's name."""
_LONGEST_PROJECT = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitorConfig:
    """Where rank 0 reports to; nowhere else unless set (docs/monitoring.md). Keys belong in the environment."""

    wandb_project: str = ""
    """Project at Weights & Biases; empty: none."""
    mlflow_uri: str = ""
    """MLflow's tracking server, https://host:5000, or sqlite:///file; empty: none."""
    mlflow_experiment: str = "clusterface"
    """Experiment there; it is made if it is not there."""
    prometheus_port: int = 0
    """Port at which Prometheus finds the newest values; 0: none."""
    prometheus_address: str = "127.0.0.1"
    """Address of that port. It asks nobody for a password: 0.0.0.0 shows the values to all who reach this host."""

    def __post_init__(self) -> None:
        at = "monitor."
        project = self.wandb_project
        require(
            project.isprintable() and not set(project) & set(_NOT_IN_PROJECTS) and len(project) <= _LONGEST_PROJECT,
            at + "wandb_project",
            project,
            f"a name of at most {_LONGEST_PROJECT} signs without any of {_NOT_IN_PROJECTS}",
        )
        if holds_credentials(self.mlflow_uri):
            raise ConfigError(
                "monitor.mlflow_uri: expected an address without credentials, got one with a password or a query (not "
                "shown): give them in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or in "
                "MLFLOW_TRACKING_TOKEN, and change them if others could read it"
            )
        for name in ("mlflow_experiment", "prometheus_address"):
            value = getattr(self, name)
            require(bool(value.strip()) and value.isprintable(), at + name, value, "a name")
        require(0 <= self.prometheus_port < 1 << 16, at + "prometheus_port", self.prometheus_port, "0 (none) to 65535")
