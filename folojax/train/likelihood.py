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
from folojax.models.core.moe import with_routing


def log_likelihood(
    params: Any,
    tokens: Int[Array, "*B N"],
    mask: Bool[Array, "*B N"],
    *,
    model: nn.Module,
    temperature: float | Float[Array, ""] = 1.0,
    lora: Any = None,
    lora_scale: float = 1.0,
    routed_experts: Int[Array, "*B N L M"] | None = None,
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
        routed_experts: Which M experts each token is sent to, in each of the L layers that have
            any, as `OutputArrays` has them; entries below 0 are left to the router. Their weights
            are those that the router gives them, and differentiable.

    Returns:
        float32; 0 where `mask` is False, and for the first token.

    Raises:
        ValueError: the model is no Flax module, or the adapter or the experts do not fit it.
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

    def hidden_states(given: tuple[Int[Array, " N"], Any]) -> Float[Array, "N E"]:
        sequence, routing = given
        own = params if routing is None else with_routing(params, routing, model.config)
        positions = jnp.arange(length)
        result: Any = model.apply({"params": own}, sequence, positions, None, dense_attend)
        return result[0]

    routing = None
    if routed_experts is not None:
        routing = _routing_of(routed_experts, tokens, model.config)

    # JAX cannot vmap the ragged products of experts.
    has_experts = getattr(model.config, "num_experts", 0) > 0
    each = flat, routing
    hidden = lax.map(hidden_states, each) if has_experts else jax.vmap(hidden_states)(each)
    targets = jnp.roll(flat, -1, axis=1)

    @jax.checkpoint
    def score(row: tuple[Float[Array, "N E"], Int[Array, " N"]]) -> Float[Array, " N"]:
        logits: Any = model.apply({"params": params}, row[0], method="logits")
        return -optax.losses.softmax_cross_entropy_with_integer_labels(logits / temperature, row[1])

    following = lax.map(score, (hidden, targets))
    found = jnp.pad(following[:, :-1], ((0, 0), (1, 0))).reshape(*batch, length)
    return jnp.where(mask, found, 0.0)


def _routing_of(
    routed_experts: Any, tokens: Int[Array, "*B N"], config: Any
) -> Int[Array, "flat N L M"]:
    """The experts of each sequence; ValueError if they are not of the model and the tokens."""
    sparse = sum(map(config.is_sparse, range(config.num_layers)))
    wanted = (*tokens.shape, sparse, config.num_experts_per_token)
    if routed_experts.shape != wanted or not sparse:
        told = f"{list(wanted)}" if sparse else "left out: the model has no experts"
        raise ValueError(f"routed_experts is {list(routed_experts.shape)}; it must be {told}")
    return jnp.asarray(routed_experts).reshape(-1, *wanted[-3:])
