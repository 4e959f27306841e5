"""A run begins with what one of ours has learnt, on other classes: by number, name, table, and means of images."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data.__main__ import main as data
from data.making.rewrite import write_set
from data.rec.records import RecordSet
from partial_fc.head import initial_centres
from tests.attack_cases import Say
from tests.integration.conftest import IDENTITIES, IMAGES, Run
from tests.start_cases import OLD, REFUSED, D, exact_means, first_loss
from training.__main__ import main
from training.checkpoint import Saved, place_of
from training.checkpoint.places import Place
from training.warm import warm_start

Said = pytest.CaptureFixture[str]
PLAIN = "clustering.enabled=false"


def _data(*arguments: object) -> None:
    assert data([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def sets(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a: persons 0 … 17. b: 12 … 23. named: both, by name. behind: a, and behind it b."""
    folder = tmp_path_factory.mktemp("sets")
    shutil.copytree(packed, folder / "all")
    (folder / "all" / "identities.txt").write_text("".join(f"person {n:02}\n" for n in range(IDENTITIES)))
    for name, persons in (("a", range(OLD)), ("b", range(12, IDENTITIES))):
        (folder / "list").write_text("".join(f"{person}\n" for person in persons))
        _data("subset", folder / "all", "--out", folder / name, "--list", folder / "list")
    _data("merge", folder / "b", folder / "a", "--out", folder / "named", "--by-name")
    _data("merge", folder / "b", folder / "a", "--out", folder / "behind")
    return folder


@pytest.fixture(scope="module")
def _kept() -> dict[str, Path]:
    return {}


@pytest.fixture
def learnt(
    _kept: dict[str, Path], sets: Path, train_here: Run, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Saved]:
    """A run on a that ended, made once; its last checkpoint."""
    if "run" not in _kept:
        run = tmp_path_factory.mktemp("learnt") / "run"
        done = train_here(PLAIN, f"train.output={run}", "train.epochs=3", "head.margin=0.1", data=sets / "a")
        assert done.returncode == 0, done.stderr
        _kept["run"] = run
    return _kept["run"], Saved(place_of(str(_kept["run"] / "checkpoints")), "step_000000018")


@pytest.fixture
def start(command: Callable[..., list[str]]) -> Callable[..., int]:
    """`start(set, *arguments, settings=…)`: the command, for a run in tmp_path/run."""

    def run(of: Path, *arguments: object, settings: tuple[str, ...] = ()) -> int:
        tail = command(1, PLAIN, *settings, data=of)
        threads = torch.get_num_threads()
        try:
            return main(["start", *tail[tail.index("--set") :], *map(str, arguments)])
        finally:
            torch.set_num_threads(threads)
            if dist.is_initialized():
                dist.destroy_process_group()  # an error leaves it to the end of its process

    return run


def _begun(tmp_path: Path) -> Saved:
    saved = Saved(place_of(str(tmp_path / "run" / "checkpoints")), "step_000000000")
    assert saved.manifest.step == 0
    assert not [name for name in saved.names if name.startswith("optimizer.")]
    return saved


def _persons(folder: Path) -> list[int]:
    """Of each class, by its name."""
    return [int(line.split()[1]) for line in (folder / "identities.txt").read_text().splitlines()]


def test_by_name_with_means_of_images_for_the_others(
    learnt: tuple[Path, Saved], sets: Path, start: Callable[..., int], train_here: Run, tmp_path: Path, capsys: Said
) -> None:
    run, saved = learnt
    how = ("--by-name", "--others", "mean", "--images", "4")
    cut = ("eval.batch_size=5",)  # classes lie across batches of embeddings
    assert start(sets / "named", "--from", run, *how, settings=cut) == 0, capsys.readouterr().err
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(str(tmp_path / "run" / "checkpoints" / "step_000000000: small and 24 class centres"))
    assert said[1:] == [
        "18 classes by name, 0 of several old ones, 6 by the mean of their images, 0 at random",
        "24 images were embedded, 0 could not be",
        "0 of 18 old class centres are not used",
    ]
    begun, old_CD = _begun(tmp_path), saved.read("head.weight")
    new_CD, persons = begun.read("head.weight"), _persons(sets / "named")
    known = [label for label, person in enumerate(persons) if person < OLD]
    others = [label for label, person in enumerate(persons) if person >= OLD]
    assert torch.equal(new_CD[known], old_CD[[persons[label] for label in known]])
    length = old_CD.double().norm(dim=1).mean()
    expected = exact_means(saved, sets / "named", others, 4) * length
    torch.testing.assert_close(new_CD[others].double(), expected, rtol=0, atol=1e-5 * float(length))
    for name in saved.names:
        if name.startswith("backbone."):
            assert torch.equal(begun.read(name), saved.read(name)), name

    for name, resumed in (("run", True), ("fresh", False)):
        done = train_here(PLAIN, "train.log_steps=1", "train.stop_after_steps=1", data=sets / "named", name=name)
        assert done.returncode == 0, done.stderr
        assert Saved(place_of(str(tmp_path / name / "checkpoints")), "step_000000001").manifest.step == 1
        assert (tmp_path / name / "checkpoints" / "step_000000000").exists() == resumed
    assert first_loss(tmp_path / "run") < 0.8 * first_loss(tmp_path / "fresh")

    assert start(sets / "named", "--from", run, *how) == 2
    assert "expected no checkpoint, found step_000000001" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_000000001\n", "it still counts"


