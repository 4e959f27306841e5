"""The experiments: what an arm may see, what a placebo hides, and what the command refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from benchmarks.experiments import glyphs
from benchmarks.experiments.__main__ import main as experiments
from benchmarks.experiments.arms import AGAINST
from benchmarks.experiments.cells import CELLS, Cell, make_split, true_accept_rates
from benchmarks.experiments.fitting import Recipe, fit
from benchmarks.experiments.nets import SmallMLP
from benchmarks.experiments.placebo import PLACEBOS
from benchmarks.experiments.pools import Pool
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
