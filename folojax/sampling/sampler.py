"""Logits and per-row parameters to tokens: a pure function over rows.

A row's token depends on its own logits, parameters, seed and position alone: its randomness is
key = fold_in(key(seed), position of the token), so a seed gives the same text in any batch and
after any preemption.

Order: the user's processors, then as in vLLM and transformers penalties, biases, bans and masks
(`folojax.sampling.logit_edits`), temperature, min-p, top-k, top-p, draw (`folojax.sampling.draws`).
A greedy row takes the largest logit and is divided by nothing.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from folojax.sampling import draws
from folojax.sampling.logit_edits import EditRows, EditState, allow_only, apply_edits
from folojax.sampling.logits_processors import LogitsProcessor
from folojax.sampling.rows import SamplingRows, StepOutput
from folojax.sampling.sampling_class import SamplingClass
from folojax.sampling.token_record import TokenRecord, make_record


@dataclasses.dataclass(frozen=True)
class SamplingSpec:
    """What chooses the sampler's executable; static."""

    needed: SamplingClass  # at least as demanding as every row
    num_logprobs: int | None = (
        None  # J, alternatives reported with each token; None: no ranks either
    )
    is_processed: bool = False
    """Log-probabilities are of the distribution that is drawn from, after all edits and truncation;
    else of the model's own."""
    num_tokens: int | None = None  # ids from here on are padding and never sampled; None: none are
    has_record: bool = False  # whether a row asks for the log-probability record of its token
    processors: tuple[LogitsProcessor, ...] = ()  # the user's; applied before the other edits
    has_mask: bool = False  # whether a row follows a grammar


def sample(
    logits: Float[Array, "B V"],
    rows: SamplingRows,
    position: Int[Array, " B"],
    spec: SamplingSpec,
    edits: tuple[EditState, EditRows] | None = None,
    log_mass: Float[Array, " B"] | None = None,
    edited: Float[Array, "B V"] | None = None,
    mask: UInt[Array, "B _"] | None = None,
) -> StepOutput:
    """Draws one token a row.

    Args:
        logits: Of the model, float32.
        rows: Parameters; fields that the class does not use are not read.
        position: Of the token to be drawn in its sequence: its randomness.
        spec: At least as demanding as every row.
        edits: For class EDITED, what is known of the slots, and the edits of the rows.
        log_mass: `log_sum_exp(logits)`, where it is known already.
        edited: What the user's processors have made of the logits; None: there are none.
        mask: With `has_mask`, the tokens that are allowed, as in `allow_only`.
    """
    if log_mass is None:
        log_mass = log_sum_exp(logits)
    is_valid = jnp.isfinite(log_mass)
    edited = logits if edited is None else edited
    if spec.needed >= SamplingClass.EDITED:
        assert edits is not None, "a step of class EDITED has edits"
        edited = apply_edits(edited, *edits)
    if spec.has_mask:
        assert mask is not None, "a step with grammars has a mask"
        edited = allow_only(edited, mask)
    blocks = draws.to_blocks(edited, spec.num_tokens)
    top = blocks.max(axis=(1, 2))
    is_valid &= jnp.isfinite(top)  # the edits have left something
    tokens = draws.argmax(blocks)
    processed, kept = blocks, None
    support = _support(blocks, top, rows, logits.shape[1], spec)
    is_greedy = rows.temperature == 0
    if spec.needed > SamplingClass.GREEDY:
        drawn = _draw(support, rows, position, spec, is_skipped=is_greedy | ~is_valid)
        tokens = jnp.where(is_greedy, tokens, drawn)
        if spec.is_processed or spec.has_record:
            kept = _kept(support, rows, tokens, spec)
            processed = jnp.where(is_greedy[:, None, None], blocks, kept)
    reported, reported_mass = logits, log_mass
    if spec.is_processed:
        reported = processed.reshape(logits.shape[0], -1)[:, : logits.shape[1]]
        reported_mass = log_sum_exp(reported)
    num_logprobs = spec.num_logprobs
    logprobs, ranks, top_tokens, top_logprobs = token_logprobs(
        reported, tokens, num_logprobs or 0, reported_mass, spec.num_tokens
    )
    record = None
    if spec.has_record:
        raw_rank = token_ranks(logits, tokens, spec.num_tokens)
        record = make_record(logits, log_mass, support, kept, tokens, is_greedy, raw_rank)
    if num_logprobs is None:
        ranks = jnp.zeros_like(ranks)
    return StepOutput(tokens, logprobs, ranks, is_valid, top_tokens, top_logprobs, record)


