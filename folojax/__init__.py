"""folojax: batched language-model generation as pure JAX functions.

The engine: `LLM`, `SamplingParams`, `EngineConfig` and the outputs. The functional layer under
it, for programs that thread the state themselves: `prefill`, `decode`, `sample_tokens`,
`score_tokens`, `init_state` and the types in `folojax.state`.
"""

from folojax.config import EngineConfig
from folojax.kv_cache import KVLayout
from folojax.llm import LLM
from folojax.outputs import (
    BatchMetrics,
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    ScoreOutput,
    batch_metrics,
)
from folojax.prompts import Prompt
from folojax.sampling import SamplingClass, SamplingSpec
from folojax.sampling_params import SamplingParams
from folojax.snapshot import Snapshot, load_snapshot
from folojax.state import (
    DecodeInputs,
    EngineState,
    PrefillInputs,
    SampleInputs,
    SamplingRows,
    SlotState,
    StepOutput,
    TokenScores,
    greedy_rows,
    init_state,
)
from folojax.step import decode, head_params, prefill, sample_tokens, score_tokens

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "BatchMetrics",
    "CompletionOutput",
    "DecodeInputs",
    "EngineConfig",
    "EngineState",
    "KVLayout",
    "Logprob",
    "PrefillInputs",
    "Prompt",
    "RequestMetrics",
    "RequestOutput",
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
    "init_state",
    "load_snapshot",
    "prefill",
    "sample_tokens",
    "score_tokens",
]
