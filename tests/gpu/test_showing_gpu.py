"""Times and memory of a step on a GPU: measured in its stream, and no host waits for them. Skipped without one."""

from __future__ import annotations

import pytest
import torch

from training.showing.flops import peak_tflops
from training.showing.memory import memory_in_use
from training.showing.timing import Stopwatch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_peaks_are_of_the_time_since_the_last_call() -> None:
    device = torch.device("cuda", 0)
    memory_in_use(device)
    held = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    large = memory_in_use(device)
    nbytes = held.nbytes
    del held
    memory_in_use(device)  # it was there when this time began
    small = memory_in_use(device)
    assert large["memory/allocated_gb"] - small["memory/allocated_gb"] == pytest.approx(nbytes / 1e9, rel=0.01)
    assert large["memory/reserved_gb"] >= large["memory/allocated_gb"]


def test_a_stopwatch_measures_the_stream_and_does_not_wait() -> None:
    device = torch.device("cuda", 0)
    watch = Stopwatch(device, "backbone")
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with watch:
            torch.cuda._sleep(100_000_000)
        watch.start()
        torch.cuda._sleep(100_000_000)
        watch.stop()
        watch.stop()  # without a beginning
    finally:
        torch.cuda.set_sync_debug_mode("default")
    seconds = watch.take()
    assert 0.02 < seconds < 2, "two hundred million cycles of a clock between 0.1 and 10 GHz"
    assert watch.take() == 0


def test_a_known_gpu_has_the_order_of_its_peaks() -> None:
    name = torch.cuda.get_device_name(0)
    half, single = peak_tflops(name, "fp16"), peak_tflops(name, "fp32")
    if half is None or single is None:
        pytest.skip(f"{name}: peak not known")
    assert half > single