def token_logprobs(
    logits: Float[Array, "B V"],
    tokens: Int[Array, " B"],
    num_logprobs: int,
    log_mass: Float[Array, " B"] | None = None,
    num_tokens: int | None = None,
) -> tuple[Float[Array, " B"], Int[Array, " B"], Int[Array, "B J"], Float[Array, "B J"]]:
    """Log-probability and rank of given tokens, and the J likeliest with theirs.

    `log_mass` is that of the logits, where it is known already. Ids from `num_tokens` on are
    padding: they have their share of the mass, as in the model's own distribution, but are no
    alternatives and take no rank.
    """
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1, mode="clip")
    if log_mass is None:
        log_mass = log_sum_exp(logits)
    top, top_tokens = draws.top_k(draws.to_blocks(logits, num_tokens), num_logprobs)
    ranks = token_ranks(logits, tokens, num_tokens)
    return chosen[:, 0] - log_mass, ranks, top_tokens, top - log_mass[:, None]


def token_ranks(
    logits: Float[Array, "B V"], tokens: Int[Array, " B"], num_tokens: int | None = None
) -> Int[Array, " B"]:
    """Counts the tokens that are likelier, and of equals those with a lower id, from 1.

    Ids from `num_tokens` on do not count.
    """
    index = jnp.arange(logits.shape[1])[None, :]
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1, mode="clip")
    is_before = (logits > chosen) | ((logits == chosen) & (index < tokens[:, None]))
    if num_tokens is not None:
        is_before &= index < num_tokens
    return 1 + is_before.sum(axis=1, dtype=jnp.int32)


def log_sum_exp(logits: Float[Array, "B V"]) -> Float[Array, " B"]:
    """The logarithm of the sum of exponentials; not finite where a logit is NaN or none finite."""
    top = logits.max(axis=1, keepdims=True)
    return (top + jnp.log(jnp.exp(logits - top).sum(axis=1, keepdims=True)))[:, 0]


def _support(
    blocks: Float[Array, "B U W"],
    top: Float[Array, " B"],
    rows: SamplingRows,
    vocab_size: int,
    spec: SamplingSpec,
) -> draws.Support:
    temperature = jnp.where(rows.temperature == 0, 1.0, rows.temperature)
    floor = jnp.full_like(top, -jnp.inf)
    if spec.needed >= SamplingClass.TRUNCATED:
        kth = draws.kth_largest(blocks, jnp.where(rows.top_k < vocab_size, rows.top_k, blocks.size))
        floor = jnp.maximum(kth, top + temperature * jnp.log(rows.min_p))
    return draws.Support(blocks, top, temperature, floor)


def row_keys(rows: SamplingRows, position: Int[Array, " B"]) -> Key[Array, " B"]:
    """The randomness of each row's token, by its seed and place."""

    def key(words: UInt[Array, "2"], position: Int[Array, ""]) -> Key[Array, ""]:
        return jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), position)

    return jax.vmap(key)(rows.seed, position)


def _draw(
    support: draws.Support,
    rows: SamplingRows,
    position: Int[Array, " B"],
    spec: SamplingSpec,
    is_skipped: Bool[Array, " B"],
) -> Int[Array, " B"]:
    keys = row_keys(rows, position)
    if spec.needed < SamplingClass.TRUNCATED:
        return draws.draw(support, keys)
    return draws.draw_from_nucleus(support, rows.top_p, keys, is_skipped)


def _kept(
    support: draws.Support, rows: SamplingRows, tokens: Int[Array, " B"], spec: SamplingSpec
) -> Float[Array, "B U W"]:
    """Logarithms of the weights that were drawn from; -inf outside."""
    weights = support.weights()
    if spec.needed >= SamplingClass.TRUNCATED:
        flat = support.logits.reshape(tokens.shape[0], -1)
        logit = jnp.take_along_axis(flat, tokens[:, None], axis=1, mode="clip")[:, 0]
        is_inside = draws.nucleus(support, rows.top_p, draws.Place(logit, tokens))
        weights = jnp.where(is_inside, weights, 0.0)
    return jnp.log(weights)


def report_shapes(spec: SamplingSpec, num_rows: int) -> Any:
    """What a step of so many rows reports, as a `StepOutput` of `jax.ShapeDtypeStruct`."""

    def column(dtype: Any, *more: int) -> Any:
        return jax.ShapeDtypeStruct((num_rows, *more), dtype)

    count, record = spec.num_logprobs or 0, None
    if spec.has_record:
        dtypes = [jnp.int32 if name == "rank" else jnp.float32 for name in TokenRecord._fields]
        record = TokenRecord._make(map(column, dtypes))
    tops = column(jnp.int32, count), column(jnp.float32, count)
    tokens = column(jnp.int32)
    return StepOutput._make((tokens, column(jnp.float32), tokens, column(jnp.bool_), *tops, record))
