"""From what the user names (a model, a tokenizer, options) to an engine."""

import dataclasses
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from folojax.buckets import make_buckets
from folojax.config import EngineConfig, ResolvedConfig
from folojax.engine import Engine
from folojax.kv_cache import KVLayout
from folojax.models.checkpoint import Checkpoint, build_module, load_params, open_checkpoint
from folojax.runner import Runner
from folojax.sampling_params import SamplingParams
from folojax.sched.scheduler import Scheduler
from folojax.tokenizer import Tokenizer, load_tokenizer

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


class LoadedModel(NamedTuple):
    """A model in memory, and the checkpoint that it came from, if it came from one."""

    module: nn.Module
    params: Any
    checkpoint: Checkpoint | None


def make_config(config: EngineConfig | None, fields: dict[str, Any]) -> EngineConfig:
    """Puts single options over a config; ValueError names those that do not exist."""
    # What vLLM's users write out for one device, where it means nothing.
    if fields.pop("tensor_parallel_size", 1) != 1:
        raise ValueError("tensor_parallel_size must be 1: an engine runs on one device")
    known = {field.name for field in dataclasses.fields(EngineConfig)}
    unknown = sorted(fields.keys() - known)
    if unknown:
        raise ValueError(f"unknown options {unknown}; there are {sorted(known)}")
    return dataclasses.replace(config or EngineConfig(), **fields)


def load_model(
    model: str | os.PathLike[str] | tuple[nn.Module, Any] | None,
    dtype: str,
    revision: str | None,
    config: EngineConfig,
) -> LoadedModel:
    """Loads a model, unless it is a (module, params) pair already; errors as `LLM`."""
    if isinstance(model, tuple):
        module, params = model
        return LoadedModel(module, params, None)
    compute_dtype = _resolve_dtype(dtype)
    checkpoint = open_checkpoint(model, revision)
    # Its errors come before the weights are paid for.
    config.resolve(checkpoint.config.max_position, jax.default_backend())
    module = build_module(checkpoint.config, compute_dtype)
    return LoadedModel(module, load_params(checkpoint, compute_dtype), checkpoint)


def find_tokenizer(tokenizer: Any, checkpoint: Checkpoint | None) -> Tokenizer | None:
    """The user's tokenizer, or else the model's; None if there is neither."""
    if isinstance(tokenizer, str | os.PathLike):
        return load_tokenizer(tokenizer)
    if tokenizer is not None:
        return Tokenizer(tokenizer)
    return load_tokenizer(checkpoint.directory) if checkpoint else None


def default_params(checkpoint: Checkpoint | None) -> SamplingParams:
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
    fields = {ours: recommended[name] for name, ours in names.items() if recommended.get(name)}
    if recommended.get("do_sample") is False:
        fields["temperature"] = 0.0
    return SamplingParams(**fields)


def make_engine(model: LoadedModel, config: ResolvedConfig, tokenizer: Tokenizer | None) -> Engine:
    """Allocates an engine."""
    module = model.module
    backend = jax.default_backend()
    is_half_on_cpu = module.dtype != jnp.float32 and backend == "cpu"
    # A product with a single row converts all weights to float32 there, in every call.
    buckets = make_buckets(config, backend, 2 if is_half_on_cpu else 1)
    layout = KVLayout.of(module.config, module.dtype, buckets.segments, config.page_size)
    vocab_size = module.config.vocab_size
    # Rows of the vocabulary beyond the tokenizer's are padding, and no token.
    num_tokens = min(vocab_size, tokenizer.num_tokens) if tokenizer else vocab_size
    runner = Runner(
        module,
        model.params,
        layout,
        buckets,
        config.max_num_seqs,
        max_logprobs=vocab_size if config.max_logprobs == -1 else config.max_logprobs,
        num_tokens=None if num_tokens == vocab_size else num_tokens,
        is_processed=config.logprobs_mode == "processed",
    )
    return Engine(
        Scheduler(config.scheduler()),
        runner,
        tokenizer,
        _end_tokens(model.checkpoint, tokenizer),
        num_tokens=num_tokens,
        max_logprobs=config.max_logprobs,
        seed=config.seed,
    )


def _end_tokens(checkpoint: Checkpoint | None, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The model's own, of which there may be several, or else the tokenizer's."""
    if checkpoint is not None and checkpoint.eos_token_ids:
        return checkpoint.eos_token_ids
    eos_token_id = tokenizer.hf.eos_token_id if tokenizer else None
    return () if eos_token_id is None else (eos_token_id,)


def _resolve_dtype(dtype: str) -> Any:
    if dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be 'auto' or one of {sorted(_DTYPES)}")
    return _DTYPES[dtype]
