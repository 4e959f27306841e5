"""What a run is made of at a step, as a checkpoint has it: cut by class, cluster and sample, not by rank.

    backbone.*              rank 0's: weights, BatchNorm statistics; with `model.shard` rows of weights
    optimizer.backbone.*    by number of the parameter; rows, as the weights'
    head.weight             rows of class centres; head.*, what a loss has learnt on the way
    optimizer.centres.*     rows, as the centres'
    clusters.*              the cluster service's; `clustering.service.saving` says how it is cut
    random.cpu, .cuda       a row for each rank

Order of the samples, flips and drawn classes need nothing: they follow from seed and step.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from clustering.service.saving import first_and_total, kind_of
from clustering.service.service import ClusterService
from partial_fc.head import PartialFCHead
from sharding import Rows
from training.checkpoint import CheckpointError, Saved
from training.distributed import Ranks
from training.sharded import ShardedBackbone

_OTHER_RANKS = 1_000_003
"""A prime, so that seeds of steps and ranks do not fall together."""


def is_cut(name: str) -> bool:
    """Whether a tensor is always shared out over the ranks; the others are rank 0's, unless the backbone is sharded."""
    if name.startswith("clusters."):
        return kind_of(name.removeprefix("clusters.")) in ("class", "cluster", "sample")
    return name == "head.weight" or name.startswith("optimizer.centres.")


