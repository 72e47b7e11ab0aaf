"""What code written for vLLM says in other words, or asks for and is not here.

A table for each place where a name may come up: arguments of `LLM`, arguments of its calls, keys
of a prompt, fields of `SamplingParams`, methods, imports. `own_names` reads the first four; from
all of them follow tables of docs/coming_from_vllm.md (`tables_page`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

from folojax.text.plain_numbers import plain

_Class = TypeVar("_Class", bound=type)

ANY = ("any value",)
"""Of what only steers vLLM's own machinery: it never changes what comes out."""


@dataclasses.dataclass(frozen=True)
class Name:
    """A name of vLLM's that is none of ours. None as its value is always as if it were not given.

    Attributes:
        same_at: Values at which it changes nothing here.
        instead: Why it is not here at others, and what to do: the end of the error.
        becomes: Our name of the same thing; then there are no values that are refused here.
        values: Ours for its values, where these differ.
    """

    same_at: tuple[Any, ...] = ()
    instead: str = ""
    becomes: str = ""
    values: tuple[tuple[Any, Any], ...] = ()


def _like(becomes: str, *values: tuple[Any, Any], same_at: tuple[Any, ...] = ()) -> Name:
    return Name(same_at=same_at, becomes=becomes, values=values)


_ONE_DEVICE = "devices share layers by tensor_parallel_size, or requests by data_parallel_size"
_NO_DRAFTS = "there is no speculative decoding, whose greedy tokens would be the same: leave it out"
_TEXT_ONLY = "the models here read text only: leave it out"
_CHANGE_CONFIG = "change config.json in a copy of the model's directory"
_USE_HUB = "the Hub's own client reads that from the environment: HF_HOME, HF_TOKEN"
_NO_WORKERS = "there are no workers: llm.params and llm.model are the arrays and the Flax module"
_BEST_OF = "LLM.beam_search searches; or sample with n and compare cumulative_logprob"
_GENERATES = (
    "the models here generate: activation_taps and SamplingParams(activations=True) return hidden "
    "states"
)
_OWN_LOOP = "add_request, step, abort_request and stream of LLM are for programs that own the loop"
_ENCODE = "encode the prompt yourself and give its token ids"
_UPDATE = "hand new weights over with llm.update_params(params)"
_STRUCTURED = "llguidance is behind SamplingParams(structured_outputs=), which has its options"

