"""What a new run is to begin with: the weights of a run of ours, or of files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones import build_backbone
from configs.schema import ConfigError, ModelConfig, RunConfig
from data.errors import DataError
from data.making.rewrite import names_of, names_of_set
from data.rec.places import where
from data.rec.records import RecordSet
from training.checkpoint import CheckpointError, Saved
from training.checkpoint.tools import newest_at
from training.checks import cache_of
from training.ranks.agreement import facts_of, label_digest
from training.warm.class_centres import Centres, FileCentres, SavedCentres
from training.warm.peer_weights import Weights, backbone_weights, heads_at
from training.warm.safetensors_file import read_tensors
from training.weight_files import read_state

_OF_RANKS = re.compile(r"(softmax_fc_gpu_|checkpoint_gpu_|rank).*\.pt")
_NAMES = "identities.txt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Backbone and class centres."""

    weights: Weights
    centres: Centres | None
    records: dict[str, Any] | None
    """Facts of the set that the centres were trained on, as `facts_of` gives them; None where none are known."""
    path: str
    """Of that set; "" where it is not known."""


def source_at(origin: str, centres: Sequence[Path], model: ModelConfig) -> Source:
    """origin: the output of a run, its checkpoints, one of them, or a file of a backbone's weights.

    centres: an exported file, or the files of arcface_torch's ranks, or their folder; none: those of the run. model: of
    the new run. Raises CheckpointError, DataError.
    """
    found = _centres_at(centres) if centres else None
    if Path(origin).is_file():
        return Source(weights=_weights_of(Path(origin), model), centres=found, records=None, path="")
    saved = newest_at(origin)
    weights = _weights_in(saved)
    if found is not None:
        return Source(weights=weights, centres=found, records=None, path="")
    of_run = SavedCentres.of(saved)
    settings = saved.values["settings"]
    return Source(weights=weights, centres=of_run, records=settings["records"], path=str(settings["data"]["path"]))


def fits(tensors: Any, model: ModelConfig) -> bool:
    """Whether they are all weights of this backbone, by their names and shapes. Raises ConfigError for none of ours."""
    try:
        with torch.device("meta"):
            state = build_backbone(model.backbone, embedding_size=model.embedding_size).state_dict()
    except ValueError as error:
        raise ConfigError(f"model.backbone: {error}") from None
    if not isinstance(tensors, dict) or tensors.keys() != state.keys():
        return False
    return all(isinstance(t, Tensor) and t.shape == state[key].shape for key, t in tensors.items())


def old_names(source: Source, num_old: int, old_set: str, config: RunConfig) -> tuple[list[str], str]:
    """Names of the classes that the centres are of, and where they stand.

    old_set: the set, or its identities.txt alone; "": where the run found it. Raises DataError: no set, another than
    the run's, no names, or not one for each centre.
    """
    at = old_set or source.path
    if not at:
        raise DataError("--old-set: expected the set that the centres were trained on, or its identities.txt, got none")
    if (path := Path(at)).name == _NAMES and path.is_file():
        return names_of(path.parent, num_old), at
    try:
        records = RecordSet.open(where(at), cache_of(config.data))
    except DataError as error:
        raise DataError(
            f"{error}; it is looked for as the centres were trained on it: say where it is now by --old-set, its "
            f"{_NAMES} alone will do"
        ) from None
    try:
        facts = facts_of(config, records, label_digest(records), 0)["records"]
        if source.records not in (None, facts):
            raise DataError(
                f"{records.address}: its records are not those that the run was trained on: say by --old-set where "
                f"these are, their {_NAMES} alone will do"
            )
        if len(names := names_of_set(records)) != num_old:
            raise DataError(
                f"{records.address}: expected a name for each of {num_old} centres in {_NAMES}, "
                f"found {len(names)}: use a map instead"
            )
    finally:
        records.close()
    return names, records.address


def _centres_at(places: Sequence[Path]) -> Centres:
    if len(places) == 1 and places[0].is_file() and not _OF_RANKS.fullmatch(places[0].name):
        return FileCentres.of(places[0])
    return heads_at(places)


def _weights_of(path: Path, model: ModelConfig) -> Weights:
    as_asked = (model.backbone,), model.embedding_size, True
    if path.suffix == ".safetensors":
        return Weights(read_tensors(path), *as_asked)
    state = read_state(path)
    # In any order, as `checkpoint export` writes them.
    return Weights(state, *as_asked) if fits(state, model) else backbone_weights(path)


def _weights_in(saved: Saved) -> Weights:
    try:
        model = saved.values["settings"]["model"]
        return Weights(saved.named("backbone."), (str(model["backbone"]),), int(model["embedding_size"]), True)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{saved.address}: not a checkpoint of this program ({error!r})") from None
