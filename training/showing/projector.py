"""The embedding projector's points: images of persons who were not trained on, where the network puts them.

Legend: N images, D components of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from backbones import IMAGE_SIZE, Backbone
from configs.schema import RunConfig
from data.loading.decode import decode_image
from data.verification_bin import VerificationSet
from evaluation.embed.embed import embed_images
from training.distributed import Ranks
from training.showing.metrics import RunLog
from training.verify import NamedSet

_SPRITE = 32
"""Pixels of a picture's side: the projector draws it hardly larger, and takes 8192 in all."""
_DIGITS = 4
"""Of a component, as text: fewer bytes, and no picture shows the others."""


class Chosen(NamedTuple):
    """Different images, those of one person together. persons: a number for each, from 0."""

    images: list[bytes]
    persons: list[int]


def choose(pairs: VerificationSet, count: int) -> Chosen:
    """At most `count` different images of a set, of the persons with the most of them.

    A set does not name its persons: whoever is in a pair of one person, or has the same image, is one.
    """
    number: dict[bytes, int] = {}
    places = [number.setdefault(image, len(number)) for image in pairs.images]
    root = list(range(len(number)))

    def find(image: int) -> int:
        while root[image] != image:
            root[image] = root[root[image]]
            image = root[image]
        return image

    for pair in np.flatnonzero(pairs.same):
        first, second = find(places[2 * pair]), find(places[2 * pair + 1])
        root[max(first, second)] = min(first, second)
    persons: dict[int, list[bytes]] = {}
    for image, place in number.items():
        persons.setdefault(find(place), []).append(image)
    most = sorted(persons.values(), key=len, reverse=True)
    rows = [(image, person) for person, images in enumerate(most) for image in images][:count]
    return Chosen([image for image, _ in rows], [person for _, person in rows])


def sprites(images: Sequence[bytes]) -> Tensor:
    """Small pictures, float32 (N, 3, _SPRITE, _SPRITE), 0 … 1."""
    small = (Image.fromarray(decode_image(image, IMAGE_SIZE)).resize((_SPRITE, _SPRITE)) for image in images)
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in small])).permute(0, 3, 1, 2) / 255


class Projector:
    """Gives TensorBoard the embeddings of the first verification set, once, at the end of a run.

    All ranks make it alike.
    """

    def __init__(self, config: RunConfig, sets: Sequence[NamedSet], ranks: Ranks) -> None:
        """sets: those of the run."""
        self._ranks, self._batch_size, self._bf16 = ranks, config.eval.batch_size, config.train.precision == "bf16"
        self._count, self._sets = config.tensorboard.projector_images, sets

    def show(self, backbone: Backbone, step: int, log: RunLog) -> None:
        """After an evaluation of the same weights, which has made the ranks' BatchNorm statistics equal.

        Every rank takes part, rank 0 writes. One all-gather.
        """
        if not self._sets or not self._count:
            return
        name, pairs = self._sets[0]
        images, persons = choose(pairs, self._count)
        with torch.autocast(self._ranks.device.type, dtype=torch.bfloat16, enabled=self._bf16):
            x_ND = embed_images(
                backbone,
                images,
                batch_size=self._batch_size,
                group=self._ranks.group,
                each=self._ranks.monitor.moved,
            )
        if self._ranks.is_main:
            try:
                unit_ND = normalize(x_ND.double()).cpu().numpy().round(_DIGITS)
                log.embedding(step, unit_ND, persons, name, sprites(images))
            except Exception as error:  # memory, or a file system that TensorBoard reaches by other means
                log.say(f"no embedding projector ({type(error).__name__}: {error})")
