"""The cluster service saved and loaded at any step, and ranks or states that do not fit each other refused."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from clustering.errors import ClusterStateError
from clustering.service.guard import agree
from clustering.service.saving import kind_of
from clustering.service.service import ClusterService
from partial_fc.collectives import GatheredBatch
from tests.dist.clustering_cases import CASES, CPU, Case
from tests.dist.service_cases import AS_SHIPPED, NOISY, STEPS, build, snapshot, train, trained, weights
from tests.ranks import WORLD_SIZES, RankPool

DRIFTING: Case = {**NOISY, "drift": 0.05}


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint does it: nothing is unpickled that is not on torch's allow-list."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {key: leaf for part, inner in value.items() for key, leaf in _flat(inner, f"{name}/{part}").items()}
    return {name: value}


def _differences(found: dict[str, Any], truth: dict[str, Any]) -> list[str]:
    found, truth = _flat(found), _flat(truth)
    if found.keys() != truth.keys():
        return sorted(found.keys() ^ truth.keys())
    return [
        key
        for key, value in truth.items()
        if not (torch.equal(found[key], value) if isinstance(value, Tensor) else found[key] == value)
    ]


def _scalars(service: ClusterService, case: Case, start: int) -> list[list[float]]:
    """Trains to the end; version, ramp, losses and row margins of every step."""
    found: list[list[float]] = []

    def look(step: int, batch: GatheredBatch) -> None:
        losses = (service.contrastive(batch), service.alignment(batch, weights(service)))
        row_margins = service.row_margins(batch).tolist()
        found.append([service.version, service.ramp(step), *(float(loss) for loss in losses), *row_margins])

    train(service, case, start=start, each=look)
    return found


def _resumed(group: dist.ProcessGroup, stops: list[int], settings: dict[str, Any]) -> dict[int, list[str]]:
    """What differs at the end when the training is interrupted after `stop` steps; and whether that was amid a run."""
    wanted = {"bank_dtype": torch.bfloat16, **settings}
    whole = build(group, DRIFTING, **wanted)
    scalars = _scalars(whole, DRIFTING, 0)
    differs: dict[int, list[str]] = {}
    for stop in stops:
        first = trained(group, DRIFTING, stop=stop, **wanted)
        state = _through_a_file(first.state_dict())
        differs[stop] = [] if (state["refresh"] is not None) == (stop in {4, 5, 8, 9, 12, 13}) else ["the case"]
        second = build(group, DRIFTING, **wanted)
        second.load_state_dict(state)
        differs[stop] += _differences(second.state_dict(), state)
        if second.version != first.version or _scalars(second, DRIFTING, stop) != scalars[stop:]:
            differs[stop].append("a step")
        differs[stop] += _differences(second.state_dict(), whole.state_dict())
        differs[stop] += _differences(snapshot(second), snapshot(whole))
    return differs


@pytest.mark.parametrize("settings", [{}, AS_SHIPPED], ids=["", "as shipped"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_going_on_from_a_saved_state_is_bit_for_bit_the_same(
    ranks: RankPool, world_size: int, settings: dict[str, Any]
) -> None:
    """Before the first refresh, within the first and second one, between two, and with the first publication."""
    stops = [2, 4, 5, 6, 7, 9] if world_size == 2 else [5, 9]
    for differs in ranks.run(world_size, _resumed, stops, settings):
        assert differs == {stop: [] for stop in stops}


def _taken_back(group: dist.ProcessGroup) -> list[str]:
    """A state from before the first publication, loaded into a service that has published since."""
    service = trained(group, NOISY, stop=3)
    state = _through_a_file(service.state_dict())
    train(service, NOISY, start=3)
    assert service.version == 3
    service.load_state_dict(state)
    truth = trained(group, NOISY, stop=3)
    return _differences(service.state_dict(), truth.state_dict()) + _differences(snapshot(service), snapshot(truth))


def test_loading_takes_back_what_was_published_since(ranks: RankPool) -> None:
    assert ranks.run(2, _taken_back) == [[], []]


# ---- other ranks -----------------------------------------------------------------------------------------------


def _parts(group: dist.ProcessGroup, stop: int) -> dict[str, Any]:
    """A rank's state by dotted names."""
    state = trained(group, DRIFTING, stop=stop, bank_dtype=torch.bfloat16).state_dict()
    return {name.replace("/", ".")[1:]: value for name, value in _flat(_through_a_file(state)).items()}


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """As a checkpoint holds it: rows of all ranks, and of the rest rank 0's."""
    merged = dict(parts[0])
    for name, value in parts[0].items():
        if isinstance(value, Tensor) and kind_of(name) != "whole":
            merged[name] = torch.cat([part[name] for part in parts])
    return merged


