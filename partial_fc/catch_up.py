"""What momentum and decay would have done to a class centre in the steps in which it was not drawn, made up for
exactly.

Without a gradient, SGD's step is linear in (w, v): v' = m v + d w and w' = w - lr v', which is the matrix

    (w', v') = M (w, v)    M = ((1 - lr d, -lr m), (d, m))

so the steps t+1 … now that a row has missed are one matrix, the product M_now … M_t+1. A table keeps that product for
every t; a step multiplies all of it by its own M. It grows by 32 bytes a step until `settle` brings every row up to
date. Rows are brought up to date when they are drawn, before the loss reads them, and so end where a dense optimizer
would have brought them. Ours.

Legend: as in `partial_fc.tiles`; T steps since the last `settle`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.links import attach, attached
from partial_fc.tiles import SampledRows, Tile, tiles_of

_NAME = "_missed_steps"
_TILE_ROWS = 4096


class MissedSteps:
    """The steps that each row of a parameter has missed. The parameter and its momentum are changed in place.

    The parameter leads here for as long as the optimizer keeps this.
    """

    def __init__(self, parameter: Tensor, velocity_RD: Tensor) -> None:
        self.parameter, self.velocity_RD = parameter, velocity_RD
        self._clear()
        attach(parameter, _NAME, self)

    def _clear(self) -> None:
        device = self.parameter.device
        self.behind = False
        """Whether some row has missed a step."""
        self.version = self.parameter._version
        self.products_T22 = torch.eye(2, dtype=torch.float64, device=device)[None]
        """Entry t: of the steps after the t-th; the last one is the identity."""
        self.seen_R1 = torch.zeros(self.parameter.shape[0], 1, dtype=torch.int32, device=device)
        """Steps that the row has seen, by a gradient or by catching up."""

    def after_step(
        self,
        tiles: list[Tile],
        subcentres: int,
        *,
        everything: bool,
        lr: float,
        momentum: float,
        decay: float,
        skip: Tensor | None = None,
    ) -> None:
        """A step has been taken, in which these tiles had a gradient. everything: they are all there is.

        skip: scalar on the device; where it is not 0, nothing has moved and nobody has missed anything: the step is
        the identity. These tiles were up to date before it, and still are.
        """
        self.version = self.parameter._version
        if everything and not self.behind:
            return
        self.behind = True
        one_122 = torch.eye(2, dtype=torch.float64, device=self.parameter.device)[None]
        step_122 = one_122.clone()
        for place, value in zip(step_122.view(4), (1 - lr * decay, -lr * momentum, decay, momentum), strict=True):
            place.fill_(value)  # a tensor made of these numbers would make a GPU's host wait
        if skip is not None:
            step_122 = torch.where(skip != 0, one_122, step_122)
        self.products_T22 = torch.cat([step_122 @ self.products_T22, one_122])
        now = len(self.products_T22) - 1
        for tile in tiles:
            tile.put(self.seen_R1, torch.full_like(tile.take(self.seen_R1, subcentres), now), subcentres)

    @torch.no_grad()
    def bring_up_to_date(self, sampled: SampledRows | None, subcentres: int) -> None:
        """Rows of the sampled classes, or all, become what they would be had they moved in every step."""
        if self.parameter._version != self.version:
            self._clear()  # loaded, or set by hand: what is there now has missed nothing
        if not self.behind:
            return
        now = len(self.products_T22) - 1
        centres_RD = self.parameter.data  # a change that does not count as one: gradients that wait are of other rows
        for tile in tiles_of(len(self.parameter) // subcentres, _TILE_ROWS, sampled):
            seen_k1, w_kD, v_kD = (tile.take(t, subcentres) for t in (self.seen_R1, centres_RD, self.velocity_RD))
            a_k1, b_k1, c_k1, d_k1 = self.products_T22[seen_k1[:, 0].long()].to(w_kD.dtype).flatten(1).split(1, dim=1)
            new_kD, velocity_kD = a_k1 * w_kD + b_k1 * v_kD, c_k1 * w_kD + d_k1 * v_kD
            for tensor, values in (
                (centres_RD, new_kD),
                (self.velocity_RD, velocity_kD),
                (self.seen_R1, torch.full_like(seen_k1, now)),
            ):
                tile.put(tensor, values, subcentres)

    def settle(self) -> None:
        """Bring every row up to date and forget the steps: before centres are saved or read as a whole."""
        self.bring_up_to_date(None, 1)
        self._clear()


def _missed_steps(parameter: Tensor) -> MissedSteps | None:
    """Those that an optimizer keeps count of; None where it lets them be."""
    missed = attached(parameter, _NAME)
    return missed if isinstance(missed, MissedSteps) else None


def settle(parameter: Tensor) -> None:
    """Before centres are saved or read as a whole."""
    if (missed := _missed_steps(parameter)) is not None:
        missed.settle()


def bring_up_to_date(parameter: Tensor, sampled: SampledRows | None, subcentres: int) -> None:
    """Before a loss reads these classes' centres; nothing where their optimizer lets missed steps be."""
    missed = _missed_steps(parameter)
    if missed is not None:
        missed.bring_up_to_date(sampled, subcentres)
