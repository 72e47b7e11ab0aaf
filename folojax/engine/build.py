"""From what the user names (a model, a tokenizer, options) to an engine."""

import dataclasses
import functools
import logging
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from folojax.backend import Backend, choose_backend
from folojax.backend.choose_devices import check_cut, choose_devices
from folojax.backend.device_memory import device_memory
from folojax.backend.devices import device_bytes, lies_as
from folojax.backend.mode import deterministic_backends
from folojax.backend.swap_cost import min_swap_tokens
from folojax.compile.mapped_memory import give_back_memory
from folojax.compile.memory_plan import MemoryPlan, plan_fraction, plan_pages
from folojax.config import EngineConfig, ResolvedConfig
from folojax.engine.engine import Engine
from folojax.engine.kernels import tell_kernels
from folojax.engine.weights import checked_pair
from folojax.models.core.config import ModelConfig
from folojax.models.core.decoder import Llama
from folojax.models.files.checkpoint import Checkpoint, build_module, load_params, open_checkpoint
from folojax.models.files.params import param_shapes
from folojax.models.quantized.quantize import (
    is_quantized,
    quantization_of,
    quantize_params,
    widened_bytes,
)
from folojax.requests.sampling_params import SamplingParams
from folojax.requests.user_functions import NO_FUNCTIONS, UserFunctions
from folojax.requests.validation import Validator
from folojax.requests.vllm_names import LLM_ARGUMENTS, own_names
from folojax.runner import temporaries as step_memory
from folojax.runner.runner import Runner
from folojax.runner.setup import Setup
from folojax.sched.option_fields import options_of
from folojax.sched.scheduler import Scheduler
from folojax.text.plain_numbers import plain
from folojax.text.tokenizer import Tokenizer
from folojax.text.tokenizer_files import has_tokenizer, load_tokenizer

_LOG = logging.getLogger("folojax")

_DTYPES = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
    "float": jnp.float32,  # as PyTorch has them for short
    "half": jnp.float16,
}


class SizedType(Protocol):
    """A dtype of NumPy or PyTorch."""

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""


DType: TypeAlias = str | type | SizedType
"""A name of a dtype, or a dtype of NumPy, JAX or PyTorch."""


class LoadedModel(NamedTuple):
    """A model in memory, the checkpoint if it came from one, and what its engine may take."""

    module: Llama
    params: Any
    checkpoint: Checkpoint | None
    config: ResolvedConfig
    memory_plan: MemoryPlan
    backends: tuple[Backend, ...]  # one for each engine; the parameters lie on that of the first


def make_config(config: EngineConfig | None, fields: dict[str, Any]) -> EngineConfig:
    """Puts single options over a config; ValueError names those that do not exist.

    None is as if an option were not given, also where a field has no such value, as in vLLM.
    """
    known = {one.name: one for one in options_of(EngineConfig)}
    fields = own_names(fields, LLM_ARGUMENTS)
    unknown = sorted(fields.keys() - known.keys())
    if unknown:
        raise ValueError(f"unknown options {unknown}; there are {sorted(known)}")
    fields = {name: v for name, v in fields.items() if v is not None or known[name].has_none}
    return dataclasses.replace(config or EngineConfig(), **fields)


def load_model(
    model: str | os.PathLike[str] | tuple[nn.Module, Any] | None,
    dtype: DType,
    revision: str | None,
    config: EngineConfig,
    mesh: Mesh | None = None,
) -> LoadedModel:
    """Loads a model, unless it is a (module, params) pair already; errors as `LLM`.

    Limits and memory are settled before weights are read, which may take long or not fit.
    """
    if model is not None and not isinstance(model, str | os.PathLike):
        if revision is not None:
            raise ValueError(f"revision {revision!r} is for Hub repositories; the model is a pair")
        return _load_pair(model, dtype, config, mesh)
    config, backends = _placed(config, mesh)
    backend = backends[0]
    compute_dtype = _resolve_dtype(dtype, backend)
    checkpoint = open_checkpoint(model, revision)
    module = build_module(checkpoint.config, compute_dtype)
    backends = _in_mode(backends, config, module)
    shapes = param_shapes(checkpoint.config, compute_dtype)
    resolved, plan = plan_memory(config, module, shapes, *backends)
    place = functools.partial(backend.devices.place_param, config=module.config)
    kind = backend.kind_of(config.quantization)
    params = load_params(checkpoint, compute_dtype, kind, place)
    return LoadedModel(module, params, checkpoint, resolved, plan, backends)


