"""The experiments: planned, paired, resumable; what an arm may see and what a placebo hides."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from benchmarks.experiments import glyphs, plan, runs, tables
from benchmarks.experiments.__main__ import main as experiments
from benchmarks.experiments.arms import AGAINST, AGREED, AGREED_AGAINST, OWN, SURE
from benchmarks.experiments.cells import CELLS, Cell, make_split, true_accept_rates
from benchmarks.experiments.fitting import Recipe, fit
from benchmarks.experiments.nets import SmallMLP
from benchmarks.experiments.placebo import PLACEBOS
from benchmarks.experiments.pools import Pool
from benchmarks.experiments.runs import Run
from benchmarks.experiments.statistics import compare, holm
from benchmarks.experiments.tiers import TIERS, Tier
from clustering.method.margins import mean_margin
from configs.head import HeadConfig
from configs.schema import ClusteringConfig


@pytest.fixture(scope="module", autouse=True)
def no_group_is_left() -> Iterator[None]:
    """A training here opens this process's default group; others that run in it want their own."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def pool() -> Pool:
    """1,200 identities whose features name identity and image, so that a test can read them back."""
    identity, image = np.meshgrid(np.arange(1200), np.arange(24), indexing="ij")
    features = np.stack([identity, image], axis=2).astype(np.float32)
    return Pool("faces", np.zeros((1200, 24, 2, 2), np.uint8), features)


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


@pytest.mark.parametrize("name", CELLS)
def test_held_out_identities_are_in_no_training_set(pool: Pool, name: str) -> None:
    split = make_split(pool, CELLS[name], seed=3, images=False)
    trained, validation, test = ({int(i) for i in x[:, 0]} for x in (split.x, split.validation, split.test))
    assert not trained & validation
    assert not trained & test
    assert not validation & test
    assert len(validation) == 100
    assert len(test) == 300
    assert len(split.labels.unique()) >= split.num_classes - 3  # wrong labels may leave a small class empty
    assert int(split.labels.max()) < split.num_classes


def test_shares_of_a_cell_are_what_it_says(pool: Pool) -> None:
    split = make_split(pool, Cell(noise=0.2), seed=1, images=False)
    identity = split.x[:, 0].long()
    assert len(split.labels) == 600 * 24
    assert split.wrong.sum() == round(0.2 * 600 * 24)
    right = torch.from_numpy(~split.wrong)
    owner = torch.full((600,), -1).scatter(0, split.labels[right], identity[right])
    assert torch.equal(owner[split.labels] == identity, right)  # misnamed samples are just those marked so

    fragments = make_split(pool, Cell(fragments=0.2), seed=1, images=False)
    assert fragments.num_classes == 720
    strangers = make_split(pool, Cell(strangers=0.2), seed=1, images=False)
    unknown = {int(i) for i in strangers.x[torch.from_numpy(strangers.wrong), 0]}
    assert not unknown & {int(i) for i in strangers.x[torch.from_numpy(~strangers.wrong), 0]}
    sizes = make_split(pool, Cell(tail=0.7), seed=1, images=False).labels.bincount()
    assert sizes.max() == 24
    assert sizes.min() == round(24 * 20**-0.7)


def test_a_seed_gives_every_arm_the_same_set(pool: Pool) -> None:
    first, second, other = (make_split(pool, CELLS["noise tail"], seed=s, images=False) for s in (4, 4, 5))
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.labels, second.labels)
    assert not torch.equal(first.x, other.x)


