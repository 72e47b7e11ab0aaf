"""Rates of the rotary embedding, and how `config.json` scales them for long texts."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float

Settings: TypeAlias = Mapping[str, Any]
Rates: TypeAlias = Float[np.ndarray, " R"]
Scaled: TypeAlias = tuple[Rates, float]

# No model comes near it, and the rates of a config beyond it would fill the memory.
_MOST_DIMS = 2**16

_ORIGINAL = "original_max_position_embeddings"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rotary rates that are not the plain ones."""

    kind: str  # as `rope_type` of config.json
    rates: tuple[float, ...]  # radians per position of each pair of head dimensions; float32 values
    attention_factor: float  # multiplies cosine and sine, so the scores by its square


def plain_rates(rotary_dim: int, theta: float) -> Rates:
    """Radians per position of each pair of head dimensions, float32, unscaled."""
    return np.float32(1.0) / _wavelengths(rotary_dim, theta)


def read_scaling(
    rope: Settings, rotary_dim: int, theta: float, max_position: int
) -> RopeScaling | None:
    """What `rope_parameters` or `rope_scaling` makes of the rates; None where they stay plain.

    `rotary_dim` dimensions of a head turn, with rates of base `theta`, in sequences of up to
    `max_position` tokens.

    Source: ROPE_INIT_FUNCTIONS in transformers' modeling_rope_utils.py, same order of operations.

    Raises:
        ValueError: a kind that is not supported, or one without its numbers.
    """
    # Files of 2023 spell the key "type".
    kind = rope.get("rope_type") or rope.get("type") or "default"
    # Dynamic rates only change beyond `max_position`, where no sequence goes.
    if kind in ("default", "dynamic"):
        return None
    if kind not in _SCALINGS:
        supported = ", ".join(("default", "dynamic", *_SCALINGS))
        raise ValueError(f"rope type {kind!r} is not supported; supported: {supported}")
    if not 2 <= rotary_dim <= _MOST_DIMS:
        raise ValueError(f"{rotary_dim} dimensions of a head turn; it may be 2 to {_MOST_DIMS:,}")
    wavelengths = _wavelengths(rotary_dim, theta)
    rates, attention_factor = _SCALINGS[kind](rope, wavelengths, theta, max_position)
    return RopeScaling(kind=kind, rates=tuple(rates.tolist()), attention_factor=attention_factor)


def _wavelengths(rotary_dim: int, theta: float) -> Rates:
    """Positions per radian."""
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    return np.power(np.float32(theta), exponents)


def _linear(rope: Settings, wavelengths: Rates, theta: float, max_position: int) -> Scaled:
    """All rates divided by one factor (position interpolation)."""
    (factor,) = _numbers(rope, "linear", "factor")
    return np.float32(1.0) / wavelengths / np.float32(factor), 1.0


def _llama3(rope: Settings, wavelengths: Rates, theta: float, max_position: int) -> Scaled:
    """Llama 3.1: what turns slowly within the old context is divided, what turns fast is kept.

    From `low_freq_factor` to `high_freq_factor` turns a ramp mixes both; Llama 4 has none.
    """
    names = ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL)
    factor, low, high, original = _numbers(rope, "llama3", *names)
    if high < low:
        raise ValueError(
            f"rope type 'llama3': high_freq_factor is {high}, below low_freq_factor, {low}"
        )
    plain = np.float32(1.0) / wavelengths
    turns = original * plain / np.float32(2 * math.pi)
    ramp = turns > high if high == low else (turns - low) / (high - low)
    keep = np.clip(ramp, 0.0, 1.0).astype(np.float32)
    return (1 - keep) * plain / np.float32(factor) + keep * plain, 1.0


