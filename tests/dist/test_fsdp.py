"""A sharded backbone trains as one that every rank has whole: the same losses, norms and weights, to rounding."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from backbones.small import SmallNet
from configs.schema import ConfigError, ModelConfig, RunConfig
from tests.dist.fsdp_cases import Blocks, Run, batches, network
from tests.ranks import RankPool
from training.building import weights_of, whole
from training.sharded_units import shard_ranks, units_of
from training.traffic import step_traffic
from training.verify import share_statistics

STEPS = 3
ALL: dict[str, Any] = {"shard": "all"}
HOSTS: dict[str, Any] = {"shard": "host", "host_ranks": 2}
"""Of two ranks each."""


class Trained(NamedTuple):
    told: list[list[float]]
    weights: dict[str, Tensor]
    centres: Tensor
    held: int
    """Numbers of the backbone's weights that this rank keeps."""


def _train(group: dist.ProcessGroup, settings: dict[str, Any]) -> Trained:
    run = Run(group, **settings)
    told = run.steps(0, STEPS)
    held = sum(p.numel() for p in run.backbone.parameters())
    return Trained(told, run.weights(), run.head.weight.detach().clone(), held)


def _both(group: dist.ProcessGroup, whole: dict[str, Any], cut: dict[str, Any]) -> list[Trained]:
    return [_train(group, settings) for settings in (whole, cut)]


