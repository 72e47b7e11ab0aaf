"""Rotary frequencies: which scalings of them exist, how a config states them, what they come to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRope:
    """Rotary frequencies divided by one factor (position interpolation)."""

    factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Rotary frequencies as Llama 3.1 scales them: low ones divided, high ones kept.

    Source: `_compute_llama3_parameters` in transformers' modeling_rope_utils.py.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnRope:
    """YaRN: dimensions that turn often are kept, slow ones divided, a ramp in between.

    Source: arXiv 2309.00071, and `_compute_yarn_parameters` in transformers.
    """

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int
    attention_factor: float
    """Multiplies cosine and sine, so the scores by its square."""
    is_truncated: bool
    """The ramp begins and ends at whole dimensions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope:
    """LongRoPE with its factors for short sequences: every frequency divided by one of its own.

    Longer sequences have other factors, for all of their tokens from the first on: keys that are
    cached already would be wrong. So the model ends where these begin.

    Source: arXiv 2402.13753, and `_compute_longrope_parameters` in transformers.
    """

    short_factor: tuple[float, ...]
    attention_factor: float
    original_max_position_embeddings: int


RopeScaling = LinearRope | Llama3Rope | YarnRope | LongRope

_ORIGINAL = "original_max_position_embeddings"

SUPPORTED = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def scaling_from_hf(rope: Mapping[str, Any], max_position: int) -> RopeScaling | None:
    """Reads the scaling of `rope_parameters` or `rope_scaling`.

    Args:
        rope: The dict, in the words of either generation of transformers.
        max_position: Longest sequence of the model.

    Raises:
        ValueError: a kind that does not exist here, or one without its numbers.
    """
    kind = kind_of(rope)
    match kind:
        case "default":
            return None
        case "dynamic":
            # Its frequencies only change beyond `max_position`, where no sequence goes.
            return None
        case "linear":
            return LinearRope(**_numbers(rope, kind, "factor"))
        case "llama3":
            names = [field.name for field in dataclasses.fields(Llama3Rope)]
            llama3 = Llama3Rope(**_numbers(rope, kind, *names))
            low, high = llama3.low_freq_factor, llama3.high_freq_factor
            if high <= low:
                raise ValueError(
                    f"rope type 'llama3': high_freq_factor is {high}, not above low_freq_factor, "
                    f"{low}"
                )
            return llama3
        case "yarn":
            return _yarn(rope, max_position)
        case "longrope" | "su":
            return _longrope(rope, max_position)
    raise ValueError(f"rope type {kind!r} is not supported; supported: {', '.join(SUPPORTED)}")


def kind_of(rope: Mapping[str, Any]) -> str:
    """The kind of scaling; files of 2023 spell the key "type"."""
    return rope.get("rope_type") or rope.get("type") or "default"


def frequencies(
    rotary_dim: int, theta: float, scaling: RopeScaling | None
) -> Float[np.ndarray, " R"]:
    """Radians per position of each pair of head dimensions, float32.

    Source: ROPE_INIT_FUNCTIONS in transformers' modeling_rope_utils.py, same order of operations.
    """
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    wavelengths = np.power(np.float32(theta), exponents)
    plain = np.float32(1.0) / wavelengths
    match scaling:
        case None:
            return plain
        case LinearRope(factor=factor):
            return plain / np.float32(factor)
        case Llama3Rope():
            return _llama3_frequencies(plain, scaling)
        case YarnRope():
            keep = _yarn_ramp(rotary_dim, theta, scaling)
            divided = np.float32(1.0) / (np.float32(scaling.factor) * wavelengths)
            return divided * (1 - keep) + plain * keep
        case LongRope(short_factor=factors):
            if len(factors) != len(plain):
                raise ValueError(
                    f"longrope has {len(factors)} short factors for {len(plain)} frequencies"
                )
            return np.float32(1.0) / (np.asarray(factors, np.float32) * wavelengths)


def attention_factor(scaling: RopeScaling | None) -> float:
    """What cosine and sine are multiplied with."""
    return scaling.attention_factor if isinstance(scaling, YarnRope | LongRope) else 1.0


def _numbers(rope: Mapping[str, Any], kind: str, *names: str) -> dict[str, Any]:
    """Entries that have to be there, and numbers."""
    missing = [name for name in names if rope.get(name) is None]
    if missing:
        raise ValueError(f"rope type {kind!r} needs {', '.join(missing)} beside it")
    for name in names:
        if not _is_positive(rope[name]):
            raise ValueError(f"rope type {kind!r}: {name} is {rope[name]!r}, not a number above 0")
    return {name: int(rope[name]) if name == _ORIGINAL else float(rope[name]) for name in names}


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0


def _yarn(rope: Mapping[str, Any], max_position: int) -> YarnRope:
    original = rope.get(_ORIGINAL) or max_position
    stated = {_ORIGINAL: original, "factor": rope.get("factor")}
    if stated["factor"] is None and _is_positive(original):
        stated["factor"] = max_position / original
    numbers = _numbers(stated, "yarn", "factor", _ORIGINAL)
    for name, default in (("beta_fast", 32), ("beta_slow", 1)):
        numbers |= _numbers({name: rope.get(name) or default}, "yarn", name)
    given = rope.get("attention_factor")
    if given is None:
        mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        given = _mscale(numbers["factor"])
        if mscale and all_dim:
            given = _mscale(numbers["factor"], mscale) / _mscale(numbers["factor"], all_dim)
    numbers |= _numbers({"attention_factor": given}, "yarn", "attention_factor")
    return YarnRope(is_truncated=bool(rope.get("truncate", True)), **numbers)


def _mscale(factor: float, multiplier: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


def _longrope(rope: Mapping[str, Any], max_position: int) -> LongRope:
    original = rope.get(_ORIGINAL) or max_position
    _numbers({_ORIGINAL: original}, "longrope")
    factors = rope.get("short_factor")
    if not isinstance(factors, list) or not all(map(_is_positive, factors)):
        raise ValueError(f"rope type 'longrope' needs short_factor, a list of numbers: {factors!r}")
    factor, given = rope.get("factor") or max_position / original, rope.get("attention_factor")
    if given is None:
        given = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return LongRope(
        short_factor=tuple(map(float, factors)),
        original_max_position_embeddings=original,
        **_numbers({"attention_factor": given}, "longrope", "attention_factor"),
    )


def _llama3_frequencies(
    plain: Float[np.ndarray, " R"], scaling: Llama3Rope
) -> Float[np.ndarray, " R"]:
    """Divides the frequencies that turn less than `low_freq_factor` times in the old context.

    Those that turn more than `high_freq_factor` times stay; between the two a ramp mixes both.
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * plain / np.float32(2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0).astype(np.float32)
    return (1 - keep) * plain / np.float32(scaling.factor) + keep * plain


def _yarn_ramp(rotary_dim: int, theta: float, scaling: YarnRope) -> Float[np.ndarray, " R"]:
    """How much of every plain frequency is kept: 1 for fast ones, 0 for slow ones."""

    def dimension_of(turns: float) -> float:
        """Where a frequency turns so often within the old context; fractional."""
        wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return rotary_dim * math.log(wavelength) / (2 * math.log(theta))

    first, last = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.is_truncated:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    width = last - first if last != first else 0.001
    ramp = (np.arange(rotary_dim // 2, dtype=np.float32) - np.float32(first)) / np.float32(width)
    return (1 - np.clip(ramp, 0.0, 1.0)).astype(np.float32)
