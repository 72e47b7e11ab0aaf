"""Rows of sampling parameters and the plain reference that tests of the sampler share."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from folojax.sampling.logit_edits import NUM_RECENT, EditRows, init_edits
from folojax.sampling.rows import SamplingRows, StepOutput
from folojax.sampling.sampler import SamplingClass, SamplingSpec, sample

V = 1000
OFF: dict[str, Any] = {"temperature": 1.0, "top_k": V, "top_p": 1.0, "min_p": 0.0, "seed": 0}


def make_rows(*params: dict[str, Any]) -> SamplingRows:
    """Rows of parameters; what a row does not name is off."""
    full = [OFF | row for row in params]

    def array(name: str, dtype: Any) -> jax.Array:
        return jnp.array([row[name] for row in full], dtype)

    seeds = [(row["seed"] >> 32, row["seed"] & 0xFFFFFFFF) for row in full]
    return SamplingRows(
        temperature=array("temperature", jnp.float32),
        top_k=array("top_k", jnp.int32),
        top_p=array("top_p", jnp.float32),
        min_p=array("min_p", jnp.float32),
        seed=jnp.array(seeds, jnp.uint32),
    )


def edit_nothing(num_rows: int) -> EditRows:
    """Rows of class EDITED that have no edit."""
    off = jnp.zeros(num_rows)
    bans = jnp.full((4, 2 + NUM_RECENT), -1).at[:, 0].set(num_rows)
    return EditRows(jnp.full(num_rows, 1), off + 1, off, off, bans)


@functools.partial(jax.jit, static_argnums=3)
def draw(
    logits: jax.Array, rows: SamplingRows, positions: jax.Array, spec: SamplingSpec
) -> StepOutput:
    """One step; class EDITED edits nothing."""
    edits = None
    if spec.needed == SamplingClass.EDITED:
        edits = init_edits(1, logits.shape[1]), edit_nothing(logits.shape[0])
    return sample(logits, rows, positions, spec, edits)


@functools.partial(jax.jit, static_argnums=3)
def draw_many(
    logits: jax.Array, rows: SamplingRows, positions: jax.Array, spec: SamplingSpec
) -> jax.Array:
    """Tokens of every row at each of the positions: [positions, B]."""

    def at(position: jax.Array) -> jax.Array:
        return draw(logits, rows, jnp.broadcast_to(position, logits.shape[:1]), spec).tokens

    return jax.lax.map(at, positions)


def random_logits(num_rows: int, seed: int = 0, scale: float = 2.0) -> jax.Array:
    """Normal ones."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(scale=scale, size=(num_rows, V)).astype(np.float32))


def pick(rows: Any, index: Sequence[int] | np.ndarray) -> Any:
    """The given rows of arrays, parameters or outputs."""
    return jax.tree.map(lambda x: x[np.array(index)], rows)


def reference_kept(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Which tokens one row keeps, in float64 and by sorting."""
    x = logits.astype(np.float64)
    kept = np.exp(x - x.max()) >= min_p
    if top_k < len(x):
        kept &= x >= np.sort(x)[-top_k]
    if top_p < 1:
        mass = np.where(kept, np.exp(x - x.max()), 0.0)
        order = np.argsort(-x, kind="stable")
        reached = np.cumsum(mass[order]) >= top_p * mass.sum()
        kept[order[np.argmax(reached) + 1 :]] = False
    return kept


def reference_probability(logits: np.ndarray, row: dict[str, Any]) -> np.ndarray:
    """What one row is drawn from, in float64 and by sorting."""
    full = OFF | row
    if full["temperature"] == 0:
        return (np.arange(len(logits)) == logits.argmax()).astype(np.float64)
    scaled = logits.astype(np.float64) / full["temperature"]
    kept = reference_kept(scaled, full["top_k"], full["top_p"], full["min_p"])
    probability = np.where(kept, np.exp(scaled - scaled.max()), 0.0)
    return probability / probability.sum()
