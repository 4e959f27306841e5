"""The embedding bank: which rows of a batch it keeps, in what order, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clustering.errors import ClusterStateError
from clustering.service.bank import EmbeddingBank
from partial_fc.collectives import GatheredBatch
from tests.unit.test_no_sync import _Syncs as Syncs

LABELS = np.array([3, 0, 2, 3, 0, 3, 4], dtype=np.int64)  # class 1 has no sample
CLASSES, DIM = 5, 3


class _OneOf:
    """Stands for one rank of a group, as the bank runs no collective: it only asks for rank and size."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.fixture(autouse=True)
def _without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda group: group.rank)
    monkeypatch.setattr(dist, "get_world_size", lambda group: group.size)


def _bank(rank: int = 0, size: int = 1, labels: Any = LABELS, **wanted: Any) -> EmbeddingBank:
    settings = {"dim": DIM, "dtype": torch.float32, **wanted}
    return EmbeddingBank(
        labels=labels,
        num_classes=CLASSES,
        group=_OneOf(rank, size),  # type: ignore[arg-type]
        device=torch.device("cpu"),
        **settings,
    )


def _batch(ids: list[int], x_ND: Tensor | None = None, labels: list[int] | None = None) -> GatheredBatch:
    """Rows of the samples `ids`; row i holds the number of its place, unless x_ND says otherwise."""
    ids_N = torch.tensor(ids)
    if x_ND is None:
        x_ND = torch.arange(1.0, len(ids) + 1)[:, None].expand(-1, DIM)
    labels_N = torch.from_numpy(LABELS)[ids_N.clamp(0, 6)] if labels is None else torch.tensor(labels)
    return GatheredBatch(x_ND, labels_N, ids_N, None)  # type: ignore[arg-type]


def test_samples_lie_by_class_then_sample() -> None:
    bank = _bank()
    assert bank.sample_P.tolist() == [1, 4, 2, 0, 3, 5, 6]
    assert bank.class_P.tolist() == [0, 0, 2, 3, 3, 3, 4]
    bank.update(_batch([5, 1, 2]))
    points = bank.points()
    assert points.x_PD[:, 0].tolist() == [2, 0, 3, 0, 0, 1, 0]
    assert points.seen_P.tolist() == [True, False, True, False, False, True, False]


def test_momentum_averages_what_a_sample_was_and_is() -> None:
    bank = _bank(momentum=0.75)
    first, second = (torch.nn.functional.normalize(torch.randn(2, 2, DIM), dim=2)).unbind()
    bank.update(_batch([6, 0], first))
    assert torch.equal(bank.points().x_PD[[6, 3]], first), "the first as it is"
    bank.update(_batch([6, 0], second))
    mean = torch.nn.functional.normalize(0.75 * first + 0.25 * second)
    assert torch.allclose(bank.points().x_PD[[6, 3]], mean, atol=1e-6)
    bank.update(_batch([6], -mean[:1]))  # 0.5 of its own way: no direction is lost
    assert torch.allclose(bank.points().x_PD[6], mean[0], atol=1e-6)
    opposite = _bank(momentum=0.5)
    opposite.update(_batch([6], first[:1]))
    opposite.update(_batch([6], -first[:1]))
    assert torch.equal(opposite.points().x_PD[6], -first[0]), "without a mean direction the newest"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_each_sample_lies_with_the_owner_of_its_class(size: int) -> None:
    banks = [_bank(rank, size) for rank in range(size)]
    assert sorted(torch.cat([bank.sample_P for bank in banks]).tolist()) == list(range(7))
    assert torch.cat([bank.sample_P for bank in banks]).tolist() == _bank().sample_P.tolist(), "the order of one rank"
    for bank in banks:
        inside_P = (bank.class_P >= bank.shard.start) & (bank.class_P < bank.shard.stop)
        assert inside_P.all()
        assert bank.class_P.tolist() == LABELS[bank.sample_P.numpy()].tolist()
        assert bank.points().largest == max(other.size for other in banks)


def test_samples_of_other_ranks_are_left_to_them() -> None:
    batch = _batch([0, 1, 2, 3, 4, 5, 6])
    whole = _bank()
    whole.update(batch)
    banks = [_bank(rank, 3) for rank in range(3)]
    for bank in banks:
        bank.update(batch)
        assert bank.points().seen_P.all()
    assert torch.equal(torch.cat([bank.points().x_PD for bank in banks]), whole.points().x_PD)


@pytest.mark.parametrize(
    "batch",
    [
        _batch([0, 1, 2], labels=[-1, -1, -1]),
        _batch([-1, 7, 10**12], labels=[0, 1, 2]),
    ],
    ids=["rows without a label", "samples that do not exist"],
)
def test_rows_that_are_no_sample_leave_no_trace(batch: GatheredBatch) -> None:
    bank = _bank()
    bank.update(batch)
    assert not bank.points().seen_P.any()
    assert (bank.points().x_PD == 0).all()


