"""How insightface loads records, by a DataLoader and by DALI, written from a description of it.

Kinder than the originals: our reader in place of mxnet's, simplejpeg in place of OpenCV behind mxnet's arrays, PIL and
torch themselves in place of torchvision's layers over them; and DALI has two batches in work, not one.

Legend: B images of a batch, H, W pixels, 3 colours.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from data.rec.header import unpack
from data.rec.index import read_index
from data.rec.recordio import RecordReader

WORKERS = 2
"""Processes of the DataLoader: insightface's setting."""

Batches = Iterator[tuple[Tensor, Tensor]]
"""float32 (B, 3, H, W) of -1 … 1 and labels, int64 (B,)."""


class RecordDataset(Dataset[tuple[Tensor, Tensor]]):
    """A sample at a time: record, header, array, PIL image, flip, tensor of 0 … 1, normalised."""

    def __init__(self, folder: Path) -> None:
        """folder: of a set without identity headers."""
        self._reader = RecordReader(folder / "train.rec")
        self._offsets = read_index(folder / "train.idx", self._reader).offsets.tolist()

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, sample: int) -> tuple[Tensor, Tensor]:
        header, encoded = unpack(memoryview(bytes(self._reader.read_at(self._offsets[sample]))))
        label = torch.tensor(header.labels[0], dtype=torch.long)
        image = Image.fromarray(simplejpeg.decode_jpeg(encoded, "RGB"))
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        x_3HW = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
        mean_311, deviation_311 = (torch.full((3, 1, 1), 0.5) for _ in range(2))
        return x_3HW.sub_(mean_311).div_(deviation_311), label


def data_loader(folder: Path, *, batch: int, steps: int, device: torch.device) -> Batches:
    """So many batches from worker processes, which start with the first and have ended after the last."""
    dataset = RecordDataset(folder)
    loader = DataLoader(
        dataset,
        batch_size=batch,
        sampler=RandomSampler(dataset, num_samples=steps * batch),
        num_workers=WORKERS,
        drop_last=True,
        pin_memory=device.type == "cuda",
        multiprocessing_context="fork",  # Linux's default before Python 3.14
    )
    return _on(device, loader)


def dali_reader(folder: Path, *, batch: int, steps: int, threads: int, device: torch.device) -> Batches:
    """So many batches from DALI's own reader of record files, which shuffles within a buffer."""
    import nvidia.dali  # noqa: PLC0415 - optional
    from nvidia.dali.plugin.pytorch import DALIClassificationIterator  # noqa: PLC0415

    dali: Any = nvidia.dali
    fn, types = dali.fn, dali.types
    pipeline = dali.Pipeline(batch_size=batch, num_threads=threads, device_id=device.index)
    with pipeline:
        encoded, labels = fn.readers.mxnet(
            path=str(folder / "train.rec"),
            index_path=str(folder / "train.idx"),
            random_shuffle=True,
            name="records",
        )
        images = fn.decoders.image(encoded, device="mixed" if device.type == "cuda" else "cpu", output_type=types.RGB)
        images = fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT,
            mean=[127.5] * 3,
            std=[127.5] * 3,
            mirror=fn.random.coin_flip(probability=0.5),
        )
        pipeline.set_outputs(images, labels)
    pipeline.build()
    stream = DALIClassificationIterator([pipeline], reader_name="records", prepare_first_batch=False)
    found = (next(stream)[0] for _ in range(steps))
    return _on(device, ((parts["data"], parts["label"].squeeze(1)) for parts in found))


def _on(device: torch.device, batches: Any) -> Batches:
    for images_B3HW, labels_B in batches:
        yield images_B3HW.to(device, non_blocking=True), labels_B.to(device, non_blocking=True).long()
