"""Rotary position embeddings (arXiv 2104.09864) with the scalings of long-context models."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from elo.common.errors import UserError
from elo.common.fields import Fields, shown

# The types, and what each reads; any other field would change what is computed.
OF_LENGTH = ("factor", "original_max_position_embeddings")
READ = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (*OF_LENGTH, "low_freq_factor", "high_freq_factor"),
    "yarn": (*OF_LENGTH, "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"),
    "longrope": (*OF_LENGTH, "attention_factor", "short_factor", "long_factor"),
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; the fields after `factor` belong to the types in their comments."""

    type: str  # one of READ
    theta: float
    factor: float = 1.0
    original_max_position_embeddings: int = 0  # dynamic, llama3, yarn, longrope
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float = 1.0  # yarn, longrope: cos and sin are multiplied by it
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    divisors: tuple[float, ...] = ()  # longrope: of each pair's frequency, up to the original length
    long_divisors: tuple[float, ...] = ()  # and beyond it

    @property
    def varies(self) -> bool:
        """Whether the frequencies depend on the sequence's length."""
        return self.type in ("dynamic", "longrope")

    def at(self, length: int, head_dim: int) -> "RopeConfig":
        """The embedding for this length, in a batch that of the longest sequence: beyond the original it may differ."""
        original = self.original_max_position_embeddings
        if not self.varies or length <= original:
            return self
        if self.type == "longrope":
            return replace(self, divisors=self.long_divisors)
        # NTK-aware scaling: a larger base, so that the slowest pair's wavelength grows by the factor.
        growth = self.factor * length / original - (self.factor - 1)
        return replace(self, theta=self.theta * growth ** (head_dim / (head_dim - 2)))


def read_rope(config: Fields, max_position_embeddings: int, head_dim: int) -> RopeConfig:
    where, fields = config.where, config.fields
    # A file that has both is read as transformers 5 reads it.
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    scaling = fields.get(name) or {}
    if not isinstance(scaling, dict):
        raise UserError(f"{where}: {name} must be an object, not {shown(scaling)}")
    rope = Fields(scaling, f"{where}: {name}")
    theta = rope.number("rope_theta", default=config.number("rope_theta", default=10000.0), minimum=1.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in [*READ]:
        raise UserError(f"{where}: rope type {shown(kind)} is not implemented; implemented are {', '.join(READ)}")
    if scaling.get("partial_rotary_factor") not in (None, 1):
        raise UserError(f"{rope.where}: partial_rotary_factor is not implemented")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *READ[kind]}
    known |= {"factor"} if scaling.get("factor") == 1 else set()  # of type default
    unknown = sorted(key for key, value in scaling.items() if key not in known and value is not None)
    if unknown:
        raise UserError(f"{rope.where}: {', '.join(unknown[:5])} is not implemented for rope type {kind}")

    if kind == "default":
        return RopeConfig(kind, theta)
    if kind == "linear":
        return RopeConfig(kind, theta, rope.number("factor"))
    if kind == "dynamic":
        factor = rope.number("factor")
        if factor < 1 or head_dim < 4:
            raise UserError(f"{rope.where}: rope type dynamic needs a factor of at least 1 and heads of 4 dimensions")
        return RopeConfig(kind, theta, factor, max_position_embeddings)
    # transformers prefers a length beside the rope fields to one among them.
    inside = rope.integer("original_max_position_embeddings", default=max_position_embeddings)
    original = config.integer("original_max_position_embeddings", default=inside)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise UserError(f"{rope.where}: low_freq_factor must be below high_freq_factor")
        return RopeConfig(kind, theta, rope.number("factor"), original, low, high)
    if kind == "longrope":
        factor = rope.number("factor", default=max_position_embeddings / original)
        if original < 2:
            raise UserError(f"{rope.where}: original_max_position_embeddings must be more than 1 for longrope")
        by_length = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        attention = rope.number("attention_factor", default=by_length)
        short, long = (_divisors(rope, name, head_dim) for name in ("short_factor", "long_factor"))
        return RopeConfig(kind, theta, factor, original, attention_factor=attention, divisors=short, long_divisors=long)
    factor = rope.number("factor")
    return RopeConfig(
        *(kind, theta, factor, original),
        attention_factor=_yarn_attention_factor(rope, factor),
        beta_fast=rope.number("beta_fast", default=32.0),
        beta_slow=rope.number("beta_slow", default=1.0),
        truncate=rope.boolean("truncate", default="truncate" not in scaling),
    )


def _divisors(rope: Fields, name: str, head_dim: int) -> tuple[float, ...]:
    values = rope.fields.get(name)
    is_numbers = isinstance(values, list) and all(type(v) in (int, float) and 0 < v < math.inf for v in values)
    if not is_numbers or len(values) != head_dim // 2:
        raise UserError(f"{rope.where}: {name} must be a list of {head_dim // 2} numbers above 0, for each pair one")
    return tuple(map(float, values))


def _yarn_attention_factor(rope: Fields, factor: float) -> float:
    """YaRN (arXiv 2309.00071), section 3.4; `mscale` and `mscale_all_dim` are DeepSeek's refinement of it."""
    if rope.given("attention_factor"):
        return rope.number("attention_factor")

    def attention_scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if rope.fields.get("mscale") and rope.fields.get("mscale_all_dim"):
        return attention_scale(rope.number("mscale")) / attention_scale(rope.number("mscale_all_dim"))
    return attention_scale(1.0)


@lru_cache(maxsize=8)
def rotary_table(
    rope: RopeConfig, head_dim: int, length: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of shape (length, head_dim / 2), computed in fp32 and then rounded to `dtype`."""
    with torch.inference_mode(False), torch.no_grad():
        angles = torch.outer(torch.arange(length, dtype=torch.float32), rotary_frequencies(rope, head_dim))
        cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
        return cos.to(device, dtype), sin.to(device, dtype)


def rotary_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position for each of the head_dim / 2 pairs, fp32, with the scaling of long-context models.

    If `rope` varies with the sequence's length, these are for the original length; `at` gives the one for a longer one.
    """
    base = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    frequencies = 1.0 / base
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == "longrope":
        return 1.0 / (torch.tensor(rope.divisors) * base)
    if rope.type == "llama3":
        # Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between interpolated.
        low, high = rope.low_freq_factor, rope.high_freq_factor
        wavelength = 2 * math.pi / frequencies
        rotations = rope.original_max_position_embeddings / wavelength
        keep = (rotations - low) / (high - low)
        between = (1 - keep) * frequencies / rope.factor + keep * frequencies
        scaled = torch.where(
            wavelength > rope.original_max_position_embeddings / low, frequencies / rope.factor, between
        )
        return torch.where(wavelength < rope.original_max_position_embeddings / high, frequencies, scaled)
    if rope.type == "yarn":
        # YaRN, arXiv 2309.00071, section 3.2: the same idea by the number of rotations over the original context.
        def dimension(rotations: float) -> float:
            wavelengths = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
            return head_dim * math.log(wavelengths) / (2 * math.log(rope.theta))

        low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low or 0.001)
        keep = 1 - ramp.clamp(0, 1)
        return 1.0 / (rope.factor * base) * (1 - keep) + frequencies * keep
    return frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + head_dim / 2]) by its position's angle.

    x: (batch, heads, sequence, head_dim); cos, sin: (sequence, head_dim / 2), or (batch, 1, sequence, head_dim / 2)
    where the sequences are at different positions.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
