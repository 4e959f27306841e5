"""Checkpoints: everything a run needs to go on as if it had never stopped, on any number of ranks.

Files are safetensors and JSON: numbers and words, no code. Formats and promises: docs/checkpoint.md.
"""

from training.checkpoint.errors import CheckpointError, DamagedError
from training.checkpoint.folder import Checkpoints
from training.checkpoint.places import place_of
from training.checkpoint.saved import Saved
from training.checkpoint.saver import Saver, Written

__all__ = ["CheckpointError", "Checkpoints", "DamagedError", "Saved", "Saver", "Written", "place_of"]
