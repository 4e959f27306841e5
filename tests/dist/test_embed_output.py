"""Embeddings that ranks write: the same rows on any number of them, in one file or in parts; errors alike on all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist

from backbones import build_backbone
from clustering.service.parts import PartFiles
from data.errors import DataError
from evaluation.embed import records as embed_records
from evaluation.embed.output import Output
from evaluation.embed.records import Embedded, embed_all, rows_of
from evaluation.embed.sources import FolderImages
from tests.image_cases import jpeg
from tests.ranks import WORLD_SIZES, RankPool

BATCH = 4


def _written(group: dist.ProcessGroup, faces: str, out: str, force: bool) -> Embedded | str:
    """What was found, or the error; then a collective, in which no rank may be missing."""
    torch.manual_seed(0)
    backbone = build_backbone("small", embedding_size=16).eval()
    found: Embedded | str
    try:
        found = embed_all(
            backbone,
            FolderImages(Path(faces.format(rank=dist.get_rank(group)))),
            Output(Path(out), force=force),
            batch_size=BATCH,
            threads=1,
            dtype=np.float32,
            group=group,
        )
    except DataError as error:
        found = str(error)
    present = torch.ones(1)
    dist.all_reduce(present, group=group)
    assert present == dist.get_world_size(group)
    return found


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 images of four identities, 13 of which do not decode."""
    folder = tmp_path_factory.mktemp("faces")
    for number in range(27):
        path = folder / f"{number // 8}" / f"{number:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jpeg(number) if number % 2 else b"none")
    (folder / "0" / "00.jpg").write_bytes(jpeg(0))
    return folder


@pytest.fixture(scope="module")
def truth(ranks: RankPool, faces: Path, tmp_path_factory: pytest.TempPathFactory) -> npt.NDArray[Any]:
    """The rows that one rank writes."""
    out = tmp_path_factory.mktemp("truth") / "x.npy"
    ranks.run(1, _written, str(faces), str(out), False)
    return np.asarray(np.load(out))


@pytest.mark.parametrize("name", ["x.npy", "parts"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_any_number_of_ranks_writes_the_same_bits(
    ranks: RankPool, faces: Path, truth: npt.NDArray[Any], tmp_path: Path, world_size: int, name: str
) -> None:
    out = tmp_path / name
    answers = ranks.run(world_size, _written, str(faces), str(out), False)
    assert answers == [Embedded(13, 0, tuple(range(2, 22, 2)))] * world_size
    np.testing.assert_array_equal(PartFiles(out).read(0, 99), truth)
    assert np.flatnonzero(~truth.any(axis=1)).tolist() == list(range(2, 27, 2))
    stem = out.stem
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {name, f"{stem}.names.txt", f"{stem}.labels.npy"}
    assert np.load(tmp_path / f"{stem}.labels.npy").tolist() == [number // 8 for number in range(27)]
    assert (tmp_path / f"{stem}.names.txt").read_text().split() == [f"{n // 8}/{n:02}.jpg" for n in range(27)]
    if name == "parts":
        assert {path.name for path in out.iterdir()} == {
            f"part-{rank:05}-of-{world_size:05}.npy" for rank in range(world_size)
        }


def test_parts_of_another_number_of_ranks_do_not_stay(
    ranks: RankPool, faces: Path, truth: npt.NDArray[Any], tmp_path: Path
) -> None:
    out = tmp_path / "parts"
    ranks.run(4, _written, str(faces), str(out), False)
    ranks.run(2, _written, str(faces), str(out), True)
    assert len(list(out.iterdir())) == 2
    np.testing.assert_array_equal(PartFiles(out).read(0, 99), truth)


def test_more_ranks_than_batches(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces" / "0.jpg").write_bytes(jpeg(0))
    for name in ("x.npy", "parts"):
        ranks.run(4, _written, str(tmp_path / "faces"), str(tmp_path / name), False)
    assert [len(np.load(path)) for path in sorted((tmp_path / "parts").iterdir())] == [1, 0, 0, 0]
    np.testing.assert_array_equal(PartFiles(tmp_path / "parts").read(0, 9), np.load(tmp_path / "x.npy"))


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 16, 27, 31])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_take_all_rows_once_in_whole_batches(rows: int, world_size: int) -> None:
    mine = [rows_of(rank, world_size, rows, BATCH) for rank in range(world_size)]
    assert [row for of_rank in mine for row in of_rank] == list(range(rows))
    assert all(of_rank.start % BATCH == 0 for of_rank in mine if of_rank)


@pytest.mark.parametrize("name", ["x.npy", "parts"])
def test_ranks_that_see_other_images_refuse_alike(ranks: RankPool, tmp_path: Path, name: str) -> None:
    for rank, image in ((0, "a.jpg"), (1, "b.jpg")):
        (tmp_path / f"faces{rank}").mkdir()
        (tmp_path / f"faces{rank}" / image).write_bytes(jpeg(0))
    answers = ranks.run(2, _written, str(tmp_path / "faces{rank}"), str(tmp_path / name), False)
    assert all("expected the same images on all ranks, found others" in str(answer) for answer in answers)
    assert not list(tmp_path.glob(f"*{name}*"))


def _full_on_one(group: dist.ProcessGroup, faces: str, out: str) -> Embedded | str:
    plain = embed_records._embed

    def full(*args: Any) -> Any:
        if dist.get_rank(group) == 1:
            raise OSError(28, "No space left on device")
        return plain(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed_records, "_embed", full)
        return _written(group, faces, out, True)


@pytest.mark.parametrize("name", ["x.npy", "parts"])
def test_one_rank_that_cannot_write_ends_all_and_leaves_nothing_new(
    ranks: RankPool, faces: Path, tmp_path: Path, name: str
) -> None:
    ranks.run(2, _written, str(faces), str(tmp_path / name), False)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    answers = [str(answer) for answer in ranks.run(2, _full_on_one, str(faces), str(tmp_path / name), timeout=60)]
    assert "another rank cannot write it" in answers[0]
    assert "cannot write it (No space left on device): free space" in answers[1]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
