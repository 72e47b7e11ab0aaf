"""The sampler where several devices share the vocabulary: each sends others a few numbers a row.

    logits of a part ─> candidates ─┐ gathered ─> the token ─> what is known of it ─┐ gathered

What `folojax.sampling.sampler` draws and reports of all logits, of parts of them:

- Greedy rows take the largest of the parts' largest.
- A draw picks the block with the largest log(mass) + noise, and a token in it likewise. So each
  part draws from its own blocks, and that with the largest score is the draw of one device.
- Of top-p each round is such a draw, and the mass before the last one is the sum of the parts'.
- The k-th largest is among the parts' largest; for a large k it is found by counts, as the end of
  the nucleus is by masses, where that is asked for.
- Edits are those of the part's tokens.

What is told of the token: `folojax.sampling.part_reports`.

A step of greedy rows, or of temperature alone, has one gather. Log-probabilities and records have
another, truncation one a round, two or three for a batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from folojax.sampling import draws
from folojax.sampling.logit_edits import EditRows, EditState, allow_only, apply_edits
from folojax.sampling.part_reports import (
    Candidate,
    Masses,
    log_mass_of,
    masses_of,
    report,
    take,
)
from folojax.sampling.parts import Part, gather
from folojax.sampling.rows import SamplingRows, StepOutput
from folojax.sampling.sampler import SamplingClass, SamplingSpec, row_keys


class _Offer(NamedTuple):
    """What a part tells before there is a token."""

    masses: Masses
    likeliest: Candidate  # of what may be sampled; its score is its logit
    drawn: Candidate | None  # a draw's, with a score relative to `likeliest`; None: not here
    largest: Float[Array, "*n B J"] | None  # for top-k; None: no row has it


def sample_part(
    logits: Float[Array, "B R"],
    part: Part,
    rows: SamplingRows,
    position: Int[Array, " B"],
    spec: SamplingSpec,
    edits: tuple[EditState, EditRows] | None = None,
    mask: UInt[Array, "B _"] | None = None,
) -> StepOutput:
    """Draws one token a row, in a function that each device of a mesh runs; all have the result.

    Args:
        logits: Of the model, float32, of the tokens that this device has: whole blocks.
        part: How the vocabulary is shared.
        rows: As of `sample`.
        position: Likewise.
        spec: Likewise; without processors, which are handed all logits.
        edits: As of `sample`, of all tokens.
        mask: Likewise.
    """
    first = part.first(logits.shape[1])
    ids = (first + jnp.arange(logits.shape[1]))[None, :]
    raw = edited = jnp.where(ids < part.vocab_size, logits, -jnp.inf)
    if spec.needed >= SamplingClass.EDITED:
        assert edits is not None, "a step of class EDITED has edits"
        edited = apply_edits(edited, *edits, first)
    if spec.has_mask:
        assert mask is not None, "a step with grammars has a mask"
        edited = allow_only(edited, mask, first)
    may_be = ids < (part.vocab_size if spec.num_tokens is None else spec.num_tokens)
    blocks = jnp.where(may_be, edited, -jnp.inf).reshape(len(raw), -1, draws.BLOCK_SIZE)
    keys = row_keys(rows, position)
    each = gather(_offer(raw, blocks, first, rows, keys, spec, part), part)
    log_mass = log_mass_of(*each.masses)
    chosen = _best(each.likeliest)
    is_valid = jnp.isfinite(log_mass) & jnp.isfinite(chosen.logit)
    is_greedy = rows.temperature == 0
    support = _support(blocks, first, chosen.logit, rows, each.largest, spec, part)
    if each.drawn is not None:
        shift = (each.likeliest.score - chosen.score[None]) / support.temperature[None]
        score = jnp.where(each.drawn.score == -jnp.inf, -jnp.inf, each.drawn.score + shift)
        chosen = _where(is_greedy, chosen, _best(each.drawn._replace(score=score)))
    elif spec.needed > SamplingClass.GREEDY:
        is_skipped = is_greedy | ~is_valid
        drawn = _draw_from_nucleus(support, raw, rows.top_p, keys, is_skipped, part)
        chosen = _where(is_greedy, chosen, drawn)
    nothing = jnp.zeros((len(raw), 0))
    out = StepOutput(
        tokens=chosen.token,
        logprobs=chosen.raw - log_mass,
        ranks=jnp.zeros(len(raw), jnp.int32),
        is_valid=is_valid,
        top_tokens=nothing.astype(jnp.int32),
        top_logprobs=nothing,
    )
    if spec.num_logprobs is None and not spec.has_record and not spec.is_processed:
        return out
    return report(out, chosen, raw, log_mass, support, rows, may_be, spec, part)


def _offer(
    raw: Float[Array, "B R"],
    blocks: Float[Array, "B U W"],
    first: Int[Array, ""],
    rows: SamplingRows,
    keys: Key[Array, " B"],
    spec: SamplingSpec,
    part: Part,
) -> _Offer:
    top, place = blocks.max(axis=(1, 2)), draws.argmax(blocks)
    likeliest = Candidate(top, first + place, top, take(raw, place))
    drawn = largest = None
    if spec.needed == SamplingClass.RANDOM:
        temperature = jnp.where(rows.temperature == 0, 1.0, rows.temperature)
        top = jnp.where(top == -jnp.inf, 0.0, top)
        support = draws.Support(blocks, top, temperature, jnp.full_like(top, -jnp.inf), first)
        mass_of_blocks = draws.block_sums(support.weights())
        score, found = draws.pick(support, mass_of_blocks, support.end, keys, jnp.int32(0), part)
        drawn = Candidate(score, found.token, found.logit, take(raw, found.token - first))
    if spec.needed >= SamplingClass.TRUNCATED:
        count = min(draws.NUM_CANDIDATES, raw.shape[1])
        largest = lax.cond(
            (rows.top_k <= draws.NUM_CANDIDATES).any(),
            lambda: draws.top_k(blocks, count)[0],
            lambda: jnp.full((len(raw), count), -jnp.inf),
        )
    return _Offer(masses_of(raw), likeliest, drawn, largest)


def _support(
    blocks: Float[Array, "B U W"],
    first: Int[Array, ""],
    top: Float[Array, " B"],
    rows: SamplingRows,
    largest: Float[Array, "N B J"] | None,
    spec: SamplingSpec,
    part: Part,
) -> draws.Support:
    """What temperature, min-p and top-k make of the logits of all parts; of this one's tokens."""
    temperature = jnp.where(rows.temperature == 0, 1.0, rows.temperature)
    floor = jnp.full_like(top, -jnp.inf)
    if spec.needed >= SamplingClass.TRUNCATED:
        assert largest is not None, "parts offer candidates of top-k"
        every = jnp.moveaxis(largest, 0, 1).reshape(len(top), -1)
        values = lax.top_k(every, min(draws.NUM_CANDIDATES, every.shape[1]))[0]
        kth = take(values, jnp.minimum(rows.top_k, values.shape[1]) - 1)
        is_on = rows.top_k < part.vocab_size
        is_far = is_on & (rows.top_k > values.shape[1])

        def by_counts() -> Float[Array, " B"]:
            ones = jnp.ones_like(blocks)
            return draws.largest_reaching(blocks, ones, rows.top_k.astype(jnp.float32), part)

        kth = jnp.where(is_far, lax.cond(is_far.any(), by_counts, lambda: kth), kth)
        kth = jnp.where(is_on, kth, -jnp.inf)
        floor = jnp.maximum(kth, top + temperature * jnp.log(rows.min_p))
    return draws.Support(blocks, top, temperature, floor, first)