def _load_pair(model: Any, dtype: DType, config: EngineConfig, mesh: Mesh | None) -> LoadedModel:
    """A pair of the user's, once it is one that an engine can run."""
    module, params = checked_pair(model)
    config, backends = _placed(config, mesh, params)
    backend, quantization = backends[0], config.quantization
    is_auto = isinstance(dtype, str) and dtype == "auto"
    if not is_auto and jnp.dtype(_resolve_dtype(dtype, backend)) != module.dtype:
        raise ValueError(
            f"dtype is {dtype!r}, and the module of the pair computes in "
            f"{jnp.dtype(module.dtype)}: leave dtype out, or build the module in that dtype and "
            "cast the params with jax.tree.map"
        )
    found = quantization_of(params)
    backends = _in_mode(backends, config, module)
    # What fits neither groups nor float8 is of eight bits with any of them.
    if found not in (None, quantization) and not (found == "int8" and quantization):
        raise ValueError(f'params have quantised kernels: pass quantization="{found}"')
    resolved, plan = plan_memory(config, module, params, *backends)
    params = backend.devices.adopt(params, module.config) if backends[1:] else params
    kind = backend.kind_of(quantization)
    if kind:
        if backend.devices.count > 1:  # first of all, so that none has the whole of a kernel
            params = backend.devices.place_params(params, module.config)
        params = quantize_params(params, kind)
    return LoadedModel(module, params, None, resolved, plan, backends)


def _placed(
    config: EngineConfig, mesh: Mesh | None, params: Any = None
) -> tuple[EngineConfig, tuple[Backend, ...]]:
    """The config with the number of devices, and for each engine the backend of its own."""
    chosen = choose_devices(params, config.tensor_parallel_size, config.data_parallel_size, mesh)
    backends = tuple(map(choose_backend, chosen))
    return dataclasses.replace(config, tensor_parallel_size=chosen[0].count), backends


def _in_mode(
    backends: tuple[Backend, ...], config: EngineConfig, module: Llama
) -> tuple[Backend, ...]:
    """The backends in the mode that the config asks for."""
    asked = module.config, module.dtype, config.quantization, config.enable_lora
    return deterministic_backends(backends, *asked) if config.deterministic else backends


