"""Draws from truncated distributions over the vocabulary, without sorting it.

The vocabulary is cut into blocks of W tokens. What a pass over all of it leaves is one number a
block, and everything after works on those and on the few blocks that they point at:

    logits [B, V] ─> [B, U, W] ─ max, sum ─> [B, U] ─> a block ─> a token in it

Min-p and top-k keep the tokens at or above some threshold; ties at the threshold are all kept, as
in vLLM. Top-p keeps the smallest set that has the mass asked for: tokens are in an order, the
likelier first, and of equals the lower id, and the set is a start of it. Where it ends is never
computed for a draw. A token is drawn from what min-p and top-k leave and is inside the nucleus if
all that comes before it has less than the mass: one pass. If it is outside, so is everything that
comes after it, and the next token is drawn from what comes before. What is accepted is an exact
draw. Each round cuts the mass that is left at a uniformly random place, and
the likeliest token is always accepted: in the mean it takes 1 + log(1 / mass of the nucleus)
rounds, in practice two or three for a whole batch. (FlashInfer samples by such rejections too.)

A row's randomness is its key alone. Rounds that only its neighbours need leave its token alone.

Where several devices share the vocabulary (`folojax.sampling.parts`), each has some of the blocks,
with the noise that these have on one device.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from folojax.sampling.parts import Part, gather, own_columns, total

BLOCK_SIZE = 128
"""W: one pass writes V / W sums, and then W tokens are looked at."""

NUM_CANDIDATES = 64
"""Up to this top_k the k-th largest value is found among the largest blocks."""


class Place(NamedTuple):
    """A token's place in the order of tokens: by logit, descending, and of equals by id."""

    logit: Float[Array, " B"]
    token: Int[Array, " B"]


class Support(NamedTuple):
    """What temperature, min-p and top-k make of the logits: the tokens to draw from.

    Weights are relative to the likeliest token, so that nothing overflows. What is cut is decided
    on logits and never on weights, whose last bits may differ from one pass to another.
    """

    logits: Float[Array, "B U W"]
    top: Float[Array, " B"]  # the largest logit
    temperature: Float[Array, " B"]
    floor: Float[Array, " B"]  # the smallest logit with a weight; -inf: nothing is cut
    first: Int[Array, ""] | int = 0  # the first token, where this is a part of the vocabulary

    @property
    def ids(self) -> Int[Array, "1 U W"]:
        """The tokens."""
        _, blocks, size = self.logits.shape
        return self.first + jnp.arange(blocks * size).reshape(1, blocks, size)

    def weights(self, before: Place | None = None) -> Float[Array, "B U W"]:
        """Weights of the tokens that come before a place, 0 for the others; None: of all."""
        place = self.end if before is None else before
        return jnp.exp(_log_weights(self, self.logits, self.ids, place))

    @property
    def end(self) -> Place:
        """The place behind all tokens that have a weight: before those that are -inf."""
        return Place(jnp.full_like(self.top, -jnp.inf), jnp.zeros(self.top.shape, jnp.int32))


def to_blocks(logits: Float[Array, "B V"], num_tokens: int | None = None) -> Float[Array, "B U W"]:
    """Cuts the vocabulary into blocks; ids from `num_tokens` on, and the padding, get -inf."""
    rows, vocab_size = logits.shape
    if num_tokens is not None and num_tokens < vocab_size:
        is_padding = jnp.arange(vocab_size)[None, :] >= num_tokens
        logits = jnp.where(is_padding, -jnp.inf, logits)
    filled = ((0, 0), (0, -vocab_size % BLOCK_SIZE))
    return jnp.pad(logits, filled, constant_values=-jnp.inf).reshape(rows, -1, BLOCK_SIZE)


def argmax(x: Float[Array, "B U W"]) -> Int[Array, " B"]:
    """Id of the largest value, the lowest one wins a tie; 0 for a row of NaN."""
    tops = x.max(axis=2)
    block = jnp.argmax(tops == tops.max(axis=1, keepdims=True), axis=1)
    return block * x.shape[2] + jnp.argmax(_take_block(x, block), axis=1)


