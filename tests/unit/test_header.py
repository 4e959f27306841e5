"""Record headers: labels of both kinds, class numbers that float32 can and cannot hold."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.rec.header import EXACT, Header, HeaderError, class_labels, class_of, pack, unpack

f32 = st.floats(width=32, allow_nan=False)
u64 = st.integers(0, 2**64 - 1)


@given(
    labels=st.lists(f32, min_size=1, max_size=12), id_=u64, id2=u64, image=st.binary(max_size=20), inside=st.booleans()
)
def test_round_trip(labels: list[float], id_: int, id2: int, image: bytes, inside: bool) -> None:
    header = Header(0, (labels[0],), id_, id2) if inside else Header(len(labels), tuple(labels), id_, id2)
    again, payload = unpack(memoryview(pack(header, image)))
    assert again == header
    assert bytes(payload) == image


def test_bytes_by_hand() -> None:
    assert pack(Header(0, (3.0,), 7, 8), b"x") == struct.pack("<IfQQ", 0, 3.0, 7, 8) + b"x"
    assert pack(Header(2, (3.0, 4.0), 7, 8), b"x") == struct.pack("<IfQQff", 2, 0.0, 7, 8, 3.0, 4.0) + b"x"


@given(payload=st.binary(max_size=60))
def test_any_bytes(payload: bytes) -> None:
    with contextlib.suppress(HeaderError):
        header, image = unpack(memoryview(payload))
        assert len(header.labels) == max(header.flag, 1)
        assert payload.endswith(bytes(image))


def test_wrong_number_of_labels() -> None:
    for header in (Header(0, (1.0, 2.0), 0, 0), Header(2, (1.0,), 0, 0), Header(0, (), 0, 0)):
        with pytest.raises(HeaderError, match="labels for flag"):
            pack(header, b"")


@given(label=st.integers(0, EXACT - 1))
def test_single_labels_are_exact(label: int) -> None:
    header, _ = unpack(memoryview(pack(Header(0, class_labels(label, pair=False), 0, 0), b"")))
    assert class_of(header.labels, pair=False) == label


@given(label=st.integers(0, 2**48 - 1))
def test_pairs_are_exact_above_float32(label: int) -> None:
    header, _ = unpack(memoryview(pack(Header(2, class_labels(label, pair=True), 0, 0), b"")))
    assert class_of(header.labels, pair=True) == label


@pytest.mark.parametrize("label", [-1.0, 0.5, float("nan"), float("inf"), float("-inf"), float(EXACT), 1e30])
def test_what_is_no_class(label: float) -> None:
    with pytest.raises(HeaderError, match="expected a class number"):
        class_of((label,), pair=False)
    with pytest.raises(HeaderError, match="expected a class number"):
        class_of((0.0, label), pair=True)


def test_landmarks_behind_the_class_are_left_alone() -> None:
    assert class_of((5.0, 0.25, float("nan")), pair=False) == 5
    assert class_of((1.0, 5.0, 0.25), pair=True) == EXACT + 5
    with pytest.raises(HeaderError, match="two labels"):
        class_of((5.0,), pair=True)
