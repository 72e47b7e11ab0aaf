"""Log-likelihood of token sequences as a differentiable pure function: what a trainer needs.

The module and the parameters are those that the engine generates with; there is no cache, no page
and no scheduler. Sequences are aligned at the left and padded at the right, as
`folojax.outputs_to_arrays` lays them out: attention is causal, so what stands behind a token
cannot change it, and padding needs no mask of its own.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from folojax.models.core.adapted import adapt
from folojax.models.core.dense_attend import dense_attend
from folojax.models.core.low_rank import stacks_of_tree


def log_likelihood(
    params: Any,
    tokens: Int[Array, "*B N"],
    mask: Bool[Array, "*B N"],
    *,
    model: nn.Module,
    temperature: float | Float[Array, ""] = 1.0,
    lora: Any = None,
    lora_scale: float = 1.0,
) -> Float[Array, "*B N"]:
    """Log-probability of every masked token, given all tokens before it.

    Pure: jit it, differentiate it with respect to `params` or `lora`, vmap it (not with experts:
    give it all sequences at once, which then run one after the other).
    The logits of one sequence at a time are in memory, [N, V] in float32, and are computed again
    in the backward pass.

    Args:
        params: The module's parameters; through quantised kernels it cannot be differentiated.
        tokens: Sequences from their first token on; what stands behind the last masked token is
            padding, and may hold anything.
        mask: True for the tokens that count. The first token of a sequence never does: nothing
            comes before it.
        model: A module of `folojax.models`. One of your own has to be bound or static under jit.
        temperature: Divides the logits, for the distribution that was sampled at a temperature.
        lora: An adapter, as `init_lora` makes it, which stays beside the parameters: no merged ones
            are made, nor their gradients.
        lora_scale: Of its updates; a number.

    Returns:
        float32; 0 where `mask` is False, and for the first token.

    Raises:
        ValueError: the model is no Flax module, or the adapter does not fit it.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is a {type(model).__name__}, and must be a Flax module: under jax.jit bind it "
            'with functools.partial, or name it in static_argnames="model"'
        )
    # Here, because it takes a while to import, and an engine has no use for it.
    import optax

    if lora is not None:
        params = adapt(params, stacks_of_tree(lora, params, model.config, lora_scale))
    *batch, length = tokens.shape
    flat = tokens.reshape(-1, length)

    def hidden_states(sequence: Int[Array, " N"]) -> Float[Array, "N E"]:
        positions = jnp.arange(length)
        result: Any = model.apply({"params": params}, sequence, positions, None, dense_attend)
        return result[0]

    # JAX cannot vmap the ragged products of experts.
    has_experts = getattr(model.config, "num_experts", 0) > 0
    hidden = lax.map(hidden_states, flat) if has_experts else jax.vmap(hidden_states)(flat)
    targets = jnp.roll(flat, -1, axis=1)

    @jax.checkpoint
    def score(row: tuple[Float[Array, "N E"], Int[Array, " N"]]) -> Float[Array, " N"]:
        logits: Any = model.apply({"params": params}, row[0], method="logits")
        return -optax.losses.softmax_cross_entropy_with_integer_labels(logits / temperature, row[1])

    following = lax.map(score, (hidden, targets))
    found = jnp.pad(following[:, :-1], ((0, 0), (1, 0))).reshape(*batch, length)
    return jnp.where(mask, found, 0.0)
