"""Spikes among simulated losses, buffers that come back, what optimizers leave alone, the loss scale, what is said."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.guard import GuardConfig
from configs.head import HeadConfig
from configs.schema import ConfigError, OptimConfig
from partial_fc.head import PartialFCHead
from partial_fc.optim import CentreAdamW, CentreSGD
from training.distributed import Ranks
from training.errors import TrainingError
from training.guard import Guard, RollBack
from training.loss_scale import LossScale
from training.optim import build_optimizers
from training.spikes import Spike, SpikeDetector
from training.step import StepValues
from training.undo import Undo

Losses = npt.NDArray[np.float64]
STEPS = 4000
NOISE: dict[str, Callable[[np.random.Generator], Losses]] = {
    "none": lambda rng: np.zeros(STEPS),
    "normal": lambda rng: rng.normal(size=STEPS),
    "both tails": lambda rng: rng.standard_t(3, STEPS),
    "exponential tails": lambda rng: rng.laplace(size=STEPS),
    "upper tail": lambda rng: rng.lognormal(0, 1, STEPS) - 1.65,
    "wandering": lambda rng: np.convolve(rng.normal(size=STEPS + 19), np.ones(20) / 20**0.5, "valid"),
}


def _losses(kind: str, seed: int) -> Losses:
    """A loss that falls, by more or less noise in proportion."""
    rng = np.random.default_rng(seed)
    falls = rng.uniform(20, 40) * np.exp(-np.arange(STEPS) / rng.uniform(200, 3000)) + rng.uniform(0.5, 5)
    return falls * (1 + rng.uniform(0.01, 0.2) * NOISE[kind](rng))


def _found(losses: Losses, detector: SpikeDetector | None = None) -> list[tuple[int, Spike]]:
    detector = detector or SpikeDetector(GuardConfig().spike_deviations)
    steps = ((step, detector.add(float(loss))) for step, loss in enumerate(losses))
    return [(step, spike) for step, spike in steps if spike is not None]


@pytest.mark.parametrize("kind", NOISE)
def test_a_loss_that_falls_with_noise_has_no_spikes(kind: str) -> None:
    assert sum(len(_found(_losses(kind, seed))) for seed in range(15)) == 0


@pytest.mark.parametrize("kind", NOISE)
def test_planted_spikes_are_found_once_each(kind: str) -> None:
    """Losses that leap to many times of what was usual, and come back slowly."""
    for seed in range(10):
        losses = _losses(kind, seed)
        begins = [700, 1500, 3000]
        for begin in begins:
            usual = losses[begin - 200 : begin]
            height = 40 * max(0.02 * abs(np.median(usual)), float(np.std(usual)))
            losses[begin : begin + 40] += height * np.exp(-np.arange(40) / 10)
        found = _found(losses)
        assert [step - spike.began for step, spike in found] == begins
        assert all(step - begin <= 3 for (step, _), begin in zip(found, begins, strict=True))


def test_one_hard_batch_is_no_spike_and_a_new_level_is_one_spike_that_ends() -> None:
    losses = 5 + 0.1 * np.random.default_rng(0).normal(size=1000)
    losses[300] += 50
    losses[500:] += 10
    losses[900:910] += 30
    assert [step - spike.began for step, spike in _found(losses)] == [500, 900]
    assert _found(losses, SpikeDetector(0)) == []


def test_a_detector_goes_on_where_it_was_saved() -> None:
    losses = _losses("both tails", 1)
    losses[1000:1030] *= 30
    for cut in (10, 300, 1001, 1002, 1010, 2000):
        first, second = SpikeDetector(8), SpikeDetector(8)
        begun = _found(losses[:cut], first)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        rest = [(step + cut, spike) for step, spike in _found(losses[cut:], second)]
        assert begun + rest == _found(losses)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(4), nn.BatchNorm1d(3)
        self.linear = nn.Linear(4, 3)

    def forward(self, x_B4: Tensor) -> Tensor:
        out: Tensor = self.second(self.linear(self.first(x_B4)))
        return out


def test_buffers_come_back_with_their_bits_and_are_what_they_were_otherwise() -> None:
    torch.manual_seed(0)
    ours, plain = Net(), Net()
    plain.load_state_dict(ours.state_dict())
    undo = Undo([ours])
    x_B4 = torch.randn(8, 4)
    for net in (ours, plain):
        net(x_B4).square().sum().backward()
    assert str(ours.state_dict()) == str(plain.state_dict())
    before = copy.deepcopy(ours.state_dict())
    undo.save()
    ours(torch.full((8, 4), torch.nan)).sum().backward()
    assert not ours.first.running_mean.isfinite().all()  # type: ignore[union-attr]
    undo.restore(torch.tensor(1.0))
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    undo.save()
    ours(x_B4)
    undo.restore(torch.tensor(0.0))
    plain(x_B4)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in ours.state_dict().items())
    fresh = Net().state_dict()
    ours.load_state_dict(fresh)
    undo.save()
    ours(x_B4)
    undo.restore(torch.tensor(1.0))
    assert all(torch.equal(value, fresh[name]) for name, value in ours.state_dict().items()), "loaded in place"


MAKE: dict[str, Callable[[PartialFCHead], torch.optim.Optimizer]] = {
    "sgd": lambda head: CentreSGD(head.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01),
    "sgd, .grad": lambda head: CentreSGD(head.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01, fused=False),
    "sgd, catching up": lambda head: CentreSGD(
        head.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01, catch_up=True
    ),
    "adamw": lambda head: CentreAdamW(head.parameters(), lr=0.02, betas=(0.9, 0.99), weight_decay=0.05),
}


def _step(head: PartialFCHead, optimizer: Any, step: int, skip: float, spoilt: bool = False) -> None:
    x_BD = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
    x_BD[3] = torch.nan if spoilt else 1.0
    labels_B = torch.arange(16) * 11 % 203
    optimizer.zero_grad()
    head(head.gather(x_BD.requires_grad_(), labels_B, labels_B), step=step).backward()
    optimizer.found_inf = torch.tensor(skip)
    optimizer.step()


def _bits(head: PartialFCHead, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = next(iter(optimizer.state_dict()["state"].values()))
    return {"weight": head.weight.detach().clone()} | {
        name: value.clone() for name, value in state.items() if isinstance(value, Tensor)
    }


@pytest.mark.parametrize("rate", [1.0, 0.2])
@pytest.mark.parametrize("make", MAKE)
def test_a_step_that_is_skipped_leaves_centres_and_their_state_alone(make: str, rate: float) -> None:
    head = PartialFCHead(num_classes=203, embedding_size=12, config=HeadConfig(sample_rate=rate), group=None, seed=0)
    optimizer = MAKE[make](head)
    for step in range(3):
        _step(head, optimizer, step, 0.0)
    before = _bits(head, optimizer)
    _step(head, optimizer, 3, 1.0, spoilt=True)
    after = _bits(head, optimizer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    _step(head, optimizer, 4, 0.0)
    assert not torch.equal(head.weight, after["weight"])
    assert head.weight.isfinite().all()


def test_rows_that_were_not_drawn_have_missed_no_step_that_was_skipped() -> None:
    """Centres end where they do when that step never was."""
    ends = []
    for skipped in (True, False):
        config = HeadConfig(sample_rate=0.1, missed_steps="catch_up")
        head = PartialFCHead(num_classes=203, embedding_size=12, config=config, group=None, seed=0)
        optimizer = MAKE["sgd, catching up"](head)
        for step in (0, 1, 2, 3, 4):
            if step != 2 or skipped:
                _step(head, optimizer, step, float(step == 2), spoilt=step == 2)
        ends.append(_bits(head, optimizer))
    assert all(torch.allclose(ends[0][name], ends[1][name], rtol=1e-4, atol=1e-6) for name in ends[0])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_checkpoint_of_another_device_does_not_decide_how_the_optimizer_works(name: Any) -> None:
    def pair() -> torch.optim.Optimizer:
        weight, centres = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3, 2))
        weight.grad = torch.ones(2)
        return build_optimizers([weight], [centres], OptimConfig(name=name), HeadConfig(), seed=0)[0]

    one, other = pair(), pair()
    one.step()
    state = one.state_dict()
    state["param_groups"][0]["fused"] = True
    other.load_state_dict(state)
    assert other.param_groups[0]["fused"] is None
    assert other.state_dict()["state"].keys() == state["state"].keys()


def test_the_loss_scale_halves_grows_and_has_an_end() -> None:
    scale = LossScale(torch.device("cpu"))
    gradients = [torch.full((3,), 2.0**16)]
    scale.unscale_(gradients)
    assert gradients[0].tolist() == [1.0] * 3
    faults = [scale.update(torch.tensor(1.0)).item() for _ in range(20)]
    assert faults == [0.0] * 16 + [1.0] * 4, "at a scale of 1, half precision is not what is wrong"
    assert scale.factor == 1
    for _ in range(2000):
        assert scale.update(torch.tensor(0.0)) == 0
    assert scale.factor == 2
    other = LossScale(torch.device("cpu"))
    other.load_state_dict(json.loads(json.dumps(scale.state_dict())))
    assert other.factor == 2


def _values(total: float = 1.0, *, skipped: bool = False, fault: bool | None = None, **changes: Any) -> StepValues:
    zero = torch.zeros(())
    return StepValues(
        **{
            "total": torch.tensor(total),
            **dict.fromkeys(("margin", "contrastive", "alignment", "gradient_norm", "unusable_rows"), zero),
            "skipped": torch.tensor(float(skipped)),
            "fault": torch.tensor(float(skipped if fault is None else fault)),
            "norms_P": torch.ones(3),
            "sample_ids": (torch.arange(10, 18),),
            "row_sums": (torch.ones(8),),
            **changes,
        }
    )


def _guard(lines: list[str], **settings: Any) -> Guard:
    ranks = Ranks(rank=0, world_size=1, device=torch.device("cpu"), group=None, store=dist.HashStore())  # type: ignore[arg-type]
    return Guard(GuardConfig(**settings), parameters=["a", "b", "c"], ranks=ranks, say=lines.append)


def test_the_first_gradient_that_is_not_finite_is_named_and_the_rows() -> None:
    lines: list[str] = []
    guard = _guard(lines)
    guard.take(6, 0.125, _values(skipped=True, norms_P=torch.tensor([torch.nan, torch.inf, 1.0])))
    guard.take(7, 0.1, _values(skipped=True, norms_P=torch.ones(3)))
    rows = torch.ones(8)
    rows[2:] = torch.nan
    micro = (torch.arange(10, 18), torch.arange(20, 28))
    guard.take(8, 0.1, _values(torch.nan, skipped=True, sample_ids=micro, row_sums=(rows, rows)))
    assert lines == [
        "step 7: skipped, the loss is finite, the gradient of b is not, the first in backward of 2 (learning rate "
        "0.125); first samples of each rank: 10, 11",
        "step 8: skipped, the loss is finite, the gradient's norm is beyond float32 (learning rate 0.1); first samples "
        "of each rank: 10, 11",
        "step 9: skipped, the loss is not finite (learning rate 0.1); embeddings that are not finite: of samples 12, "
        "13, 14, 15, 16, 17, 22, 23 and 4 more",
    ]
    assert guard.statistics() == {"guard/skipped_steps": 3, "guard/loss_spikes": 0}


def test_skips_in_a_row_roll_back_with_a_lower_rate_until_it_is_of_no_use() -> None:
    lines: list[str] = []
    guard = _guard(lines, skips_to_roll_back=3, max_rollbacks=2, rollback_lr=0.25)
    bad = _values(torch.nan, skipped=True)
    for step in range(2):
        guard.take(step, 0.1, bad)
    guard.take(2, 0.1, _values())
    for step in (3, 4):
        guard.take(step, 0.1, bad)
    with pytest.raises(RollBack, match="3 steps in a row, up to step 6, were not finite"):
        guard.take(5, 0.1, bad)
    with pytest.raises(TrainingError, match=r"no checkpoint of this run to go back to: lower optim\.lr"):
        guard.rolled_back("why", can=False)
    for times in (1, 2):
        guard.rolled_back("why", can=True)
        assert guard.lr_factor == 0.25**times
        saved = json.loads(json.dumps(guard.state_dict()))
        guard = _guard(lines, skips_to_roll_back=3, max_rollbacks=2, rollback_lr=0.25)
        guard.load_state_dict(saved)
    assert guard.skipped_steps == 5
    with pytest.raises(TrainingError, match=r"why, after guard.max_rollbacks = 2 returns .* rate being 0.0625 of"):
        guard.rolled_back("why", can=True)


def test_overflows_of_half_precision_are_no_faults() -> None:
    lines: list[str] = []
    guard = _guard(lines, skips_to_roll_back=2)
    for step in range(5):
        guard.take(step, 0.1, _values(skipped=True, fault=False))
    assert guard.skipped_steps == 0
    assert lines == []


def test_a_spike_is_told_of_once_with_the_step_in_which_it_began() -> None:
    lines: list[str] = []
    guard = _guard(lines)
    for step in range(300):
        high = 200 <= step < 220
        ids = torch.arange(8) + 100 * step
        guard.take(step, 0.1, _values(50.0 if high else 5 + step % 7 / 10, sample_ids=(ids,)))
    assert lines == [
        "step 201: the loss leapt to 50, where 5.3 with a deviation of 0.3 was usual (learning rate 0.1); first "
        "samples of each rank: 20000, 20001"
    ]
    assert guard.loss_spikes == 1


def test_weights_that_are_not_finite_are_never_saved() -> None:
    guard = _guard([])
    backbone = Net()
    head = PartialFCHead(num_classes=5, embedding_size=3, config=HeadConfig(centre_dtype="bf16"), group=None, seed=0)
    guard.check_weights(backbone, head)
    with torch.no_grad():
        head.weight[2, 1] = torch.inf
    with pytest.raises(RollBack, match="class centres are not finite"):
        guard.check_weights(backbone, head)
    backbone.second.running_var[1] = torch.nan  # type: ignore[index]
    with pytest.raises(RollBack, match="weights of the backbone are not finite"):
        guard.check_weights(backbone, head)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("skips_to_roll_back", 0), ("rollback_lr", 0.0), ("rollback_lr", 1.5), ("max_rollbacks", -1),
     ("spike_deviations", -1.0)],
)  # fmt: skip
def test_settings_out_of_range_are_refused(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"guard.{setting}: expected"):
        GuardConfig(**{setting: value})