LLM_ARGUMENTS = {
    "gpu_memory_utilization": _like("memory_fraction"),
    "block_size": _like("page_size"),
    "num_gpu_blocks_override": _like("num_pages"),
    "num_scheduler_steps": _like("max_decode_steps"),
    "enforce_eager": _like("warm_up", (True, False), same_at=(False,)),
    "logprobs_mode": _like(
        "logprobs_mode", ("raw_logprobs", "raw"), ("processed_logprobs", "processed")
    ),
    # A file says itself what it has. "fp8" is not here: it means the same in both.
    "quantization": _like(
        "quantization",
        *(
            (one, None)
            for one in ("awq", "awq_marlin", "gptq", "gptq_marlin", "compressed-tensors", "mxfp4")
        ),
    ),
    "disable_log_stats": Name(ANY),  # LLM.metrics counts at either
    "disable_log_requests": Name(ANY),
    "disable_custom_all_reduce": Name(ANY),
    "disable_cascade_attn": Name(ANY),
    "compilation_config": Name(ANY),
    "cuda_graph_sizes": Name(ANY),
    "max_seq_len_to_capture": Name(ANY),
    "prefix_caching_hash_algo": Name(ANY),  # tokens are compared themselves
    "served_model_name": Name(ANY),
    "enable_sleep_mode": Name(ANY),  # LLM.sleep needs no preparation
    "use_v2_block_manager": Name(ANY),
    "use_tqdm_on_load": Name(ANY),  # a bar is for terminals, and for loads that take long
    "pipeline_parallel_size": Name((1,), _ONE_DEVICE),
    "enable_expert_parallel": Name((False,), _ONE_DEVICE),
    "distributed_executor_backend": Name(("uni",), _ONE_DEVICE),
    "worker_cls": Name(("auto",), _NO_WORKERS),
    "worker_extension_cls": Name(("",), _NO_WORKERS),
    "device": Name(("auto",), "JAX chooses the device: set JAX_PLATFORMS before it is imported"),
    "swap_space": Name(
        (0, 4), "num_host_pages is room in host memory, in pages of page_size tokens"
    ),
    "preemption_mode": Name(("recompute",), "num_host_pages is room in host memory"),
    "cpu_offload_gb": Name((0,), "weights stay on the device: quantization makes them smaller"),
    "kv_cache_memory_bytes": Name((), "give num_pages, or memory_fraction"),
    "kv_cache_dtype": Name(
        ("auto",), "keys and values are float32 on CPU and of the model's dtype elsewhere"
    ),
    "calculate_kv_scales": Name((False,), "keys and values are not quantised"),
    "disable_sliding_window": Name((False,), "lower max_model_len to the window instead"),
    "attention_backend": Name((), "folojax.backend chooses the kernels of a platform"),
    "max_num_partial_prefills": Name((1,), "long_prefill_token_threshold makes prompts take turns"),
    "max_long_partial_prefills": Name((1,), "long_prefill_token_threshold makes them take turns"),
    "scheduler_delay_factor": Name((0,), "requests are admitted as soon as there is room"),
    "stream_interval": Name((1,), "LLM.stream reports every step: pass some over yourself"),
    "runner": Name(("auto", "generate"), _GENERATES),
    "task": Name(("auto", "generate"), _GENERATES),
    "convert": Name(("auto", "none"), _GENERATES),
    "pooler_config": Name((), _GENERATES),
    "load_format": Name(
        ("auto", "safetensors"),
        "files say themselves what they are; for random weights pass a pair (module, params)",
    ),
    "config_format": Name(("auto", "hf"), "models come with the config.json of transformers"),
    "model_impl": Name(
        ("auto",), "the models are those of docs/models.md, or a pair (module, params)"
    ),
    "hf_overrides": Name(({},), _CHANGE_CONFIG),
    "hf_config_path": Name((), _CHANGE_CONFIG),
    "rope_scaling": Name(({},), _CHANGE_CONFIG),
    "rope_theta": Name((), _CHANGE_CONFIG),
    "hf_token": Name((True,), _USE_HUB),
    "download_dir": Name((), _USE_HUB),
    "code_revision": Name((), "code that ships with a model is never run"),
    "tokenizer_revision": Name((), "pass tokenizer= a directory or a transformers tokenizer"),
    "tokenizer_mode": Name(("auto",), "pass tokenizer= a transformers tokenizer of that kind"),
    "generation_config": Name(("auto",), "pass sampling_params=SamplingParams() to each call"),
    "override_generation_config": Name(({},), "pass sampling_params to each call"),
    "model_loader_extra_config": Name(({},), "files are read as they are"),
    "ignore_patterns": Name(([], "original/**/*"), "only safetensors files are read"),
    "speculative_config": Name(({},), _NO_DRAFTS),
    "speculative_model": Name((), _NO_DRAFTS),
    "num_speculative_tokens": Name((0,), _NO_DRAFTS),
    "max_cpu_loras": Name(ANY),  # all that were named stay in memory
    "lora_dtype": Name(("auto",), "adapters have the model's dtype"),
    "fully_sharded_loras": Name(
        (False,), "over devices updates are cut as their kernels are: leave it out"
    ),
    "default_mm_loras": Name(({},), _TEXT_ONLY),
    "structured_outputs_config": Name(
        ({}, {"backend": "auto"}, {"backend": "guidance"}), _STRUCTURED
    ),
    "guided_decoding_backend": Name(("auto", "guidance"), _STRUCTURED),
    "limit_mm_per_prompt": Name(({},), _TEXT_ONLY),
    "mm_processor_kwargs": Name(({},), _TEXT_ONLY),
    "allowed_local_media_path": Name(("",), _TEXT_ONLY),
    "enable_prompt_embeds": Name((False,), "prompts are text or token ids"),
    "kv_transfer_config": Name(({},), "LLM.snapshot and LLM.resume move requests with their K/V"),
    "otlp_traces_endpoint": Name((), "LLM.metrics counts, and outputs have their times"),
    "additional_config": Name(({},), "nothing here reads it"),
}
"""Keywords of `LLM`."""

