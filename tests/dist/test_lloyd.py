"""Iterations of k-means over ranks: equal to the plain float64 ones, and the same bits on 1, 2 and 4 ranks.

Legend: N points, P of one rank, K clusters, D embedding size.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clustering.lloyd import assign as lloyd_assign
from clustering.lloyd.lloyd import Iteration, Lloyd
from clustering.lloyd.reference import plain_iteration
from clustering.lloyd.threads import each
from clustering.service.rows import TensorRows
from sharding import shard_of
from tests.ranks import WORLD_SIZES, RankPool


class Case(NamedTuple):
    points: int
    clusters: int
    D: int
    groups: int = 0
    """Around which the points lie; 0: anywhere."""
    copies: int = 1
    """Of each point."""
    zero_points: int = 0
    zero_centres: int = 0
    same_centres: int = 0
    """That begin as copies of the first."""
    iterations: int = 5
    dtype: torch.dtype = torch.float32
    codes: bool | None = None
    """Of Lloyd; True: by codes, though it does not pay."""


CASES = {
    "clustered": Case(507, 23, 33, groups=20),
    "anywhere": Case(507, 40, 12),
    "fewer seeds than groups": Case(900, 30, 64, groups=60, iterations=8),
    "empty clusters": Case(252, 60, 16, groups=12, same_centres=20, iterations=6),
    "centres not there yet": Case(252, 30, 16, groups=12, zero_centres=12, zero_points=9),
    "one centre so far": Case(123, 4, 7, groups=2, zero_centres=3),
    "no centre at all": Case(20, 5, 7, zero_centres=5, iterations=2),
    "copies": Case(40, 30, 24, groups=10, copies=5, same_centres=4),
    "more clusters than points": Case(7, 12, 5),
    "one point": Case(1, 1, 7),
    "one cluster": Case(123, 1, 7, groups=3),
    "fewer clusters than ranks": Case(123, 3, 7, groups=3),
    "by codes": Case(507, 150, 33, groups=60, copies=2, same_centres=20, zero_centres=9, zero_points=5, codes=True),
    "by codes, anywhere": Case(600, 252, 70, codes=True),
    "by codes, two tiles": Case(1500, 1100, 16, groups=300, iterations=3, codes=True),
    "projected": Case(4400, 400, 256, groups=200, iterations=3),
    "projected, by codes": Case(4400, 400, 240, groups=200, iterations=3, codes=True),
}


def data(case: Case) -> tuple[Tensor, Tensor]:
    """Points (N, D) and centres to start from (K, D)."""
    generator = torch.Generator().manual_seed(case.points + case.clusters)
    x_ND = torch.randn(case.points, case.D, generator=generator)
    if case.groups:
        group_GD = F.normalize(torch.randn(case.groups, case.D, generator=generator))
        place_N = torch.randint(case.groups, (case.points,), generator=generator)
        x_ND = group_GD[place_N] + 0.8 / case.D**0.5 * x_ND
    x_ND = F.normalize(x_ND).repeat(case.copies, 1)
    x_ND = x_ND[torch.randperm(len(x_ND), generator=generator)]
    start_KD = x_ND[torch.randint(len(x_ND), (case.clusters,), generator=generator)]
    start_KD[1 : 1 + case.same_centres] = start_KD[0]
    start_KD[len(start_KD) - case.zero_centres :] = 0
    x_ND[3 : 3 + case.zero_points] = 0
    return x_ND.to(case.dtype), start_KD


def _split(N: int, group: dist.ProcessGroup) -> slice:
    """Uneven on purpose: with 4 ranks the third has nothing."""
    cuts = {1: (0, N), 2: (0, N // 3, N), 4: (0, N // 3, N // 2, N // 2, N)}[dist.get_world_size(group)]
    rank = dist.get_rank(group)
    return slice(cuts[rank], cuts[rank + 1])


def _lloyd(group: dist.ProcessGroup, case: Case, **options: Any) -> Lloyd:
    x_ND, start_KD = data(case)
    part = _split(len(x_ND), group)
    own = shard_of(dist.get_rank(group), dist.get_world_size(group), case.clusters)
    return Lloyd(
        TensorRows(x_ND[part]),
        centres_SD=start_KD[own.start : own.stop],
        num_clusters=case.clusters,
        group=group,
        first_row=part.start,
        **{"codes": case.codes, **options},
    )


def _run(group: dist.ProcessGroup, case: Case, options: dict[str, Any]) -> list[dict[str, Any]]:
    lloyd, told = _lloyd(group, case, **options), []
    for number in range(case.iterations + 1):
        done = lloyd.iterate() if number < case.iterations else lloyd.assign()
        told.append(_held(lloyd, done))
    return told


def _held(lloyd: Lloyd, done: Iteration) -> dict[str, Any]:
    return {
        "centres": lloyd.centres_SD.clone(),
        "index": lloyd.index_P,
        "best": lloyd.best_P,
        "told": (done.number, done.mean_cosine, done.moved, done.empty),
        "compared": done.compared,
    }


def _joined(parts: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of all ranks, iteration by iteration."""
    joined = []
    for ranks in zip(*parts, strict=True):
        assert len({rank["told"] for rank in ranks}) == 1
        assert len({rank["compared"] for rank in ranks}) == 1
        tensors = {name: torch.cat([rank[name] for rank in ranks]) for name in ("centres", "index", "best")}
        joined.append({**tensors, "told": ranks[0]["told"], "compared": ranks[0]["compared"]})
    return joined