def _yarn(rope: Settings, wavelengths: Rates, theta: float, max_position: int) -> Scaled:
    """YaRN (arXiv 2309.00071): much the same, with a ramp over dimensions instead of turns."""
    given = {
        _ORIGINAL: rope.get(_ORIGINAL) or max_position,
        "beta_fast": rope.get("beta_fast") or 32,
        "beta_slow": rope.get("beta_slow") or 1,
    }
    original, fast, slow = _numbers(given, "yarn", *given)
    stated = rope.get("factor")
    given = {"factor": max_position / original if stated is None else stated}
    (factor,) = _numbers(given, "yarn", "factor")
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    attention_factor = _mscale(factor)
    if mscale and all_dim:
        attention_factor = _mscale(factor, mscale) / _mscale(factor, all_dim)

    rotary_dim = 2 * len(wavelengths)

    def dimension_of(turns: float) -> float:
        """Where a rate turns so often within the old context; fractional."""
        wavelength = original / (turns * 2 * math.pi)
        return rotary_dim * math.log(wavelength) / (2 * math.log(theta))

    first, last = dimension_of(fast), dimension_of(slow)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    width = last - first if last != first else 0.001
    ramp = (np.arange(len(wavelengths), dtype=np.float32) - np.float32(first)) / np.float32(width)
    keep = (1 - np.clip(ramp, 0.0, 1.0)).astype(np.float32)
    divided = np.float32(1.0) / (np.float32(factor) * wavelengths)
    rates = divided * (1 - keep) + np.float32(1.0) / wavelengths * keep
    return rates, _attention_factor(rope, "yarn", attention_factor)


def _mscale(factor: float, multiplier: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


def _longrope(rope: Settings, wavelengths: Rates, theta: float, max_position: int) -> Scaled:
    """LongRoPE (arXiv 2402.13753) for short sequences: each rate divided by its own factor.

    Longer sequences have other factors, for all of their tokens from the first on: keys that are
    cached already would be wrong. So `config_from_hf` ends a model where these begin.
    """
    (original,) = _numbers({_ORIGINAL: rope.get(_ORIGINAL) or max_position}, "longrope", _ORIGINAL)
    factors = rope.get("short_factor")
    if not isinstance(factors, list) or not all(map(_is_positive, factors)):
        raise ValueError(f"rope type 'longrope' needs short_factor, a list of numbers: {factors!r}")
    if len(factors) != len(wavelengths):
        raise ValueError(
            f"short_factor has {len(factors)} entries; {len(wavelengths)} pairs of dimensions turn"
        )
    factor = rope.get("factor") or max_position / original
    scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    rates = np.float32(1.0) / (np.asarray(factors, np.float32) * wavelengths)
    return rates, _attention_factor(rope, "longrope", scale)


def _proportional(rope: Settings, wavelengths: Rates, theta: float, max_position: int) -> Scaled:
    """The first of all pairs turn, at the rates that they have among all; the others do not."""
    given = {"factor": 1.0, "partial_rotary_factor": 1.0} | {
        name: rope[name] for name in ("factor", "partial_rotary_factor") if name in rope
    }
    factor, part = _numbers(given, "proportional", *given)
    rates = np.float32(1.0) / wavelengths / np.float32(factor)
    rates[int(part * len(wavelengths)) :] = 0
    return rates, 1.0


_SCALINGS = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,
    "proportional": _proportional,
}


def _attention_factor(rope: Settings, kind: str, default: float) -> float:
    stated = rope.get("attention_factor")
    given = {"attention_factor": default if stated is None else stated}
    return _numbers(given, kind, "attention_factor")[0]


def _numbers(rope: Settings, kind: str, *names: str) -> list[float]:
    """Entries that have to be there, and numbers."""
    missing = [name for name in names if rope.get(name) is None]
    if missing:
        raise ValueError(f"rope type {kind!r} needs {', '.join(missing)} beside it")
    for name in names:
        if not _is_positive(rope[name]):
            raise ValueError(f"rope type {kind!r}: {name} is {rope[name]!r}, not a number above 0")
    return [float(rope[name]) for name in names]


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0
