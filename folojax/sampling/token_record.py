"""The log-probability record of a sampled token, computed where it is sampled.

A token goes through up to three distributions, and importance weights need to know which:

    raw        softmax(logits)                          the model's own
    tempered   softmax(edited logits / temperature)     after penalties, biases, bans, temperature
    processed  tempered, cut to what min-p, top-k and top-p keep: what was drawn from

    processed = tempered - log_kept        log_kept: logarithm of the tempered mass that was kept

A greedy row is not a draw: its temperature counts as 1 and nothing is cut.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from folojax.sampling.draws import Support


class TokenRecord(NamedTuple):
    """Natural logarithms of probabilities, and what else a trainer asks of a sampled token."""

    raw: Float[Array, " B"]
    tempered: Float[Array, " B"]
    processed: Float[Array, " B"]
    log_kept: Float[Array, " B"]  # at most 0
    entropy: Float[Array, " B"]  # of the raw distribution, in nats
    rank: Int[Array, " B"]  # in the raw distribution; 1 is the likeliest


def make_record(
    logits: Float[Array, "B V"],
    log_mass: Float[Array, " B"],
    support: Support,
    kept: Float[Array, "B U W"] | None,
    tokens: Int[Array, " B"],
    is_greedy: Bool[Array, " B"],
    rank: Int[Array, " B"],
) -> TokenRecord:
    """Records the tokens that were drawn.

    Args:
        logits: Of the model.
        log_mass: Logarithm of the sum of their exponentials.
        support: Edited logits and temperature (1 for greedy rows).
        kept: Logarithms of the weights that were drawn from, relative to the largest; None: no
            row cuts anything.
        tokens: What was drawn.
        is_greedy: Rows that cut nothing, whatever `kept` says.
        rank: Of the tokens in the raw distribution.
    """
    raw_logit = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    logprobs = logits - log_mass[:, None]
    probability = jnp.exp(logprobs)
    entropy = -jnp.where(probability > 0, probability * logprobs, 0.0).sum(axis=1)

    # All of it, without the floor that min-p and top-k have put into the support.
    scaled = (support.logits - support.top[:, None, None]) / support.temperature[:, None, None]
    log_total = jnp.log(jnp.exp(scaled).sum(axis=(1, 2)))
    flat = scaled.reshape(scaled.shape[0], -1)
    tempered = jnp.take_along_axis(flat, tokens[:, None], axis=1)[:, 0] - log_total
    log_kept = jnp.zeros_like(tempered)
    if kept is not None:
        cut = jnp.minimum(jnp.log(jnp.exp(kept).sum(axis=(1, 2))) - log_total, 0.0)
        log_kept = jnp.where(is_greedy, 0.0, cut)
    return TokenRecord(
        raw=raw_logit - log_mass,
        tempered=tempered,
        processed=tempered - log_kept,
        log_kept=log_kept,
        entropy=entropy,
        rank=rank,
    )
