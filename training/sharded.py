"""The backbone cut over ranks: weights, gradients and moments, by torch's FSDP2.

A rank keeps some rows of every weight. Before a block runs, forward or backward, its weights are gathered whole, and
after it they are let go; its gradient is summed over ranks and scattered, so that each rank gets that of its rows. The
optimizer sees plain tensors, this rank's rows, and knows nothing of it.

    unit (`units_of`)     gather before it runs; again before its backward, unless it is kept; reduce-scatter after that
    model.shard=host      the same among the ranks of a host; then an all-reduce of the rows' gradients over hosts

Sums, not means: as everywhere here, losses are those of the global batch. Weights and gradients travel in float32, and
autocast rounds operands as it does without this, so that both train the same. Micro-batches are scattered one by one:
to add them up first would need the whole gradient on every rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from backbones import Backbone
from configs.schema import ConfigError
from partial_fc.collectives import all_reduce_
from sharding import Rows
from training.distributed import Ranks, host_groups, pass_two_images
from training.ranks.lost import says_a_rank_is_lost
from training.sharded_units import units_of


class ShardedBackbone:
    """Takes the place of torch's DistributedDataParallel. All ranks make one and call it alike."""

    def __init__(self, backbone: Backbone, ranks: Ranks, inside: int) -> None:
        """backbone: on the CPU, or its device; moved to the ranks' unit by unit, and cut in place. inside: ranks that
        share out one copy (`sharded_units.shard_ranks`). Runs a forward and a backward pass on two black images, with
        their collectives. Raises ConfigError for a backbone that cannot be cut.
        """
        self.module = backbone
        self._saved = set(backbone.state_dict())
        self._group, self._hosts = ranks.group, ranks.world_size // inside
        mesh = _mesh(ranks, inside)
        self._units: list[tuple[FSDPModule, bool]] = []
        """Each with whether it is kept."""
        units = units_of(backbone)
        try:
            for unit in units:
                cut = fully_shard(unit.module, mesh=mesh, reshard_after_forward=not unit.kept)
                cut.set_gradient_divide_factor(1.0)
                cut.set_force_sum_reduction_for_comms(True)  # or NCCL would be given a product with that factor
                self._units.append((cut, unit.kept))
            pass_two_images(self, backbone, ranks.device)
        except Exception as error:  # a stranger's network may use weights of modules that it does not call
            if isinstance(error, torch.OutOfMemoryError) or says_a_rank_is_lost(error):
                raise
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"model.shard: expected a backbone whose blocks can be gathered one by one, got {said:.200}: use --set "
                "model.shard=none"
            ) from None
        self._own: list[nn.Parameter] = []
        self.rows: dict[str, Rows] = {}
        """This rank's rows of each parameter, by its name in the backbone; their tensors are those of `parameters`."""
        for name, whole in backbone.named_parameters():
            own = _local(whole)
            self._own.append(own)
            start = min(mesh.get_local_rank(mesh.ndim - 1) * -(-len(whole) // inside), len(whole))
            self.rows[name] = Rows(own, start, len(whole))
        self.writes = ranks.rank < inside
        """Whether these rows go into checkpoints: those of one copy do."""

    def __call__(self, images_B3HW: Tensor) -> Tensor:
        """As the backbone's. Collectives: a gather for each unit; in backward as above."""
        return self.module(images_B3HW)  # type: ignore[no-any-return]

    def parameters(self) -> Iterable[nn.Parameter]:
        """This rank's rows of each of the backbone's, in its order, as plain tensors; .grad is that of the rows."""
        return self._own

    def buffers(self) -> Iterable[Tensor]:
        """The backbone's, whole. Rank 0's count, as with `data_parallel`."""
        return self.module.buffers()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """For micro-batches that others follow: hosts add their gradients up with the last one's."""
        root, _ = self._units[-1]
        root.set_requires_all_reduce(False)
        try:
            yield
        finally:
            root.set_requires_all_reduce(True)

    def norms(self, local_P: Tensor) -> Tensor:
        """float32 norms of whole gradients, from those of this rank's rows. One all-reduce; all ranks get the same."""
        squares_P = all_reduce_(local_P.double().square(), self._group) / self._hosts
        return squares_P.sqrt().float()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[Backbone]:
        """The backbone with all its weights on every rank, for passes that not every rank makes as often, without
        gradients. One gather for each unit.
        """
        for unit, _ in self._units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield self.module
        finally:
            for unit, kept in self._units:
                unit.set_reshard_after_forward(not kept, recurse=False)
                unit.reshard()

    def uncut(self) -> dict[str, Tensor]:
        """What of the backbone's state dict every rank has whole: BatchNorm's statistics. By name."""
        return {name: buffer for name, buffer in self.module.named_buffers() if name in self._saved}

    def weights(self) -> dict[str, Tensor]:
        """The backbone's state dict, whole, in the host's memory of rank 0; others get nothing. A gather a weight."""
        found: dict[str, Tensor] = {}
        for name, tensor in self.module.state_dict().items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if dist.get_rank(self._group) == 0:
                found[name] = whole.cpu()
        return found


def _local(whole: nn.Parameter) -> nn.Parameter:
    """The rows of a cut parameter that are here, in the same memory; their gradients come to it."""
    assert isinstance(whole, DTensor)
    own = nn.Parameter(whole.to_local().detach(), requires_grad=whole.requires_grad)

    def take(cut: Tensor) -> None:
        assert isinstance(cut.grad, DTensor)
        grad = cut.grad.to_local()
        own.grad = grad if own.grad is None else own.grad.add_(grad)
        cut.grad = None

    if whole.requires_grad:
        # FSDP2 calls it with every gradient that it has scattered.
        whole.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
    return own


def _mesh(ranks: Ranks, inside: int) -> DeviceMesh:
    kind = ranks.device.type
    if inside == ranks.world_size:
        return DeviceMesh.from_group(ranks.group, kind)
    across, within = host_groups(ranks, inside)
    places = torch.tensor(dist.get_process_group_ranks(ranks.group)).view(-1, inside)
    return DeviceMesh.from_group([across, within], kind, mesh=places, mesh_dim_names=("hosts", "ranks"))