def _assert_equal(
    cut: Trained, whole: Trained, *, statistics: bool = True, rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    """statistics: BatchNorm's as well, which are rank 0's; those of others are nowhere used."""
    assert np.allclose(cut.told, whole.told, rtol=rtol, atol=atol)
    assert set(cut.weights) == set(whole.weights)
    for name, tensor in whole.weights.items():
        if "running" in name and not statistics:
            continue
        assert torch.allclose(cut.weights[name].float(), tensor.float(), rtol=rtol, atol=atol), name
    assert torch.allclose(cut.centres, whole.centres, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("world_size", "settings", "net", "more"),
    [
        (2, ALL, "blocks", {"optimizer": "adamw", "accumulation": 2}),
        (4, ALL, "blocks", {"optimizer": "adamw", "accumulation": 2}),
        (4, HOSTS, "blocks", {"optimizer": "adamw", "accumulation": 2}),
        (2, ALL, "small", {}),
        (4, ALL, "small", {}),
        (4, HOSTS, "small", {}),
        (2, ALL, "vit", {}),
        (4, HOSTS, "vit", {"precision": "bf16", "recompute": 1.0}),
        (2, ALL, "blocks", {"precision": "fp16"}),
    ],
)
def test_a_sharded_backbone_trains_as_a_whole_one(
    ranks: RankPool, world_size: int, settings: dict[str, Any], net: str, more: dict[str, Any]
) -> None:
    """Rows are not shared out evenly; gradients are clipped; ranks draw different masks and depths."""
    whole = {"net": net, **more}
    parts = ranks.run(world_size, _both, whole, {**whole, **settings})
    loose: dict[str, float] = {}
    if net != "blocks":  # BatchNorm of four images makes much of little
        loose = {"rtol": 5e-3, "atol": 1e-4}
    if "precision" in more:
        loose = {"rtol": 0.02, "atol": 2e-4}
    for rank, (one, cut) in enumerate(parts):
        _assert_equal(cut, one, statistics=rank == 0, **loose)
        for name, tensor in parts[0][1].weights.items():
            if "running" not in name:
                assert torch.equal(cut.weights[name], tensor), "all ranks hold the same bits"
    copies = world_size // settings.get("host_ranks", world_size)
    assert sum(cut.held for _, cut in parts) == copies * parts[0][0].held
    assert max(cut.held for _, cut in parts) < parts[0][0].held


def test_any_number_of_ranks_trains_as_one(ranks: RankPool) -> None:
    (one,) = ranks.run(1, _train, {})
    for world_size in (2, 4):
        parts = ranks.run(world_size, _train, ALL)
        for part in parts:
            _assert_equal(part._replace(centres=torch.cat([p.centres for p in parts])), one)


def _recomputed(group: dist.ProcessGroup) -> list[Trained]:
    return [_train(group, {"net": "vit", "recompute": share, **ALL}) for share in (0.0, 0.5)]


def test_with_recompute_it_trains_the_same_bits(ranks: RankPool) -> None:
    for plain, again in ranks.run(2, _recomputed):
        assert plain.told == again.told
        assert all(torch.equal(again.weights[name], tensor) for name, tensor in plain.weights.items())


def _bits(run: Run) -> dict[str, Tensor]:
    found, _ = run.state.collect()
    tensors = {name: getattr(item, "tensor", item) for name, item in found.items() if "random" not in name}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _skipped(group: dist.ProcessGroup, settings: dict[str, Any], bad_rank: int) -> dict[str, Any]:
    """A step whose gradient is nan on one rank alone, after a good one; and the step after it."""
    run = Run(group, net="small", **settings)
    run.steps(0, 1)
    before = _bits(run)
    hook = None
    if run.ranks.rank == bad_rank:

        def spoil(_module: Any, _inputs: Any, x_BCHW: Tensor) -> None:
            x_BCHW.register_hook(lambda grad: grad * torch.nan)

        hook = run.whole.stem.register_forward_hook(spoil)  # type: ignore[union-attr, operator]
    parts = batches(run.ranks.rank, run.ranks.world_size, 1, 1)
    values = run.train_step(parts, step=1, lr=0.05)
    if hook is not None:
        hook.remove()
    changed = [name for name, tensor in _bits(run).items() if not torch.equal(tensor, before[name])]
    names = [name for name, p in run.whole.named_parameters() if p.requires_grad]
    bad = [name for name, norm in zip(names, values.norms_P.isfinite().tolist(), strict=True) if not norm]
    ((loss, *_),) = run.steps(2, 3)
    return {
        "skipped": values.skipped.item(),
        "total": values.total.item(),
        "changed": changed,
        "bad": bad,
        "loss": loss,
    }


@pytest.mark.parametrize(("world_size", "settings"), [(2, ALL), (4, HOSTS)])
def test_a_gradient_that_is_nan_on_one_rank_moves_nothing_on_any(
    ranks: RankPool, world_size: int, settings: dict[str, Any]
) -> None:
    """The stem's weights are rows of which a rank without a nan of its own has some."""
    parts = ranks.run(world_size, _skipped, settings, world_size - 1)
    for part in parts:
        assert part["skipped"] == 1
        assert np.isfinite(part["total"])
        assert part["changed"] == []
        assert part["bad"] == ["stem.weight"]
        assert part["loss"] == parts[0]["loss"]
        assert np.isfinite(part["loss"])


def _evaluated(group: dist.ProcessGroup) -> dict[str, Any]:
    """Embeddings of rank + 1 batches amid a training, and the training beside it that makes none."""
    run, plain = (Run(group, net="vit", **ALL) for _ in range(2))
    states = [torch.get_rng_state()] * 2

    def steps(of: int, first: int, last: int) -> list[list[float]]:
        torch.set_rng_state(states[of])
        told = (run, plain)[of].steps(first, last)
        states[of] = torch.get_rng_state()
        return told

    told = [steps(of, 0, 2) for of in (0, 1)]
    images = torch.randn(3, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    with whole(run.backbone) as backbone, torch.no_grad():
        share_statistics(backbone, group)
        backbone.eval()
        found = [backbone(images) for _ in range(run.ranks.rank + 1)][-1]
        backbone.train()
    weights = weights_of(run.backbone)
    twin = network("vit")
    if run.ranks.is_main:
        twin.load_state_dict(weights)
    else:
        assert weights == {}
    told = [before + steps(of, 2, 4) for of, before in enumerate(told)]
    with torch.no_grad():
        return {
            "told": told,
            "found": found,
            "twin": twin.eval()(images),
            "held": run.weights(),
            "plain": plain.weights(),
        }


def test_ranks_may_embed_unequal_numbers_of_batches_in_between(ranks: RankPool) -> None:
    first, second = ranks.run(2, _evaluated)
    assert torch.allclose(first["found"], second["found"], rtol=1e-5, atol=1e-6)
    assert torch.allclose(first["found"], first["twin"], rtol=1e-5, atol=1e-6), "weights() are those it embeds with"
    for part in (first, second):
        assert part["told"][0] == part["told"][1]
        for name, tensor in part["plain"].items():
            if part is first or "running" not in name:
                assert torch.equal(part["held"][name], tensor), name


def test_units_are_blocks_and_large_layers_and_what_is_left() -> None:
    units = units_of(network("vit"))
    assert [type(unit.module).__name__ for unit in units] == ["_Block", "_Block", "Linear", "VisionTransformer"]
    assert [unit.kept for unit in units] == [False, False, True, True]
    for net in (network("vit"), network("blocks"), SmallNet(embedding_size=8)):
        taken = [p for unit in units_of(net) for p in unit.parameters]
        assert len(taken) == len(set(taken)) == len(list(net.parameters()))


def _refused(group: dist.ProcessGroup) -> tuple[str, str, str]:
    """Hosts with unequal numbers of ranks, a backbone that reads past a block, and one with a number for a weight."""
    with pytest.raises(ConfigError) as uneven:
        Run(group, shard="host", host_ranks=3 if dist.get_rank(group) else 1)

    def past(self: Blocks, images_B3HW: Tensor) -> Tensor:
        return self.first(images_B3HW) * self.blocks[0].bias.sum()  # type: ignore[union-attr, operator]

    body, Blocks.body = Blocks.body, past  # type: ignore[method-assign]
    try:
        with pytest.raises(ConfigError) as astray:
            Run(group, **ALL)
    finally:
        Blocks.body = body  # type: ignore[method-assign]
    made = Blocks.__init__

    def with_a_number(self: Blocks, *args: Any, **more: Any) -> None:
        made(self, *args, **more)
        self.gain = nn.Parameter(torch.tensor(1.0))

    Blocks.__init__ = with_a_number  # type: ignore[method-assign]
    try:
        with pytest.raises(ConfigError) as scalar:
            Run(group, **ALL)
        with pytest.raises(ConfigError, match=r"^model\.shard: expected a backbone whose weights have rows"):
            step_traffic(RunConfig(model=ModelConfig(shard="all")), network("blocks"), ranks=2)
    finally:
        Blocks.__init__ = made  # type: ignore[method-assign]
    return str(uneven.value), str(astray.value), str(scalar.value)


def test_what_cannot_be_cut_is_refused_in_a_line(ranks: RankPool) -> None:
    for uneven, astray, scalar in ranks.run(2, _refused):
        assert scalar.startswith("model.shard: expected a backbone whose blocks can be gathered one by one, got ")
        assert uneven.startswith("model.shard=host: expected as many ranks on every host")
        assert astray.startswith("model.shard: expected a backbone whose blocks can be gathered one by one, got ")
        assert "\n" not in astray
    with pytest.raises(ConfigError, match=r"model\.compile: expected false with model\.shard"):
        ModelConfig(compile=True, shard="all")
    with pytest.raises(ConfigError, match=r"model\.shard: expected none, host or all, got 'some'"):
        ModelConfig(shard="some")  # type: ignore[arg-type]
    assert [shard_ranks(*case) for case in (("none", 8, 4), ("all", 8, 4), ("host", 8, 4), ("host", 8, 0))] == [
        1, 8, 4, 8
    ]  # fmt: skip


def _kind(group: dist.ProcessGroup) -> bool:
    return isinstance(Run(group, **ALL).backbone, DistributedDataParallel)


def test_on_one_rank_there_is_nothing_to_cut(ranks: RankPool) -> None:
    assert ranks.run(1, _kind) == [True]
