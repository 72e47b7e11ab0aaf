"""Logits and per-row parameters to tokens: a pure function over rows.

A row's token depends on its own logits, parameters, seed and position alone. The draw is the
Gumbel maximum over the kept tokens, with key = fold_in(key(seed), position of the token), so a
seed gives the same text in any batch and after any preemption.

Order, as in vLLM and transformers: bans, temperature, min-p, top-k, top-p, draw. All three
truncations keep the tokens at or above some threshold (ties at the threshold are all kept), so
they are found without sorting the vocabulary: among the largest few where that settles it, else
exactly by bisection over the ordered bits of the floats.
"""

import dataclasses
import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from folojax.state import SamplingRows, StepOutput

NUM_CANDIDATES = 64


class SamplingClass(enum.IntEnum):
    """What the most demanding row of a batch needs; static, so each has its own executable."""

    GREEDY = 0
    RANDOM = 1  # temperature
    TRUNCATED = 2  # and top-k, top-p, min-p
    EDITED = 3  # and edits of the logits: banned ids


@dataclasses.dataclass(frozen=True)
class SamplingSpec:
    """What chooses the sampler's executable; static.

    Attributes:
        needed: At least as demanding as every row.
        num_logprobs: J, alternatives to report with each token; None reports no ranks either.
        num_tokens: Ids from here on are padding of the vocabulary and never sampled; None: none.
    """

    needed: SamplingClass
    num_logprobs: int | None = None
    num_tokens: int | None = None


class _Kept(NamedTuple):
    """Tokens of a row with `logits >= threshold` are kept; not settled: the candidates ran out."""

    threshold: Float[Array, " B"]
    is_settled: Bool[Array, " B"]


def sample(
    logits: Float[Array, "B V"],
    rows: SamplingRows,
    position: Int[Array, " B"],
    spec: SamplingSpec,
) -> StepOutput:
    """Draws one token a row.

    Args:
        logits: Of the model, float32.
        rows: Parameters; fields that the class does not use are not read.
        position: Of the token to be drawn in its sequence: its randomness.
        spec: At least as demanding as every row.
    """
    sampling = spec.needed
    processed = _ban(logits, rows.banned) if sampling >= SamplingClass.EDITED else logits
    if spec.num_tokens is not None and spec.num_tokens < logits.shape[1]:
        is_padding = jnp.arange(logits.shape[1])[None, :] >= spec.num_tokens
        processed = jnp.where(is_padding, -jnp.inf, processed)
    is_valid = jnp.isfinite(jax.nn.logsumexp(logits, axis=-1))
    is_valid &= processed.max(axis=-1) > -jnp.inf  # the bans have left something
    if sampling > SamplingClass.GREEDY:
        is_greedy = (rows.temperature == 0)[:, None]
        scaled = processed / jnp.where(is_greedy, 1.0, rows.temperature[:, None])
        noisy = scaled + _gumbel(rows.seed, position, logits.shape[1])
        if sampling >= SamplingClass.TRUNCATED:
            noisy = jnp.where(scaled >= truncate(scaled, rows)[:, None], noisy, -jnp.inf)
        processed = jnp.where(is_greedy, processed, noisy)
    tokens = argmax(processed)
    if spec.num_logprobs is None:
        none = jnp.zeros((logits.shape[0], 0))
        logprobs = -optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens)
        ranks = jnp.zeros_like(tokens)
        return StepOutput(tokens, logprobs, ranks, is_valid, none.astype(jnp.int32), none)
    logprobs, ranks, top_tokens, top = token_logprobs(logits, tokens, spec.num_logprobs)
    return StepOutput(tokens, logprobs, ranks, is_valid, top_tokens, top)


def token_logprobs(
    logits: Float[Array, "B V"], tokens: Int[Array, " B"], num_logprobs: int
) -> tuple[Float[Array, " B"], Int[Array, " B"], Int[Array, "B J"], Float[Array, "B J"]]:
    """Log-probability and rank of given tokens, and the J likeliest with theirs.

    A rank counts the tokens that are likelier, and of equals those with a lower id, from 1.
    """
    index = jnp.arange(logits.shape[1])[None, :]
    chosen = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[:, None], axis=1)
    is_before = (logits > chosen) | ((logits == chosen) & (index < tokens[:, None]))
    normaliser = jax.nn.logsumexp(logits, axis=1, keepdims=True)
    top, top_tokens = lax.top_k(logits, num_logprobs)
    ranks = 1 + is_before.sum(axis=1, dtype=jnp.int32)
    return (chosen - normaliser)[:, 0], ranks, top_tokens, top - normaliser