def test_a_labelled_row_beside_an_unlabelled_one_is_kept() -> None:
    bank = _bank()
    bank.update(_batch([0, 1, 2, 3], labels=[-1, 0, -1, 3]))
    assert bank.sample_P[bank.points().seen_P].tolist() == [1, 3]


def test_the_last_write_stays() -> None:
    bank = _bank()
    bank.update(_batch([2, 6]))
    bank.update(_batch([6, 3]))
    assert bank.points().x_PD[bank.sample_P == 2, 0].tolist() == [1]
    assert bank.points().x_PD[bank.sample_P == 6, 0].tolist() == [1]
    assert bank.points().x_PD[bank.sample_P == 3, 0].tolist() == [2]


def test_points_show_what_is_written_later() -> None:
    bank = _bank()
    points = bank.points()
    bank.update(_batch([1]))
    assert points.seen_P[0]
    assert points.x_PD[0, 0] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_leave_what_was_there(value: float) -> None:
    bank = _bank()
    bank.update(_batch([5, 1]))
    x_ND = torch.ones(3, DIM)
    x_ND[[0, 1], [2, 0]] = value
    bank.update(_batch([1, 6, 3], x_ND))
    stored = dict(zip(bank.sample_P.tolist(), bank.points().x_PD.tolist(), strict=True))
    assert stored[1] == [2.0] * DIM, "the former one"
    assert stored[3] == [1.0] * DIM
    assert bank.sample_P[bank.points().seen_P].tolist() == [1, 3, 5]


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_of_a_sample_that_comes_twice_the_first_labelled_row_counts(momentum: float) -> None:
    bank = _bank(momentum=momentum)
    x_ND = F.normalize(torch.randn(5, DIM, generator=torch.Generator().manual_seed(0)))
    batch = _batch([5, 1, 5, 1, 5], x_ND)
    batch.labels_N[0] = -1
    bank.update(batch)
    stored = dict(zip(bank.sample_P.tolist(), bank.points().x_PD, strict=True))
    assert torch.equal(stored[1], x_ND[1])
    assert torch.equal(stored[5], x_ND[2])


def test_a_snapshot_stays_as_it_is() -> None:
    bank = _bank()
    bank.update(_batch([5, 1]))
    snapshot = bank.snapshot()
    before = snapshot.x_PD.clone()
    bank.update(_batch([6, 5, 0]))
    assert torch.equal(snapshot.x_PD, before)
    assert int(snapshot.seen_P.sum()) == 2


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_an_update_does_not_wait_for_the_device(momentum: float) -> None:
    bank, batch = _bank(momentum=momentum), _batch([5, 1])
    with Syncs() as syncs:
        bank.update(batch)
    assert syncs.found == []


def test_gradients_stay_outside_and_values_are_rounded_to_the_bank() -> None:
    bank = _bank(dtype=torch.bfloat16)
    x_ND = torch.full((1, DIM), 1 / 3, requires_grad=True)
    bank.update(_batch([1], x_ND))
    stored_PD = bank.points().x_PD
    assert not stored_PD.requires_grad
    assert torch.equal(stored_PD[0], torch.full((DIM,), 1 / 3).bfloat16())


@pytest.mark.parametrize("labels", [[0, 5], [0, -1, 3]])
def test_labels_out_of_range_are_refused(labels: list[int]) -> None:
    said = f"labels: expected classes 0 … 4, got {min(labels)} … {max(labels)}: check the records"
    with pytest.raises(ValueError, match=re.escape(said)):
        _bank(labels=np.array(labels, dtype=np.int64))


def test_ranks_without_samples_and_data_without_samples() -> None:
    for bank in (_bank(1, 5), _bank(6, 7), _bank(labels=np.array([], dtype=np.int64))):
        assert bank.size == 0
        assert bank.points().x_PD.shape == (0, DIM)
    bank = _bank(1, 5)
    bank.update(_batch([0, 1, 2]))
    assert bank.points().seen_P.shape == (0,)


def test_state_comes_back() -> None:
    first, second = _bank(dtype=torch.bfloat16), _bank(dtype=torch.bfloat16)
    first.update(_batch([5, 1, 2]))
    points = second.points()
    second.update(_batch([6]))
    second.load_state_dict(first.state_dict())
    assert torch.equal(points.x_PD, first.points().x_PD), "views taken before the load show it"
    assert torch.equal(points.seen_P, first.points().seen_P)


@pytest.mark.parametrize("other", [_OneOf(0, 2), {"dim": DIM + 1}], ids=["ranks", "dim"])
def test_a_state_of_another_shape_is_refused(other: Any) -> None:
    state = (_bank(other.rank, other.size) if isinstance(other, _OneOf) else _bank(**other)).state_dict()
    with pytest.raises(ClusterStateError, match=r"expected \(7, 3\) embeddings on this rank, got"):
        _bank().load_state_dict(state)