def plan_memory(
    config: EngineConfig, module: Llama, params: Any, backend: Backend, *others: Backend
) -> tuple[ResolvedConfig, MemoryPlan]:
    """Settles an engine's limits, and the memory that it takes within them.

    Args:
        config: As the user gave it.
        module: The model.
        params: Of it, or their shapes.
        backend: That the engine runs on.
        *others: Those of further engines, which take the same of their devices.

    Raises:
        ValueError: the limits contradict each other, the model or the number of devices, or the
            memory is too little.
    """
    devices, kind = backend.devices, backend.kind_of(config.quantization)
    num_weights = sum(
        math.prod(leaf.shape) for leaf in jax.tree.leaves(params, is_leaf=is_quantized)
    )
    if kind:
        # Floats that are quantised remain the caller's.
        params = jax.eval_shape(lambda params: quantize_params(params, kind), params)
    check_cut(module, devices, params)
    forms = jax.tree.leaves(devices.param_shapes(params, module.config))
    sizes = list(map(device_bytes, forms))
    given = zip(jax.tree.leaves(params), forms, sizes, strict=True)
    resident = sum(size for leaf, form, size in given if lies_as(leaf, form))
    resolved = config.resolve(
        module.config.max_position,
        backend,
        _min_swap_tokens(module, num_weights, backend),
        has_states=module.config.recurrent is not None,
    )

    def measure(num_pages: int) -> int:
        sized = dataclasses.replace(resolved, num_pages=num_pages)
        return step_memory.measure(make_setup(module, sized, backend), kind)

    setup = make_setup(module, resolved, backend)
    plan = MemoryPlan(
        weights_bytes=sum(sizes) + setup.stack_bytes(params),
        slots_bytes=step_memory.slot_bytes(module, setup.num_slots) + setup.layout.state_bytes,
        bytes_per_page=setup.layout.bytes_per_page,
        num_pages=resolved.num_pages,
        page_size=resolved.page_size,
        max_model_len=resolved.max_model_len,
        temporaries_bytes=step_memory.estimate(setup) + widened_bytes(params) // devices.count,
        is_measured=False,
        device=device_memory(resident, *(one.devices for one in (backend, *others))),
    )
    fraction = config.pool_fraction(backend)
    if fraction is None:
        lower = "max_num_seqs" if config.num_pages is None else "num_pages"
        return resolved, plan_pages(plan, measure, lower)
    plan = plan_fraction(
        plan,
        measure if backend.measures_memory else None,
        fraction,
        # Memory that is not ours alone is not taken for the prefixes of requests that have ended.
        None if backend.memory_fraction else resolved.most_running_pages,
    )
    plan = dataclasses.replace(plan, num_pages=devices.agree(plan.num_pages))
    return dataclasses.replace(resolved, num_pages=plan.num_pages), plan


def find_tokenizer(tokenizer: Any, checkpoint: Checkpoint | None) -> Tokenizer | None:
    """The user's tokenizer, or else the model's; None if there is neither."""
    if isinstance(tokenizer, str | os.PathLike):
        return load_tokenizer(tokenizer)
    if tokenizer is not None:
        return Tokenizer(tokenizer)
    if checkpoint is None:
        return None
    if not has_tokenizer(checkpoint.directory):
        _LOG.info("no tokenizer in %s: prompts are token ids", checkpoint.directory)
        return None
    return load_tokenizer(checkpoint.directory)


def default_sampling_params(checkpoint: Checkpoint | None) -> SamplingParams:
    """The sampling parameters that a model's generation_config.json recommends."""
    recommended = checkpoint.generation_config if checkpoint else {}
    names = {
        "temperature": "temperature",
        "top_p": "top_p",
        "top_k": "top_k",
        "min_p": "min_p",
        "repetition_penalty": "repetition_penalty",
        "max_new_tokens": "max_tokens",
    }
    stated = {name: recommended.get(name) for name in names}
    fields = {names[name]: value for name, value in stated.items() if value is not None}
    if recommended.get("do_sample") is False:
        fields["temperature"] = 0.0
    try:
        return SamplingParams(**fields)
    except ValueError as error:
        raise ValueError(f"generation_config.json of the model: {error}") from error


def make_engines(
    model: LoadedModel,
    tokenizer: Tokenizer | None,
    functions: UserFunctions = NO_FUNCTIONS,
    eos_token_id: int | Sequence[int] | None = None,
) -> list[Engine]:
    """Allocates the engines; end tokens are as of `LLM`."""
    functions.check_layers(model.module.config.num_layers)
    module, config = model.module, model.config
    functions.check_results(module.config.vocab_size, module.config.hidden_size, module.dtype)
    vocab_size = module.config.vocab_size
    # Rows of the vocabulary beyond the tokenizer's are padding, and no token.
    num_tokens = min(vocab_size, tokenizer.num_tokens) if tokenizer else vocab_size
    ends = _end_tokens(eos_token_id, model.checkpoint, tokenizer, vocab_size)
    setups = [make_setup(module, config, backend, num_tokens) for backend in model.backends]
    tell_kernels(module, setups[0].layout)
    give_back_memory()  # of what loading has left, before the pool is allocated
    validator = Validator(
        config.scheduler(),
        vocab_size=vocab_size,
        num_tokens=num_tokens,
        max_logprobs=config.max_logprobs,
        tokenizer=tokenizer,
        eos_token_ids=ends,
        functions=functions,
        residual_bytes=functions.residual_bytes(module),
        num_experts=numbers_of_experts(module.config),
        is_strict=config.strict,
    )
    seeds = np.random.default_rng(config.seed)  # one, so that it does not matter who draws
    engines = []
    for number, setup in enumerate(setups):
        params = model.params
        if number:
            params = setup.backend.devices.adopt(params, module.config)
        runner = Runner(setup, params, is_strict=config.strict, functions=functions)
        scheduler = Scheduler(config.scheduler())
        engines.append(
            Engine(scheduler, runner, validator, seed=seeds, is_checked=config.check_integrity)
        )
    return engines