CALL_ARGUMENTS = {
    "tokenization_kwargs": Name(({},), _ENCODE),
    "mm_processor_kwargs": Name(({},), _TEXT_ONLY),
    "guided_options_request": Name((), _STRUCTURED),
    "prompt_adapter_request": Name((), "there are no prompt adapters"),
}
"""Keywords of `LLM.generate` and `LLM.chat`."""

PROMPT_KEYS = {
    "multi_modal_data": Name(({},), _TEXT_ONLY),
    "multi_modal_uuids": Name(({},), _TEXT_ONLY),
    "mm_processor_kwargs": Name(({},), _TEXT_ONLY),
    "token_type_ids": Name((), "the models here have no types of tokens"),
    "prompt_embeds": Name((), "prompts are text or token ids"),
    "cache_salt": Name(
        (), "all requests of an engine share pages, or none (enable_prefix_caching)"
    ),
}
"""Keys of a prompt that is a dict."""

SAMPLING_FIELDS = {
    "seed": _like("seed", (-1, None)),
    "logprobs": _like("logprobs", (True, 1)),
    "prompt_logprobs": _like("prompt_logprobs", (True, 1)),
    "best_of": Name((1,), _BEST_OF),
    "use_beam_search": Name((False,), _BEST_OF),
    "length_penalty": Name((1.0,), _BEST_OF),
    "early_stopping": Name((False,), _BEST_OF),
    "guided_decoding": _like("structured_outputs"),
    "truncate_prompt_tokens": Name(
        (), "nothing is truncated in silence: cut the token ids yourself"
    ),
    "output_kind": Name(
        (0,), "step and stream report all that there is so far, and generate what is finished"
    ),
    "flat_logprobs": Name((False,), "outputs_to_arrays makes arrays of log-probabilities"),
    "logprob_token_ids": Name((), "LLM.score gives log-probabilities of chosen tokens"),
    "skip_reading_prefix_cache": Name(
        (False,), "enable_prefix_caching=False is for a whole engine"
    ),
    "thinking_token_budget": Name((), "max_tokens, and a second request behind what is thought"),
    "skip_clone": Name(ANY),
}
"""Keywords of `SamplingParams`."""

STRUCTURED_FIELDS = {
    "disable_fallback": Name(ANY),  # there is one backend
    "backend": Name(("auto", "guidance"), _STRUCTURED),
}
"""Keywords of `StructuredOutputsParams`."""

BEAM_FIELDS = {
    "temperature": Name((0,), "beams are ranked by the model's own log-probabilities"),
    "include_stop_str_in_output": Name((False,), "there are no stop strings, and ends have text"),
}
"""Keywords of `BeamSearchParams`."""

METHODS = {
    **dict.fromkeys(("embed", "encode", "classify", "reward"), _GENERATES),
    **dict.fromkeys(("collective_rpc", "apply_model"), _NO_WORKERS),
    **dict.fromkeys(("start_profile", "stop_profile"), "jax.profiler traces any program of JAX"),
    **dict.fromkeys(("init_weight_transfer_engine", "update_weights"), _UPDATE),
    **dict.fromkeys(("enqueue", "wait_for_completion"), _OWN_LOOP),
    "get_metrics": "llm.metrics() counts, and each output has its times in metrics",
    "preprocess_chat": "llm.render_chat makes the prompt of a conversation",
    "set_tokenizer": "pass tokenizer= to LLM",
}
"""Methods of `LLM` that are not here, and what there is instead."""

IMPORTS = {
    **dict.fromkeys(("AsyncLLMEngine", "AsyncEngineArgs"), f"{_OWN_LOOP}, from any thread"),
    **dict.fromkeys(("PoolingParams", "PoolingRequestOutput"), _GENERATES),
    **dict.fromkeys(("EmbeddingRequestOutput", "ClassificationRequestOutput"), _GENERATES),
    "GuidedDecodingParams": "StructuredOutputsParams has its fields",
    "ModelRegistry": "docs/new_model.md adds a family; weights in memory: a pair (module, params)",
    "RequestOutputKind": SAMPLING_FIELDS["output_kind"].instead,
}
"""What `from folojax import` does not give, and what there is instead."""


