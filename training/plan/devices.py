"""Devices that can be planned for: peaks and memory are those of `training.showing.flops`, the one table of GPUs."""

from __future__ import annotations

import os
from dataclasses import dataclass

from configs.schema import ConfigError
from training.plan.links import WITHIN, Link, unknown
from training.showing.flops import PEAKS

_USABLE = 0.97
"""Assumed: of a GPU's memory, what ECC and the driver leave."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What a rank computes on."""

    name: str
    memory: int
    """Bytes that all of a rank's work may take."""
    cuda: bool
    half: float = 0.0
    """Flops a second at the maker's peak, in tensor cores."""
    single: float = 0.0
    """In float32."""
    bandwidth: float = 0.0
    """Bytes a second of its memory, the maker's."""
    bf16: bool = True
    triton: bool = True
    within: Link
    network: str = "infiniband-8x400"
    """Between hosts, unless told otherwise."""

    def peak(self, precision: str) -> float:
        """Flops a second. Raises ConfigError for a precision that the device has not."""
        if precision == "bf16" and not self.bf16:
            raise ConfigError(f"train.precision: {self.name} has no bf16 products: expected fp16 or fp32, got bf16")
        return self.single if precision == "fp32" else self.half


_GPUS = {  # name here: name in the table of peaks, link within a host, network between hosts
    "H200": ("H200", "nvlink4", "infiniband-8x400"),
    "H100": ("H100", "nvlink4", "infiniband-8x400"),
    "H100-NVL": ("H100 NVL", "pcie5", "infiniband-400"),
    "H100-PCIe": ("H100 PCIe", "pcie5", "infiniband-400"),
    "A100-80GB": ("A100 80GB", "nvlink3", "infiniband-8x200"),
    "A100-40GB": ("A100", "nvlink3", "infiniband-8x200"),
    "A10": ("A10", "pcie4", "ethernet-100"),
    "L40S": ("L40S", "pcie4", "ethernet-100"),
    "L40": ("L40", "pcie4", "ethernet-100"),
    "L4": ("L4", "pcie4", "ethernet-100"),
    "RTX-4090": ("RTX 4090", "pcie4", "ethernet-25"),
    "V100-32GB": ("V100-SXM2-32GB", "nvlink2", "infiniband-100"),
    "V100-16GB": ("V100-SXM2", "nvlink2", "infiniband-100"),
    "T4": ("T4", "pcie3", "ethernet-25"),
}
CPU = "cpu"
NAMES = (*_GPUS, CPU)


def device_of(name: str) -> Device:
    """By name, in capitals or not. cpu: this machine's. Raises ConfigError with the nearest known name."""
    if name.lower() == CPU:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device(name=CPU, memory=memory, cuda=False, within=WITHIN["memory"], network="ethernet-25")
    found = next((key for key in _GPUS if _plain(key) == _plain(name)), None)
    if found is None:
        raise ConfigError(unknown("--gpu", name, dict.fromkeys(NAMES)))
    key, within, network = _GPUS[found]
    peak = PEAKS[key]
    return Device(
        name=found,
        memory=int(peak.memory * 2**30 * _USABLE),
        cuda=True,
        half=peak.half * 1e12,
        single=peak.single * 1e12,
        bandwidth=peak.bandwidth * 1e9,
        bf16=peak.bf16,
        triton=peak.bf16,  # partial_fc.kernels wants Ampere, the first with bf16
        within=WITHIN[within],
        network=network,
    )


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace(" ", "").replace("_", "")
