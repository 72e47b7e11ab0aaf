"""What is counted beside the clock: compilations, memory, and the engine's own counts."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from bench_metrics import host_peak_memory_gib
from jax import monitoring

from folojax import LLM

_COMPILED = "/jax/core/compile/backend_compile_duration"
_SAVED = "/jax/compilation_cache/compile_time_saved_sec"
_TRACED = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
)


@dataclasses.dataclass
class Compilations:
    """What JAX's compiler did.

    Attributes:
        num_executables: Programs compiled, or read from the cache on disk.
        compile_s: The seconds that this took here.
        cold_compile_s: The seconds that it takes with an empty cache: of programs that were read,
            the time that the compiler needed when they were stored.
        num_cached: Those that were read.
    """

    num_executables: int = 0
    compile_s: float = 0.0
    cold_compile_s: float = 0.0
    num_cached: int = 0


@contextlib.contextmanager
def count_compilations() -> Iterator[Compilations]:
    """Counts those inside the block, of the whole process."""
    counts = Compilations()

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == _COMPILED:
            counts.num_executables += 1
        elif event == _SAVED:
            counts.num_cached += 1
        if event in (_COMPILED, *_TRACED):
            counts.compile_s += duration_secs
        if event in (_SAVED, _COMPILED, *_TRACED):
            counts.cold_compile_s += duration_secs

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield counts
    finally:
        monitoring.unregister_event_duration_listener(listen)


@dataclasses.dataclass(frozen=True)
class EngineCounts:
    """Counts of an engine since it was made.

    Attributes:
        num_steps: Steps.
        scheduled_tokens: Tokens computed for requests.
        padding_tokens: Tokens computed for nobody.
        prefill_tokens: Of the scheduled tokens, those of calls for prompt chunks.
        prefill_padding_tokens: Of the padding, that of calls for prompt chunks.
        prefix_hit_tokens: Tokens found in the prefix cache, and not computed.
        preemptions: Samples that lost their pages.
    """

    num_steps: int
    scheduled_tokens: int
    padding_tokens: int
    prefill_tokens: int
    prefill_padding_tokens: int
    prefix_hit_tokens: int
    preemptions: int

    @classmethod
    def of(cls, llm: LLM) -> "EngineCounts":
        """As they stand."""
        metrics = llm.metrics()
        return cls(
            num_steps=metrics.num_steps,
            scheduled_tokens=metrics.num_scheduled_tokens,
            padding_tokens=metrics.num_padding_tokens,
            prefill_tokens=metrics.num_prefill_tokens,
            prefill_padding_tokens=metrics.num_prefill_padding_tokens,
            prefix_hit_tokens=metrics.num_prefix_hit_tokens,
            preemptions=metrics.num_preemptions,
        )

    def since(self, before: "EngineCounts", num_outputs: int, num_samples: int) -> dict[str, Any]:
        """The counts of a round.

        `prefill_tokens_computed` is all that was computed to get at first tokens: a sample's every
        further token takes one computed token. What a preemption lost is in it too.

        Args:
            before: The counts at its start.
            num_outputs: Tokens that it gave, of all samples.
            num_samples: Samples that gave them.
        """
        old, new = dataclasses.asdict(before), dataclasses.asdict(self)
        counts = {name: new[name] - old[name] for name in new}
        scheduled, padding = counts["scheduled_tokens"], counts["padding_tokens"]
        in_prefill = counts["prefill_tokens"], counts["prefill_padding_tokens"]
        return {
            **counts,
            "prefill_tokens_computed": scheduled - (num_outputs - num_samples),
            "padding_waste": _share(padding, scheduled),
            "prefill_padding_waste": _share(in_prefill[1], in_prefill[0]),
            "decode_padding_waste": _share(padding - in_prefill[1], scheduled - in_prefill[0]),
        }


def _share(padding: int, useful: int) -> float:
    return padding / max(padding + useful, 1)


def peak_memory_gib() -> float:
    """The most that this process ever held: of the device where it tells, or else of the host."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    return host_peak_memory_gib()
