"""Arithmetic of a training, and what share of the GPU's peak it is (MFU, model FLOPs utilisation).

Model FLOPs are what the formulas ask for: forward, and twice as many backward, whatever is computed again or besides
(Chowdhery et al., PaLM, arXiv:2204.02311, appendix B). A multiplication and an addition count as two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from backbones import IMAGE_SIZE
from configs.schema import RunConfig

_PASSES = 3
"""Forward, gradient of the input, gradient of the weight."""


class Peak(NamedTuple):
    """Dense TFLOPS: half precision in tensor cores with sums in float32; float32 outside them, as runs of fp32 do."""

    half: float
    single: float
    memory: float
    """GiB."""
    bandwidth: float
    """GB a second of that memory."""
    bf16: bool = True


PEAKS = {
    "H200": Peak(989, 67, 141, 4800),
    "H100 NVL": Peak(835, 60, 94, 3900),
    "H100 PCIe": Peak(756, 51, 80, 2000),
    "H100": Peak(989, 67, 80, 3350),
    "A100 80GB": Peak(312, 19.5, 80, 2039),
    "A100": Peak(312, 19.5, 40, 1555),
    "A10": Peak(125, 31.2, 24, 600),
    "L40S": Peak(362, 91.6, 48, 864),
    "L40": Peak(181, 90.5, 48, 864),
    "L4": Peak(121, 30.3, 24, 300),
    "RTX 4090": Peak(165.2, 82.6, 24, 1008),
    "V100-SXM2-32GB": Peak(125, 15.7, 32, 900, bf16=False),
    "V100-SXM2": Peak(125, 15.7, 16, 900, bf16=False),
    "V100-PCIE": Peak(112, 14, 16, 900, bf16=False),
    "T4": Peak(65, 8.1, 16, 320, bf16=False),
}
"""By a part of the name that torch gives; the first that fits counts.

From NVIDIA's pages and data sheets (https://www.nvidia.com/en-us/data-center/ h200, h100, a100, l40s, l4, tesla-t4; A10
and L40 data sheets; volta-v100-datasheet-update-us-1165301-r5.pdf; "NVIDIA Ada GPU architecture", version 2.01, for the
RTX 4090). Where they give figures for 2:4 sparsity, these are half of them: what dense products can reach. Memory and
its bandwidth are for `training.plan`.
"""
_SLICE = "MIG"
"""In the name of a part of a GPU, of whose peak nothing is known."""


def peak_tflops(gpu: str, precision: str) -> float | None:
    """Of a GPU by the name that torch gives it, in `train.precision`; None where it is not known."""
    words = gpu.replace("-", " ").split()
    if _SLICE in words:
        return None
    for name, peak in PEAKS.items():
        if all(part in words for part in name.replace("-", " ").split()):
            if precision == "bf16" and not peak.bf16:
                return None
            return peak.single if precision == "fp32" else peak.half
    return None


def forward_flops(backbone: nn.Module) -> int:
    """Of one image, forward, in the mode that the backbone is in: its matrix products and convolutions.

    Nothing is computed or changed: only shapes go through it.
    """
    shapes = FakeTensorMode()
    state = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    fakes: dict[str, Tensor] = {name: shapes.from_tensor(tensor.detach()) for name, tensor in state.items()}
    # Attention as products that are counted, which is not done for all the ways in which it may run.
    with shapes, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        device = next(iter(fakes.values())).device
        images_B3HW = torch.empty(2, 3, *IMAGE_SIZE, device=device)  # BatchNorm in training mode wants more than one
        with FlopCounterMode(display=False) as counter:
            functional_call(backbone, fakes, (images_B3HW,))
    return int(counter.get_total_flops()) // len(images_B3HW)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Arithmetic of one image, and the peak of the device that does it."""

    flops_per_image: float | None
    """Over all ranks together: the backbone's, and the products with the class centres that take part. None where a
    backbone's shapes depend on more than the size of its input.
    """
    peak: float | None
    """TFLOPS of a rank's device; None where it is not known."""

    @classmethod
    def of(cls, backbone: nn.Module, config: RunConfig, *, num_classes: int, device: torch.device) -> Work:
        """backbone: in training mode, without DDP around it. Losses of the clusters are not counted."""
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = peak_tflops(gpu, config.train.precision)
        try:
            forward = forward_flops(backbone)
        except Exception:  # of a stranger's network: a figure for the log is no reason not to train it
            return cls(flops_per_image=None, peak=peak)
        head = config.head
        product = 2 * config.model.embedding_size * head.subcentres * num_classes * head.sample_rate
        return cls(flops_per_image=_PASSES * (forward + product), peak=peak)

    def rates(self, images_per_second_per_rank: float) -> dict[str, float]:
        """Scalars for the log, as far as they are known: TFLOPS of a rank on average, and MFU."""
        if self.flops_per_image is None:
            return {}
        tflops = self.flops_per_image * images_per_second_per_rank / 1e12
        values = {"throughput/tflops": tflops}
        if self.peak is not None:
            values["throughput/mfu"] = tflops / self.peak
        return values
