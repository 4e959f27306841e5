"""A refresh that fails on one rank is dropped on all, and training sees nothing else of it."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from clustering.service.guard import Guard, agree
from clustering.service.service import ClusterService
from partial_fc.collectives import GatheredBatch
from tests.dist.clustering_cases import CPU, Case, problem
from tests.dist.service_cases import EPOCH, NOISY, STEPS, build, train, weights
from tests.ranks import WORLD_SIZES, RankPool

DRIFTING: Case = {**NOISY, "drift": 0.05}

KINDS = ("start", "assign", "gate", "seed", "mean", "count", "cohesion", "hard levels", "margins", "assignments",
         "matching", "anchors", "weights", "neighbours", "publication")  # fmt: skip
"""Every kind of local work; the second refresh begins after 8 steps and ends after 10."""


@contextlib.contextmanager
def _failing(kind: str, here: bool) -> Iterator[None]:
    """Local work of this kind raises on this rank."""
    original = Guard.run

    def raises() -> Any:
        raise torch.OutOfMemoryError("no room\nfor this")

    def run(self: Guard, what: str, work: Callable[[], Any], otherwise: Any) -> Any:
        return original(self, what, raises if here and what == kind else work, otherwise)

    Guard.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        Guard.run = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _messages() -> Iterator[list[str]]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("clustering.service").addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger("clustering.service").removeHandler(handler)


def _scalars(service: ClusterService, start: int, stop: int) -> list[list[float]]:
    """Version, ramp, losses and row margins of these steps."""
    found: list[list[float]] = []

    def look(step: int, batch: GatheredBatch) -> None:
        losses = (service.contrastive(batch), service.alignment(batch, weights(service)))
        row_margins = service.row_margins(batch).tolist()
        found.append([service.version, service.ramp(step), *(float(loss) for loss in losses), *row_margins])

    train(service, DRIFTING, start=start, stop=stop, each=look)
    return found


BEFORE = 2 * EPOCH - 1  # steps before the one after which the second refresh begins


def _taken_up(group: dist.ProcessGroup, state: dict[str, Any]) -> ClusterService:
    service = build(group, DRIFTING, hard_negatives=2)
    service.load_state_dict(copy.deepcopy(state))
    return service


def _with_failures(group: dist.ProcessGroup) -> dict[str, Any]:
    """By kind: whether the losses are those of a run whose refresh was dropped, the versions, the failures, the log."""
    service = build(group, DRIFTING, hard_negatives=2)
    train(service, DRIFTING, stop=BEFORE)
    state, last = copy.deepcopy(service.state_dict()), dist.get_world_size(group) - 1
    truth = _scalars(service, BEFORE, BEFORE + 1)
    service._refresh = None
    truth += _scalars(service, BEFORE + 1, STEPS)
    found = {}
    for kind in KINDS:
        service = _taken_up(group, state)
        with _messages() as said:
            with _failing(kind, dist.get_rank(group) == last):
                scalars = _scalars(service, BEFORE, 3 * EPOCH - 1)
            scalars += _scalars(service, 3 * EPOCH - 1, STEPS)
        found[kind] = (scalars == truth, [row[0] for row in scalars], service.statistics(STEPS), said)
    return found


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_failure_on_one_rank_drops_the_refresh_on_all_and_nothing_else(ranks: RankPool, world_size: int) -> None:
    parts = ranks.run(world_size, _with_failures)
    for kind in KINDS:
        for rank, part in enumerate(parts):
            same, versions, statistics, said = part[kind]
            assert versions == [1] * 7 + [2] * 2, kind
            assert same, f"{kind}: training sees what it would see without that refresh"
            assert statistics["clusters/failed_refreshes"] == 1
            assert len(said) == (rank == 0), "said once"
        words = parts[0][kind][3][0]
        assert f"(rank {world_size - 1}, {kind}: OutOfMemoryError: no room)" in words
        assert "version 1 of the clusters stays" in words


def _first_fails(group: dist.ProcessGroup) -> tuple[list[float], list[float], list[str]]:
    """The first refresh fails: versions and ramp of every step; and what differs where it was resumed amid it."""
    service = build(group, DRIFTING)
    train(service, DRIFTING, stop=EPOCH - 1)
    with _failing("assign", dist.get_rank(group) == 0):
        train(service, DRIFTING, start=EPOCH - 1, stop=EPOCH + 1)
    file = io.BytesIO()
    torch.save(service.state_dict(), file)
    file.seek(0)
    again = build(group, DRIFTING)
    again.load_state_dict(torch.load(file, weights_only=True))
    rows, rows_again = _scalars(service, EPOCH + 1, STEPS), _scalars(again, EPOCH + 1, STEPS)
    differs = [] if rows == rows_again and again.failed_refreshes == service.failed_refreshes == 1 else ["the end"]
    return [row[0] for row in rows], [row[1] for row in rows], differs


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_ramp_waits_when_the_first_refresh_fails_and_a_resumed_run_remembers(
    ranks: RankPool, world_size: int
) -> None:
    for versions, ramp, differs in ranks.run(world_size, _first_fails):
        assert versions == [0] * 5 + [1] * 4 + [2] * 2
        assert ramp == [0.0] * 6 + [0.25, 0.5, 0.75, 1.0, 1.0], "from the publication after 10 steps on"
        assert differs == []


def _not_finite(group: dist.ProcessGroup, where: str) -> tuple[int, list[str]]:
    service = build(group, DRIFTING)
    with _messages() as said:
        train(service, DRIFTING, stop=EPOCH)
        assert service._refresh is not None
        if dist.get_rank(group) == dist.get_world_size(group) - 1:
            held = service._refresh.points.x_PD if where == "snapshot" else service._refresh.run.centres_SD
            held[0] = float("nan")
            if where == "centres":  # a cluster without members keeps its centre
                service._refresh.run.index_P.fill_(-1)
                service._refresh.run.counted_P.fill_(False)
        train(service, DRIFTING, start=EPOCH, stop=EPOCH + 3)
    return service.failed_refreshes, said


@pytest.mark.parametrize(("where", "said"), [("snapshot", "embeddings are not finite"), ("centres", "not finite")])
def test_numbers_that_are_not_finite_fail_a_refresh(ranks: RankPool, where: str, said: str) -> None:
    parts = ranks.run(2, _not_finite, where)
    assert [failed for failed, _ in parts] == [1, 1]
    assert said in parts[0][1][0]


def _agreed(group: dist.ProcessGroup, failures: list[str]) -> str:
    return agree(3, failures[dist.get_rank(group)], group, CPU)


def test_the_first_failing_ranks_words_reach_all(ranks: RankPool) -> None:
    assert ranks.run(4, _agreed, ["", "", "", ""]) == [""] * 4
    assert ranks.run(4, _agreed, ["", "", "größer", "b"]) == ["rank 2, größer"] * 4
    (said, *others) = ranks.run(4, _agreed, ["", "x" * 1000, "", "b"])
    assert others == [said] * 3
    assert said.startswith("rank 1, xxx")
    assert len(said) < 300


def _without_finite_rows(group: dist.ProcessGroup) -> bool:
    """Rows that are not finite change neither bank nor centres."""
    service = build(group, NOISY)
    train(service, NOISY)
    assert service._published is not None
    before = [service.bank.points().x_PD.clone(), service._published.c_SD.clone(), service._published.anchor_RD.clone()]
    ids_N = torch.arange(12)
    labels_N = problem(NOISY)[1][ids_N]
    for value in (float("nan"), float("inf"), float("-inf")):
        x_ND = torch.full((12, 8), 0.35)
        x_ND[:, 3] = value
        service.observe(GatheredBatch(x_ND, labels_N, ids_N, group))
    after = [service.bank.points().x_PD, service._published.c_SD, service._published.anchor_RD]
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_rows_that_are_not_finite_never_enter(ranks: RankPool) -> None:
    assert ranks.run(2, _without_finite_rows) == [True, True]
