"""Settings of the sharded margin softmax and of its class centres."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from configs.checks import require

Loss = Literal["arcface", "cosface", "combined", "magface", "adaface", "curricularface"]
Impl = Literal["auto", "reference", "torch", "triton"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """The sharded margin softmax over class centres (Partial FC)."""

    loss: Loss = "arcface"
    """arcface: cos(theta + m), m in radians. cosface: cos(theta) - m. combined: cos(m1 theta + m) - m3.
    magface: arcface, with a margin that grows with the embedding's length. adaface: between arcface and cosface, by the
    embedding's length. curricularface: arcface, and hard negatives weigh more as training goes on."""
    margin: float = 0.5
    """m0, the margin of every class until clusters guide it; their sample-weighted mean stays m0. AdaFace's authors
    take 0.4. Of magface, what a class's own margin exceeds it by is added to the one of the length."""
    m1: float = 1.0
    """Of combined: multiplies the angle, 1 or more."""
    m3: float = 0.0
    """Of combined: taken from the cosine."""
    length_low: float = 10.0
    """Of magface: embedding lengths from here to length_high are given margins from margin_low to margin_high."""
    length_high: float = 110.0
    """Of magface: longer embeddings are taken for ones of this length."""
    margin_low: float = 0.45
    """Of magface: margin of the shortest embeddings."""
    margin_high: float = 0.8
    """Of magface: margin of the longest embeddings."""
    length_weight: float = 35.0
    """Of magface: lambda_g, weight of the regulariser that lets embeddings of good images grow."""
    quality_spread: float = 0.333
    """Of adaface: h; lengths within 1 / h deviations of the mean span the quality from -1 to 1."""
    running_momentum: float = 0.99
    """Of adaface and curricularface: share of the past in running statistics."""
    subcentres: int = 1
    """K, centres of a class; its cosine is the largest of theirs (sub-center ArcFace takes 3, for noisy labels)."""
    straight_through: bool = False
    """insightface's gradient, which leaves the margin's own derivative out, in place of the exact one."""
    interclass_filter: float = 0.0
    """Above 0: cosines of other classes above it count as 0, as insightface's filter of label noise; 0: off."""
    scale: float = 64.0
    """s, the logits' scale; 30 suits fewer than some thousand classes. Up to 128, and 10^9 classes, exp() of every
    class within 100 degrees lies in float32's range (docs/numerics.md); up to 64 with curricularface, whose logits
    reach 2 s."""
    sample_rate: float = 1.0
    """Share of the class centres that is drawn for a step; the classes of the batch always take part."""
    missed_steps: Literal["skip", "catch_up"] = "skip"
    """What becomes of a class centre in steps in which it was not drawn: nothing; or, with SGD, exactly what momentum
    and decay would have done to it, made up for when it is drawn again."""
    on_sphere: bool = False
    """Class centres move along the sphere and keep their length; weight decay then does not act on them."""
    centre_dtype: Literal["fp32", "bf16"] = "fp32"
    """Of class centres and their momentum. bf16 rounds by lot, without bias, and halves their memory."""
    wire_dtype: Literal["fp32", "bf16"] = "fp32"
    """In which embeddings and their gradients travel between ranks; bf16 halves the bytes, sums stay float32."""
    impl: Impl = "auto"
    """auto: Triton kernels where they can run, else torch. reference: dense and slow, for comparison."""

    def __post_init__(self) -> None:
        self._check_loss()
        name, value = "head.interclass_filter", self.interclass_filter
        require(0 <= value < 1, name, value, "0 (off) to below 1")
        require(0 <= self.margin < 1.5, "head.margin", self.margin, "0 <= margin < 1.5")
        most = 64 if self.loss == "curricularface" else 128
        expected = f"0 < scale <= {most} (exp() of ordinary cosines must fit float32)"
        require(0 < self.scale <= most, "head.scale", self.scale, expected)
        require(0 < self.sample_rate <= 1, "head.sample_rate", self.sample_rate, "0 < sample_rate <= 1")
        whole = isinstance(self.subcentres, int)
        require(whole and 1 <= self.subcentres <= 16, "head.subcentres", self.subcentres, "a whole number, 1 to 16")
        require(0 <= self.running_momentum < 1, "head.running_momentum", self.running_momentum, "0 <= momentum < 1")
        require(self.missed_steps in ("skip", "catch_up"), "head.missed_steps", self.missed_steps, "skip or catch_up")
        exact = self.missed_steps == "catch_up"
        require(not (exact and self.on_sphere), "head.on_sphere", True, "false with head.missed_steps=catch_up")
        for name in ("centre_dtype", "wire_dtype"):
            require(getattr(self, name) in ("fp32", "bf16"), f"head.{name}", getattr(self, name), "fp32 or bf16")
        require(not (exact and self.centre_dtype == "bf16"), "head.centre_dtype", "bf16", "fp32 with catch_up")
        require(self.impl in get_args(Impl), "head.impl", self.impl, ", ".join(get_args(Impl)))

    def _check_loss(self) -> None:
        known = get_args(Loss)
        require(self.loss in known, "head.loss", self.loss, f"{', '.join(known[:-1])} or {known[-1]}")
        alone = self.loss != "combined"
        require(1 <= self.m1 <= 8 and not (alone and self.m1 != 1), "head.m1", self.m1, "1 to 8; 1 unless combined")
        require(0 <= self.m3 < 1 and not (alone and self.m3), "head.m3", self.m3, "0 <= m3 < 1; 0 unless combined")
        plain = self.loss in ("arcface", "cosface")
        require(plain or not self.straight_through, "head.straight_through", True, f"false with head.loss={self.loss}")
        both = self.loss == "curricularface" and self.interclass_filter > 0
        require(not both, "head.interclass_filter", self.interclass_filter, "0 with head.loss=curricularface")
        low, high = self.length_low, self.length_high
        require(0 < low < high, "head.length_low, length_high", (low, high), "0 < length_low < length_high")
        low, high = self.margin_low, self.margin_high
        require(
            0 <= low <= high < 1.5, "head.margin_low, margin_high", (low, high), "0 <= margin_low <= margin_high < 1.5"
        )
        require(self.length_weight >= 0, "head.length_weight", self.length_weight, "0 or more")
        require(self.quality_spread > 0, "head.quality_spread", self.quality_spread, "more than 0")
