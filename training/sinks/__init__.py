"""Other places that a run reports to, beside its own files and TensorBoard (docs/monitoring.md)."""

from __future__ import annotations

from collections.abc import Callable

from configs.monitor import MonitorConfig
from training.sinks.base import Sink
from training.sinks.front import Sinks
from training.sinks.mlflow import MLflow
from training.sinks.prometheus import Prometheus
from training.sinks.queued import Queued
from training.sinks.wandb import WeightsAndBiases

__all__ = ["Sinks", "build_sinks"]


def build_sinks(config: MonitorConfig, say: Callable[[str], None]) -> Sinks:
    """What the settings ask for; on rank 0 alone. say: shows a line. Raises ConfigError when a library is missing."""
    sinks: list[Sink] = []
    if config.wandb_project:
        sinks.append(Queued(WeightsAndBiases(config), say))
    if config.mlflow_uri:
        sinks.append(Queued(MLflow(config), say))
    if config.prometheus_port:
        sinks.append(Prometheus(config))
    return Sinks(sinks, say)
