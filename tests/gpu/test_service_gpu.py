"""A training step with all cluster terms on a GPU: nothing in it waits for the device. Skipped without one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from backbones import IMAGE_SIZE
from benchmarks.service_step import Arm, long_tailed_labels
from configs.load import load_config
from configs.schema import TrainConfig
from data.loading.batch import Batch
from training.distributed import open_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIG = Path(__file__).parents[2] / "configs" / "ms1mv3_r50.yaml"
SETTINGS: dict[str, list[str]] = {
    "clusters": [],
    "hard classes, sampled": ["head.sample_rate=0.3", "clustering.hard_negatives=4"],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_no_step_waits_for_the_device(name: str) -> None:
    """Between two refreshes: slices of one do wait, once in many steps."""
    settings = ["clustering.warmup_fraction=0", "clustering.ramp_fraction=0", "train.epochs=2", "train.batch_size=16"]
    config = load_config(CONFIG, [*settings, "model.backbone=iresnet18", *SETTINGS[name]])
    labels_N = torch.from_numpy(long_tailed_labels(3000, 60, np.random.default_rng(0)))
    with open_ranks(TrainConfig(device="cuda")) as ranks:
        arm = Arm(config, labels_N, 3000 // 16, ranks, guided=True)
        first = arm.prepare()
        pixels = torch.randint(0, 256, (16, *IMAGE_SIZE, 3), dtype=torch.uint8, device=ranks.device)
        ids_NB = torch.randint(0, 3000, (4, 16))
        batches = [
            Batch(pixels.permute(0, 3, 1, 2), labels_N[ids_B].to(ranks.device), ids_B.to(ranks.device))
            for ids_B in ids_NB
        ]
        for number, batch in enumerate(batches):
            torch.cuda.set_sync_debug_mode("error" if number > 1 else "default")  # the first load, tune and make state
            try:
                values = arm.train_step([batch], step=first + number, lr=1e-3)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert arm.service is not None
        assert arm.service.version == 1
        assert torch.isfinite(values.total)
        assert float(values.contrastive) > 0
