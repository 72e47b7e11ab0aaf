"""Compiles the engine's steps for a GPU that is not there.

The compiler comes with JAX's CUDA plugin, which needs no driver: `jax-cuda12-plugin` and
`jax-cuda12-pjrt` of jaxlib's version, installed without their dependencies. XLA is told what the
card is like by a description (data/h200_target.textproto). Without a card nothing is autotuned, so
tile sizes are guesses; what kernels there are, their order, and what they copy is as on the card.

cuDNN is a library call to XLA, which need not be installed either; those who ask for its version
and for the card's generation are told what `_pretend_card` says.
"""

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from hlo_read import Program, Thunk, read_thunks
from jax.experimental import topologies

from folojax.attention import cudnn
from folojax.backend.backend import GPU
from folojax.backend.devices import Devices, device_bytes
from folojax.compile.shapes import slots_for
from folojax.models.core.adapted import adapt
from folojax.models.core.decoder import Llama, init_params
from folojax.models.machine import decode_product
from folojax.models.quantized.quantize import quantize_params
from folojax.runner.adapter_slots import stack_shapes
from folojax.runner.batch import Batch
from folojax.runner.grammar_masks import GrammarMasks
from folojax.runner.padding import padding
from folojax.sampling.sampler import SamplingSpec
from folojax.steps.executables import Executable
from folojax.steps.state import init_state

TARGET = Path(__file__).parent / "data" / "h200_target.textproto"

_CUDNN_VERSION = 91900
_HOPPER = 9.0


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program for the card.

    On several cards, of one of them.

    Attributes:
        program: Its HLO.
        thunks: What the runtime starts.
        temporary_bytes: Memory beside arguments and results.
        cache_bytes: Of the cache that it is handed.
        weight_bytes: Of the weights; an embedding that is only looked up in aside.
    """

    program: Program
    thunks: list[Thunk]
    temporary_bytes: int
    cache_bytes: int
    weight_bytes: int


def target_devices(target: Path = TARGET, count: int = 1) -> Devices:
    """Cards that a description tells of, in one machine.

    Raises:
        RuntimeError: the plugin with the compiler is not there.
    """
    try:
        found = topologies.get_topology_desc(
            "gpu", "cuda", target_config=target.read_text(), topology=f"1x1x{count}"
        )
    except (NotImplementedError, RuntimeError) as error:
        version = jax.lib.__version__
        raise RuntimeError(
            f"there is no compiler for CUDA ({error}): pip install --no-deps --target DIR "
            f"jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version}, then run with "
            "PYTHONPATH=DIR and JAX_PLATFORMS=cpu"
        ) from None
    return Devices(tuple(found.devices))


class Steps:
    """The programs of an engine on one card or several, as shapes: nothing is allocated."""

    def __init__(
        self,
        module: Llama,
        num_pages: int,
        page_size: int,
        table_pages: int,
        devices: Devices,
        quantization: str | None = None,
        is_deterministic: bool = False,
        loras: tuple[int, int] | None = None,
        is_hopper: bool = True,
    ) -> None:
        """Takes shapes.

        Args:
            module: The model.
            num_pages: P, of the pool.
            page_size: S.
            table_pages: N, most pages of a row.
            devices: See `target_devices`.
            quantization: Of the kernels.
            is_deterministic: Whether they are those of deterministic mode.
            loras: Slots of adapters and their rank, of rows that have one each; None: none has.
            is_hopper: Whether cards have the kernel of decode steps.
        """
        backend = dataclasses.replace(GPU, capability=_HOPPER, devices=devices)
        self._is_hopper = is_hopper
        jax.clear_caches()  # of traces for another card
        if is_deterministic:
            backend = backend.deterministic(module.config, module.dtype)
        self._devices, self._steps = devices, backend.make_steps(module)
        self._vocab_size, self._table_pages = module.config.vocab_size, table_pages
        self._is_tied = module.config.tie_embeddings
        kind = backend.kind_of(quantization)

        def make() -> Any:
            params = init_params(module, jax.random.key(0))
            return quantize_params(params, kind) if kind else params

        shapes = jax.eval_shape(make)
        self._params = devices.param_shapes(shapes, module.config)
        self._num_loras, self._called = 0, self._params
        if loras is not None:
            self._num_loras = loras[0]
            stacks = stack_shapes(shapes, module.config, *loras, module.dtype, devices)
            self._called = adapt(self._params, stacks)
        self._layout = backend.kv_layout(module.config, module.dtype, num_pages, page_size)

    def decode(self, rows: int, spec: SamplingSpec) -> Compiled:
        """The decode step, with its sampling."""
        return self._compile(Executable("decode", rows, spec=spec, is_adapted=self._is_adapted))

    def prefill(self, rows: int, columns: int, most_tokens: int) -> Compiled:
        """The prefill step."""
        more: Any = {"most_tokens": most_tokens, "is_adapted": self._is_adapted}
        return self._compile(Executable("prefill", rows, columns, **more))

    @property
    def _is_adapted(self) -> bool:
        return self._num_loras > 0

    def _compile(self, one: Executable) -> Compiled:
        lowered: list[Any] = []

        def lower(program: Any, args: Any, key: Any = None) -> Any:
            lowered.append(program.lower(*args))
            return lowered[-1].out_info

        num_slots, num_pages = slots_for(one.rows), self._layout.num_pages
        sizes = num_slots, self._table_pages, num_pages, self._vocab_size
        batch = Batch(*sizes, num_adapters=self._num_loras)
        make = functools.partial(init_state, self._layout, num_slots)
        state = self._devices.shapes(jax.eval_shape(make))
        with _pretend_card(self._is_hopper):
            given = padding(one, batch, GrammarMasks(self._vocab_size, one.rows, self._devices))
            self._steps.call(one, self._called, state, given, lower)
        with tempfile.TemporaryDirectory() as dump:
            options: Any = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
            compiled = lowered[0].compile(compiler_options=options)
            (sequence,) = Path(dump).glob("*.thunk_sequence_after_thunk_passes.txt")
            thunks = read_thunks(sequence.read_text())
        text, memory = compiled.as_text(), compiled.memory_analysis()
        assert text is not None, "a program has a text"
        assert memory is not None, "the compiler tells what memory a program takes"
        weights = dict(self._params)
        if not self._is_tied:
            del weights["embed"]
        return Compiled(
            program=Program(text),
            thunks=thunks,
            temporary_bytes=memory.temp_size_in_bytes,
            cache_bytes=self._layout.num_pages * self._layout.bytes_per_page,
            weight_bytes=sum(map(device_bytes, jax.tree.leaves(weights))),
        )


@contextlib.contextmanager
def _pretend_card(is_hopper: bool) -> Iterator[None]:
    """Answers what is asked while a step is traced: a card, and a cuDNN.

    On Hopper there is the kernel of decode steps, too, if this machine can compile the call of it.
    """
    from jax._src.cudnn import fused_attention_stablehlo as fused

    has_product = is_hopper and decode_product.register() is None
    with contextlib.ExitStack() as stack:
        for owner, name, answer in (
            (cudnn, "problem", lambda: None),
            (decode_product, "has_product", lambda dtype, bits: has_product),
            (fused, "check_cudnn_version", lambda: _CUDNN_VERSION),
            (fused, "check_compute_capability", lambda capability: True),
            (fused, "is_cuda_compute_capability_equal", lambda capability: False),
        ):
            stack.enter_context(mock.patch.object(owner, name, answer))
        yield
