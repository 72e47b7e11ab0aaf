"""What an engine counts."""

import dataclasses

from folojax.compile.programs import SPENT
from folojax.runner.runner import Runner
from folojax.sched.scheduler import Scheduler


@dataclasses.dataclass(frozen=True)
class EngineMetrics:
    """Where the engine stands, and what it has done since it was made."""

    num_running: int  # samples in the batch
    num_waiting: int  # samples in the queue, new or preempted
    num_used_pages: int  # KV pages with an owner
    num_cached_pages: int  # KV pages without one, kept for prompts that begin alike
    num_pages: int  # KV pages in all
    num_steps: int  # that computed something
    num_prefill_calls: int  # device calls for prompt chunks
    num_decode_calls: int  # device calls for single tokens, at most one a step
    num_scheduled_tokens: int  # computed for requests
    num_padding_tokens: int  # computed for nobody, to fill a bucket
    num_prefill_tokens: int  # of the scheduled tokens, those of calls for prompt chunks
    num_prefill_padding_tokens: (
        int  # of the padding, that of such calls; the rest is in decode calls
    )
    num_discarded_tokens: int  # sampled for requests that had ended, which no one has seen
    num_preemptions: int  # how often a sample lost its pages
    num_swapped_pages: int  # that came back from host memory, and were not computed again
    num_prefix_query_tokens: int  # looked up in the prefix cache
    num_prefix_hit_tokens: int  # of those, the ones that were found, and not computed
    compile_s: float  # spent by this process, all engines in it, on compiling or loading programs


def read_metrics(
    scheduler: Scheduler, runner: Runner, num_steps: int, num_preemptions: int
) -> EngineMetrics:
    """The counts of an engine's parts as they stand now."""
    stats, memory = runner.stats, scheduler.memory
    return EngineMetrics(
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting,
        num_used_pages=memory.allocator.num_used,
        num_cached_pages=memory.allocator.num_idle,
        num_pages=scheduler.config.num_pages,
        num_steps=num_steps,
        num_prefill_calls=stats.num_prefill_calls,
        num_decode_calls=stats.num_decode_calls,
        num_scheduled_tokens=stats.num_scheduled_tokens,
        num_padding_tokens=stats.num_computed_tokens - stats.num_scheduled_tokens,
        num_prefill_tokens=stats.num_prefill_tokens,
        num_prefill_padding_tokens=stats.num_prefill_padding_tokens,
        num_discarded_tokens=scheduler.in_flight.num_discarded_tokens,
        num_preemptions=num_preemptions,
        num_swapped_pages=stats.num_loaded_pages,
        num_prefix_query_tokens=memory.num_query_tokens,
        num_prefix_hit_tokens=memory.num_hit_tokens,
        compile_s=SPENT.seconds,
    )
