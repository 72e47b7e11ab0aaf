"""The user's own functions of the logits, compiled into the sampler.

A processor is given when the engine is built and is on for the requests that name it. It is a pure
function of one row, `f(logits, state) -> (logits, state)`; its state lives on the device, a row a
slot, is made when a request joins the batch and follows it through preemptions. Steps in which no
request names a processor run the programs of an engine without it.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_UNNAMED = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.VAR_POSITIONAL,
    inspect.Parameter.VAR_KEYWORD,
)

NO_TOKEN = -1
"""`RequestState.last_token` before the first output."""


class RequestState(NamedTuple):
    """What a processor knows of its request."""

    value: Any  # the processor's own pytree of arrays: what it returned last
    last_token: Int[Array, ""]  # the last output token; NO_TOKEN before the first
    num_outputs: Int[Array, ""]  # output tokens so far


@dataclasses.dataclass(frozen=True)
class LogitsProcessor:
    """A function of the logits, by name.

    Attributes:
        name: What `SamplingParams.logits_processors` calls it.
        apply: From logits [V] in float32 and a `RequestState` to logits and a new `value`, whose
            shapes and dtypes are the old one's. -inf bans a token. Pure, traced once.
        init: Makes the `value` of a new request; left out, that is an empty tuple. Its keywords,
            which need defaults, are what `SamplingParams.extra_args` may hold; shapes and dtypes
            do not depend on them.
    """

    name: str
    apply: Callable[[Any, RequestState], tuple[Any, Any]]
    init: Callable[..., Any] = tuple

    @functools.cached_property
    def arguments(self) -> frozenset[str]:
        """The keywords of `init`."""
        named = inspect.signature(self.init).parameters.values()
        return frozenset(one.name for one in named if one.kind not in _UNNAMED)

    def start(self, extra_args: Mapping[str, Any]) -> Any:
        """The `value` of a new request that came with these."""
        own = {name: extra_args[name] for name in extra_args if name in self.arguments}
        return self.init(**own)


class ProcessorSlots(NamedTuple):
    """State of every slot; rows of requests without processors are stale, not clean."""

    values: dict[str, Any]  # by name, arrays [M, ...]
    last_token: Int[Array, " M"]
    num_outputs: Int[Array, " M"]


class ProcessorRows(NamedTuple):
    """The processors of a step's rows."""

    slot: Int[Array, " B"]  # M for a row without any
    is_on: Bool[Array, "B _"]  # by the processors of the step's spec


def init_processors(processors: tuple[LogitsProcessor, ...], num_slots: int) -> ProcessorSlots:
    """Allocates the state of all slots."""

    def tiled(leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        return jnp.broadcast_to(leaf, (num_slots, *leaf.shape)).copy()

    return ProcessorSlots(
        values={one.name: jax.tree.map(tiled, one.init()) for one in processors},
        last_token=jnp.full(num_slots, NO_TOKEN),
        num_outputs=jnp.zeros(num_slots, jnp.int32),
    )


@functools.partial(jax.jit, donate_argnames="slots")
def write_processors(
    slots: ProcessorSlots, slot: Int[Array, ""], new: ProcessorSlots
) -> ProcessorSlots:
    """Replaces the row of a slot by arrays without the slot axis. DONATES `slots`."""
    return jax.tree.map(lambda old, leaf: old.at[slot].set(leaf), slots, new)


@jax.jit
def read_processors(slots: ProcessorSlots, slot: Int[Array, ""]) -> ProcessorSlots:
    """The row of a slot, as `write_processors` takes it."""
    return jax.tree.map(lambda leaf: leaf[slot], slots)


def apply_processors(
    logits: Float[Array, "B V"],
    slots: ProcessorSlots,
    rows: ProcessorRows,
    processors: tuple[LogitsProcessor, ...],
) -> tuple[Float[Array, "B V"], ProcessorSlots]:
    """Logits as the processors leave them, and their new values; other rows keep their bits."""
    values = dict(slots.values)
    last_token = slots.last_token.at[rows.slot].get(mode="clip")
    num_outputs = slots.num_outputs.at[rows.slot].get(mode="clip")
    num_slots = slots.last_token.shape[0]
    for index, one in enumerate(processors):
        mine = jax.tree.map(lambda leaf: leaf.at[rows.slot].get(mode="clip"), values[one.name])
        state = RequestState(mine, last_token, num_outputs)
        changed, new = jax.vmap(one.apply)(logits, state)
        is_on = rows.is_on[:, index]
        logits = jnp.where(is_on[:, None], changed.astype(logits.dtype), logits)
        target = jnp.where(is_on, rows.slot, num_slots)
        values[one.name] = jax.tree.map(
            lambda old, leaf, target=target: old.at[target].set(leaf, mode="drop"),
            values[one.name],
            new,
        )
    return logits, slots._replace(values=values)


def note_outputs(
    slots: ProcessorSlots, rows: ProcessorRows, tokens: Int[Array, " B"]
) -> ProcessorSlots:
    """Takes in the tokens just sampled; a slot of M is dropped."""
    return slots._replace(
        last_token=slots.last_token.at[rows.slot].set(tokens, mode="drop"),
        num_outputs=slots.num_outputs.at[rows.slot].add(1, mode="drop"),
    )
