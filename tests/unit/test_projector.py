"""What the embedding projector gets: which images, who is who, and the files as TensorBoard reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tensorboard.plugins.projector import projector_config_pb2

from data.verification_bin import VerificationSet
from tests.image_cases import jpeg, picture
from training.showing.metrics import RunLog
from training.showing.projector import choose, sprites


def _set(*pairs: tuple[str, str, bool]) -> VerificationSet:
    images = [image.encode() for first, second, _ in pairs for image in (first, second)]
    return VerificationSet(images, np.array([same for _, _, same in pairs]))


PAIRS = _set(
    ("a1", "a2", True), ("b1", "a1", False), ("c1", "c2", True), ("a3", "a2", True), ("d1", "c1", False),
    ("c1", "c1", True),
)  # fmt: skip


def test_persons_are_those_joined_by_pairs_and_by_the_same_image() -> None:
    chosen = choose(PAIRS, 100)
    assert [(image.decode(), person) for image, person in zip(*chosen, strict=True)] == [
        ("a1", 0), ("a2", 0), ("a3", 0), ("c1", 1), ("c2", 1), ("b1", 2), ("d1", 3),
    ]  # fmt: skip


def test_of_many_those_with_the_most_images() -> None:
    assert [image.decode() for image in choose(PAIRS, 4).images] == ["a1", "a2", "a3", "c1"]
    assert choose(PAIRS, 1).persons == [0]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.booleans()), min_size=1, max_size=30))
def test_any_set_agrees_with_a_search_from_image_to_image(drawn: list[tuple[int, int, bool]]) -> None:
    pairs = _set(*((str(first), str(second), same) for first, second, same in drawn))
    chosen = choose(pairs, 1000)
    person = dict(zip(chosen.images, chosen.persons, strict=True))
    assert set(person) == set(pairs.images)
    for start, number in person.items():
        reached, edge = {start}, [start]
        while edge:
            here = edge.pop()
            for first, second, same in drawn:
                a, b = str(first).encode(), str(second).encode()
                if same and here in (a, b):
                    edge += {a, b} - reached
                    reached |= {a, b}
        assert reached == {image for image in person if person[image] == number}
    counts = [chosen.persons.count(number) for number in range(max(chosen.persons) + 1)]
    assert counts == sorted(counts, reverse=True)


def test_sprites_are_the_images_made_small() -> None:
    small = sprites([jpeg(3, quality=100), jpeg(4, quality=100)])
    assert small.shape == (2, 3, 32, 32)
    assert small.dtype == torch.float32
    for number, seed in enumerate((3, 4)):
        mean = picture(seed).mean((0, 1)) / 255
        assert np.allclose(small[number].mean((1, 2)).numpy(), mean, atol=0.02)


def _read(folder: Path) -> tuple[projector_config_pb2.EmbeddingInfo, np.ndarray, list[str], tuple[int, int]]:
    config = projector_config_pb2.ProjectorConfig()
    text_format.Parse((folder / "projector_config.pbtxt").read_text(), config)
    (info,) = config.embeddings
    rows = np.loadtxt(folder / info.tensor_path, delimiter="\t", ndmin=2)
    names = (folder / info.metadata_path).read_text().splitlines()
    with Image.open(folder / info.sprite.image_path) as sheet:
        return info, rows, names, sheet.size


@pytest.mark.parametrize("count", [1, 5, 9])
def test_the_files_hold_points_labels_and_pictures(
    tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path, active=True, total_steps=9, first_step=0)
    x_ND = np.random.default_rng(0).normal(size=(count, 7)).round(4)
    pictures = sprites([jpeg(seed) for seed in range(count)])
    for _ in range(2):  # as a finished run does that is started again
        log.embedding(12, x_ND, list(range(count)), "a/b <i>\\c", pictures)
    log.close()
    log = RunLog(tmp_path, active=True, total_steps=9, first_step=0)
    log.embedding(12, x_ND, list(range(count)), "a/b <i>\\c", pictures)
    log.close()
    info, rows, names, size = _read(tmp_path / "tensorboard")
    assert np.array_equal(rows, x_ND)
    assert names == [str(number) for number in range(count)]
    side = int(np.ceil(np.sqrt(count)))
    assert (list(info.sprite.single_image_dim), size) == ([32, 32], (32 * side, 32 * side))
    assert capsys.readouterr() == ("", "")


def test_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "00012").write_text("a file")
    log = RunLog(tmp_path, active=True, total_steps=9, first_step=0)
    log.embedding(12, np.zeros((2, 3)), [0, 1], "person", sprites([jpeg(0), jpeg(1)]))
    log.close()
    assert "tensorboard: cannot write it" in capsys.readouterr().err
