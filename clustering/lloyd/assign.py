"""One assignment of all points to the nearest centres of all ranks, with as few comparisons as can be.

1. Look: where a point was assigned before, its cosine to that centre as it is now is computed alone.
2. Part the centres into lively and quiet ones, the points into those that need not be compared with quiet ones and the
   others (`clustering.nearest.bounds`); choose a projection from a sample (`clustering.nearest.by_projection`).
3. Compare: points by what they need. Where nothing was known beforehand, those whose best cosine after the projection
   is below the projection's are compared with all centres afterwards.

Legend: P points of this rank, Q of some kind, b of a block, S centres of a shard, s of them compared, K clusters of
all ranks, D embedding size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from clustering.lloyd.checks import agree, problem_of_rows
from clustering.lloyd.codes import PointCodes, codes_pay
from clustering.lloyd.projection import Projections
from clustering.lloyd.threads import each, threads_of
from clustering.nearest.bounds import FAR, angles_at_least, angles_at_most, best_threshold, passing_counts, thresholds
from clustering.nearest.by_pairs import quieten
from clustering.nearest.by_projection import Projection, Sample, find_
from clustering.nearest.codes import CodedCentres, can_code
from clustering.nearest.float64_rows import row_dots
from clustering.nearest.nearest import NONE, Nearest, nearest_, tolerance
from clustering.nearest.projected import ProjectedCentres
from clustering.service.rows import UnitRows
from clustering.service.shards import show_rows
from partial_fc.collectives import all_reduce_
from sharding import Shard, all_shards

_LEAST = 512
"""Points of a piece, where there are as many: fewer are not worth a thread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """Points that are compared with the same centres in the same way."""

    point_Q: Tensor
    lively: bool
    """With lively centres alone."""
    projection: Projection | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Comparison:
    """With the same centres, of one shard, in the same way."""

    centres_sD: Tensor
    operand_sD: Tensor
    """The same in the dtype of the products."""
    cluster_s: Tensor
    projection: Projection | None
    projected_s: ProjectedCentres | None
    coded: CodedCentres | None


def _with_all(chosen_P: Tensor, projection: Projection | None) -> _Task:
    return _Task(point_Q=chosen_P.nonzero()[:, 0], lively=False, projection=projection)


