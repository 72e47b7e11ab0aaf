"""Compiles the engine's steps for a GPU that is not there.

The compiler comes with JAX's CUDA plugin, which needs no driver: `jax-cuda12-plugin` and
`jax-cuda12-pjrt` of jaxlib's version, installed without their dependencies. XLA is told what the
card is like by a description (data/h200_target.textproto). Without a card nothing is autotuned, so
tile sizes are guesses; what kernels there are, their order, and what they copy is as on the card.
"""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from folojax.buckets import DecodeShape, PrefillShape, slots_for
from folojax.kv_cache import KVLayout
from hlo_read import Program, Thunk, read_thunks
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from folojax import kv_cache
from folojax.batch import Batch
from folojax.layered import WholeSteps
from folojax.models.llama import Llama, init_params
from folojax.models.platforms import tracing_for

TARGET = Path(__file__).parent / "data" / "h200_target.textproto"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program for the card.

    Attributes:
        program: Its HLO.
        thunks: What the runtime starts.
        temporary_bytes: Memory beside arguments and results.
        cache_bytes: Of the cache that it is handed.
        weight_bytes: Of the weights; the embedding, which is only looked up in, aside.
    """

    program: Program
    thunks: list[Thunk]
    temporary_bytes: int
    cache_bytes: int
    weight_bytes: int


def target_device(target: Path = TARGET) -> Any:
    """The card that a description tells of.

    Raises:
        RuntimeError: the plugin with the compiler is not there.
    """
    try:
        return topologies.get_topology_desc(
            "gpu", "cuda", target_config=target.read_text(), topology="1x1x1"
        ).devices[0]
    except (NotImplementedError, RuntimeError) as error:
        version = jax.lib.__version__
        raise RuntimeError(
            f"there is no compiler for CUDA ({error}): pip install --no-deps --target DIR "
            f"jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version}, then run with "
            "PYTHONPATH=DIR and JAX_PLATFORMS=cpu"
        ) from None


class Steps:
    """The jitted steps of one model on one card, as shapes: nothing is allocated."""

    def __init__(self, module: Llama, segments: tuple[int, ...], page_size: int, device: Any):
        self._module, self._steps = module, WholeSteps(module)
        self._sharding = SingleDeviceSharding(device)
        shapes = jax.eval_shape(functools.partial(init_params, module), jax.random.key(0))
        self._params = self._on_device(shapes)
        self._layout = KVLayout.of(module.config, module.dtype, segments, page_size)
        with tracing_for("gpu"):
            cache = jax.eval_shape(functools.partial(kv_cache.init_cache, self._layout))
        self._cache = self._on_device(cache)

    def decode(self, shape: DecodeShape) -> Compiled:
        """The decode step; the cache must have exactly the segments of the shape."""
        batch = self._batch(shape.rows, shape.table_pages)
        inputs = self._on_device(batch.decode_inputs(shape, []))
        tokens = self._array((batch.num_slots,), jnp.int32)
        with tracing_for("gpu"):
            (call,) = self._steps.decode_calls(self._params, self._cache, tokens, inputs)
            lowered = call.lower()
        return self._compile(lowered)

    def prefill(self, shape: PrefillShape) -> Compiled:
        """The prefill step, likewise."""
        batch = self._batch(shape.rows, shape.table_pages)
        inputs = self._on_device(batch.prefill_inputs(shape, []))
        with tracing_for("gpu"):
            (call,) = self._steps.prefill_calls(self._params, self._cache, inputs)
            lowered = call.lower()
        return self._compile(lowered)

    def _compile(self, lowered: Any) -> Compiled:
        with tempfile.TemporaryDirectory() as dump:
            options: Any = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
            compiled = lowered.compile(compiler_options=options)
            (sequence,) = Path(dump).glob("*.thunk_sequence_after_thunk_passes.txt")
            thunks = read_thunks(sequence.read_text())
        weights = {name: leaf for name, leaf in self._params.items() if name != "embed"}
        return Compiled(
            program=Program(compiled.as_text()),
            thunks=thunks,
            temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
            cache_bytes=_bytes(self._cache),
            weight_bytes=_bytes(weights),
        )

    def _batch(self, rows: int, table_pages: int) -> Batch:
        vocab_size = self._module.config.vocab_size
        return Batch(slots_for(rows), table_pages, self._layout.num_pages, vocab_size)

    def _on_device(self, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: self._array(leaf.shape, leaf.dtype), tree)

    def _array(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._sharding)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
