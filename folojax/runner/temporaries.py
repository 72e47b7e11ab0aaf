"""What the jitted steps need beside their arguments: by XLA's analysis, or by a rough bound.

XLA knows the size of a compiled program's temporaries, but compiling a whole model only to ask
takes seconds. Layers run one after the other in the same buffers, so a model of two layers needs
what one of thirty does, to within kilobytes, and is compiled in a fraction of the time. If the
model has no more than two, what is compiled here is what the engine will call, and is not compiled
again.
"""

import dataclasses
import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import SingleDeviceSharding

from folojax.backend import Backend
from folojax.compile.shapes import DecodeShape, PrefillShape, Shapes
from folojax.kv import KVLayout
from folojax.kv.page_copies import COPY_SIZES
from folojax.models.core.dense_attend import dense_attend
from folojax.models.quantized.quantize import quantize_params
from folojax.runner.batch import Batch, ints
from folojax.sampling.logit_edits import init_edits
from folojax.sampling.rows import SampleInputs
from folojax.sampling.sampler import SamplingClass, SamplingSpec
from folojax.steps import row_by_row as rowwise
from folojax.steps import step
from folojax.steps.by_layer import make_steps
from folojax.steps.state import DecodeInputs, init_state

_NUM_LAYERS = 2


def slot_bytes(module: nn.Module, num_slots: int) -> int:
    """Bytes of what the sampler keeps of every request, edits of logits included."""
    edits = jax.eval_shape(functools.partial(init_edits, num_slots, module.config.vocab_size))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in (ints(num_slots), *edits))


def measure(
    module: nn.Module,
    layout: KVLayout,
    shapes: Shapes,
    num_slots: int,
    max_logprobs: int,
    backend: Backend,
    quantization: str | None = None,
    *,
    is_deterministic: bool = False,
) -> int:
    """Bytes beside weights and state that the largest calls need, as XLA has compiled them.

    Args:
        module: Of `folojax.models`.
        layout: Of the cache; nothing is allocated.
        shapes: Which shapes exist.
        num_slots: M.
        max_logprobs: J, at most.
        backend: That the engine runs on.
        quantization: Of the kernels.
        is_deterministic: With the program of such an engine (`folojax.steps.row_by_row`) beside
            the others.
    """
    num_layers = min(_NUM_LAYERS, module.config.num_layers)
    shallow = module.clone(config=dataclasses.replace(module.config, num_layers=num_layers))
    shallow_layout = dataclasses.replace(layout, num_layers=num_layers)
    lowered = list(
        _lower(
            shallow,
            shallow_layout,
            shapes,
            num_slots,
            max_logprobs,
            backend,
            quantization,
            is_deterministic,
        )
    )
    with ThreadPoolExecutor() as pool:  # XLA compiles without Python's lock
        compiled = list(pool.map(lambda one: one.compile(), lowered))
    found = [one.memory_analysis() for one in compiled]
    # One call after the other uses the same memory, but their results wait to be read.
    results = sum(one.output_size_in_bytes - one.alias_size_in_bytes for one in found)
    copies = COPY_SIZES[-1] * layout.bytes_per_page
    return results + max(copies, *(one.temp_size_in_bytes for one in found))


def estimate(module: nn.Module, layout: KVLayout, shapes: Shapes, max_logprobs: int) -> int:
    """A bound on what `measure` finds, from shapes alone: generous, and nothing is compiled.

    Three times what stands in the largest arrays, as every one of them has a predecessor that it
    was made from and a successor.
    """
    config = module.config
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    inner = 2 * config.intermediate_size + 3 * config.hidden_size + (heads + 2 * kv_heads) * dim
    page = layout.bytes_per_page // layout.num_layers
    # The MLP of all tokens of a call; and attention, which in plain XLA has a few pages and the
    # scores of them for each row.
    rows, columns = shapes.prefill_rows[-1], shapes.prefill_columns
    tokens = min(rows * columns, shapes.prefill_tokens or rows * columns)
    seen = max(layout.page_size, 128)
    attention = max(rows, shapes.decode_rows[-1]) * (2 * page + 8 * columns * heads * seen)
    model = attention + 4 * max(tokens, shapes.decode_rows[-1]) * inner
    # Sampling: logits, sorted copies, noise; and the alternatives that are reported.
    most_rows = max(rows, shapes.decode_rows[-1], columns)
    sample = 4 * most_rows * (4 * config.vocab_size + 2 * max_logprobs)
    scores = 8 * tokens * (max_logprobs + 1)
    copies = COPY_SIZES[-1] * layout.bytes_per_page
    return 3 * max(model, sample, copies) + scores


def _lower(
    module: nn.Module,
    layout: KVLayout,
    shapes: Shapes,
    num_slots: int,
    max_logprobs: int,
    backend: Backend,
    quantization: str | None,
    is_deterministic: bool,
) -> Iterator[Any]:
    """Traces the largest call of every jitted step on padding, with arrays that are only shapes."""
    variables = jax.eval_shape(
        lambda token: module.init(jax.random.key(0), token, token, None, dense_attend),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    params = variables["params"]
    if quantization:
        params = jax.eval_shape(lambda params: quantize_params(params, quantization), params)
    params = _on_device(params)
    head = step.head_params(params)
    state = _on_device(jax.eval_shape(functools.partial(init_state, layout, num_slots)))
    vocab_size = module.config.vocab_size
    edits = _on_device(jax.eval_shape(functools.partial(init_edits, num_slots, vocab_size)))
    batch = Batch(num_slots, shapes.table_pages, layout.num_pages, vocab_size)

    steps = make_steps(module, backend.is_layered, shapes.prefill_tokens)
    shape = PrefillShape(shapes.prefill_rows[-1], shapes.prefill_columns)
    inputs = batch.prefill_inputs(shape, [])
    yield from (one.lower() for one in steps.prefill_calls(params, state.cache, inputs))

    decode_shape = DecodeShape(shapes.decode_rows[-1])
    one = batch.decode_inputs(decode_shape, [])
    calls = steps.decode_calls(params, state.cache, state.slots.tokens, one)
    yield from (call.lower() for call in calls)

    if is_deterministic:
        size = backend.rows_per_call
        slot = batch.pad([], size)
        one = DecodeInputs(slot, ints(size), ints(size), batch.page_tables(slot))
        tokens = state.slots.tokens
        yield rowwise.forward.lower(params, state.cache, tokens, one, None, model=module, edits=())

    rows = max(shape.rows, decode_shape.rows)
    slot = batch.pad([], rows)
    spec = SamplingSpec(SamplingClass.EDITED, max_logprobs)
    rows_inputs = SampleInputs(
        slot, ints(rows), batch.params.rows(slot), batch.params.edit_rows(slot, ints(rows))
    )
    states = _array((rows, module.config.hidden_size), module.dtype)
    slots = state.slots._replace(edits=edits)
    yield step.sample_tokens.lower(head, slots, states, rows_inputs, model=module, spec=spec)

    chunks = _array((shape.rows, shape.columns, module.config.hidden_size), module.dtype)
    targets = ints((shape.rows, shape.columns))
    yield step.score_tokens.lower(head, chunks, targets, model=module, num_logprobs=max_logprobs)


def _on_device(shapes: Any) -> Any:
    """Shapes of arrays that are committed to the device, as the engine's are."""
    return jax.tree.map(lambda leaf: _array(leaf.shape, leaf.dtype), shapes)


def _array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    sharding = SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
