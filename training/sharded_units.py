"""What of a backbone is gathered at a time when it is sharded, and over how many ranks it is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import nn

from backbones import Backbone
from configs.schema import ConfigError

_LARGE = 1 << 20
"""Numbers of a linear layer outside of the blocks that is gathered on its own."""


class Unit(NamedTuple):
    """Parameters that are gathered together, before the module runs."""

    module: nn.Module
    parameters: Sequence[nn.Parameter]
    kept: bool
    """Stays whole from forward to backward: the next pass through it comes at once."""


def units_of(backbone: Backbone) -> list[Unit]:
    """The blocks, large linear layers outside of them, and the backbone with what is left, last.

    Blocks are what `Backbone.parts` says. A linear layer outside of them stands at the end of a backbone: it is run
    last and needed first in backward, when most memory is in use, so that letting it go between spares nothing.
    """
    units: list[Unit] = []
    taken: set[nn.Parameter] = set()

    def take(module: nn.Module, *, kept: bool) -> None:
        parameters = [p for p in module.parameters() if p not in taken]
        taken.update(parameters)
        if parameters:
            units.append(Unit(module, parameters, kept))

    for part in backbone.parts():
        if part.module is not backbone:
            take(part.module, kept=False)
    for module in backbone.modules():
        if isinstance(module, nn.Linear) and module.weight.numel() >= _LARGE and module.weight not in taken:
            take(module, kept=True)
    take(backbone, kept=True)
    return units


def shard_ranks(shard: Literal["none", "host", "all"], ranks: int, host_ranks: int) -> int:
    """Over how many ranks one copy of the backbone is cut; 1: every rank has all of it.

    host_ranks: of each host; 0: all are on one; -1: hosts have unequal numbers of them. Raises ConfigError for those.
    """
    if shard == "none" or ranks == 1:
        return 1
    if shard == "all" or host_ranks == 0:
        return ranks
    if host_ranks < 0 or ranks % host_ranks:
        raise ConfigError(
            f"model.shard=host: expected as many ranks on every host, got {ranks} over hosts that differ: "
            "start the same --nproc_per_node everywhere, or use --set model.shard=all"
        )
    return host_ranks