def own_names(
    given: Mapping[str, Any], table: Mapping[str, Name], place: str = ""
) -> dict[str, Any]:
    """What was given under our names and in our values; what changes nothing is left out.

    Args:
        given: By name; names that are not in the table stay as they are.
        table: One of those above.
        place: Before what is refused, in the error.

    Raises:
        ValueError: some names are not here at these values, or come beside ours; all are named.
    """
    own: dict[str, Any] = {}
    problems = []
    for name, value in given.items():
        row = table.get(name)
        if row is None:
            own[name] = value
        elif row.becomes and value is not None:
            if row.becomes in given and row.becomes != name:
                problems.append(f"{row.becomes} and {name} are two names of the same: give one")
            if not _is_one_of(value, row.same_at):
                found = [ours for theirs, ours in row.values if _is_one_of(value, (theirs,))]
                own[row.becomes] = found[0] if found else value
        elif not (value is None or _is_one_of(value, row.same_at)):
            problems.append(f"{name} is {value!r:.80}; {row.instead}")
    if problems:
        raise ValueError(place + "; ".join(problems))
    return own


def takes_names(table: Mapping[str, Name]) -> Callable[[_Class], _Class]:
    """A class whose keywords may be those of a table too."""

    def decorate(cls: Any) -> Any:
        init = cls.__init__

        @functools.wraps(init)
        def translated(self: Any, *args: Any, **fields: Any) -> None:
            if fields.keys() & table.keys():
                fields = own_names(fields, table, f"{cls.__name__}: ")
            init(self, *args, **fields)

        cls.__init__ = translated
        return cls

    return decorate


def prompts_of(prompts: Any, others: Mapping[str, Any]) -> Any:
    """The prompts of a call that has keywords of vLLM's; ValueError if one of these is refused."""
    own = own_names(others, CALL_ARGUMENTS)
    token_ids = own.pop("prompt_token_ids", None)
    if unknown := sorted(own):
        raise ValueError(f"unknown keywords {unknown}; there are {sorted(CALL_ARGUMENTS)}")
    if token_ids is None:
        return prompts
    if prompts is not None:
        raise ValueError("prompts and prompt_token_ids are two names of the same: give one")
    return token_ids


def missing_method(name: str) -> Callable[..., NoReturn]:
    """What stands for a method that is not here.

    Raises:
        AttributeError: it is none of vLLM's either.
    """
    if name not in METHODS:
        raise AttributeError(f"'LLM' object has no attribute {name!r}")

    def refuse(*args: Any, **keywords: Any) -> NoReturn:
        raise NotImplementedError(f"LLM.{name} is not here: {METHODS[name]}")

    return refuse


def tables_page() -> str:
    """The tables of docs/coming_from_vllm.md that are made of these."""
    titles = {
        "Arguments of `LLM`": LLM_ARGUMENTS,
        "Arguments of `generate` and `chat`": CALL_ARGUMENTS,
        "Keys of a prompt": PROMPT_KEYS,
        "Fields of `SamplingParams`": SAMPLING_FIELDS,
        "Fields of `StructuredOutputsParams`": STRUCTURED_FIELDS,
        "Fields of `BeamSearchParams`": BEAM_FIELDS,
    }
    parts = []
    for title, table in titles.items():
        rows = [f"| `{name}` | {_told(name, row)} |" for name, row in table.items()]
        parts += [f"### {title}", "", "| vLLM | here |", "|---|---|", *rows, ""]
    for title, sentences in {"Methods of `LLM`": METHODS, "Imports": IMPORTS}.items():
        rows = [f"| `{name}` | not here: {text} |" for name, text in sentences.items()]
        parts += [f"### {title}", "", "| vLLM | here |", "|---|---|", *rows, ""]
    return "\n".join(parts).rstrip()


def _told(name: str, row: Name) -> str:
    if row.same_at is ANY:
        return "changes nothing, whatever it is"
    told = [f"{' or '.join(f'`{value!r}`' for value in row.same_at)} changes nothing"]
    told = told if row.same_at else []
    if row.becomes not in ("", name):
        told.append(f"is `{row.becomes}`")
    told += [f"`{theirs!r}` is `{ours!r}`" for theirs, ours in row.values]
    if not row.becomes:
        told.append(f"{'others are ' if told else ''}refused: {row.instead}")
    return "; ".join(told)


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether it is one of them, and no bool in place of a number: True equals 1 to Python."""
    value = plain(value)
    if values is ANY:
        return True
    if not isinstance(value, bool | int | float | str | list | tuple | dict):
        return False
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values)
