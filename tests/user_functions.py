"""Functions of a user for the step, and engines that have them."""

from typing import Any

import jax
import jax.numpy as jnp

from folojax import (
    LLM,
    ActivationEdit,
    LogitsProcessor,
    RequestOutput,
    RequestState,
    SamplingParams,
)
from folojax.sampling.logits_processors import NO_TOKEN
from tests.reference import TINY_LIMITS

OPEN, CLOSE, BODY = 91, 93, 10
PROMPTS = [list(range(5, 40)), [9, 8, 7], [11, 12, 13, 14], [3]]


def ban_even(logits: jax.Array, state: RequestState) -> tuple[jax.Array, Any]:
    return jnp.where(jnp.arange(logits.shape[0]) % 2 == 0, -jnp.inf, logits), state.value


def force(logits: jax.Array, token: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(logits.shape[0]) == token, logits, -jnp.inf)


def brackets(logits: jax.Array, state: RequestState) -> tuple[jax.Array, Any]:
    """An opening bracket first, a closing one after BODY tokens."""
    is_first, is_last = state.num_outputs == 0, state.num_outputs == BODY + 1
    forced = force(logits, jnp.where(is_first, OPEN, CLOSE))
    return jnp.where(is_first | is_last, forced, logits), state.value


def count_up(logits: jax.Array, state: RequestState) -> tuple[jax.Array, Any]:
    """Forces 0, 1, 2, ... by a count of its own, and NaN should the last token be another."""
    start, count = state.value["start"], state.value["count"]
    last = jnp.where(count == 0, NO_TOKEN, start + count - 1)
    is_right = (state.last_token == last) & (state.num_outputs == count)
    forced = force(logits, start + count)
    return jnp.where(is_right, forced, jnp.nan), {"start": start, "count": count + 1}


def start_count(start: int = 0) -> dict[str, jax.Array]:
    return {"start": jnp.int32(start), "count": jnp.int32(0)}


PROCESSORS = [
    LogitsProcessor("odd", ban_even),
    LogitsProcessor("brackets", brackets),
    LogitsProcessor("count", count_up, start_count),
]


def steer(hidden: jax.Array, layer: int) -> jax.Array:
    direction = jnp.where(jnp.arange(hidden.shape[0]) % 3 == 0, 2.0, -1.0)
    return hidden + direction.astype(hidden.dtype)


EDITS = [
    ActivationEdit("steer", (1,), steer),
    ActivationEdit("twice", (0, 1), lambda hidden, layer: hidden * (2.0 + layer)),
]


def make_llm(model: tuple, **options: Any) -> LLM:
    functions = {"logits_processors": PROCESSORS, "activation_edits": EDITS}
    return LLM(model, **TINY_LIMITS | functions | options)


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 14, "ignore_eos": True, "logprobs": 2} | fields)


KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"seed": 1},
    {"seed": 2, "top_p": 0.9},
    {"seed": 3, "frequency_penalty": 1.0},
]


def generate(llm: LLM, asked: list[SamplingParams]) -> list[RequestOutput]:
    return llm.generate(PROMPTS, asked, use_tqdm=False)


def facts(output: RequestOutput) -> tuple:
    """What must be the same to the bit."""
    one = output.outputs[0]
    return one.token_ids, one.cumulative_logprob, one.logprobs