def _same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for one, other in zip(found, expected, strict=True):
        for name in ("index", "best", "centres"):
            assert torch.equal(one[name], other[name]), f"{name} after iteration {one['told'][0]}"
        assert one["told"] == other["told"]


def _alone(ranks: RankPool, case: Case, **options: Any) -> list[dict[str, Any]]:
    return _joined(ranks.run(1, _run, case, options))


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("projected")])
def test_equals_the_plain_iteration(ranks: RankPool, name: str) -> None:
    """From the same centres each time, so that a tie that float32 centres decide otherwise does not lead elsewhere."""
    case = CASES[name]
    x_ND, centres_KD = data(case)
    x_ND = x_ND.double()
    number, moved_from_N = 0, torch.full((len(x_ND),), -1)
    for done in _alone(ranks, case):
        expected_KD, best_N, index_N = plain_iteration(x_ND, centres_KD.double())
        assert torch.equal(done["index"], index_N)
        has_N = index_N >= 0
        torch.testing.assert_close(done["best"][has_N], best_N[has_N], rtol=0, atol=1e-12)
        assert (done["best"][~has_N] == float("-inf")).all()
        _, mean_cosine, moved, empty = done["told"]
        assert mean_cosine == pytest.approx(float(best_N[has_N].sum() / max(1, int(has_N.sum()))), abs=1e-9)
        assert moved == int((index_N != moved_from_N).sum())
        assert empty == case.clusters - len(index_N[has_N].unique())
        if done["told"][0] > number:
            torch.testing.assert_close(done["centres"].double(), expected_KD, rtol=0, atol=1e-6)
        else:  # the last assignment, without an update
            assert torch.equal(done["centres"], centres_KD)
        number = done["told"][0]
        centres_KD, moved_from_N = done["centres"], index_N


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_on_any_number_of_ranks(ranks: RankPool, name: str, world_size: int) -> None:
    case = CASES[name]
    _same(_joined(ranks.run(world_size, _run, case, {})), _alone(ranks, case))


def _run_where_one_cannot_code(group: dist.ProcessGroup, case: Case) -> list[dict[str, Any]]:
    if dist.get_rank(group) == 0:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(lloyd_assign, "can_code", lambda dim: False)
            return _run(group, case, {})
    return _run(group, case, {})


@pytest.mark.parametrize("name", ["by codes", "projected, by codes"])
def test_ranks_that_cannot_multiply_codes_do_without(ranks: RankPool, name: str) -> None:
    found = _joined(ranks.run(2, _run_where_one_cannot_code, CASES[name]))
    for one, other in zip(found, _alone(ranks, CASES[name]), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("index", "best", "centres"))


def _run_on_threads(group: dist.ProcessGroup, case: Case, threads: int) -> tuple[list[dict[str, Any]], set[str], int]:
    """What `_run` gives, the threads that compared, and torch's threads afterwards."""
    before, names = torch.get_num_threads(), set()

    class Watched(TensorRows):
        def block(self, start: int, stop: int) -> torch.Tensor:
            names.add(threading.current_thread().name)
            return super().block(start, stop)

    x_ND, start_KD = data(case)
    torch.set_num_threads(threads)
    try:
        lloyd = Lloyd(
            Watched(x_ND), centres_SD=start_KD, num_clusters=case.clusters, group=group, block=64, codes=case.codes
        )
        told = [_held(lloyd, lloyd.iterate()) for _ in range(case.iterations)]
        return told, names, torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["clustered", "copies", "by codes", "projected"])
def test_threads_change_nothing(ranks: RankPool, name: str) -> None:
    case = CASES[name]
    found, names, threads = ranks.run(1, _run_on_threads, case, 3)[0]
    _same(found, _alone(ranks, case)[: case.iterations])
    assert threads == 3
    assert len(names) > 1 or len(data(case)[0]) <= 64


