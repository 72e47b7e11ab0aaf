"""Draws where each of several devices has some of the vocabulary: candidates alone are exchanged.

    logits of a part ─> the largest, the sum, a draw: seven numbers a row ─┐ gathered from all
                                                                         └─> the token, on each

Greedy rows take the largest of the largest. A draw from the whole distribution picks the block with
the largest log(mass) + noise, and a token in it likewise (`folojax.sampling.draws`): so each part
draws from its own blocks, with the noise that these have on one device, and the largest of the
results is the draw of one device.

Truncation, edits, alternatives and records need more of the distribution than that.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from folojax.sampling import draws
from folojax.sampling.rows import SamplingRows, StepOutput
from folojax.sampling.sampler import SamplingClass, SamplingSpec, row_keys


class Part(NamedTuple):
    """Which tokens a device has: whole blocks, of which the last may be padding."""

    axis: str  # of the mesh, over which each device has one
    vocab_size: int  # V, of the whole


class _Candidates(NamedTuple):
    """What a part offers; float32, which has ids of up to 16 million."""

    raw_top: Float[Array, " B"]  # the largest logit
    mass: Float[Array, " B"]  # the sum of exponentials, relative to it
    top: Float[Array, " B"]  # the largest logit of what may be sampled
    likeliest: Float[Array, " B"]  # its token
    score: Float[Array, " B"]  # of the draw, relative to `top` over the temperature
    drawn: Float[Array, " B"]  # its token
    drawn_logit: Float[Array, " B"]


def is_drawn_in_parts(spec: SamplingSpec) -> bool:
    """Whether candidates are enough for what a spec asks for."""
    is_more = spec.is_processed or spec.has_record or spec.processors or spec.has_mask
    return spec.needed <= SamplingClass.RANDOM and spec.num_logprobs is None and not is_more


def sample_part(
    logits: Float[Array, "B R"],
    part: Part,
    rows: SamplingRows,
    position: Int[Array, " B"],
    spec: SamplingSpec,
) -> StepOutput:
    """Draws one token a row, in a function that each device of a mesh runs; all have the result.

    Args:
        logits: Of the model, float32, of the tokens that this device has, in the mesh's order.
        part: Which these are.
        rows: As of `sample`.
        position: Likewise.
        spec: One that `is_drawn_in_parts`.
    """
    own = _candidates(logits, part, rows, position, spec)
    gathered = jax.lax.all_gather(jnp.stack(own, axis=1), part.axis)  # [n, B, 7]
    each = _Candidates(*jnp.moveaxis(gathered, 2, 0))
    raw_top = each.raw_top.max(axis=0)
    mass = jnp.where(each.mass > 0, each.mass * jnp.exp(each.raw_top - raw_top[None]), each.mass)
    log_mass = raw_top + jnp.log(mass.sum(axis=0))
    top = each.top.max(axis=0)
    chosen, logit = _best(each.top, each.likeliest), top
    if spec.needed > SamplingClass.GREEDY:
        is_greedy = rows.temperature == 0
        temperature = jnp.where(is_greedy, 1.0, rows.temperature)
        score = each.score + (each.top - top[None]) / temperature[None]
        score = jnp.where(each.score == -jnp.inf, -jnp.inf, score)
        chosen = jnp.where(is_greedy, chosen, _best(score, each.drawn))
        logit = jnp.where(is_greedy, logit, _best(score, each.drawn_logit))
    nothing = jnp.zeros((logits.shape[0], 0))
    return StepOutput(
        tokens=chosen.astype(jnp.int32),
        logprobs=logit - log_mass,
        ranks=jnp.zeros(logits.shape[0], jnp.int32),
        is_valid=jnp.isfinite(log_mass) & jnp.isfinite(top),
        top_tokens=nothing.astype(jnp.int32),
        top_logprobs=nothing,
    )


def _candidates(
    logits: Float[Array, "B R"],
    part: Part,
    rows: SamplingRows,
    position: Int[Array, " B"],
    spec: SamplingSpec,
) -> _Candidates:
    num_rows, size = logits.shape
    first = jax.lax.axis_index(part.axis) * size
    ids = (first + jnp.arange(size))[None, :]
    raw = jnp.where(ids < part.vocab_size, logits, -jnp.inf)
    raw_top = raw.max(axis=1)
    is_empty = raw_top == -jnp.inf
    mass = jnp.exp(raw - jnp.where(is_empty, 0.0, raw_top)[:, None]).sum(axis=1)
    if spec.num_tokens is not None:
        raw = jnp.where(ids < spec.num_tokens, raw, -jnp.inf)
    blocks = raw.reshape(num_rows, -1, draws.BLOCK_SIZE)
    top, likeliest = blocks.max(axis=(1, 2)), first + draws.argmax(blocks)
    score, drawn, drawn_logit = top, likeliest, top
    if spec.needed > SamplingClass.GREEDY:
        temperature = jnp.where(rows.temperature == 0, 1.0, rows.temperature)
        support = draws.Support(
            blocks,
            jnp.where(top == -jnp.inf, 0.0, top),
            temperature,
            jnp.full_like(top, -jnp.inf),
        )
        place = draws.PartOfBlocks(
            first // draws.BLOCK_SIZE, -(-part.vocab_size // draws.BLOCK_SIZE)
        )
        score, found = draws.draw_in_part(support, row_keys(rows, position), place)
        drawn, drawn_logit = first + found.token, found.logit
    fields = raw_top, mass, top, likeliest, score, drawn, drawn_logit
    return _Candidates(*(field.astype(jnp.float32) for field in fields))


def _best(score: Float[Array, "N B"], value: Float[Array, "N B"]) -> Float[Array, " B"]:
    """The value of the part with the largest score, the first of equals."""
    return jnp.take_along_axis(value, jnp.argmax(score, axis=0)[None], axis=0)[0]