def test_true_accept_rates_against_counting_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.nn.functional.normalize(torch.randn(36, 5, generator=generator, dtype=torch.float64))
    genuine, impostors = [], []
    for i in range(36):
        for j in range(i):
            (genuine if i // 12 == j // 12 else impostors).append(float(x_ND[i] @ x_ND[j]))
    threshold = sorted(impostors)[-round(0.1 * len(impostors))]
    expected = 100 * np.mean([cosine > threshold for cosine in genuine])
    assert true_accept_rates(x_ND, (0.1,)) == pytest.approx([expected])


@pytest.mark.parametrize("tier", TIERS.values(), ids=list(TIERS))
def test_every_arm_may_try_as_often(tier: Tier) -> None:
    tried = [len(arm.margins) for name, arm in tier.arms.items() if name not in tier.arcface]
    assert set(tried) == {3} == {len(tier.arcface)}
    assert {"full", *AGAINST} <= tier.arms.keys()
    for name, arm in tier.arms.items():
        for margin in arm.margins:
            assert tier.recipe(name, margin).optim.lr == tier.lr  # and the configuration's own checks


def test_seeds_of_tuning_are_not_those_that_count() -> None:
    seeds = [*plan.TUNING_SEEDS, *(seed for round_ in (0, *plan.ROUNDS) for seed in plan.seeds_of(round_))]
    assert len(set(seeds)) == len(seeds) == 42


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
    alike = ("full", AGREED, OWN)  # the others take the first one's
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


def _fitted(placebo: str) -> Any:
    """A short training on 40 classes of which some are wide."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(40).repeat_interleave(12)
    centres = torch.randn(40, 16, generator=generator)
    width = torch.linspace(0.2, 2.0, 40)[labels, None]
    x = centres[labels] + width * torch.randn(len(labels), 16, generator=generator)
    clustering = ClusteringConfig(warmup_fraction=0.1, ramp_fraction=0.0, margin_low=0.2, margin_high=0.6)
    recipe = Recipe(epochs=6, batch=48, head=HeadConfig(margin=0.4, scale=16.0), clustering=clustering, placebo=placebo)
    net = SmallMLP(features=16, embedding_size=8)
    return fit(net, x, labels, num_classes=40, recipe=recipe, augment=lambda x, _: x, seed=2)


def test_a_training_is_deterministic_and_learns() -> None:
    first, second = _fitted(""), _fitted("")
    assert first.loss_by_epoch == second.loss_by_epoch
    assert first.loss_by_epoch[-1] < first.loss_by_epoch[0] / 2
    assert first.service.version >= 3


def test_placebos_hide_what_they_say() -> None:
    honest, levels, everything = (_fitted(placebo).service for placebo in PLACEBOS)
    width = torch.arange(40.0)

    def correlation(service: Any) -> float:
        return float(torch.corrcoef(torch.stack([service.hard_levels_C, width]))[0, 1])

    assert correlation(honest) > 0.5
    assert abs(correlation(levels)) < 0.4
    assert abs(correlation(everything)) < 0.4
    published = everything._published
    assert torch.equal(published.owner_K[:40], torch.arange(40))
    assert (published.owner_K[40:] == -1).all()
    assert torch.equal(published.code_I.abs().long() - 1, torch.arange(40).repeat_interleave(12))
    counted_I = published.code_I > 0
    assert published.samples_R.tolist() == counted_I.view(40, 12).sum(1).tolist(), "the lot does not count"
    assert float(mean_margin(published.margin_R, published.samples_R.double(), 0)) == pytest.approx(0.4, abs=1e-9)
    for lying in (levels, everything):
        found = lying._honest
        assert sorted(found.hard_R.tolist()) == pytest.approx(sorted(lying._published.hard_R.tolist()))
        assert int((found.code_I < 0).sum()) == int((lying._published.code_I < 0).sum())
        refresh = lying._new_refresh()
        assert torch.equal(refresh.run.centres_SD, found.c_SD), "the next refresh goes on from the truth"
    assert torch.equal(levels._published.code_I, levels._honest.code_I)
    assert sorted(published.f_R.tolist()) == sorted(everything._honest.f_R.tolist())


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


@pytest.mark.parametrize("option", ["--jobs", "--seeds"])
def test_no_jobs_and_no_seeds_are_refused(capsys: pytest.CaptureFixture[str], option: str) -> None:
    with pytest.raises(SystemExit):
        experiments(["run", option, "0"])
    assert f"{option}: expected at least 1, got 0" in capsys.readouterr().err


def test_a_report_of_nothing_is_one_line_and_the_old_one_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.md"
    out.write_text("of before")
    assert experiments(["report", "--lines", str(tmp_path / "none.jsonl"), "--cells", "tail", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "none.jsonl: expected runs on features in tail, got none" in said
    assert said.count("\n") == 1
    assert out.read_text() == "of before"


def test_an_arm_of_another_tier_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        experiments(["run", "--tier", "images", "--only", "full", "arcface 0.7"])
    assert "--only: expected arms of the tier of images, arcface 0.1, " in capsys.readouterr().err


def test_missing_fonts_are_named_with_the_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(glyphs, "_FOLDER", tmp_path)
    with pytest.raises(glyphs.MissingFontsError, match="apt-get install fonts-noto-cjk"):
        glyphs.open_faces()


def test_what_a_camera_sees_depends_on_the_seed_alone() -> None:
    glyph = np.full((30, 20), 255, np.uint8)
    one, same, other = (glyphs._seen(glyph, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.shape == (glyphs.SIDE, glyphs.SIDE)
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert one[8:24, 10:22].mean() > one[:4].mean() + 30