def _gone_on(group: dist.ProcessGroup, merged: dict[str, Any], start: int) -> dict[str, Any]:
    service = build(group, DRIFTING, bank_dtype=torch.bfloat16)
    mine = {"class": service.classes, "cluster": service.clusters}
    first = service.bank.first
    state: dict[str, Any] = {}
    for name, value in merged.items():
        *path, last = name.split(".")
        place = state
        for step in path:
            place = place.setdefault(step, {})
        place[last] = value
        if isinstance(value, Tensor) and (kind := kind_of(name)) not in ("whole", "rank"):
            rows = slice(*mine[kind]) if kind in mine else slice(first, first + service.bank.size)
            place[last] = value[rows]
    service.load_state_dict(state)
    train(service, DRIFTING, start=start)
    return snapshot(service)


@pytest.mark.parametrize("stop", [5, 9])
@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 3), (3, 1)])
def test_other_ranks_go_on_where_a_refresh_was(ranks: RankPool, stop: int, before: int, after: int) -> None:
    """Within the first refresh, and within the second; neither 9 classes nor 11 clusters are multiples."""
    merged = _merged(ranks.run(before, _parts, stop))
    assert "refresh.done" in merged
    found = ranks.run(after, _gone_on, merged, stop)
    truth = ranks.run(after, _undisturbed)
    for mine, theirs in zip(found, truth, strict=True):
        assert mine["version"] == theirs["version"] == 3
        assert mine["statistics"] == pytest.approx(theirs["statistics"], abs=1e-9)
        for kind in ("by_cluster", "by_class", "whole"):
            for key, values in theirs[kind].items():
                assert torch.allclose(mine[kind][key], values, rtol=0, atol=2e-6), key


def _undisturbed(group: dist.ProcessGroup) -> dict[str, Any]:
    return snapshot(trained(group, DRIFTING, bank_dtype=torch.bfloat16))


# ---- refused ---------------------------------------------------------------------------------------------------


def _state(group: dist.ProcessGroup) -> dict[str, Any]:
    return _through_a_file(trained(group, NOISY, stop=7).state_dict())


def _refusal(group: dist.ProcessGroup, state: dict[str, Any], case: Case) -> str:
    service = build(group, case)
    with pytest.raises(ClusterStateError) as error:
        service.load_state_dict(state)
    assert service.version == 0
    return str(error.value)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sizes": [10] * 10}, "classes = 9, this run has 10"),
        ({"extra": 3}, "clusters = 11, this run has 12"),
        ({"sizes": [10] * 8 + [11]}, "samples = 90, this run has 91"),
        ({"dim": 7}, "expected (90, 7) embeddings on this rank, got (90, 8)"),
    ],
)
def test_a_state_of_other_data_is_refused(ranks: RankPool, changed: Case, said: str) -> None:
    (state,) = ranks.run(1, _state)
    assert said in ranks.run(1, _refusal, state, {**NOISY, **changed})[0]


def test_a_bank_of_other_classes_is_refused(ranks: RankPool) -> None:
    """As many samples and classes in all, yet other shares of the ranks."""
    states = ranks.run(2, _state)
    messages = ranks.run(2, _refusal, states[0], {**NOISY, "sizes": [14, 6] + [10] * 7, "flipped": 0, "seed": 1})
    assert all("embeddings on this rank" in message for message in messages)


def _check(group: dist.ProcessGroup, versions: list[int]) -> str:
    try:
        agree(versions[dist.get_rank(group)], "", group, CPU)
    except ClusterStateError as error:
        return str(error)
    return "agreed"


def test_versions_are_checked_on_all_ranks(ranks: RankPool) -> None:
    assert ranks.run(4, _check, [3, 3, 3, 3]) == ["agreed"] * 4
    for versions in ([3, 3, 4, 3], [2, 3, 4, 4], [0, 0, 0, 7]):
        for message in ranks.run(4, _check, versions):
            assert f"from {min(versions)} to {max(versions)}: resume all from the same checkpoint" in message


def _mixed(group: dist.ProcessGroup) -> tuple[str, int]:
    """One rank's state says another version: the next publication is refused on all ranks, and changes nothing."""
    service = trained(group, CASES["even"], stop=9)
    state = _through_a_file(service.state_dict())
    if dist.get_rank(group) == 1:
        state["published"]["version"] += 1
    service = build(group, CASES["even"])
    service.load_state_dict(state)
    before = service.version
    with pytest.raises(ClusterStateError) as error:
        train(service, CASES["even"], start=9, stop=STEPS)
    assert service.version == before
    return str(error.value), service._done


def test_ranks_of_different_versions_do_not_publish(ranks: RankPool) -> None:
    for message, done in ranks.run(2, _mixed):
        assert "cluster versions from 2 to 3" in message
        assert done == 10, "the step of the next publication"
