"""folojax: batched language-model generation as pure JAX functions.

The engine: `LLM`, `SamplingParams`, `EngineConfig` and the outputs. The functional layer under
it, for programs that thread the state themselves: `prefill`, `decode`, `init_state` and the types
in `folojax.state`.
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
    batch_metrics,
)
from folojax.sampling import SamplingClass
from folojax.sampling_params import SamplingParams
from folojax.state import (
    DecodeInputs,
    EngineState,
    PrefillInputs,
    SamplingRows,
    greedy_rows,
    init_state,
)
from folojax.step import decode, prefill

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
    "RequestMetrics",
    "RequestOutput",
    "SamplingClass",
    "SamplingParams",
    "SamplingRows",
    "batch_metrics",
    "decode",
    "greedy_rows",
    "init_state",
    "prefill",
]
