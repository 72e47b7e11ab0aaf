"""What the jitted steps need beside their arguments: by XLA's analysis, or by a rough bound.

XLA knows the size of a compiled program's temporaries, but compiling a whole model only to ask
takes seconds. Layers run one after the other in the same buffers, so a model of two layers needs
what one of thirty does, to within kilobytes, and is compiled in a fraction of the time. If the
model has no more than two, what is compiled here is what the engine will call, and is not compiled
again.
"""

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from flax import linen as nn

from folojax.kv.page_copies import COPY_SIZES
from folojax.models.core.decoder import init_params
from folojax.models.core.recurrence import CHUNK
from folojax.models.quantized.quantize import quantize_params
from folojax.runner.batch import ints
from folojax.runner.padding import compile_on_padding
from folojax.runner.setup import Setup
from folojax.sampling.logit_edits import init_edits
from folojax.sampling.sampler import SamplingClass
from folojax.steps.executables import COPIES, EDITS, Executable
from folojax.steps.state import init_state

_NUM_LAYERS = 2


def slot_bytes(module: nn.Module, num_slots: int) -> int:
    """Bytes of what the sampler keeps of every request, edits of logits included."""
    edits = jax.eval_shape(functools.partial(init_edits, num_slots, module.config.vocab_size))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in (ints(num_slots), *edits))


def measure(setup: Setup, quantization: str | None = None) -> int:
    """Bytes beside weights and state that the largest calls need, as XLA has compiled them.

    Args:
        setup: Of the engine; nothing of it is allocated.
        quantization: Of the kernels.
    """
    module, backend = setup.model, setup.backend
    # As many as have one of every kind, where two do not.
    config = module.config
    kinds = [
        (config.is_recurrent(i), config.has_pages(i), config.is_sparse(i), config.at(i).head_dim)
        for i in range(config.num_layers)
    ]
    of_each = max(map(kinds.index, set(kinds))) + 1
    num_layers = min(max(_NUM_LAYERS, of_each), len(kinds))
    setup = dataclasses.replace(
        setup,
        model=module.clone(config=dataclasses.replace(config, num_layers=num_layers)),
        layout=dataclasses.replace(setup.layout, num_layers=num_layers),
    )

    def make() -> Any:
        params = init_params(setup.model, jax.random.key(0))
        params = quantize_params(params, quantization) if quantization else params
        state = init_state(setup.layout, setup.num_slots)
        edits = init_edits(setup.num_slots, module.config.vocab_size)
        return params, state._replace(slots=state.slots._replace(edits=edits))

    params, state = jax.eval_shape(make)
    params = backend.devices.param_shapes(params, setup.model.config)
    state = backend.devices.shapes(state)
    steps, batch = backend.make_steps(setup.model), setup.batch()

    def compile_one(one: Executable) -> list[Any]:
        return compile_on_padding(one, setup, steps, batch, params, state)

    with ThreadPoolExecutor() as pool:  # XLA compiles without Python's lock
        compiled = [one for some in pool.map(compile_one, _largest(setup)) for one in some]
    found = [one.memory_analysis() for one in compiled]
    # One call after the other uses the same memory, but their results wait to be read.
    results = sum(one.output_size_in_bytes - one.alias_size_in_bytes for one in found)
    copies = COPY_SIZES[-1] * setup.layout.bytes_per_page
    return results + max(copies, *(one.temp_size_in_bytes for one in found))


def _largest(setup: Setup) -> list[Executable]:
    """Of every kind, the executable with the most rows and the most demanding sampling."""

    def size(one: Executable) -> tuple[int, int, int]:
        spec = one.spec
        return one.rows, spec.needed if spec else 0, (spec.num_logprobs or 0) if spec else 0

    # Adapters add some thousandths.
    listed = dataclasses.replace(setup, max_loras=0).list_executables(tuple(SamplingClass), True)
    found = {one.kind: one for one in sorted(listed, key=size)}
    return [one for one in found.values() if one not in (COPIES, EDITS)]


def estimate(setup: Setup) -> int:
    """A bound on what `measure` finds, from shapes alone: generous, and nothing is compiled.

    Three times what stands in the largest arrays, as every one of them has a predecessor that it
    was made from and a successor.
    """
    config, layout, shapes = (
        setup.backend.devices.part(setup.model).config,
        setup.layout,
        setup.shapes,
    )
    heads = config.num_heads
    inner = 3 * config.hidden_size + max(
        2 * one.intermediate_size + (heads + 2 * one.num_kv_heads) * one.head_dim
        for one in map(config.at, range(config.num_layers))
    )
    page = layout.bytes_per_page // len(layout.paged_layers)
    # The MLP of all tokens of a call; and attention, which in plain XLA has a few pages and the
    # scores of them for each row.
    rows, columns = shapes.prefill_rows[-1], shapes.prefill_columns
    tokens = min(rows * columns, shapes.prefill_tokens or rows * columns)
    seen = max(layout.page_size, 128)
    attention = max(rows, shapes.decode_rows[-1]) * (2 * page + 8 * columns * heads * seen)
    model = attention + 4 * max(tokens, shapes.decode_rows[-1]) * inner
    if layout.recurrent is not None:
        # The states of all rows of a decode step; of a chunk, what it does to a state.
        sizes = layout.recurrent
        of_state = layout.state_bytes // len(layout.recurrent_layers)
        of_token = 3 * sizes.num_value_heads * (sizes.key_dim + sizes.value_dim + CHUNK)
        model += 2 * of_state + 4 * tokens * of_token
    # Sampling: logits, sorted copies, noise; and the alternatives that are reported.
    most_rows = max(rows, shapes.decode_rows[-1], columns)
    sample = 4 * most_rows * (4 * config.vocab_size + 2 * setup.max_logprobs)
    scores = 8 * tokens * (setup.max_logprobs + 1)
    copies = COPY_SIZES[-1] * layout.bytes_per_page
    return 3 * max(model, sample, copies) + scores
