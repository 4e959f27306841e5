"""A backbone through torch.compile: names and evaluation stay, values agree, BatchNorm's statistics move once."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backbones import Backbone, build_backbone
from backbones.recompute import recompute
from backbones.vit import VisionTransformer
from configs.schema import ConfigError
from training import distributed


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _images(count: int) -> Tensor:
    return torch.rand(count, 3, 112, 112, generator=torch.Generator().manual_seed(1)) * 2 - 1


def _build(name: str, share: float = 0.0) -> Backbone:
    torch.manual_seed(3)
    if name == "small":
        return build_backbone(name, embedding_size=8, recompute=share)
    # Without random numbers, which compiled come in another order.
    vit = VisionTransformer(64, 3, embedding_size=8, drop_path=0, mask_ratio=0)
    recompute(vit.parts(), share)
    return vit


def _trained(backbone: Backbone) -> dict[str, Tensor]:
    """Embedding, gradients and buffers of a pass."""
    embedding_BD = backbone(_images(3))
    embedding_BD.backward(torch.randn(embedding_BD.shape, generator=torch.Generator().manual_seed(2)))
    out = {f"gradient of {name}": w.grad for name, w in backbone.named_parameters() if w.grad is not None}
    out |= {f"buffer {name}": buffer.clone() for name, buffer in backbone.named_buffers()}
    return {**out, "embedding": embedding_BD.detach()}


def _agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        distance = torch.linalg.norm((found[name] - value).double())
        assert distance <= 1e-3 * torch.linalg.norm(value.double()), name


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("name", ["small", "vit"])
def test_values_agree_and_statistics_move_once(name: str, share: float) -> None:
    backbone = _build(name, share)
    backbone.compile_body(backend="aot_eager")
    found = _trained(backbone)
    _agree(found, _trained(_build(name)))
    counts = [int(value) for key, value in found.items() if key.endswith("num_batches_tracked")]
    assert set(counts) == {1}


def test_it_is_compiled_once_for_training_and_never_for_evaluation() -> None:
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> object:
        compiled.append(len(graph.graph.nodes))
        return graph.forward

    backbone = _build("small")
    backbone.compile_body(backend=backend)  # type: ignore[arg-type]
    for _ in range(3):
        backbone(_images(3)).sum().backward()
    assert len(compiled) == 1
    assert compiled[0] > 10
    with torch.no_grad():
        expected = copy.deepcopy(_build("small").eval())
        expected.load_state_dict(backbone.state_dict())
        assert torch.equal(backbone.eval()(_images(2)), expected(_images(2)))
        backbone.train()(_images(4))  # a trial of shapes, not a step
    assert len(compiled) == 1


def test_names_are_those_of_a_backbone_that_is_not_compiled(tmp_path: Path) -> None:
    backbone, plain = _build("small"), _build("small")
    backbone.compile_body(backend="eager")
    backbone(_images(2)).sum().backward()
    assert list(backbone.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in backbone.named_modules()] == [name for name, _ in plain.named_modules()]
    torch.save(backbone.state_dict(), tmp_path / "backbone.pt")
    plain.load_state_dict(torch.load(tmp_path / "backbone.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(plain.eval()(_images(2)), backbone.eval()(_images(2)))


def test_a_copy_runs_its_own_weights() -> None:
    first = _build("small")
    first.compile_body(backend="eager")
    second = copy.deepcopy(first)
    with torch.no_grad():
        for weight in first.parameters():
            weight.zero_()
    assert second(_images(2)).abs().sum() > 0


def test_the_head_stays_outside_autocast() -> None:
    backbone = _build("small")
    backbone.compile_body(backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features_BCHW = backbone.body(_images(2))
        embedding_BD = backbone(_images(2))
    assert features_BCHW.dtype == torch.bfloat16
    assert embedding_BD.dtype == torch.float32
    embedding_BD.sum().backward()
    assert all(weight.grad.dtype == torch.float32 for weight in backbone.parameters() if weight.grad is not None)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's own compiler needs a C++ compiler")
def test_through_torchs_own_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    backbone = _build("small")
    backbone.compile_body()
    _agree(_trained(backbone), _trained(_build("small")))


def test_a_compiler_that_does_not_work_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_function: object) -> object:
        raise RuntimeError("no g++ here\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ConfigError, match=r"model\.compile: .*works on cpu, got no g\+\+ here: install") as caught:
        distributed._try_compiler(torch.device("cpu"))
    assert "\n" not in str(caught.value)
