"""Losses that depend on the sample or on the state of training, end to end on 1, 2 and 4 ranks: gradients in raw
embeddings, running statistics, collectives, saving and loading.

Legend: N rows of the global batch, B of one rank, D embedding size, C classes, T steps.
"""

from __future__ import annotations

import dataclasses
import functools
import io
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from configs.schema import HeadConfig
from partial_fc.collectives import gather_batch
from partial_fc.head import PartialFCHead
from tests.dist.head_cases import SCALE, Case, dense_loss, doubled, problem
from tests.ranks import WORLD_SIZES, RankPool

BOUND = 4e-6
"""Relative. Twice that of the head alone: the embeddings are made unit ones in float32 as well."""

CASE = Case(rows=124, dim=123, classes=507)


def _head(group: dist.ProcessGroup, config: HeadConfig) -> PartialFCHead:
    head = PartialFCHead(
        num_classes=CASE.classes, embedding_size=CASE.dim, config=config, group=group, seed=1, sparse_gradient=False
    )
    head.weight.data.copy_(problem(CASE)[2][head.shard.start : head.shard.stop])
    return head


@functools.cache
def _raw_ND(step: int) -> Tensor:
    """Embeddings as a backbone gives them; float32. Another length and another place each step."""
    x_ND, length_N, *_ = problem(CASE)
    generator = torch.Generator().manual_seed(step)
    moved_ND = x_ND + 0.02 * step * torch.randn(x_ND.shape, generator=generator)
    return moved_ND * length_N.roll(step)[:, None] * (1 + 0.1 * step)


