"""folojax: batched language-model generation as pure JAX functions.

The engine: `LLM`, `SamplingParams`, `EngineConfig` and the outputs. The functional layer under
it, for programs that thread the state themselves: `prefill`, `decode`, `sample_tokens`,
`score_tokens`, `init_state` and the types in `folojax.steps.state`.
"""

from folojax.config import EngineConfig
from folojax.engine.snapshot import Snapshot, load_snapshot
from folojax.kv import KVLayout
from folojax.llm import LLM
from folojax.requests.outputs import (
    BatchMetrics,
    CompletionOutput,
    Logprob,
    LogprobRecord,
    RequestMetrics,
    RequestOutput,
    ScoreOutput,
    batch_metrics,
)
from folojax.requests.prompts import Prompt
from folojax.requests.sampling_params import SamplingParams
from folojax.sampling.logits_processors import LogitsProcessor, RequestState
from folojax.sampling.rows import (
    SampleInputs,
    SamplingRows,
    SlotState,
    StepOutput,
    TokenScores,
    greedy_rows,
)
from folojax.sampling.sampler import SamplingClass, SamplingSpec
from folojax.steps.residuals import ActivationEdit, read_residuals
from folojax.steps.state import DecodeInputs, EngineState, PrefillInputs, init_state
from folojax.steps.step import decode, head_params, prefill, sample_tokens, score_tokens
from folojax.train.likelihood import log_likelihood
from folojax.train.lora import init_lora, merge_lora
from folojax.train.output_arrays import OutputArrays, RecordArrays, outputs_to_arrays
from folojax.train.rollout import Rollouts, run_for

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "ActivationEdit",
    "BatchMetrics",
    "CompletionOutput",
    "DecodeInputs",
    "EngineConfig",
    "EngineState",
    "KVLayout",
    "LogitsProcessor",
    "Logprob",
    "LogprobRecord",
    "OutputArrays",
    "PrefillInputs",
    "Prompt",
    "RecordArrays",
    "RequestMetrics",
    "RequestOutput",
    "RequestState",
    "Rollouts",
    "SampleInputs",
    "SamplingClass",
    "SamplingParams",
    "SamplingRows",
    "SamplingSpec",
    "ScoreOutput",
    "SlotState",
    "Snapshot",
    "StepOutput",
    "TokenScores",
    "batch_metrics",
    "decode",
    "greedy_rows",
    "head_params",
    "init_lora",
    "init_state",
    "load_snapshot",
    "log_likelihood",
    "merge_lora",
    "outputs_to_arrays",
    "prefill",
    "read_residuals",
    "run_for",
    "sample_tokens",
    "score_tokens",
]
