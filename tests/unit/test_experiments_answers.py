"""The experiments' runs and what they answer: seeds, margins, lines on record, paired statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.experiments import plan, runs, tables
from benchmarks.experiments.__main__ import main as experiments
from benchmarks.experiments.arms import AGAINST, AGREED, AGREED_AGAINST, LOOSE, ONE, OWN, SURE
from benchmarks.experiments.runs import Run
from benchmarks.experiments.statistics import compare, holm
from benchmarks.experiments.tiers import TIERS


def test_wilcoxon_and_interval_of_a_known_case() -> None:
    found = compare([5.0, 6.0, 7.0, 8.0, 9.0, 10.0], [4.0, 4.0, 4.0, 4.0, 4.0, 4.0])
    assert found.mean == 3.5
    assert found.p == 2 / 2**6  # all six differences of one sign: the two extreme of 2^6 sign patterns
    assert found.mean - found.low == pytest.approx(2.570582 * np.sqrt(3.5) / np.sqrt(6), rel=1e-5)
    assert compare([1.0, 1.0], [1.0, 1.0]).p == 1
    with pytest.raises(ValueError, match="two or more"):
        compare([1.0], [2.0])


def test_holm_steps_down_and_never_falls() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_seeds_of_tuning_are_not_those_that_count() -> None:
    seeds = [*plan.TUNING_SEEDS, *(seed for round_ in (0, *plan.ROUNDS) for seed in plan.seeds_of(round_))]
    assert len(set(seeds)) == len(seeds) == 52


FEATURES = TIERS["features"]


def _line(arm: str, margin: float, seed: int, *, validation: float = 0.0, test: float = 0.0) -> dict[str, Any]:
    run = Run("features", "faces", "noise tail", arm, margin, seed)
    rates = {"validation": [validation, 0.0], "test": [test, 0.0], "loss": [2.0, 1.0], "pool": "p"}
    names = ("tier", "kind", "cell", "arm", "margin", "seed")
    return {**dict(zip(names, run.key, strict=True)), **rates, "settings": runs.settings_of(run)}


def test_margins_are_chosen_on_validation_of_the_tuning_seeds_alone() -> None:
    lines = [
        _line("full", margin, seed, validation=rate, test=100 - rate)
        for margin, rate in ((0.3, 5.0), (0.5, 7.0), (0.7, 6.0))
        for seed in plan.TUNING_SEEDS
    ]
    lines.append(_line("full", 0.3, 0, validation=99.0))
    alike = ("full", AGREED, OWN, ONE, LOOSE)  # the others take the first one's
    assert plan.chosen_margins(lines, "features") == {("faces", "noise tail", name): 0.5 for name in alike}
    assert not plan.tuning_runs("features", ["faces"], ["clean"], [AGREED])
    assert plan.chosen_margins(lines[1:], "features") == {}, "not before all tries are there"


def test_margins_come_from_the_cell_that_is_most_alike() -> None:
    assert [plan.tuned_in(cell) for cell in ("clean", "tail", "fragments", "noise", "strangers tail")] == [
        *["clean"] * 3,
        *["noise tail"] * 2,
    ]
    runs_of = {
        cell: plan.tuning_runs("images", ["faces"], [cell], ["full"]) for cell in ("tail", "noise", "strangers tail")
    }
    assert {run.cell for run in runs_of["tail"]} == {"clean"}
    assert runs_of["noise"] == runs_of["strangers tail"]
    assert len(runs_of["noise"]) == len(plan.TUNING_SEEDS) * len(FEATURES.arms["full"].margins)


def test_a_run_is_done_once_and_again_when_its_settings_change(tmp_path: Path) -> None:
    run = Run("features", "faces", "clean", "pull", 0.5, 0)
    line = {**_line("pull", 0.5, 0), "cell": "clean", "settings": runs.settings_of(run)}
    pools = {"faces": "p"}
    assert runs.missing([run], [], pools) == [run]
    assert runs.missing([run], [line], pools) == []
    assert runs.missing([run], [line], {"faces": "drawn elsewhere"}) == [run]

    file = tmp_path / "lines.jsonl"
    runs._append(file, line)
    file.write_text(file.read_text() + '{"tier": "fea')  # a crash in the middle of a line
    assert runs.read_results(file) == [line]
    other, newer = {**line, "seed": 1}, {**line, "loss": [3.0, 2.0]}
    changed = json.loads(json.dumps({**line, "seed": 3}))
    changed["settings"]["epochs"] += 1
    for later in (other, newer, changed, {**line, "seed": 4, "arm": "of old"}):
        runs._append(file, later)
    assert runs.read_results(file) == [newer, other], "with other settings it is another run"
    runs._append(file, {**line, "seed": 2, "pool": "q"})
    assert [result["seed"] for result in runs.read_results(file)] == [2], "one pool at a time"
    elsewhere = _line("pull", 0.5, 0)
    runs._append(file, elsewhere)
    assert elsewhere in runs.read_results(file), "another cell may have another pool"
    assert len(runs.read_results(file)) == 2


def test_answers_name_the_best_arcface_of_the_runs_and_correct_for_three_questions() -> None:
    chosen = {
        **{name: FEATURES.arms[name].margins[0] for name in FEATURES.arcface},
        **dict.fromkeys(("full", *AGAINST), 0.5),
    }
    lines = [
        _line(name, margin, seed, validation=float(margin == chosen[name]))
        for name in chosen
        for margin in FEATURES.arms[name].margins
        for seed in plan.TUNING_SEEDS
    ]
    for seed in plan.seeds_of(0):
        for place, name in enumerate(FEATURES.arcface):
            lines.append(_line(name, chosen[name], seed, test=20.0 + place + 0.1 * seed))
        lines.append(_line("full", 0.5, seed, test=24.0 + 0.1 * seed + 0.01 * seed))
        lines.append(_line("full", 0.7, seed, test=99.0))  # another margin than the chosen one
        lines.append(_line("full, levels shuffled", 0.5, seed, test=24.0 + 0.1 * seed + (0.02 if seed % 2 else -0.02)))
        lines.append(_line("full, all shuffled", 0.5, seed, test=22.0 + 0.1 * seed))
    first, second, third = tables.answers(tables.group(lines, "features"), "features")
    assert first.startswith("faces, noise tail: full above arcface 0.7? yes: +2.04")
    assert first.endswith("p 0.006")
    assert "full, levels shuffled? " in second
    assert "full, all shuffled? yes" in third
    (missing,) = tables.answers(tables.group(lines[:-1], "features"), "features")
    assert "not answered yet" in missing
    rows = tables.rows(tables.group(lines, "features")["faces", "noise tail"], "features")
    assert [row[1] for row in rows] == [*FEATURES.arcface, "full", *AGAINST]
    assert rows[2][4] == "best"
    assert rows[3][0] == "10"


def test_the_lines_on_record_still_count() -> None:
    """A new setting, or another default, makes every line another run's: `arms._OFF` keeps what they had."""
    files = sorted((Path(runs.__file__).parents[1] / "results").glob("experiments*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    count = {key: sum(map(runs._is_current, group)) for key, group in _by_arm(lines).items()}
    assert all(count[tier, arm] >= 10 for tier in TIERS for arm in TIERS[tier].arms if (tier, arm) in count)
    assert {arm for tier, arm in count if tier == "images"} == set(TIERS["images"].arms)


def _by_arm(lines: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        found.setdefault((line["tier"], line["arm"]), []).append(line)
    return found


def test_fresh_seeds_answer_for_what_was_changed() -> None:
    lines = [
        _line(name, margin, seed, validation=float(margin == FEATURES.arms[name].margins[0]), test=20.0)
        for name in ("arcface 0.3", SURE)
        for margin in FEATURES.arms[name].margins
        for seed in plan.TUNING_SEEDS
    ]
    for seed in plan.seeds_of(1)[:4]:
        lines += [_line("arcface 0.3", 0.3, seed, test=20.0 + seed), _line(SURE, 0.3, seed, test=19.9 + seed)]
    for line in lines:
        line["cell"] = "clean"
    assert tables.group(lines, "features") == {}
    (said,) = tables.fresh_answers(tables.group(lines, "features", plan.seeds_of(1)))
    assert said.startswith("faces, clean, 4 fresh seeds: full, sure worse than arcface 0.3 by over 0.2? no: -0.10")


def test_a_later_round_may_ask_the_primary_questions_again() -> None:
    against = ("arcface 0.3", *AGREED_AGAINST)
    tries = ("arcface 0.3", "full", *AGAINST)  # the others are like these
    lines = [
        _line(name, margin, seed, validation=float(margin == 0.3))
        for name in tries
        for margin in FEATURES.arms[name].margins
        for seed in plan.TUNING_SEEDS
    ]
    for seed in plan.seeds_of(3):
        lines.append(_line(AGREED, 0.3, seed, test=22.0 + 0.1 * seed))
        lines += [
            _line(name, 0.3, seed, test=below + 0.13 * seed) for name, below in zip(against, (18, 22, 20), strict=True)
        ]
    said = tables.fresh_answers(tables.group(lines, "features", plan.seeds_of(3)))
    words = [
        line.partition("faces, noise tail, fresh seeds: full, agreed above ")[2][: len(other) + 6]
        for line, other in zip(said, against, strict=True)
    ]
    assert words == [f"{other}? {answer}" for other, answer in zip(against, ("yes:", "no: ", "yes:"), strict=True)]


@pytest.mark.parametrize("text", ["nonsense", '{"arm": "full"}', "[1]", '{"tier": "fea'])
def test_a_file_of_something_else_is_one_line_and_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text(f"{json.dumps(_line('full', 0.5, 0))}\n{text}\n")
    before = file.read_bytes()
    for command in ("tune", "run", "report"):
        assert experiments([command, "--lines", str(file), "--out", str(tmp_path / "out.md")]) == 2
        said = capsys.readouterr().err
        assert "lines.jsonl, line 2: expected the JSON of a run" in said
        assert said.count("\n") == 1
    assert file.read_bytes() == before