def make_setup(
    module: Llama, config: ResolvedConfig, backend: Backend, num_tokens: int | None = None
) -> Setup:
    """What the calls of an engine are made for; ids from `num_tokens` on are no tokens."""
    vocab_size = module.config.vocab_size
    # The cap of alternatives, or the whole vocabulary where there is none.
    most = vocab_size if config.max_logprobs == -1 else min(config.max_logprobs, vocab_size)
    return Setup(
        model=module,
        backend=backend,
        layout=backend.kv_layout(
            module.config,
            module.dtype,
            config.num_pages,
            config.page_size,
            config.max_num_seqs,
            config.num_prefix_states,
        ),
        shapes=backend.shapes(config, module.dtype),
        max_num_seqs=config.max_num_seqs,
        max_logprobs=most,
        num_tokens=None if num_tokens == vocab_size else num_tokens,
        is_processed=config.logprobs_mode == "processed",
        max_loras=config.max_loras if config.enable_lora else 0,
        max_lora_rank=config.max_lora_rank,
        max_decode_steps=config.max_decode_steps,
    )


def numbers_of_experts(config: ModelConfig) -> tuple[int, int, int]:
    """Layers that have experts, those that a token is sent to in each, and those of a layer."""
    num_layers = sum(map(config.is_sparse, range(config.num_layers)))
    return num_layers, config.num_experts_per_token, config.num_experts


def _min_swap_tokens(module: Llama, num_weights: int, backend: Backend) -> int:
    layout = backend.kv_layout(module.config, module.dtype, num_pages=1, page_size=1)
    return min_swap_tokens(num_weights, layout.bytes_per_page, backend.swap_rates)


def _end_tokens(
    given: int | Sequence[int] | None,
    checkpoint: Checkpoint | None,
    tokenizer: Tokenizer | None,
    vocab_size: int,
) -> tuple[int, ...]:
    """The user's end tokens, or else the tokenizer's, then those of the model's files.

    Fine-tuned models often state the end of a turn in one of the three files only.
    """
    if given is not None:
        several = [plain(one) for one in (given if isinstance(given, Iterable) else (given,))]
        for one in several:
            if type(one) is not int or not 0 <= one < vocab_size:
                raise ValueError(
                    f"eos_token_id holds {one!r}; it must be one token id or several, from 0 to "
                    f"{vocab_size - 1}"
                )
        return tuple(dict.fromkeys(several))
    ends = list(checkpoint.eos_token_ids) if checkpoint is not None else []
    own = tokenizer.eos_token_id if tokenizer is not None else None
    if own is not None and own < vocab_size:
        ends.insert(0, own)
    return tuple(dict.fromkeys(ends))


def _resolve_dtype(dtype: DType, backend: Backend) -> Any:
    if isinstance(dtype, str) and dtype == "auto":
        return backend.default_dtype
    # Types of JAX and NumPy have names, dtypes of NumPy and PyTorch are written as these.
    name = getattr(dtype, "__name__", str(dtype)).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(
            f"dtype is {dtype!r}; it must be 'auto', one of {sorted(_DTYPES)}, or such a dtype of "
            "NumPy, JAX or PyTorch"
        )
    return _DTYPES[name]
