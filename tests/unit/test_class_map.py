"""Which old class a new one is, by tables and names; the samples that means are of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from training.warm.class_map import ClassMap, by_name, no_classes, read_map, same_classes
from training.warm.class_means import chosen_samples

C, OLD = 6, 5


def _map(tmp_path: Path, text: str | bytes, old_set: str = "") -> ClassMap:
    path = tmp_path / "map.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_map(path, num_classes=C, num_old=OLD, old_set=old_set)


def _pairs(found: ClassMap) -> list[tuple[int, int, float]]:
    return list(zip(found.new_P.tolist(), found.old_P.tolist(), found.weight_P.tolist(), strict=True))


@pytest.mark.parametrize(
    "text",
    [
        "0 4\n5 1\n",
        "0,4\n5,1\n",
        "new,old\n0, 4\n\n5,\t1",
        "new old\r\n0\t4\r\n5 1\r\n",
        "label,old_label\n0,4\n5,1\n",
        "label,set,old_label,images\n0,a,4,3\n5,a,1,3\n",
        "new_label,old_labels\n0,4\n5,1\n",
    ],
)
def test_tables_of_every_kind(tmp_path: Path, text: str) -> None:
    found = _map(tmp_path, text)
    assert [(new, old) for new, old, _ in _pairs(found)] == [(0, 4), (5, 1)]
    assert found.count_C.tolist() == [1, 0, 0, 0, 0, 1]
    assert found.unused == 3


def test_a_table_of_several_sets_counts_for_the_one_that_the_centres_are_of(tmp_path: Path) -> None:
    text = 'label,set,old_label,images\n0,a,0,7\n0,"b,c",0,2\n0,"b,c",3,9\n1,a,1,1\n2,"b,c",4,4\n'
    assert _pairs(_map(tmp_path, text, "b,c")) == [(0, 0, 2), (0, 3, 9), (2, 4, 4)]
    assert _pairs(_map(tmp_path, text, "./a/")) == [(0, 0, 7), (1, 1, 1)]
    with pytest.raises(DataError, match=r"made of several \(a, b,c\): say by --old-set"):
        _map(tmp_path, text)
    with pytest.raises(DataError, match="made of a, b,c, and the centres were trained on x"):
        _map(tmp_path, text, "x")


def test_a_cleaned_set_joins_labels_and_splits_them(tmp_path: Path) -> None:
    found = _map(tmp_path, "new_label,old_labels\n0,0 3\n1,2\n3,4\n4,2\n5,3\n")
    assert _pairs(found) == [(0, 0, 1), (0, 3, 1), (1, 2, 1), (3, 4, 1)]
    assert found.count_C.tolist() == [2, 1, 0, 1, 0, 0]


RANGE = "line {}: expected a class of the new set, from 0 to 5, and an old one, from 0 to 4, found "
ORIGINS = "label,set,old_label,images\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected lines with a new class"),
        ("\n \n", "expected lines with a new class"),
        ("new,old\n", "expected lines with a new class"),
        (ORIGINS, "expected lines with a new class"),
        ("0 4\n6 1\n", RANGE.format(2) + "'6 1'"),
        ("0 5\n", RANGE.format(1) + "'0 5'"),
        ("0 -1\n", RANGE.format(1)),
        ("0 1 2\n", RANGE.format(1)),
        ("0\n", RANGE.format(1)),
        ("0 1.0\n", RANGE.format(1)),
        ("0 ٣\n", RANGE.format(1)),
        ("old,new\n1,1\n", RANGE.format(1) + "'old,new'"),
        ("0 4\n0 1\n", "line 2: class 0 stands there twice"),
        ("0 4\n1 4\n", "line 2: old class 4 stands there twice"),
        (f"{ORIGINS}0,a,4,3\n1,a,4,3\n", "line 3: old class 4 stands there twice"),
        (f"{ORIGINS}0,a,4,0\n", RANGE.format(2)),
        (f"{ORIGINS}0,a,4\n", RANGE.format(2)),
        (f"{ORIGINS}x,a,4,1\n", RANGE.format(2) + "'x,a,4,1'"),
        ("new_label,old_labels\n0,4\n0,1\n", "line 3: class 0 stands there twice"),
        ("new_label,old_labels\n0,4\n9,4\n", RANGE.format(3)),
        ("new_label,old_labels\n0,1 5\n", RANGE.format(2)),
        ("new_label,old_labels\n0,\n", RANGE.format(2)),
        ("new_label,old_labels\n0,1\n1,1 2\n", "line 3: old class 1 stands there twice"),
        (b"0 1\n\xff\xfe\n", "not UTF-8 text"),
        ("0 [bold]1\x1b[31m\n", r"found '0 [bold]1\x1b[31m'"),
        (b"\0\0\0", RANGE.format(1)),
        ('0 "' + "1" * 200_000 + '"\n', "map.csv: "),
    ],
)
def test_tables_that_say_nothing_clear_are_refused(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(DataError) as raised:
        _map(tmp_path, text)
    assert said in str(raised.value)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 400 + len(str(tmp_path))


def test_a_table_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match="cannot read it"):
            read_map(path, num_classes=C, num_old=OLD)


def test_random_bytes_are_a_map_or_refused(tmp_path: Path) -> None:
    for seed in range(200):
        drawn = np.random.default_rng(seed)
        content = drawn.choice(np.frombuffer(b"0123456 ,\n\"'\r\0\xc3x", np.uint8), drawn.integers(40)).tobytes()
        try:
            found = _map(tmp_path, content)
        except DataError:
            continue
        assert len(set(found.old_P.tolist())) == len(found.old_P)
        assert set(found.new_P.tolist()) <= set(range(C))


def test_names_and_numbers() -> None:
    found = by_name(["x", "b", "a", "<b>é"], ["a", "<b>é", "c"], new_at="new", old_at="old")
    assert _pairs(found) == [(2, 0, 1), (3, 1, 1)]
    assert (found.num_classes, found.num_old, found.unused) == (4, 3, 1)
    with pytest.raises(DataError, match=r"^old: classes 0 and 2 are both named 'a'"):
        by_name(["a"], ["a", "b", "a"], new_at="new", old_at="old")
    with pytest.raises(DataError, match=r"^new: classes 1 and 2 are both named ''"):
        by_name(["a", "", ""], ["a"], new_at="new", old_at="old")
    with pytest.raises(DataError, match=r"^new: none of its 1 names is one of the 2 of old"):
        by_name(["A"], ["a", "b"], new_at="new", old_at="old")
    assert _pairs(same_classes(3, 3)) == [(0, 0, 1), (1, 1, 1), (2, 2, 1)]
    with pytest.raises(DataError, match="have 3 classes, the centres are 4"):
        same_classes(3, 4)
    assert (no_classes(3, 4).count_C.tolist(), no_classes(3, 4).unused) == ([0, 0, 0], 4)


@pytest.mark.parametrize("most", [1, 3, 4, 100])
def test_chosen_samples_are_spread_over_their_class(most: int) -> None:
    draw = np.random.default_rng(most)
    label_N = draw.integers(0, 30, 300)
    label_N[label_N == 4] = 5  # a class without images
    wanted_C = draw.random(31) < 0.7
    wanted_C[[4, 30]] = True
    chosen = chosen_samples(label_N, wanted_C, most)
    assert np.array_equal(label_N[chosen], np.sort(label_N[chosen]))
    for label in range(31):
        there, mine = np.flatnonzero(label_N == label), chosen[label_N[chosen] == label]
        assert len(mine) == (min(most, len(there)) if wanted_C[label] else 0)
        assert len(set(mine.tolist())) == len(mine)
        if len(mine) > 1:
            gaps = np.diff(np.searchsorted(there, mine))
            assert gaps.min() >= len(there) // most
            assert gaps.max() <= -(-len(there) // most)
    assert not len(chosen_samples(label_N, np.zeros(31, np.bool_), most))