class _Round(NamedTuple):
    number: Int[Array, ""]
    is_settled: Bool[Array, " B"]
    chosen: Candidate  # the last draw: what lies behind it is outside of the nucleus
    mass: Float[Array, "B U"]  # of what comes before it, in this part
    target: Float[Array, " B"]  # the mass of the nucleus


def _draw_from_nucleus(
    support: draws.Support,
    raw: Float[Array, "B R"],
    top_p: Float[Array, " B"],
    keys: Key[Array, " B"],
    is_skipped: Bool[Array, " B"],
    part: Part,
) -> Candidate:
    """As `draws.draw_from_nucleus`; the sums of a round come with the candidates of the next."""

    def next_round(last: _Round) -> _Round:
        end = draws.Place(last.chosen.logit, last.chosen.token)
        score, own = draws.pick(support, last.mass, end, keys, last.number, part)
        offered = Candidate(score, own.token, own.logit, take(raw, own.token - support.first))
        each, masses = gather((offered, last.mass.sum(axis=1)), part)
        mass, is_first = masses.sum(axis=0), last.number == 0
        # Not 0, for the likeliest token to be inside: a top_p may underflow.
        whole = jnp.maximum(top_p * mass, jnp.finfo(jnp.float32).tiny)
        target = jnp.where(is_first, whole, last.target)
        is_settled = last.is_settled | (~is_first & (mass < target))
        chosen = _where(is_settled, last.chosen, _best(each))
        # With top_p = 1 everything is inside, also what is too small to change a sum.
        is_settled |= top_p >= 1
        before = draws.Place(chosen.logit, chosen.token)
        mass_of_blocks = draws.block_sums(support.weights(before))
        return _Round(last.number + 1, is_settled, chosen, mass_of_blocks, target)

    end, nothing = support.end, jnp.zeros_like(top_p)
    nowhere = Candidate(nothing, end.token, end.logit, nothing)
    mass = draws.block_sums(support.weights())
    start = _Round(jnp.int32(0), is_skipped, nowhere, mass, nothing)
    return lax.while_loop(lambda last: ~last.is_settled.all(), next_round, start).chosen


def _best(each: Candidate) -> Candidate:
    """The one with the largest score, the first of equals."""
    index = jnp.argmax(each.score, axis=0)[None]
    return jax.tree.map(lambda number: jnp.take_along_axis(number, index, axis=0)[0], each)


def _where(which: Bool[Array, " B"], one: Candidate, other: Candidate) -> Candidate:
    return jax.tree.map(lambda a, b: jnp.where(which, a, b), one, other)