def test_by_the_table_that_merge_wrote_and_new_centres_for_the_others(
    learnt: tuple[Path, Saved], sets: Path, start: Callable[..., int], tmp_path: Path, capsys: Said
) -> None:
    run, saved = learnt
    table = sets / "behind" / "labels.csv"
    assert start(sets / "behind", "--from", run / "checkpoints", "--map", table, "--others", "random") == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "18 classes by map, 0 of several old ones, 0 by the mean of their images, 12 at random",
        "0 of 18 old class centres are not used",
    ]
    new_CD = _begun(tmp_path).read("head.weight")
    assert torch.equal(new_CD[12:], saved.read("head.weight"))
    seed = saved.values["settings"]["train"]["seed"]
    assert torch.equal(new_CD[:12], initial_centres(0, 30, D, seed)[:12])


def test_classes_that_were_joined_and_left_out(
    learnt: tuple[Path, Saved], sets: Path, start: Callable[..., int], tmp_path: Path, capsys: Said
) -> None:
    run, saved = learnt
    table, folder = tmp_path / "map.csv", tmp_path / "joined"
    table.write_text("set,label,new_label\n1,3,0\n1,9,0\n1,5,1\n1,0,2\n")
    _data("merge", sets / "a", "--out", folder, "--map", table)
    settings = ("head.centre_dtype=bf16", "train.batch_size=8")
    assert start(folder, "--from", run, "--map", folder / "labels.csv", settings=settings) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "2 classes by map, 1 of several old ones, 0 by the mean of their images, 0 at random",
        "14 of 18 old class centres are not used",
    ]
    new_CD, old_CD = _begun(tmp_path).read("head.weight"), saved.read("head.weight")
    assert torch.equal(new_CD[1:], old_CD[[5, 0]].bfloat16())
    exact_CD = old_CD.double()
    both_D = exact_CD[3] / exact_CD[3].norm() + exact_CD[9] / exact_CD[9].norm()  # as many images
    expected = both_D / both_D.norm() * exact_CD[[3, 9, 5, 0]].norm(dim=1).mean()
    torch.testing.assert_close(new_CD[0].double(), expected, rtol=0, atol=0.02 * float(expected.norm()))


@pytest.mark.parametrize("suffix", ["npy", "pt", "safetensors"])
def test_from_exported_files(
    learnt: tuple[Path, Saved], sets: Path, start: Callable[..., int], tmp_path: Path, capsys: Said, suffix: str
) -> None:
    run, saved = learnt
    centres, backbone = tmp_path / f"centres.{suffix}", tmp_path / f"backbone.{suffix.replace('npy', 'pt')}"
    for what, out in (("centres", centres), ("backbone", backbone)):
        assert main(["checkpoint", "export", str(run), "--what", what, "--out", str(out)]) == 0
    (tmp_path / "old_to_new.txt").write_text("0 17\n1 2\n2 11\n")
    _data("subset", sets / "b", "--out", tmp_path / "few", "--identities", "3")
    arguments = ("--centres", centres, "--map", tmp_path / "old_to_new.txt")
    assert start(tmp_path / "few", "--from", backbone, *arguments) == 0, capsys.readouterr().err
    begun = _begun(tmp_path)
    assert torch.equal(begun.read("head.weight"), saved.read("head.weight")[[17, 2, 11]])
    for name in saved.names:
        if name.startswith("backbone."):
            assert torch.equal(begun.read(name), saved.read(name)), name


def test_same_classes_on_another_schedule(
    learnt: tuple[Path, Saved], sets: Path, start: Callable[..., int], train_here: Run, tmp_path: Path, capsys: Said
) -> None:
    run, saved = learnt
    settings = ("optim.lr=1e-12", "train.epochs=2")
    assert start(sets / "a", "--from", run / "checkpoints" / "step_000000018", "--same", settings=settings) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    done = train_here(PLAIN, *settings, data=sets / "a")
    assert done.returncode == 0, done.stderr
    trained = Saved(place_of(str(tmp_path / "run" / "checkpoints")), "step_000000012")
    torch.testing.assert_close(trained.read("head.weight"), saved.read("head.weight"), rtol=0, atol=1e-6)


