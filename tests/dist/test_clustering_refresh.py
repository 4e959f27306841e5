"""A refresh as a whole: the same bits on any number of ranks, and however it is sliced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.dist.clustering_cases import CASES, Case
from tests.dist.service_cases import AS_SHIPPED, EPOCH, NOISY, STEPS, build, snapshot, train
from tests.ranks import WORLD_SIZES, RankPool

DRIFTING: Case = {**NOISY, "drift": 0.05}

# ---- the same bits ---------------------------------------------------------------------------------------------


def _states(group: dist.ProcessGroup, case: Case, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """What is held after every step, from the first publication on."""
    service = build(group, case, **wanted)
    found = []
    for step in range(STEPS):
        train(service, case, start=step, stop=step + 1)
        if service.version:
            held = snapshot(service)
            found.append({**held, "by_class": {name: t.clone() for name, t in held["by_class"].items()}})
    return found


def _whole(parts: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """Every tensor over all ranks, and the statistics."""
    cut = {f"{kind} {name}": torch.cat([part[kind][name] for part in parts])
           for kind in ("by_cluster", "by_class") for name in parts[0][kind]}  # fmt: skip
    return {**cut, **parts[0]["whole"], **{name: torch.tensor(v) for name, v in parts[0]["statistics"].items()}}


BITS: dict[str, tuple[Case, dict[str, Any]]] = {
    "noisy": (DRIFTING, {}),
    "noisy, bf16": (DRIFTING, {"bank_dtype": torch.bfloat16}),
    "noisy, as shipped": (DRIFTING, {"bank_dtype": torch.bfloat16, **AS_SHIPPED}),
    "noisy, float32, neighbours": (DRIFTING, {"bank_dtype": torch.float32, "hard_negatives": 3}),
    "long tail, ungated": ({**CASES["long tail"], "drift": 0.1}, {"noise_gate": False, "direction": -1}),
    "classes without samples": ({**CASES["classes without samples"], "drift": 0.1}, {"margin_rule": "kappaface"}),
    "more clusters than samples": ({**CASES["more clusters than samples"], "drift": 0.1}, {}),
}


@pytest.mark.parametrize("name", BITS)
def test_all_that_is_published_is_the_same_bits_on_any_number_of_ranks(ranks: RankPool, name: str) -> None:
    """Counts, matching, hard levels, margins, centres and how they move between refreshes; of three versions."""
    one = ranks.run(1, _states, *BITS[name])
    for world_size in WORLD_SIZES[1:]:
        parts = ranks.run(world_size, _states, *BITS[name])
        for step, (mine, theirs) in enumerate(zip(zip(*one, strict=True), zip(*parts, strict=True), strict=True)):
            truth, found = _whole(mine), _whole(theirs)
            different = [key for key, value in truth.items() if not torch.equal(found[key], value)]
            assert not different, f"{step} steps after the first publication"


def _first_version(group: dist.ProcessGroup, span: float, block: int) -> dict[str, Any]:
    service = build(group, DRIFTING, refresh_span=span, block=block)
    train(service, DRIFTING, stop=EPOCH + round(span * EPOCH))
    assert service.version == 1
    return snapshot(service)


def test_a_refresh_does_not_depend_on_its_slices_nor_on_what_is_written_meanwhile(ranks: RankPool) -> None:
    """Embeddings drift, and the bank takes them in while the refresh runs; it shows those of its beginning."""
    truth = _whole(tuple(ranks.run(2, _first_version, 0.25, 1000)))
    for span, block in ((1.0, 1000), (0.5, 3), (1.0, 1)):
        found = _whole(tuple(ranks.run(2, _first_version, span, block)))
        assert [key for key, value in truth.items() if not torch.equal(found[key], value)] == []