def _step(
    head: PartialFCHead, step: int = 0, labels_N: Tensor | None = None, **margins: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and this rank's gradients in raw embeddings and centres."""
    B = CASE.rows // dist.get_world_size(head.group)
    mine = slice(dist.get_rank(head.group) * B, (dist.get_rank(head.group) + 1) * B)
    raw_BD = _raw_ND(step)[mine].clone().requires_grad_()
    labels_B = (problem(CASE)[3] if labels_N is None else labels_N)[mine]
    batch = head.gather(raw_BD, labels_B, torch.zeros_like(labels_B))
    loss: Tensor = head(batch, step=step, **margins)
    head.weight.grad = None
    loss.backward()
    assert raw_BD.grad is not None
    assert head.weight.grad is not None
    return loss.detach(), raw_BD.grad, head.weight.grad


def _end_to_end(group: dist.ProcessGroup, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    head = _head(group, case.config)
    margins_C = problem(CASE)[4][head.shard.start : head.shard.stop]
    return _step(head, step=3, class_margins_C=margins_C)


@functools.lru_cache(maxsize=1)
def _truth(case: Case) -> tuple[float, Tensor, Tensor]:
    raw_ND, w_CD, labels_N, margins_C = doubled((_raw_ND(3), *problem(case)[2:]))
    loss = dense_loss(case, F.normalize(raw_ND), raw_ND.norm(dim=1), w_CD, labels_N, margins_C)
    return loss.item(), *torch.autograd.grad(loss, (raw_ND, w_CD))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("loss", ["magface", "adaface", "curricularface", "arcface"])
def test_gradient_in_raw_embeddings(ranks: RankPool, loss: str, rate: float, world_size: int) -> None:
    """Of MagFace it has a part along the embedding: the length's, through the margin and the regulariser."""
    case = dataclasses.replace(CASE, loss=loss, rate=rate)
    parts = ranks.run(world_size, _end_to_end, case)
    truth, true_ND, true_CD = _truth(case)
    found_ND, found_CD = (torch.cat([part[i] for part in parts]) for i in (1, 2))
    assert all(part[0].item() == pytest.approx(truth, rel=BOUND) for part in parts)
    for found, true in ((found_ND, true_ND), (found_CD, true_CD)):
        assert (found - true).norm() <= BOUND * true.norm()
    direction_ND = F.normalize(_raw_ND(3).double())
    along_N, true_along_N = ((g * direction_ND).sum(1) for g in (found_ND, true_ND))
    if loss == "magface":
        assert (true_along_N != 0).sum() == (problem(CASE)[3] >= 0).sum()
        assert (along_N - true_along_N).norm() <= BOUND * true_along_N.norm()
    else:
        assert along_N.norm() <= BOUND * true_ND.norm()


STEPS = 4
MOMENTUM = 0.8


def _running_config(loss: str) -> HeadConfig:
    return HeadConfig(loss=loss, running_momentum=MOMENTUM, scale=SCALE)  # type: ignore[arg-type]


def _statistics(head: PartialFCHead) -> dict[str, float]:
    module = head.adaface if head.adaface is not None else head.curricular
    assert module is not None
    return {name: buffer.item() for name, buffer in module.named_buffers()}


def _train(group: dist.ProcessGroup, loss: str) -> list[dict[str, float]]:
    """The running statistics after each step; centres stay."""
    head, seen = _head(group, _running_config(loss)), []
    for step in range(STEPS):
        _step(head, step)
        seen.append(_statistics(head))
    head.eval()
    _step(head, 7)
    assert _statistics(head) == seen[-1], "not in evaluation"
    head.train()
    _step(head, 7, labels_N=torch.full((CASE.rows,), -1))
    assert _statistics(head) == seen[-1], "nor by rows without a label"
    return seen


def _plain_statistics(loss: str) -> list[dict[str, float]]:
    """By the papers' formulas, float64."""
    _, _, w_CD, labels_N, _ = problem(CASE)
    running: dict[str, float] = {"t": 0.0}
    seen = []
    for step in range(STEPS):
        raw_ND = _raw_ND(step)[labels_N >= 0].double()
        if loss == "adaface":
            length_N = raw_ND.norm(dim=1)
            now = {"mean": length_N.mean().item(), "deviation": length_N.std().item()}
            running = now if step == 0 else running
        else:
            cosine_N = (F.normalize(raw_ND) * F.normalize(w_CD.double())[labels_N[labels_N >= 0]]).sum(1)
            now = {"t": cosine_N.mean().item()}
        running = {name: MOMENTUM * running[name] + (1 - MOMENTUM) * value for name, value in now.items()}
        seen.append(running | ({"batches": step + 1.0} if loss == "adaface" else {}))
    return seen


@pytest.mark.parametrize("loss", ["adaface", "curricularface"])
def test_running_statistics_are_the_plain_ones_on_any_ranks(ranks: RankPool, loss: str) -> None:
    (alone,) = ranks.run(1, _train, loss)
    for found, plain in zip(alone, _plain_statistics(loss), strict=True):
        assert found == pytest.approx(plain, rel=1e-6)
    for world_size in (2, 4):
        for seen in ranks.run(world_size, _train, loss):
            assert seen == alone, "the same bits on all ranks, and on one"


def _saved_and_loaded(group: dist.ProcessGroup, loss: str) -> None:
    trained = _head(group, _running_config(loss))
    for step in range(2):
        _step(trained, step)
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    loaded = _head(group, _running_config(loss))
    with torch.no_grad():
        loaded.weight.zero_()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for step in (2, 3):
        for one, other in zip(_step(trained, step), _step(loaded, step), strict=True):
            assert torch.equal(one, other)
    fresh = _head(group, _running_config(loss))
    assert (_step(fresh, 3)[0] != _step(trained, 3)[0]) == (loss != "magface"), "the statistics count"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("loss", ["magface", "adaface", "curricularface"])
def test_a_saved_head_goes_on_where_it_was(ranks: RankPool, loss: str, world_size: int) -> None:
    ranks.run(world_size, _saved_and_loaded, loss)


def _reduced(group: dist.ProcessGroup, loss: str) -> list[int]:
    """Numbers in each all-reduce of a step."""
    head = _head(group, _running_config(loss))
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce:
        _step(head)
    return [call.args[0].numel() for call in reduce.call_args_list]


@pytest.mark.parametrize("loss", ["arcface", "magface", "adaface", "curricularface"])
def test_curricularface_alone_reduces_once_more(ranks: RankPool, loss: str) -> None:
    expected = [2 * CASE.rows] * (2 if loss == "curricularface" else 1)
    assert ranks.run(2, _reduced, loss) == [expected] * 2
    assert ranks.run(1, _reduced, loss) == [[]]


def _with_class_margins(group: dist.ProcessGroup, added: float) -> list[tuple[Tensor, Tensor, Tensor]]:
    """MagFace with every class's margin m0 + added; with its line of margins moved by as much; and with neither."""
    config = HeadConfig(loss="magface")
    head = _head(group, config)
    moved = _head(
        group,
        dataclasses.replace(config, margin_low=config.margin_low + added, margin_high=config.margin_high + added),
    )
    margins_C = torch.full((head.shard.size,), config.margin + added)
    return [_step(head, class_margins_C=margins_C), _step(moved), _step(head)]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("added", [0.0, 0.15, -0.2])
def test_class_margins_shift_magfaces(ranks: RankPool, added: float, world_size: int) -> None:
    for given, moved, plain in ranks.run(world_size, _with_class_margins, added):
        for one, other, without in zip(given, moved, plain, strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm()
            assert torch.equal(one, without) == (added == 0)


def _row_lengths_needed(group: dist.ProcessGroup, loss: str) -> None:
    head = _head(group, _running_config(loss))
    x_ND, _, _, labels_N, _ = problem(CASE)
    with pytest.raises(ValueError, match=r"make the batch with PartialFCHead\.gather"):
        head(gather_batch(x_ND, labels_N, labels_N, group), step=0)


@pytest.mark.parametrize("loss", ["magface", "adaface"])
def test_a_batch_without_lengths_is_refused(ranks: RankPool, loss: str) -> None:
    ranks.run(1, _row_lengths_needed, loss)
