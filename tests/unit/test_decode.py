"""Decoding: right pixels for every kind of image, a reason for every refusal, and one verdict for both loaders."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.loading.decode import DecodeError, check_image, decode_image, encode_black
from tests.image_cases import SIZE, damaged_images, jpeg, odd_images, picture

ODD, DAMAGED = odd_images(), damaged_images()


def _verdict(function: object, encoded: bytes) -> str | None:
    try:
        function(encoded, SIZE)  # type: ignore[operator]
    except DecodeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("chroma", ["444", "422", "420", "440", "411", "Gray"])
def test_jpeg_pixels_are_libjpegs(chroma: str) -> None:
    encoded = jpeg(1, chroma=chroma)
    out = np.zeros((*SIZE, 3), np.uint8)
    assert decode_image(memoryview(encoded), SIZE, out=out) is out
    assert (out == np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))).all()
    assert (out == decode_image(encoded, SIZE)).all()


def test_pixels_are_near_what_was_encoded() -> None:
    """In RGB order, upright: a decoder that swaps channels or axes is far off."""
    difference = np.abs(decode_image(jpeg(2, quality=98, chroma="444"), SIZE).astype(int) - picture(2))
    assert difference.mean() < 2
    assert (decode_image(ODD["png"], SIZE) == picture(0)).all()
    assert (decode_image(ODD["png alpha"], SIZE) == picture(0)).all()
    assert (decode_image(ODD["png 16 bit"], SIZE) == picture(0)).all()


def test_odd_but_good_images() -> None:
    plain = cv2.imdecode(
        np.frombuffer(ODD["exif orientation"], np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    )
    for name, encoded in ODD.items():
        check_image(encoded, SIZE)
        assert np.abs(decode_image(encoded, SIZE).astype(int) - picture(0)).mean() < 160, name
    assert (decode_image(ODD["exif orientation"], SIZE) == plain[..., ::-1]).all()


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_images_are_refused_with_the_reason(name: str) -> None:
    encoded, reason = DAMAGED[name]
    for function in (check_image, decode_image):
        for given_as in (encoded, memoryview(encoded)):
            with pytest.raises(DecodeError) as caught:
                function(given_as, SIZE)
            assert reason in str(caught.value)
            assert "\n" not in str(caught.value)


def test_a_decompression_bomb_is_refused_by_its_head() -> None:
    """100 bytes that declare gigapixels: the size is compared before any decoder runs."""
    png = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + b"IHDR" + b"\x7f\xff\xff\xff" * 2
    head = bytearray(jpeg(0))
    frame = head.index(b"\xff\xc0")
    head[frame + 5 : frame + 9] = b"\xff\x00" * 2
    for bomb in (png, bytes(head)):
        with pytest.raises(DecodeError, match="expected 112 x 112 pixels"):
            decode_image(bomb, SIZE)


@settings(max_examples=400, deadline=None)
@given(
    image=st.sampled_from([*ODD.values(), jpeg(0), jpeg(0, chroma="444")]),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3),
    keep=st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_check_refuses_what_decode_refuses(image: bytes, changes: list[tuple[float, int]], keep: float) -> None:
    damaged = bytearray(image)
    for place, value in changes:
        damaged[int(place * len(damaged))] = value
    encoded = bytes(damaged[: int(keep * len(damaged))])
    assert (_verdict(check_image, encoded) is None) == (_verdict(decode_image, encoded) is None)


def test_black() -> None:
    assert not decode_image(encode_black((7, 5)), (7, 5)).any()
