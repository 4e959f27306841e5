"""IJB's files: every one that does not fit is refused with its row."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from evaluation.embed.files import EmbeddingFile
from evaluation.ijb import files as ijb_files
from evaluation.ijb.files import read_images, read_pairs, read_persons, read_points
from evaluation.ijb.templates import Templates, pooled
from tests.ijb_cases import Array, made_up, write

VECTORS = Path(__file__).parents[1] / "fixtures" / "vectors"


def _pooled(folder: Path, x_ND: Array, template_N: Array, media_N: Array, **options: object) -> Templates:
    np.save(folder / "x.npy", x_ND)
    halves = bool(options.pop("halves", False))
    return pooled(EmbeddingFile(folder / "x.npy", halves=halves), template_N, media_N, **options)  # type: ignore[arg-type]


def _replaced(name: str, number: int, change: Callable[[str], str]) -> Callable[[dict[str, Path]], None]:
    def apply(paths: dict[str, Path]) -> None:
        lines = paths[name].read_text().splitlines()
        lines[number - 1] = change(lines[number - 1])
        paths[name].write_text("\n".join(lines) + "\n")

    return apply


def _rows(change: Callable[[Array], Array]) -> Callable[[dict[str, Path]], None]:
    return lambda paths: np.save(paths["x"], change(np.load(paths["x"])))


def _set(row: int, value: float) -> Callable[[Array], Array]:
    def change(x: Array) -> Array:
        x[row] = value
        return x

    return change


WRONG: dict[str, tuple[Callable[[dict[str, Path]], object], str]] = {
    "a row less": (_rows(lambda x: x[:-1]), r"x.npy: expected \d+ rows, one an image of .*media.txt, found \d+"),
    "nan": (_rows(_set(7, math.nan)), r"x.npy: row 7: expected an embedding, found numbers that are not finite"),
    "inf": (_rows(_set(9, math.inf)), r"x.npy: row 9: .* not finite"),
    "zero": (_rows(_set(4, 0)), r"x.npy: row 4: .* only zeros.* embed these images again"),
    "whole numbers": (_rows(lambda x: x.astype(np.int32)), r"x.npy: expected embeddings.*found int32 of shape"),
    "one dimension": (_rows(lambda x: x[:, 0]), r"x.npy: expected embeddings.*found float32 of shape \(\d+,\)"),
    "no rows": (_rows(lambda x: x[:0]), r"x.npy: expected embeddings"),
    "complex": (_rows(lambda x: x.astype(np.complex64)), r"x.npy: expected embeddings"),
    "objects": (_rows(lambda x: x.astype(object)), r"x.npy: expected embeddings.*Python objects"),
    "cut short": (
        lambda p: p["x"].write_bytes(p["x"].read_bytes()[:-3]),
        r"x.npy: expected embeddings, floating point \(images, components\), as numpy.save writes them",
    ),
    "too long": (lambda p: p["x"].write_bytes(p["x"].read_bytes() + b"abc"), r"x.npy: expected \d+ bytes.*found \d+"),
    "no array": (lambda p: p["x"].write_bytes(b"0.1 0.2"), r"x.npy: expected embeddings"),
    "an empty file": (lambda p: p["x"].write_bytes(b""), r"x.npy: expected embeddings"),
    "no file": (lambda p: p["x"].unlink(), r"x.npy: cannot read it \(No such file"),
    "an archive": (
        lambda p: p["x"].write_bytes((VECTORS / "ijb.npz").read_bytes()),
        r"x.npy: expected embeddings.*in one .npy file, found NpzFile",
    ),
    "media: two words": (
        _replaced("media", 3, lambda s: "2.jpg 5"),
        "media.txt: line 3: expected `name template media`",
    ),
    "media: no number": (_replaced("media", 3, lambda s: "2.jpg 5 x"), "media.txt: line 3: .*found 2.jpg 5 x"),
    "media: empty": (lambda p: p["media"].write_text(""), "media.txt: expected lines .*found an empty file"),
    "media: bytes": (lambda p: p["media"].write_bytes(b"\xff\xfe"), "media.txt: line 1 or one after it: expected text"),
    "media: none": (lambda p: p["media"].unlink(), r"media.txt: cannot read it \(No such file"),
    "detector: other image": (
        _replaced("detector", 5, lambda s: "x" + s),
        r"detector.txt: line 5: expected 4.jpg, as in .*media.txt, found x4.jpg: .*same order",
    ),
    "detector: a row less": (
        lambda p: p["detector"].write_text("\n".join(p["detector"].read_text().splitlines()[:-1])),
        r"detector.txt: expected \d+ rows, one an image of .*media.txt",
    ),
    "detector: a point less": (
        _replaced("detector", 2, lambda s: s.rsplit(" ", 1)[0]),
        "detector.txt: line 2: expected a name, ten coordinates and a score",
    ),
    "detector: nan": (_replaced("detector", 2, lambda s: s.rsplit(" ", 1)[0] + " nan"), "detector.txt: line 2"),
    "detector: below zero": (
        _replaced("detector", 2, lambda s: s.rsplit(" ", 1)[0] + " -0.5"),
        "detector.txt: line 2: expected a score of at least 0, found -0.5",
    ),
    "pairs: unknown": (
        _replaced("pairs", 11, lambda s: "99999 " + s.split(" ", 1)[1]),
        "pairs.txt: line 11: template 99999 has no image in",
    ),
    "pairs: unknown second": (
        _replaced("pairs", 12, lambda s: s.split(" ")[0] + " 1 0"),
        "pairs.txt: line 12: template 1 has no image in",
    ),
    "pairs: label 2": (
        _replaced("pairs", 1, lambda s: s[:-1] + "2"),
        "pairs.txt: line 1: expected the label 0 or 1, found 2",
    ),
    "pairs: two numbers": (_replaced("pairs", 4, lambda s: s[:-2]), "pairs.txt: line 4: expected 3 whole numbers"),
    "gallery: no header": (
        lambda p: p["g1"].write_text("\n".join(p["g1"].read_text().splitlines()[1:])),
        "g1.txt: expected a header with TEMPLATE_ID and SUBJECT_ID",
    ),
    "gallery: a header alone": (
        lambda p: p["g1"].write_text("TEMPLATE_ID,SUBJECT_ID\n"),
        "g1.txt: expected templates, found a header alone",
    ),
    "gallery: unknown": (_replaced("g1", 3, lambda s: "99999,1,x"), "g1.txt: line 3: template 99999 has no image in"),
    "gallery: short line": (_replaced("g1", 3, lambda s: "5"), "g1.txt: line 3: expected whole numbers"),
    "gallery: two subjects": (
        _replaced("g1", 3, lambda s: s.split(",")[0] + ",1,a\n" + s.split(",")[0] + ",2,b"),
        r"g1.txt: line 4: template \d+ is of subject 2, on line 3 of 1",
    ),
    "gallery: none": (lambda p: p["g1"].unlink(), "g1.txt: cannot read it"),
    "gallery: bytes": (lambda p: p["g1"].write_bytes(b"TEMPLATE_ID,SUBJECT_ID\n\xff,1\n"), "g1.txt: expected a table"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(tmp_path: Path, name: str) -> None:
    paths = write(made_up(), tmp_path)
    WRONG[name][0](paths)
    with pytest.raises(DataError, match=WRONG[name][1]):
        _read_all(paths)


def _read_all(paths: dict[str, Path]) -> None:
    images = read_images(paths["media"])
    embeddings = EmbeddingFile(paths["x"])
    ijb_files.check_rows(paths["x"], embeddings.rows, images)
    points = read_points(paths["detector"], images)
    templates = pooled(embeddings, images.template_N, images.media_N, weight_N=points.score_N)
    read_pairs(paths["pairs"], templates.ids_T, paths["media"])
    read_persons(paths["g1"], templates.ids_T, paths["media"])


@pytest.mark.parametrize("table", [0, 1 << 24])
def test_files_are_read_as_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: int) -> None:
    monkeypatch.setattr(ijb_files, "_TABLE", table)
    case = made_up()
    paths = write(case, tmp_path)
    images = read_images(paths["media"])
    points = read_points(paths["detector"], images)
    ids = np.unique(case.template_N)
    pairs = read_pairs(paths["pairs"], ids, paths["media"])
    np.testing.assert_array_equal(images.template_N, case.template_N)
    np.testing.assert_array_equal(images.media_N, case.media_N)
    np.testing.assert_array_equal(points.score_N, case.score_N)
    assert points.points_N52[3].tolist() == [[3, 3.25], [3.5, 3.75], [4, 4.25], [4.5, 4.75], [5, 5.25]]
    np.testing.assert_array_equal(ids[np.column_stack([pairs.first_P, pairs.second_P])], case.pairs_P2)
    np.testing.assert_array_equal(pairs.same_P, case.same_P)
    paths["pairs"].write_text(f"{ids[-1] + 5} {ids[0]} 0\n")
    with pytest.raises(DataError, match="line 1: template"):
        read_pairs(paths["pairs"], ids, paths["media"])


def test_templates_without_a_direction_are_named(tmp_path: Path) -> None:
    x = np.array([[1.0, 2.0], [-1.0, -2.0], [1.0, 0.0]])
    with pytest.raises(DataError, match="template 4: expected a direction"):
        _pooled(tmp_path, x, np.array([4, 4, 9]), np.array([1, 2, 3]))
    with pytest.raises(DataError, match=r"template 9: .*are all its detector scores zero"):
        _pooled(tmp_path, x, np.array([4, 5, 9]), np.array([1, 2, 3]), weight_N=np.array([1.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match="expected 3 templates and media, got 2 and 3"):
        _pooled(tmp_path, x, np.array([4, 5]), np.array([1, 2, 3]))
    np.save(tmp_path / "odd.npy", np.ones((2, 3)))
    with pytest.raises(DataError, match=r"even number of components.*got 3"):
        EmbeddingFile(tmp_path / "odd.npy", halves=True)
