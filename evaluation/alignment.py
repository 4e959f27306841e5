"""Faces brought into place by five points: both eyes, the nose, both corners of the mouth.

Legend: K points, 2 coordinates x and y in pixels (x to the right, y down).
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from backbones import IMAGE_SIZE
from evaluation.roc import Floats

REFERENCE_52: Floats = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
"""Left eye, right eye, nose, left and right corner of the mouth as one sees them, in 112 x 112: the places of
insightface's `norm_crop` (arcface), which those of SphereFace's 96 x 112 are with 8 added to x."""


def similarity(points_K2: npt.NDArray[Any], onto_K2: npt.NDArray[Any]) -> Floats:
    """The turn, scale and shift, float64 (2, 3), that bring points nearest to others by least squares; no mirror.

    S. Umeyama, Least-squares estimation of transformation parameters between two point patterns, PAMI 13(4), 1991,
    equations 38-43: with centred points p, q and K covariance sum(q p') / K = U S V', rotation U diag(1, d) V',
    d = sign(det U det V), scale trace(S diag(1, d)) / variance(p).

    Raises ValueError for other shapes, numbers that are not finite, and points that are all at one place.
    """
    points, onto = (np.asarray(given, np.float64) for given in (points_K2, onto_K2))
    if points.ndim != 2 or points.shape[1] != 2 or points.shape != onto.shape or len(points) < 2:
        raise ValueError(
            f"expected two sets of points of one shape (K, 2), K >= 2, got {points.shape} and {onto.shape}"
        )
    if not (np.isfinite(points).all() and np.isfinite(onto).all()):
        raise ValueError("expected finite points, got nan or inf")
    centre, onto_centre = points.mean(axis=0), onto.mean(axis=0)
    variance = float(np.square(points - centre).sum(axis=1).mean())
    if variance <= np.square(np.finfo(np.float32).eps * (1 + np.abs(points).max())):
        raise ValueError("expected points at different places, got all at one")
    u, singular, vt = np.linalg.svd((onto - onto_centre).T @ (points - centre) / len(points))
    signs = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    linear = (singular * signs).sum() / variance * (u * signs) @ vt
    return np.column_stack([linear, onto_centre - linear @ centre])


def aligned(image_HW3: npt.NDArray[np.uint8], points_52: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The face of an image as training and evaluation expect it: uint8 (112, 112, 3), channels in the image's order.

    points_52: where `REFERENCE_52` is in the image. Bilinear (OpenCV's warpAffine), black beyond the border. Raises
    ValueError as `similarity` does, and for anything but uint8 (H, W, 3).
    """
    if image_HW3.dtype != np.uint8 or image_HW3.ndim != 3 or image_HW3.shape[2] != 3 or not image_HW3.size:
        raise ValueError(f"expected an image uint8 (H, W, 3), got {image_HW3.dtype} of shape {image_HW3.shape}")
    height, width = IMAGE_SIZE
    face = cv2.warpAffine(np.ascontiguousarray(image_HW3), similarity(points_52, REFERENCE_52), (width, height))
    return np.asarray(face, np.uint8)
