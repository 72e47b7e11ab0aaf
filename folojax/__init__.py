"""folojax: batched language-model generation as pure JAX functions.

The engine: `LLM`, `SamplingParams`, `EngineConfig` and the outputs. The functional layer under
it, for programs that thread the state themselves: `prefill`, `decode`, `sample_tokens`,
`score_tokens`, `init_state` and the types in `folojax.steps.state`.

Each name is imported when it is first asked for: JAX takes a second, and `folojax --help` or
`SamplingParams` need none of it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from folojax.config import EngineConfig as EngineConfig
    from folojax.engine.snapshot import Snapshot as Snapshot
    from folojax.engine.snapshot import load_snapshot as load_snapshot
    from folojax.kv import KVLayout as KVLayout
    from folojax.llm import LLM as LLM
    from folojax.llm_engine import EngineArgs as EngineArgs
    from folojax.llm_engine import LLMEngine as LLMEngine
    from folojax.models.core.config import ModelConfig as ModelConfig
    from folojax.models.core.decoder import init_params as init_params
    from folojax.models.core.shards import join_params as join_params
    from folojax.models.files.checkpoint import build_module as build_module
    from folojax.models.files.checkpoint import load_params as load_params
    from folojax.models.files.checkpoint import open_checkpoint as open_checkpoint
    from folojax.models.files.hf_config import config_from_hf as config_from_hf
    from folojax.models.files.params import params_from_hf as params_from_hf
    from folojax.models.files.save import params_to_hf as params_to_hf
    from folojax.models.files.save import save_pretrained as save_pretrained
    from folojax.requests.beams import BeamSearchOutput as BeamSearchOutput
    from folojax.requests.beams import BeamSearchParams as BeamSearchParams
    from folojax.requests.beams import BeamSearchSequence as BeamSearchSequence
    from folojax.requests.lora_request import LoRARequest as LoRARequest
    from folojax.requests.outputs import BatchMetrics as BatchMetrics
    from folojax.requests.outputs import CompletionOutput as CompletionOutput
    from folojax.requests.outputs import Logprob as Logprob
    from folojax.requests.outputs import LogprobRecord as LogprobRecord
    from folojax.requests.outputs import RequestMetrics as RequestMetrics
    from folojax.requests.outputs import RequestOutput as RequestOutput
    from folojax.requests.outputs import ScoreOutput as ScoreOutput
    from folojax.requests.outputs import batch_metrics as batch_metrics
    from folojax.requests.prompts import Prompt as Prompt
    from folojax.requests.prompts import TextPrompt as TextPrompt
    from folojax.requests.prompts import TokensPrompt as TokensPrompt
    from folojax.requests.sampling_params import SamplingParams as SamplingParams
    from folojax.requests.structured_outputs import (
        StructuredOutputsParams as StructuredOutputsParams,
    )
    from folojax.sampling.logits_processors import LogitsProcessor as LogitsProcessor
    from folojax.sampling.logits_processors import RequestState as RequestState
    from folojax.sampling.rows import SampleInputs as SampleInputs
    from folojax.sampling.rows import SamplingRows as SamplingRows
    from folojax.sampling.rows import SlotState as SlotState
    from folojax.sampling.rows import StepOutput as StepOutput
    from folojax.sampling.rows import TokenScores as TokenScores
    from folojax.sampling.rows import greedy_rows as greedy_rows
    from folojax.sampling.sampler import SamplingSpec as SamplingSpec
    from folojax.sampling.sampling_class import SamplingClass as SamplingClass
    from folojax.steps.layers import ActivationEdit as ActivationEdit
    from folojax.steps.layers import head_params as head_params
    from folojax.steps.layers import read_residuals as read_residuals
    from folojax.steps.state import DecodeInputs as DecodeInputs
    from folojax.steps.state import EngineState as EngineState
    from folojax.steps.state import PrefillInputs as PrefillInputs
    from folojax.steps.state import init_state as init_state
    from folojax.steps.step import decode as decode
    from folojax.steps.step import prefill as prefill
    from folojax.steps.step import sample_tokens as sample_tokens
    from folojax.steps.step import score_tokens as score_tokens
    from folojax.train.likelihood import log_likelihood as log_likelihood
    from folojax.train.lora import init_lora as init_lora
    from folojax.train.lora import merge_lora as merge_lora
    from folojax.train.output_arrays import OutputArrays as OutputArrays
    from folojax.train.output_arrays import RecordArrays as RecordArrays
    from folojax.train.output_arrays import outputs_to_arrays as outputs_to_arrays
    from folojax.train.rollout import Rollouts as Rollouts
    from folojax.train.rollout import run_for as run_for

__version__ = "0.1.0"

_NAMES = {
    "config": "EngineConfig",
    "engine.snapshot": "Snapshot load_snapshot",
    "kv": "KVLayout",
    "llm": "LLM",
    "llm_engine": "EngineArgs LLMEngine",
    "models.core.config": "ModelConfig",
    "models.core.decoder": "init_params",
    "models.core.shards": "join_params",
    "models.files.checkpoint": "build_module load_params open_checkpoint",
    "models.files.hf_config": "config_from_hf",
    "models.files.params": "params_from_hf",
    "models.files.save": "params_to_hf save_pretrained",
    "requests.beams": "BeamSearchOutput BeamSearchParams BeamSearchSequence",
    "requests.lora_request": "LoRARequest",
    "requests.outputs": (
        "BatchMetrics CompletionOutput Logprob LogprobRecord RequestMetrics RequestOutput "
        "ScoreOutput batch_metrics"
    ),
    "requests.prompts": "Prompt TextPrompt TokensPrompt",
    "requests.sampling_params": "SamplingParams",
    "requests.structured_outputs": "StructuredOutputsParams",
    "sampling.logits_processors": "LogitsProcessor RequestState",
    "sampling.rows": "SampleInputs SamplingRows SlotState StepOutput TokenScores greedy_rows",
    "sampling.sampler": "SamplingSpec",
    "sampling.sampling_class": "SamplingClass",
    "steps.layers": "ActivationEdit head_params read_residuals",
    "steps.state": "DecodeInputs EngineState PrefillInputs init_state",
    "steps.step": "decode prefill sample_tokens score_tokens",
    "train.likelihood": "log_likelihood",
    "train.lora": "init_lora merge_lora",
    "train.output_arrays": "OutputArrays RecordArrays outputs_to_arrays",
    "train.rollout": "Rollouts run_for",
}
"""What each module gives: the same as above, for Python."""

_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        from folojax.requests.vllm_names import IMPORTS

        if name in IMPORTS:
            raise ImportError(f"{name} of vLLM is not here: {IMPORTS[name]}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"folojax.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