class RunState:
    """Collects and restores the state of this rank. No method runs a collective."""

    def __init__(
        self,
        *,
        backbone: nn.Module | ShardedBackbone,
        head: PartialFCHead,
        optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
        service: ClusterService | None,
        ranks: Ranks,
        seed: int,
    ) -> None:
        self._backbone, self._head, self._service = backbone, head, service
        self._of_backbone, self._of_centres = optimizers
        self._ranks, self._seed = ranks, seed
        K = head.config.subcentres
        self._centres = (head.shard.start * K, head.shard.stop * K, head.num_classes * K)

    def collect(self) -> tuple[dict[str, Rows | Tensor], dict[str, Any]]:
        """Tensors, the run's own, and what is none, as JSON has it. On the GPU nothing is waited for."""
        first, _, total = self._centres
        # The centres' optimizer first: it may bring them up to date.
        centres, values = _of_optimizer(self._of_centres)
        tensors: dict[str, Rows | Tensor] = {
            f"optimizer.centres.{name}": Rows(tensor, first, total) for name, tensor in centres.items()
        }
        tensors |= self._collect_backbone()
        tensors |= {f"head.{name}": t for name, t in self._head.state_dict().items() if isinstance(t, Tensor)}
        tensors["head.weight"] = Rows(self._head.weight, first, total)
        saved = {"centres": values, "clusters": None}
        if self._service is not None:
            found: dict[str, Tensor] = {}
            saved["clusters"] = _parted(self._service.state_dict(), "", found)
            for name, tensor in found.items():
                kind = kind_of(name)
                cut = Rows(tensor, *first_and_total(self._service, kind))
                tensors[f"clusters.{name}"] = tensor if kind == "whole" else cut
        rank, world_size = self._ranks.rank, self._ranks.world_size
        tensors["random.cpu"] = Rows(torch.get_rng_state()[None], rank, world_size)
        if self._ranks.device.type == "cuda":
            tensors["random.cuda"] = Rows(torch.cuda.get_rng_state(self._ranks.device)[None], rank, world_size)
        return tensors, json.loads(json.dumps(saved))

    def restore(self, saved: Saved) -> None:
        """Become what was saved, by any number of ranks. Raises DamagedError, CheckpointError."""
        state = saved.values["state"]
        try:
            self._restore_centres(saved, state["centres"])
            self._restore_backbone(saved)
            if self._service is not None:
                self._service.load_state_dict(self._clusters(saved, state["clusters"]))
        except (KeyError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            words = str(error).splitlines()[0]
            raise CheckpointError(
                f"{saved.address}: was written by another version of this program ({words}): choose another "
                "train.output, or start over with --set train.resume=false"
            ) from None
        self._restore_random(saved)

    def _collect_backbone(self) -> dict[str, Rows | Tensor]:
        moments, _ = _of_optimizer(self._of_backbone)
        if not isinstance(self._backbone, ShardedBackbone):
            whole = {f"backbone.{name}": tensor for name, tensor in self._backbone.state_dict().items()}
            return {**whole, **{f"optimizer.backbone.{name}": tensor for name, tensor in moments.items()}}
        found: dict[str, Rows | Tensor] = {
            f"backbone.{name}": tensor for name, tensor in self._backbone.uncut().items()
        }
        rows = list(self._backbone.rows.values())
        found |= {f"backbone.{name}": own for name, own in self._backbone.rows.items()}
        for name, tensor in moments.items():
            own = rows[int(name.partition(".")[0])]
            found[f"optimizer.backbone.{name}"] = Rows(tensor, own.start, own.total) if tensor.dim() else tensor
        if self._backbone.writes:
            return found
        return {name: item for name, item in found.items() if not isinstance(item, Rows)}

    def _restore_backbone(self, saved: Saved) -> None:
        weights, moments = "backbone.", "optimizer.backbone."
        if not isinstance(self._backbone, ShardedBackbone):
            self._backbone.load_state_dict(saved.named(weights))
            _load(self._of_backbone, _by_number(saved.named(moments)))
            return
        here: dict[str, Rows | Tensor] = {**self._backbone.uncut(), **self._backbone.rows}
        if set(here) != {name.removeprefix(weights) for name in saved.names if name.startswith(weights)}:
            raise RuntimeError("names of the backbone's weights differ")
        for name, item in here.items():
            _read_into(item, saved, weights + name)
        rows = list(self._backbone.rows.values())
        found: dict[str, Tensor] = {}
        for name in (name.removeprefix(moments) for name in saved.names if name.startswith(moments)):
            own = rows[int(name.partition(".")[0])]
            cut = (own.start, own.start + len(own.tensor)) if saved.shape(moments + name) else ()
            found[name] = saved.read(moments + name, *cut)
        _load(self._of_backbone, _by_number(found))

    def _restore_centres(self, saved: Saved, scalars: dict[str, Any]) -> None:
        self._restore_head(saved)
        start, stop, _ = self._centres
        prefix = "optimizer.centres."
        moments = {
            name.removeprefix(prefix): saved.read(name, start, stop) for name in saved.names if name.startswith(prefix)
        }
        _load(self._of_centres, _by_number(moments, scalars))

    def _restore_head(self, saved: Saved) -> None:
        """Its copy of the centres is gone when their momentum comes: each may fill half of the memory."""
        start, stop, _ = self._centres
        head: dict[str, Any] = {**saved.named("head.", leave="head.weight")}
        head |= {"weight": saved.read("head.weight", start, stop), "_extra_state": self._head.get_extra_state()}
        self._head.load_state_dict(head)

    def _clusters(self, saved: Saved, values: Any) -> dict[str, Any]:
        assert self._service is not None
        state: dict[str, Any] = json.loads(json.dumps(values))  # it is filled below
        for name in saved.names:
            if not name.startswith("clusters."):
                continue
            *path, last = name.split(".")[1:]
            kind = kind_of(".".join([*path, last]))
            place = state
            for step in path:
                place = place[step]
            if kind in ("whole", "rank"):
                place[last] = saved.read(name)
            else:
                first, _ = first_and_total(self._service, kind)
                place[last] = saved.read(name, first, first + self._size(kind))
        return state

    def _size(self, kind: str) -> int:
        assert self._service is not None
        sizes = {"class": self._service.classes.size, "cluster": self._service.clusters.size}
        return sizes.get(kind, self._service.bank.size)

    def _restore_random(self, saved: Saved) -> None:
        rank, step = self._ranks.rank, saved.manifest.step
        if rank >= saved.shape("random.cpu")[0]:  # a rank that was not there
            torch.manual_seed(self._seed + 1 + rank + _OTHER_RANKS * step)
            return
        torch.set_rng_state(saved.read("random.cpu", rank, rank + 1)[0])
        if self._ranks.device.type == "cuda" and "random.cuda" in saved.names:  # else it was written on CPUs
            torch.cuda.set_rng_state(saved.read("random.cuda", rank, rank + 1)[0], self._ranks.device)


@torch.no_grad()
def _read_into(item: Rows | Tensor, saved: Saved, name: str) -> None:
    """Raises RuntimeError where it is of another shape."""
    if (shape := saved.shape(name)) != tuple(item.shape):
        raise RuntimeError(f"{name} is of shape {shape}")
    if isinstance(item, Rows):
        item.tensor.copy_(saved.read(name, item.start, item.start + len(item.tensor)))
    else:
        item.copy_(saved.read(name))


def _of_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State by number of the parameter and name: tensors, and the rest. Settings are not state."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for number, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            (tensors if isinstance(value, Tensor) else values)[f"{number}.{name}"] = value
    return tensors, values


def _by_number(tensors: dict[str, Tensor], values: dict[str, Any] | None = None) -> dict[int, dict[str, Any]]:
    states: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **(values or {})}.items():
        number, _, key = name.partition(".")
        states.setdefault(int(number), {})[key] = value
    return states


def _load(optimizer: torch.optim.Optimizer, states: dict[int, dict[str, Any]]) -> None:
    """Raises RuntimeError where the states are not of these parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, state in states.items():
        for value in state.values():
            if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] != parameters[number].shape[0]:
                raise RuntimeError(f"optimizer state of parameter {number} is of another shape")
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    for p, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                # As the parameter lies in memory (channels last), or every step would go across it.
                state[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)


def _parted(state: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The same without its tensors, which go to `tensors` by their dotted name."""
    if not isinstance(state, dict):
        return state
    values = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            tensors[path + name] = value
        else:
            values[name] = _parted(value, f"{path}{name}.", tensors)
    return values