def top_k(x: Float[Array, "B U W"], count: int) -> tuple[Float[Array, "B J"], Int[Array, "B J"]]:
    """The `count` largest values, descending, and their ids; the lowest id first in a tie.

    They lie in the `count` blocks with the largest maxima, which are much less than the whole.
    """
    rows, blocks, size = x.shape
    if count >= blocks:
        values, ids = lax.top_k(x.reshape(rows, -1), count)
        return values, ids
    block = jnp.sort(lax.top_k(x.max(axis=2), count)[1], axis=1)
    inside = jnp.take_along_axis(x, block[:, :, None], axis=1)
    values, place = lax.top_k(inside.reshape(rows, -1), count)
    return values, jnp.take_along_axis(block, place // size, axis=1) * size + place % size


def kth_largest(x: Float[Array, "B U W"], k: Int[Array, " B"]) -> Float[Array, " B"]:
    """The k-th largest value of each row, counting equals; -inf for a k of U * W or more."""
    size = x.shape[1] * x.shape[2]
    is_off = k >= size

    def among_candidates() -> Float[Array, " B"]:
        values = top_k(x, min(NUM_CANDIDATES, size))[0]
        return _take(values, jnp.minimum(k, values.shape[1]) - 1)

    def by_bisection() -> Float[Array, " B"]:
        return largest_reaching(x, jnp.ones_like(x), k.astype(jnp.float32))

    found = lax.switch(
        jnp.where(is_off, 0, jnp.where(k <= NUM_CANDIDATES, 1, 2)).max(),
        [lambda: jnp.full_like(x[:, 0, 0], -jnp.inf), among_candidates, by_bisection],
    )
    return jnp.where(is_off, -jnp.inf, found)


def draw(support: Support, keys: Key[Array, " B"]) -> Int[Array, " B"]:
    """Draws a token a row from the whole support."""
    return pick(support, block_sums(support.weights()), support.end, keys, jnp.int32(0))[1].token


def draw_from_nucleus(
    support: Support,
    top_p: Float[Array, " B"],
    keys: Key[Array, " B"],
    is_skipped: Bool[Array, " B"],
) -> Int[Array, " B"]:
    """Draws a token a row from the smallest part of the support that has `top_p` of its mass.

    A row that is skipped needs no draw, and its token means nothing; of the others some weight is
    positive and none NaN.
    """

    def next_round(last: _Round) -> _Round:
        _, place = pick(support, last.mass, last.end, keys, last.number)
        mass = block_sums(support.weights(before=place))
        # With top_p = 1 everything is inside, also what is too small to change a sum.
        is_inside = (mass.sum(axis=1) < target) | (top_p >= 1)
        token = jnp.where(last.is_settled, last.token, place.token)
        return _Round(last.number + 1, token, last.is_settled | is_inside, place, mass)

    mass = block_sums(support.weights())
    # Not 0, for the first token to be inside: a top_p may underflow.
    target = jnp.maximum(top_p * mass.sum(axis=1), jnp.finfo(jnp.float32).tiny)
    token = jnp.zeros(top_p.shape, jnp.int32)
    start = _Round(jnp.int32(0), token, is_skipped, support.end, mass)
    return lax.while_loop(lambda last: ~last.is_settled.all(), next_round, start).token


class _Round(NamedTuple):
    number: Int[Array, ""]
    token: Int[Array, " B"]
    is_settled: Bool[Array, " B"]
    end: Place  # tokens from this place on lie outside of the nucleus
    mass: Float[Array, "B U"]  # of the others


def nucleus(
    support: Support, top_p: Float[Array, " B"], drawn: Place, part: Part | None = None
) -> Bool[Array, "B U W"]:
    """Which tokens are in the nucleus, by bisection: 33 passes, for who needs to know it.

    Some weight of each row is positive. `drawn` are tokens that were drawn from it: a sum that
    rounds otherwise than the draw's must not leave them out. With a part of the vocabulary, the
    same of its tokens, after a sum over devices a pass.
    """
    rows = support.logits.shape[0]
    weight = support.weights()
    target = top_p * total(weight.sum(axis=2).sum(axis=1), part)
    logit = largest_reaching(support.logits, weight, target, part)
    above = jnp.where(support.logits > _wide(logit), weight, 0.0).sum(axis=2).sum(axis=1)
    # Equal logits have equal weights, so the mass before one of them needs no sum.
    is_equal = support.logits == _wide(logit)
    number = jnp.cumsum(is_equal.reshape(rows, -1), axis=1, dtype=jnp.int32).reshape(weight.shape)
    each = jnp.where(is_equal, weight, 0.0).max(axis=(1, 2))
    if part is not None:
        counts = number[:, -1, -1]
        told = gather((above, counts, each), part)
        above, each = told[0].sum(axis=0), told[2].max(axis=0)
        is_earlier = jnp.arange(told[1].shape[0])[:, None] < jax.lax.axis_index(part.axis)
        number += _wide(jnp.where(is_earlier, told[1], 0).sum(axis=0))
    is_reached = _wide(above) + (number - 1) * _wide(each) >= _wide(target)
    is_inside = (support.logits > _wide(logit)) | (is_equal & (~is_reached | (number == 1)))
    up_to_drawn = _is_before(support.logits, support.ids, drawn._replace(token=drawn.token + 1))
    return is_inside | up_to_drawn | _wide(top_p >= 1.0)


def pick(
    support: Support,
    mass: Float[Array, "B U"],
    end: Place,
    keys: Key[Array, " B"],
    number: Int[Array, ""],
    part: Part | None = None,
) -> tuple[Float[Array, " B"], Place]:
    """Draws a block by its mass before a place, and a token in it.

    Args:
        support: Of the whole vocabulary or a part.
        mass: Of its blocks, of what comes before `end`.
        end: Where the tokens to draw from end.
        keys: Of the rows.
        number: Of the draw, each with its own noise.
        part: Of the vocabulary; None: all is here.

    Returns:
        A score, whose largest over all parts is that of the token that would be drawn of the whole;
        and the token.
    """
    blocks = mass.shape[1] if part is None else -(-part.vocab_size // BLOCK_SIZE)

    def gumbel(key: Key[Array, ""]) -> Float[Array, " UW"]:
        return jax.random.gumbel(jax.random.fold_in(key, number), (blocks + BLOCK_SIZE,))

    noise = jax.vmap(gumbel)(keys)
    of_blocks = noise[:, :blocks]
    if part is not None:
        of_blocks = own_columns(of_blocks, support.first // BLOCK_SIZE, mass.shape[1])
    scores = jnp.log(mass) + of_blocks
    block = jnp.argmax(scores, axis=1)
    logits = _take_block(support.logits, block)
    ids = support.first + block[:, None] * BLOCK_SIZE + jnp.arange(BLOCK_SIZE)[None, :]
    inside = _log_weights(support, logits[:, None, :], ids[:, None, :], end)[:, 0]
    place = jnp.argmax(inside + noise[:, blocks:], axis=1)
    return scores.max(axis=1), Place(
        _take(logits, place), support.first + block * BLOCK_SIZE + place
    )


def _log_weights(
    support: Support, logits: Float[Array, "B U W"], ids: Int[Array, "#B U W"], end: Place
) -> Float[Array, "B U W"]:
    scaled = (logits - _wide(support.top)) / _wide(support.temperature)
    is_kept = _is_before(logits, ids, end) & (logits >= _wide(support.floor))
    return jnp.where(is_kept, scaled, -jnp.inf)


def _is_before(
    logits: Float[Array, "B U W"], ids: Int[Array, "#B U W"], place: Place
) -> Bool[Array, "B U W"]:
    is_equal = logits == _wide(place.logit)
    return (logits > _wide(place.logit)) | (is_equal & (ids < _wide(place.token)))


def _wide(x: Any) -> Any:
    """A number a row, against blocks."""
    return x[:, None, None]


def _take_block(x: Float[Array, "B U W"], block: Int[Array, " B"]) -> Float[Array, "B W"]:
    return jnp.take_along_axis(x, block[:, None, None], axis=1)[:, 0]


def _take(x: Float[Array, "B N"], index: Int[Array, " B"]) -> Float[Array, " B"]:
    return jnp.take_along_axis(x, index[:, None], axis=1)[:, 0]


def largest_reaching(
    x: Float[Array, "B U W"],
    weight: Float[Array, "B U W"],
    target: Float[Array, " B"],
    part: Part | None = None,
) -> Float[Array, " B"]:
    """The largest value t of a row with sum(weight where x >= t) >= target, bit by bit."""
    ordered = _ordered_bits(x)

    def set_bit(i: Int[Array, ""], bits: UInt[Array, " B"]) -> UInt[Array, " B"]:
        higher = bits | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        inside = jnp.where(ordered >= higher[:, None, None], weight, 0.0)
        return jnp.where(total(inside.sum(axis=2).sum(axis=1), part) >= target, higher, bits)

    bits = lax.fori_loop(0, 32, set_bit, jnp.zeros(x.shape[0], jnp.uint32))
    # A target that rounding has put out of reach, or that underflowed to 0, would give a NaN.
    least, most = ordered.min(axis=(1, 2)), ordered.max(axis=(1, 2))
    if part is not None:
        every = lax.all_gather(jnp.stack([least, most]), part.axis)
        least, most = every[:, 0].min(axis=0), every[:, 1].max(axis=0)
    bits = jnp.clip(bits, least, most)
    is_negative = bits < jnp.uint32(1 << 31)
    raw = jnp.where(is_negative, ~bits, bits ^ jnp.uint32(1 << 31))
    return lax.bitcast_convert_type(raw, jnp.float32)


def _ordered_bits(x: Float[Array, "B U W"]) -> UInt[Array, "B U W"]:
    """Unsigned integers in the order of the floats: sign bit flipped, negatives inverted."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def block_sums(weights: Float[Array, "B U W"]) -> Float[Array, "B U"]:
    """The mass of each block."""
    # The barrier keeps XLA from turning a sum of these sums into another pass over the whole.
    return lax.optimization_barrier(weights.sum(axis=2))
