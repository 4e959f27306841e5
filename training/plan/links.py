"""What joins ranks: within a host, and between hosts.

Nothing of it was measured: several GPUs have not run yet. Speeds are the makers', of one direction; latencies, and the
share of a wire's speed that collectives reach, are assumed, and every plan with more than one rank says so.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from configs.schema import ConfigError

SHARE = 0.8
"""Assumed: of a wire's speed, what a collective of many bytes reaches."""
LAUNCH_S = 15e-6
"""Assumed: of a collective, before anything moves."""


@dataclass(frozen=True, slots=True)
class Link:
    """bytes_per_s: of one direction, of a rank within a host, of the whole host between hosts."""

    name: str
    bytes_per_s: float
    latency_s: float
    """Of a step of a tree over it."""


WITHIN = {
    link.name: link
    for link in (
        Link("nvlink4", 450e9, 2e-6),  # 18 links of 25 GB/s a direction: H100 and H200 SXM
        Link("nvlink3", 300e9, 2e-6),  # 12: A100 SXM
        Link("nvlink2", 150e9, 3e-6),  # 6: V100 SXM2
        Link("pcie5", 64e9, 5e-6),  # 16 lanes
        Link("pcie4", 32e9, 5e-6),
        Link("pcie3", 16e9, 6e-6),
        Link("memory", 5e9, 30e-6),  # gloo on a host's loopback device
    )
}
BETWEEN = {
    link.name: link
    for link in (
        Link("infiniband-8x400", 400e9, 5e-6),  # eight ports of 400 Gb/s a host, as hosts of eight GPUs have them
        Link("infiniband-8x200", 200e9, 5e-6),
        Link("infiniband-400", 50e9, 5e-6),
        Link("infiniband-200", 25e9, 5e-6),
        Link("infiniband-100", 12.5e9, 5e-6),
        Link("ethernet-100", 12.5e9, 30e-6),
        Link("ethernet-25", 3.125e9, 30e-6),
        Link("ethernet-10", 1.25e9, 40e-6),
    )
}


def link_of(name: str, known: dict[str, Link], option: str) -> Link:
    """By name. Raises ConfigError with the nearest known one."""
    if name not in known:
        raise ConfigError(unknown(option, name, known))
    return known[name]


def unknown(option: str, name: str, known: dict[str, object] | dict[str, Link]) -> str:
    """The line for a name that is none of the known ones."""
    near = difflib.get_close_matches(name.lower(), {one.lower(): one for one in known}, n=1, cutoff=0.0)
    hint = next(one for one in known if one.lower() == near[0])
    return f"{option}: expected one of {', '.join(known)}, got {name!r}: did you mean {hint}?"