def _fails(place: int) -> int:
    if place == 5:
        raise OSError("disk gone")
    return place


def test_a_thread_that_fails_fails_the_work() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert each(_fails, range(5), torch.device("cpu")) == [0, 1, 2, 3, 4]
        with pytest.raises(OSError, match="disk gone"):
            each(_fails, range(9), torch.device("cpu"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_what_is_left_out_changes_nothing(ranks: RankPool, name: str) -> None:
    case = CASES[name]
    everything = _alone(ranks, case, bounds=False, projection=False, codes=False)
    for options in ({"projection": False}, {"bounds": False}, {"codes": False}, {}):
        _same(_alone(ranks, case, **options), everything)


@pytest.mark.parametrize("seed", range(12))
def test_bounds_change_nothing_whatever_the_data(ranks: RankPool, seed: int) -> None:
    """Groups that overlap more or less, blocks of odd lengths, one to thirty clusters a group."""
    case = Case(100 + 47 * seed, 5 + 7 * (seed % 5), 3 + 5 * seed, groups=2 + seed, same_centres=seed % 4, iterations=9)
    everything = _alone(ranks, case, bounds=False, projection=False, block=57)
    bounded = _joined(ranks.run(2, _run, case, {"projection": False, "block": 23 + 41 * (seed % 3)}))
    _same(bounded, everything)


def test_bounds_and_projection_leave_comparisons_out(ranks: RankPool) -> None:
    case = CASES["projected"]
    compared = [
        [done["compared"] for done in _alone(ranks, case, bounds=bounds, projection=projection)]
        for bounds, projection in ((False, False), (True, False), (False, True))
    ]
    assert all(share == 1 for share in compared[0])
    assert compared[1][-1] < 0.5, "after assignments that hardly moved"
    assert min(compared[2]) < 0.8


def test_rows_of_other_dtypes(ranks: RankPool) -> None:
    case = CASES["clustered"]
    whole = _alone(ranks, case)
    _same(_alone(ranks, case._replace(dtype=torch.float64)), whole)
    rounded = case._replace(dtype=torch.bfloat16)
    _same(_joined(ranks.run(2, _run, rounded, {})), _alone(ranks, rounded, bounds=False))
    assert (_alone(ranks, rounded)[-1]["index"] == whole[-1]["index"]).double().mean() > 0.9


def test_products_of_bfloat16_lead_to_the_same_bits(ranks: RankPool) -> None:
    case = CASES["clustered"]
    _same(_alone(ranks, case, product_dtype=torch.bfloat16), _alone(ranks, case))


def _error(group: dist.ProcessGroup, what: str) -> str:
    case = CASES["clustered"]
    x_ND, start_KD = data(case)
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    part = _split(len(x_ND), group)
    own = shard_of(dist.get_rank(group), dist.get_world_size(group), case.clusters)
    centres_SD = start_KD[own.start : own.stop].clone()
    x_PD = x_ND[part].clone()
    if last and what == "shape":
        centres_SD = centres_SD[:-1]
    if last and what == "dtype":
        centres_SD = centres_SD.double()
    if last and what == "nan":
        x_PD[4, 2] = torch.nan
    if last and what == "length":
        x_PD[4] *= 2
    if last and what == "infinite centre":
        centres_SD[1, 0] = torch.inf
    try:
        lloyd = Lloyd(
            TensorRows(x_PD),
            centres_SD=centres_SD,
            num_clusters=case.clusters,
            group=group,
            first_row=part.start,
            block=0 if last and what == "block" else None,
        )
        lloyd.iterate()
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("shape", "expected float32 (11, 33), this rank's clusters 12 … 22 by sharding.shard_of, got float32 (10, 33)"),
        ("dtype", "got float64"),
        ("nan", "row 173: expected a row of length 1, or of zeros, got length nan"),
        ("length", "row 173: expected a row of length 1, or of zeros, got length 2"),
        ("infinite centre", "centre 13: expected a row of length 1"),
        ("block", "expected at least 1 point at a time, got 0"),
    ],
)
def test_all_ranks_raise_when_one_must(ranks: RankPool, what: str, words: str) -> None:
    others, own = ranks.run(2, _error, what)
    assert words in own
    assert "another rank" in others


def test_rows_must_be_a_matrix_of_floating_point_numbers() -> None:
    for wrong in (torch.ones(3), torch.ones(3, 4, dtype=torch.int32)):
        with pytest.raises(ValueError, match="expected rows of floating-point numbers"):
            TensorRows(wrong)