def argmax(x: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Index of the largest value, the lowest one wins a tie; V - 1 for a row of NaN.

    Spelled with max and min, which XLA's CPU backend runs several times faster than its argmax.
    """
    size = x.shape[1]
    index = jnp.arange(size, dtype=jnp.int32)[None, :]
    is_largest = x == x.max(axis=1, keepdims=True)
    return jnp.minimum(jnp.where(is_largest, index, size).min(axis=1), size - 1)


def truncate(scaled: Float[Array, "B V"], rows: SamplingRows) -> Float[Array, " B"]:
    """The threshold of min-p, top-k and top-p together, exact: -inf where nothing is cut."""
    kept = _threshold_of_candidates(scaled, rows)
    return lax.cond(
        kept.is_settled.all(),
        lambda: kept.threshold,
        lambda: jnp.where(kept.is_settled, kept.threshold, _threshold_by_bisection(scaled, rows)),
    )


def _threshold_of_candidates(scaled: Float[Array, "B V"], rows: SamplingRows) -> _Kept:
    vocab_size = scaled.shape[1]
    count = min(NUM_CANDIDATES, vocab_size)
    candidates = lax.top_k(scaled, count)[0]
    has_top_k, has_top_p = rows.top_k < vocab_size, rows.top_p < 1.0

    kth = jnp.take_along_axis(candidates, jnp.clip(rows.top_k - 1, 0, count - 1)[:, None], axis=1)
    floor = jnp.maximum(_min_p_floor(scaled, rows), jnp.where(has_top_k, kth[:, 0], -jnp.inf))

    weight = jnp.exp(candidates - candidates[:, :1])
    mass = jnp.cumsum(jnp.where(candidates >= floor[:, None], weight, 0.0), axis=1)
    reached = mass >= _top_p_target(scaled, floor, rows)[:, None]
    first = jnp.minimum(jnp.argmax(reached, axis=1), count - 1)[:, None]
    nucleus = jnp.take_along_axis(candidates, first, axis=1)[:, 0]
    return _Kept(
        threshold=jnp.where(has_top_p, jnp.maximum(floor, nucleus), floor),
        is_settled=(~has_top_k | (rows.top_k <= count)) & (~has_top_p | reached[:, -1]),
    )


def _threshold_by_bisection(scaled: Float[Array, "B V"], rows: SamplingRows) -> Float[Array, " B"]:
    ordered = _ordered_bits(scaled)
    weight = jnp.exp(scaled - scaled.max(axis=1, keepdims=True))
    kth = _largest_reaching(ordered, jnp.ones_like(scaled), rows.top_k.astype(jnp.float32))
    has_top_k = rows.top_k < scaled.shape[1]
    floor = jnp.maximum(_min_p_floor(scaled, rows), jnp.where(has_top_k, kth, -jnp.inf))
    inside = jnp.where(scaled >= floor[:, None], weight, 0.0)
    nucleus = _largest_reaching(ordered, inside, _top_p_target(scaled, floor, rows))
    return jnp.where(rows.top_p < 1.0, jnp.maximum(floor, nucleus), floor)


def _largest_reaching(
    ordered: UInt[Array, "B V"], weight: Float[Array, "B V"], target: Float[Array, " B"]
) -> Float[Array, " B"]:
    """The largest value t of a row with sum(weight where value >= t) >= target, bit by bit."""

    def set_bit(i: Int[Array, ""], bits: UInt[Array, " B"]) -> UInt[Array, " B"]:
        higher = bits | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        reached = jnp.where(ordered >= higher[:, None], weight, 0.0).sum(axis=1) >= target
        return jnp.where(reached, higher, bits)

    bits = lax.fori_loop(0, 32, set_bit, jnp.zeros(ordered.shape[0], jnp.uint32))
    # A target that rounding has put out of reach, or that underflowed to 0, would give a NaN.
    bits = jnp.clip(bits, ordered.min(axis=1), ordered.max(axis=1))
    is_negative = bits < jnp.uint32(1 << 31)
    raw = jnp.where(is_negative, ~bits, bits ^ jnp.uint32(1 << 31))
    return lax.bitcast_convert_type(raw, jnp.float32)


def _ordered_bits(x: Float[Array, "B V"]) -> UInt[Array, "B V"]:
    """Unsigned integers in the order of the floats: sign bit flipped, negatives inverted."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _min_p_floor(scaled: Float[Array, "B V"], rows: SamplingRows) -> Float[Array, " B"]:
    return scaled.max(axis=1) + jnp.log(rows.min_p)


def _top_p_target(
    scaled: Float[Array, "B V"], floor: Float[Array, " B"], rows: SamplingRows
) -> Float[Array, " B"]:
    """The mass to reach, in units of the likeliest token's; of what min-p and top-k have left."""
    weight = jnp.exp(scaled - scaled.max(axis=1, keepdims=True))
    return rows.top_p * jnp.where(scaled >= floor[:, None], weight, 0.0).sum(axis=1)


def _ban(logits: Float[Array, "B V"], banned: Int[Array, "B X"]) -> Float[Array, "B V"]:
    row = jnp.arange(logits.shape[0])[:, None]
    return logits.at[row, banned].set(-jnp.inf, mode="drop")


def _gumbel(
    seed: UInt[Array, "B 2"], position: Int[Array, " B"], vocab_size: int
) -> Float[Array, "B V"]:
    def draw(words: UInt[Array, "2"], position: Int[Array, ""]) -> Float[Array, " V"]:
        key: Key[Array, ""] = jax.random.wrap_key_data(words, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, position), (vocab_size,))

    return jax.vmap(draw)(seed, position)
