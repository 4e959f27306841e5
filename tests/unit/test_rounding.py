"""Stochastic rounding: unbiased, the same for any cut into shards, exact where nothing is to be rounded."""

from __future__ import annotations

import pytest
import torch

from configs.head import HeadConfig
from partial_fc.head import PartialFCHead
from partial_fc.optim import CentreSGD
from partial_fc.rounding import lots, more_lots, stochastic_bf16


def test_every_lot_rounds_to_a_neighbour_and_the_mean_is_the_number() -> None:
    """Over all 65,536 lots the mean is exact: of the 2^16 float32 numbers between two bf16, the k-th goes up k
    times."""
    every_lot = torch.arange(1 << 16)
    for value in (1.0, 1.00123, -3.3e-5, 0.7 + 2**-20, 1e30, -1e-30, 0.0):
        number = torch.tensor(value)
        rounded = stochastic_bf16(number.expand(1 << 16).contiguous(), every_lot).double()
        assert set(rounded.tolist()) <= {float(rounded.min()), float(rounded.max())}
        assert float(rounded.min()) <= number <= float(rounded.max())
        assert float(rounded.max() - rounded.min()) <= abs(number) * 2**-7
        assert float(rounded.mean()) == pytest.approx(float(number), rel=1e-12, abs=0)


def test_numbers_that_bf16_holds_stay_and_what_is_not_finite_too() -> None:
    numbers = torch.randn(4096).bfloat16().float()
    assert torch.equal(stochastic_bf16(numbers, torch.full((4096,), 0xFFFF)).float(), numbers)
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert str(stochastic_bf16(odd, torch.full((3,), 0xFFFF)).tolist()) == "[inf, -inf, nan]"


def test_lots_are_even_independent_and_a_function_of_the_row() -> None:
    whole = lots(torch.arange(300), 64, key=7)
    assert torch.equal(
        torch.cat([lots(torch.arange(0, 123), 64, key=7), lots(torch.arange(123, 300), 64, key=7)]), whole
    )
    assert not (whole == lots(torch.arange(300), 64, key=8)).any(1).all()
    shares = torch.stack([whole & 0xFFFF, whole >> 16, more_lots(whole) & 0xFFFF]).double().flatten(1) / 65536
    assert shares.min() >= 0
    assert shares.max() < 1
    assert torch.allclose(shares.mean(1), torch.full((3,), 0.5, dtype=torch.float64), atol=0.01)
    assert torch.corrcoef(shares).fill_diagonal_(0).abs().max() < 0.03
    neighbours = torch.corrcoef(torch.stack([shares[0][:-1], shares[0][1:]]))
    assert abs(float(neighbours[0, 1])) < 0.03


def test_steps_too_small_for_bf16_arrive_on_average() -> None:
    head = PartialFCHead(num_classes=64, embedding_size=256, config=HeadConfig(centre_dtype="bf16"), group=None, seed=0)
    head.weight.data.fill_(1.0)
    optimizer = CentreSGD(head.parameters(), lr=1.0, momentum=0.0, weight_decay=0.0, fused=False)
    for _ in range(50):
        head.weight.grad = torch.full_like(head.weight, 2.0**-14)  # nearest rounding would leave 1.0 each time
        optimizer.step()
    assert float(head.weight.detach().float().mean()) == pytest.approx(1 - 50 * 2.0**-14, rel=1e-4)
    assert torch.tensor(1 - 2.0**-14).bfloat16() == 1


def test_bf16_centres_follow_float32_ones() -> None:
    """The same training in both: the loss falls alike, and centres stay together within bf16's digits."""
    losses = {}
    for dtype in ("fp32", "bf16"):
        config = HeadConfig(scale=16.0, margin=0.2, centre_dtype=dtype)  # type: ignore[arg-type]
        head = PartialFCHead(num_classes=60, embedding_size=32, config=config, group=None, seed=0)
        assert head.weight.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
        optimizer = CentreSGD(head.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        generator = torch.Generator().manual_seed(1)
        x_BD, labels_B = torch.randn(64, 32, generator=generator), torch.arange(64) % 60
        for step in range(60):
            loss = head(head.gather(x_BD, labels_B, labels_B), step=step)
            loss.backward()
            optimizer.step()
        losses[dtype] = loss.item()
        assert optimizer.state[head.weight]["momentum_buffer"].dtype == head.weight.dtype
    assert losses["fp32"] < 0.5
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.1)