def test_a_backbone_alone_and_images_that_do_not_decode(
    learnt: tuple[Path, Saved], sets: Path, start: Callable[..., int], tmp_path: Path, capsys: Said
) -> None:
    run, saved = learnt
    records = RecordSet.open(sets / "a")
    images = [(label, bytes(image)) for label, image in map(records.image, range(4 * IMAGES))]
    cut = [(label, image[:50] if label == 2 else image) for label, image in images]
    cut[0] = (0, b"no image")
    write_set(tmp_path / "cut", cut, num_classes=5, image_size=(112, 112), texts={}, force=False)
    arguments = ("--from", run / "backbone.pt", "--others", "mean")
    assert start(tmp_path / "cut", *arguments, settings=("train.batch_size=8",)) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.splitlines()[1:] == [
        "0 classes by number, 0 of several old ones, 3 by the mean of their images, 2 at random",
        "23 images were embedded, 9 could not be; of 2 classes none was left, which begin at random",
    ]
    new_CD = _begun(tmp_path).read("head.weight")
    fresh_CD = initial_centres(0, 5, D, saved.values["settings"]["train"]["seed"])
    assert torch.equal(new_CD[[2, 4]], fresh_CD[[2, 4]])
    length = fresh_CD.norm(dim=1).mean()
    expected = exact_means(saved, sets / "a", [1, 3], IMAGES) * length
    torch.testing.assert_close(new_CD[[1, 3]].double(), expected, rtol=0, atol=1e-5 * float(length))
    assert float(new_CD[0].norm()) == pytest.approx(float(length), rel=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_be_wrong_in_silence_is_refused(
    learnt: tuple[Path, Saved],
    sets: Path,
    start: Callable[..., int],
    tmp_path: Path,
    capsys: Said,
    said: Say,
    name: str,
) -> None:
    arguments, settings, message = REFUSED[name]
    of_start = arguments(learnt[0], sets, tmp_path)
    capsys.readouterr()
    assert start(sets / "named", *of_start, settings=settings) == 2
    assert message in said()
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


def test_a_run_with_sub_centres_and_one_whose_centres_are_not_finite(
    learnt: tuple[Path, Saved], sets: Path, start: Callable[..., int], tmp_path: Path, said: Say, capsys: Said
) -> None:
    assert (
        start(sets / "a", "--from", learnt[0] / "backbone.pt", "--others", "random", settings=("head.subcentres=2",))
        == 0
    )
    shutil.move(tmp_path / "run", tmp_path / "two")
    capsys.readouterr()
    assert start(sets / "a", "--from", tmp_path / "two", "--same") == 2
    assert "expected a head with one centre for each class, found head.subcentres = 2" in said()

    np.save(tmp_path / "centres.npy", np.full((OLD, D), np.nan, np.float32))
    assert start(sets / "a", "--from", learnt[0], "--centres", tmp_path / "centres.npy", "--same") == 2
    assert "not finite" in said()
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


def test_as_many_classes_of_other_records_are_said(
    learnt: tuple[Path, Saved], sets: Path, start: Callable[..., int], tmp_path: Path, capsys: Said
) -> None:
    _data("shuffle", sets / "a", "--out", tmp_path / "shuffled")
    capsys.readouterr()
    assert start(tmp_path / "shuffled", "--from", learnt[0], "--same") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("the records are others than the old run's")
    assert torch.equal(_begun(tmp_path).read("head.weight"), learnt[1].read("head.weight"))


def test_places_that_cannot_be_written(
    learnt: tuple[Path, Saved],
    sets: Path,
    start: Callable[..., int],
    tmp_path: Path,
    said: Say,
    capsys: Said,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    capsys.readouterr()
    settings = (f"train.checkpoints={tmp_path / 'file'}",)
    assert start(sets / "a", "--from", learnt[0], "--same", settings=settings) == 2
    assert f"{tmp_path / 'file'}: cannot read it (Not a directory)" in said()

    def full(place: Place, name: str, rows: object) -> dict[str, object]:
        with place.create(name) as file:
            file.write(b"some of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

    monkeypatch.setattr(warm_start, "write", full)
    assert start(sets / "a", "--from", learnt[0], "--same") == 2
    assert "cannot write it (No space left on device): make room there" in said()
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))
    monkeypatch.undo()
    assert start(sets / "a", "--from", learnt[0], "--same") == 0