class Assigner:
    """Keeps what one assignment can tell the next: a lower bound of each point's angle to all centres but its own."""

    def __init__(
        self,
        rows: UnitRows,
        *,
        num_clusters: int,
        first_row: int,
        total: int,
        group: dist.ProcessGroup,
        device: torch.device,
        bounds: bool,
        projection: bool,
        codes: bool | None,
        kernels: bool,
        dtype: torch.dtype,
        block: int,
    ) -> None:
        """total: points of all ranks. codes: None: where they pay. kernels: compare by Triton. dtype: of the products'
        operands.
        """
        self._rows, self._group, self._device = rows, group, device
        self._shards = all_shards(dist.get_world_size(group), num_clusters)
        self._first_row, self._total = first_row, total
        self._bounds, self._kernels, self._dtype, self._block = bounds, kernels, dtype, block
        self._bound_P = torch.zeros(len(rows), device=device)
        self._real_P: Tensor | None = None
        """bool: rows that are not zero; None: not looked at yet."""
        wanted = codes_pay(rows.dim, num_clusters) if codes is None else codes
        coded = wanted and device.type == "cpu" and dtype == torch.float32 and not kernels and can_code(rows.dim)
        self._codes = PointCodes(rows, always=codes is True) if coded else None
        self._projections: Projections | None = None
        if projection and device.type == "cpu":
            found = Projections(
                rows,
                num_clusters=num_clusters,
                first_row=first_row,
                total=total,
                codes=self._codes is not None,
                group=group,
            )
            self._projections = found if found.worth_a_try else None
        if self._codes or self._projections:
            quieten()
        self._work = 0.0

    def assign(self, centres_SD: Tensor, index_P: Tensor, drift_K: Tensor) -> tuple[Nearest, int]:
        """Nearest centre and its cosine for each point of this rank, and the cosines computed, in full ones.

        centres_SD: float32, this rank's. index_P: the last assignment, -1 for none. drift_K: float32, the angle by
        which each centre moved since then. Raises ValueError for rows that are not unit or zero, the first time.

        Collectives: one broadcast of the centres for each rank, two or three times; with bounds one all-reduce of some
        64 numbers, with projection one of some 10 000; the first time one more.
        """
        if self._real_P is None:
            self._real_P = self._checked()
        known = self._bounds and bool((drift_K < FAR).any())
        self._work = 0.0
        state, sample = self._look(centres_SD, index_P if known else torch.full_like(index_P, -1), known)
        delta, passing_P = self._part(state, drift_K) if known else (0.0, torch.zeros_like(self._real_P))
        projection = self._projections.choose(sample, known=known) if self._projections and sample else None
        lively_K = drift_K > delta
        if known:
            self._compare(state, centres_SD, self._tasks(state, passing_P, projection), lively_K)
        else:
            self._compare(state, centres_SD, [_with_all(self._real_P, projection)], lively_K)
            if projection:
                low_P = self._real_P & (state.best_b < projection.cosine)
                state.second_b[low_P] = NONE  # the limit of a projection that did not reach them
                self._compare(state, centres_SD, [_with_all(low_P, None)], lively_K)
        found_P = angles_at_least(state.second_b, tolerance(self._dtype))
        self._bound_P = torch.where(passing_P, (self._bound_P - delta).minimum(found_P), found_P)
        return state, round(self._work)

    def _checked(self) -> Tensor:
        """Which rows are not zero, bool (P,). One all-reduce."""
        real_P = torch.zeros(len(self._rows), dtype=torch.bool, device=self._device)
        problem = ""
        for start in range(0, len(self._rows), self._block):
            x_bD = self._rows.block(start, min(start + self._block, len(self._rows)))
            problem = problem or problem_of_rows(x_bD, self._first_row + start)
            real_P[start : start + len(x_bD)] = (x_bD != 0).any(1)
        agree(problem, self._group, self._device)
        return real_P

    def _look(self, centres_SD: Tensor, index_P: Tensor, known: bool) -> tuple[Nearest, Sample | None]:
        """Cosines to the centres of `index_P`, and the sample's to all. A broadcast for each rank, if needed."""
        state = Nearest.unknown(len(self._rows), self._device)
        sample = self._projections.sample() if self._projections else None
        if not known and sample is None:
            return state, None
        state.index_b.copy_(index_P)
        for shard, shown_SD in self._shown(centres_SD):
            known_Q = ((index_P >= shard.start) & (index_P < shard.stop)).nonzero()[:, 0]

            def look(part_b: Tensor, shard: Shard = shard, shown_SD: Tensor = shown_SD) -> None:
                x_bD = self._rows.pick(part_b)
                state.best_b[part_b] = row_dots(x_bD, None, shown_SD, index_P[part_b] - shard.start)

            each(look, self._pieces(known_Q), self._device)
            self._work += len(known_Q)
            if sample:
                sample.see(shown_SD[(shown_SD != 0).any(1)])
        return state, sample

    def _part(self, state: Nearest, drift_K: Tensor) -> tuple[float, Tensor]:
        """Delta, and the points that have no quiet centre nearer than their own. One all-reduce."""
        own_P = angles_at_most(state.best_b, tolerance(self._dtype))
        gap_P = (self._bound_P - own_P).masked_fill(state.index_b < 0, -1.0)
        delta_T = thresholds(drift_K)
        passing_T = all_reduce_(passing_counts(gap_P, delta_T), self._group)
        delta = best_threshold(delta_T, passing_T, drift_K, self._total)
        return delta, gap_P > delta

    def _tasks(self, state: Nearest, passing_P: Tensor, projection: Projection | None) -> list[_Task]:
        assert self._real_P is not None
        high_P = state.best_b >= (projection.cosine if projection else torch.inf)
        return [
            _Task(
                point_Q=(self._real_P & (passing_P == lively) & (high_P == (used is not None))).nonzero()[:, 0],
                lively=lively,
                projection=used,
            )
            for lively in (True, False)
            for used in dict.fromkeys((projection, None))  # one, where nothing is projected
        ]

    def _compare(self, state: Nearest, centres_SD: Tensor, tasks: Sequence[_Task], lively_K: Tensor) -> None:
        """A broadcast for each rank."""
        for shard, shown_SD in self._shown(centres_SD):
            exists_S = (shown_SD != 0).any(1)
            for task in tasks:
                taken_S = exists_S & lively_K[shard.start : shard.stop] if task.lively else exists_S
                place_s = taken_S.nonzero()[:, 0]
                if not len(place_s) or not len(task.point_Q):
                    continue
                centres_sD = shown_SD if len(place_s) == shard.size else shown_SD[place_s]
                compare = partial(self._run, state, self._comparison(task, centres_sD, place_s + shard.start))
                self._work += sum(each(compare, self._pieces(task.point_Q), self._device))

    def _comparison(self, task: _Task, centres_sD: Tensor, cluster_s: Tensor) -> _Comparison:
        projected_s, coded, projection = None, None, task.projection
        if projection and self._projections:
            self._projections.keep(projection.dims, self._device)
            projected_s = self._projections.of_centres(centres_sD, projection.dims)
        elif self._codes and self._codes.pay(len(task.point_Q), len(cluster_s)):
            coded = self._codes.of_centres(centres_sD)
        return _Comparison(
            centres_sD=centres_sD,
            operand_sD=centres_sD.to(self._dtype),
            cluster_s=cluster_s,
            projection=projection,
            projected_s=projected_s,
            coded=coded,
        )

    def _run(self, state: Nearest, comparison: _Comparison, part_b: Tensor) -> float:
        """Compare a piece's points; the cosines computed, in full ones."""
        c, used, x_bD = comparison, comparison.projection, self._rows.pick(part_b)
        part = Nearest(best_b=state.best_b[part_b], index_b=state.index_b[part_b], second_b=state.second_b[part_b])
        work = float(len(part_b) * len(c.cluster_s))
        if used and c.projected_s and self._projections:
            projected_b = self._projections.of_points(part_b, x_bD, used.dims)
            work *= used.dims / self._rows.dim
            work += find_(part, x_bD, projected_b, c.centres_sD, c.projected_s, c.cluster_s, used)
            part.second_b.clamp_min_(used.cosine)
        elif c.coded and self._codes:
            self._codes.compare_(part, part_b, x_bD, c.centres_sD, c.coded, c.cluster_s)
        else:
            nearest_(part, x_bD, c.centres_sD, c.operand_sD, c.cluster_s, kernels=self._kernels)
        for kept_P, new_b in zip(
            (state.best_b, state.index_b, state.second_b), (part.best_b, part.index_b, part.second_b), strict=True
        ):
            kept_P[part_b] = new_b
        return work

    def _shown(self, centres_SD: Tensor) -> Iterator[tuple[Shard, Tensor]]:
        for rank, shard in enumerate(self._shards):
            yield shard, show_rows(centres_SD, shard, rank, self._group)

    def _pieces(self, point_Q: Tensor) -> Sequence[Tensor]:
        """Some points' places at a time, enough for all threads. point_Q: rising."""
        share = -(-len(point_Q) // threads_of(self._device))
        return point_Q.split(min(self._block, max(_LEAST, share))) if len(point_Q) else ()
