"""What a run can stop with that its user can mend: each is shown as one line, without a traceback."""

from __future__ import annotations

from clustering.errors import ClusterStateError
from configs.schema import ConfigError
from data.errors import DataError
from partial_fc import HeadStateError
from training.checkpoint import CheckpointError


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


USER_ERRORS = (ConfigError, DataError, CheckpointError, ClusterStateError, HeadStateError, TrainingError)
"""Everything that is not a bug of ours."""
