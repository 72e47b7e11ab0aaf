"""What is told of tokens where several devices share the vocabulary: log-probabilities, records.

Ranks, masses and entropies are sums over parts; the likeliest are among the parts' likeliest. See
`folojax.sampling.part_sampler`, which draws.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from folojax.sampling import draws
from folojax.sampling.parts import Part, gather
from folojax.sampling.rows import SamplingRows, StepOutput
from folojax.sampling.sampler import SamplingClass, SamplingSpec
from folojax.sampling.token_record import TokenRecord


class Candidate(NamedTuple):
    """A token that a part offers, or that is taken."""

    score: Float[Array, "*n B"]
    token: Int[Array, "*n B"]
    logit: Float[Array, "*n B"]  # edited
    raw: Float[Array, "*n B"]  # the model's logit


class Masses(NamedTuple):
    """Of a distribution, what one part has of it."""

    top: Float[Array, "*n B"]  # the largest logit
    mass: Float[Array, "*n B"]  # the sum of exponentials, relative to it


class _Likeliest(NamedTuple):
    """The likeliest tokens of a part, or of all."""

    value: Float[Array, "*n B J"]
    token: Int[Array, "*n B J"]


class _Known(NamedTuple):
    """What a part tells of the token that was taken; what nobody asks for is None."""

    likelier: Int[Array, " B"]  # how many tokens are, in the distribution that is reported
    likeliest: _Likeliest | None  # in that distribution
    mass: Float[Array, " B"] | None  # of it, where it is another than the model's
    raw_likelier: Int[Array, " B"] | None
    entropy: Float[Array, " B"] | None
    tempered: Float[Array, " B"] | None  # the mass of all that may be sampled
    kept: Float[Array, " B"] | None  # the mass of what was drawn from


def score_part(
    logits: Float[Array, "B R"],
    part: Part,
    tokens: Int[Array, " B"],
    num_logprobs: int,
    num_tokens: int | None = None,
) -> tuple[Float[Array, " B"], Int[Array, " B"], Int[Array, "B J"], Float[Array, "B J"]]:
    """As `token_logprobs`, in a function that each device of a mesh runs; all have the result."""
    size = logits.shape[1]
    first = part.first(size)
    ids = (first + jnp.arange(size))[None, :]
    raw = jnp.where(ids < part.vocab_size, logits, -jnp.inf)
    tokens = jnp.clip(tokens, 0, part.vocab_size - 1)
    place = tokens - first
    own = jnp.where(
        (place >= 0) & (place < size), take(raw, jnp.clip(place, 0, size - 1)), -jnp.inf
    )
    may_be = ids < (part.vocab_size if num_tokens is None else num_tokens)
    likeliest = _likeliest(jnp.where(may_be, raw, -jnp.inf), first, num_logprobs)
    each, chosen, likeliest = gather((masses_of(raw), own, likeliest), part)
    log_mass, chosen = log_mass_of(*each), chosen.max(axis=0)
    likelier = gather(_count(raw, ids, chosen, tokens, may_be), part).sum(axis=0)
    value, token = _likeliest_of_all(likeliest, num_logprobs)
    return chosen - log_mass, 1 + likelier, token, value - log_mass[:, None]


def report(
    out: StepOutput,
    chosen: Candidate,
    raw: Float[Array, "B R"],
    log_mass: Float[Array, " B"],
    support: draws.Support,
    rows: SamplingRows,
    may_be: Bool[Array, "1 R"],
    spec: SamplingSpec,
    part: Part,
) -> StepOutput:
    """What is asked for beside the token."""
    is_greedy, ids = rows.temperature == 0, support.ids.reshape(1, -1)
    edited = support.logits.reshape(raw.shape)
    scaled = (edited - support.top[:, None]) / support.temperature[:, None]
    is_cut = spec.needed > SamplingClass.GREEDY and (spec.has_record or spec.is_processed)
    weights = _kept(support, rows, chosen, spec, part) if is_cut else None
    # In the order of logits, which have more digits than what is made of them.
    order, logit, values, mass = raw, chosen.raw, jnp.where(may_be, raw, -jnp.inf), None
    if spec.is_processed:
        order, logit, values, mass = edited, chosen.logit, edited, jnp.exp(scaled).sum(axis=1)
        if weights is not None:
            is_kept = is_greedy[:, None] | (weights > 0)
            values = jnp.where(is_kept, edited, -jnp.inf)
            mass = jnp.where(is_greedy, mass, weights.sum(axis=1))
    count, record = spec.num_logprobs or 0, None
    own = _Known(
        likelier=_count(order, ids, logit, chosen.token, may_be),
        likeliest=_likeliest(values, support.first, count),
        mass=mass,
        raw_likelier=None,
        entropy=None,
        tempered=None,
        kept=None,
    )
    if spec.has_record:
        logprobs = raw - log_mass[:, None]
        probability = jnp.exp(logprobs)
        own = own._replace(
            raw_likelier=_count(raw, ids, chosen.raw, chosen.token, may_be),
            entropy=-jnp.where(probability > 0, probability * logprobs, 0.0).sum(axis=1),
            tempered=jnp.exp(scaled).sum(axis=1),
            kept=None if weights is None else weights.sum(axis=1),
        )
    each = gather(own, part)
    summed = jax.tree.map(lambda number: number.sum(axis=0), each._replace(likeliest=None))
    assert each.likeliest is not None, "all parts have told theirs"
    value, token = _likeliest_of_all(each.likeliest, count)
    tempered = (chosen.logit - support.top) / support.temperature
    logprobs = out.logprobs
    if spec.is_processed:
        log_mass = jnp.log(summed.mass)
        logprobs = tempered - log_mass
        value = (value - support.top[:, None]) / support.temperature[:, None]
    if spec.has_record:
        log_total = jnp.log(summed.tempered)
        log_kept = jnp.zeros_like(log_total)
        if summed.kept is not None:
            cut = jnp.minimum(jnp.log(summed.kept) - log_total, 0.0)
            log_kept = jnp.where(is_greedy, 0.0, cut)
        record = TokenRecord(
            raw=out.logprobs,
            tempered=tempered - log_total,
            processed=tempered - log_total - log_kept,
            log_kept=log_kept,
            entropy=summed.entropy,
            rank=1 + summed.raw_likelier,
        )
    return out._replace(
        logprobs=logprobs,
        ranks=out.ranks if spec.num_logprobs is None else 1 + summed.likelier,
        top_tokens=token,
        top_logprobs=value - log_mass[:, None],
        record=record,
    )


def _kept(
    support: draws.Support,
    rows: SamplingRows,
    chosen: Candidate,
    spec: SamplingSpec,
    part: Part,
) -> Float[Array, "B R"]:
    """The weights that were drawn from; 0 outside."""
    weights = support.weights()
    if spec.needed >= SamplingClass.TRUNCATED:
        place = draws.Place(chosen.logit, chosen.token)
        weights = jnp.where(draws.nucleus(support, rows.top_p, place, part), weights, 0.0)
    return weights.reshape(weights.shape[0], -1)


def masses_of(logits: Float[Array, "B R"]) -> Masses:
    """What a part has of the distribution of its logits."""
    top = logits.max(axis=1)
    shift = jnp.where(top == -jnp.inf, 0.0, top)
    return Masses(top, jnp.exp(logits - shift[:, None]).sum(axis=1))


def log_mass_of(top: Float[Array, "N B"], mass: Float[Array, "N B"]) -> Float[Array, " B"]:
    """As `log_sum_exp` of the whole, of what the parts have told."""
    highest = top.max(axis=0)
    moved = jnp.where(mass > 0, mass * jnp.exp(top - highest[None]), mass)
    return highest + jnp.log(moved.sum(axis=0))


def _count(
    logits: Float[Array, "B R"],
    ids: Int[Array, "1 R"],
    chosen: Float[Array, " B"],
    token: Int[Array, " B"],
    may_be: Bool[Array, "1 R"],
) -> Int[Array, " B"]:
    """How many tokens of a part are likelier, or as likely and of lower ids."""
    is_equal = logits == chosen[:, None]
    is_before = (logits > chosen[:, None]) | (is_equal & (ids < token[:, None]))
    return (is_before & may_be).sum(axis=1, dtype=jnp.int32)


def _likeliest(values: Float[Array, "B R"], first: Int[Array, ""] | int, count: int) -> _Likeliest:
    value, place = draws.top_k(draws.to_blocks(values), min(count, values.shape[1]))
    return _Likeliest(value, first + place)


def _likeliest_of_all(each: _Likeliest, count: int) -> _Likeliest:
    """Of equals the lowest ids: parts are in their order, and so is what each has told."""
    value, token = (jnp.moveaxis(one, 0, 1).reshape(one.shape[1], -1) for one in each)
    value, place = lax.top_k(value, count)
    return _Likeliest(value, jnp.take_along_axis(token, place, axis=1))


def take(x: Float[Array, "B N"], index: Int[Array, " B"]) -> Float[Array, " B"]:
    """The number of each row at an index."""
    return jnp.take_along_axis(x, index[:, None], axis=1)[:, 0]
