"""Encoded image to pixels: JPEG and PNG, strictly, and never more pixels than asked for."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg

from data.errors import DataError

Pixels = npt.NDArray[np.uint8]
Encoded = bytes | memoryview

_JPEG = b"\xff\xd8"
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_HEAD = 24  # signature, length and name of IHDR, width, height: the least that states a size


class DecodeError(DataError):
    """The bytes are not an image of the expected size; the message says what they are."""


def decode_image(encoded: Encoded, size: tuple[int, int], *, out: Pixels | None = None) -> Pixels:
    """Pixels of a JPEG or PNG, uint8 (H, W, 3) RGB, written to `out` (C-contiguous) when it is given.

    size: (height, width). One of another size is refused, and a larger one before anything is decoded, so a
    decompression bomb costs nothing. Strict: whatever libjpeg or libpng warns of is an error. Damage that leaves
    a decodable stream cannot be seen: JPEG has no checksum. Grey, palette, 16-bit and CMYK become 8-bit RGB,
    alpha is dropped, EXIF orientation is ignored. Raises DecodeError.

    Exact integer DCT and interpolated chroma, which gives bit for bit what DALI's CPU decoder gives.
    """
    target = np.empty((*size, 3), np.uint8) if out is None else out
    try:
        found = simplejpeg.decode_jpeg(encoded, "RGB", buffer=target)  # reads the head, and refuses what has no room
    except ValueError as error:  # of what is no JPEG, too: nearly everything is one, and need not be asked before
        _check_size(encoded, size)
        if _is_jpeg(encoded):
            raise DecodeError(f"damaged JPEG: {error}") from None
        np.copyto(target, _decode_png(encoded))
        return target
    if found.shape != target.shape:
        _check_size(encoded, size)
    return target


def check_image(encoded: Encoded, size: tuple[int, int]) -> None:
    """Raise DecodeError for exactly the images that `decode_image` refuses, in less than half its time.

    A JPEG is decoded at an eighth of its size: all entropy-coded data are read, which is where damage shows,
    but hardly any pixel is computed.
    """
    _check_size(encoded, size)
    if not _is_jpeg(encoded):
        _decode_png(encoded)
        return
    try:
        simplejpeg.decode_jpeg(encoded, "RGB", min_height=1, min_width=1, min_factor=8)
    except ValueError as error:
        raise DecodeError(f"damaged JPEG: {error}") from None


def encode_black(size: tuple[int, int]) -> bytes:
    """A black PNG of (height, width)."""
    return bytes(cv2.imencode(".png", np.zeros((*size, 3), np.uint8))[1])


def _is_jpeg(encoded: Encoded) -> bool:
    return encoded[:2] == _JPEG


def declared_size(encoded: Encoded) -> tuple[int, int]:
    """(height, width) by the head of a JPEG or PNG, which is all that is read. Raises DecodeError."""
    if _is_jpeg(encoded):
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(encoded)
        except ValueError as error:
            raise DecodeError(f"damaged JPEG: {error}") from None
    elif encoded[: len(_PNG)] == _PNG and len(encoded) >= _PNG_HEAD:
        width, height = (int.from_bytes(encoded[at : at + 4], "big") for at in (16, 20))
    else:
        raise DecodeError(f"expected JPEG or PNG, found {len(encoded)} bytes that begin with '{encoded[:8].hex()}'")
    return height, width


def _check_size(encoded: Encoded, size: tuple[int, int]) -> None:
    height, width = declared_size(encoded)
    if (height, width) != size:
        raise DecodeError(f"expected {size[0]} x {size[1]} pixels (height x width), found {height} x {width}")


def _decode_png(encoded: Encoded) -> Pixels:
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        bgr = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error as error:
        raise DecodeError(f"damaged PNG: {error.err}") from None
    if bgr is None:
        raise DecodeError("damaged PNG: libpng cannot read it")
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)
