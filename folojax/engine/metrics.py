"""What an engine counts."""

import dataclasses

from folojax.runner.runner import Runner
from folojax.sched.scheduler import Scheduler


@dataclasses.dataclass(frozen=True)
class EngineMetrics:
    """Where the engine stands.

    Attributes:
        num_running: Samples in the batch.
        num_waiting: Samples in the queue, new or preempted.
        num_used_pages: KV pages with an owner.
        num_cached_pages: KV pages without one, kept for prompts that begin alike.
        num_pages: KV pages in all.
        num_steps: Steps that computed something.
        num_prefill_calls: Device calls for prompt chunks.
        num_decode_calls: Device calls for single tokens, at most one a step.
        num_scheduled_tokens: Tokens computed for requests.
        num_padding_tokens: Tokens computed for nobody, to fill a bucket.
        num_prefill_tokens: Of the scheduled tokens, those of calls for prompt chunks.
        num_prefill_padding_tokens: Of the padding, that of calls for prompt chunks; the rest are
            rows of decode calls.
        num_discarded_tokens: Tokens sampled for requests that had ended, which no one has seen.
        num_preemptions: How often a sample lost its pages.
        num_swapped_pages: Pages that came back from host memory, and were not computed again.
        num_prefix_query_tokens: Tokens that were looked up in the prefix cache.
        num_prefix_hit_tokens: Those of them that were found, and not computed.
    """

    num_running: int
    num_waiting: int
    num_used_pages: int
    num_cached_pages: int
    num_pages: int
    num_steps: int
    num_prefill_calls: int
    num_decode_calls: int
    num_scheduled_tokens: int
    num_padding_tokens: int
    num_prefill_tokens: int
    num_prefill_padding_tokens: int
    num_discarded_tokens: int
    num_preemptions: int
    num_swapped_pages: int
    num_prefix_query_tokens: int
    num_prefix_hit_tokens: int


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
        num_discarded_tokens=scheduler.flights.num_discarded_tokens,
        num_preemptions=num_preemptions,
        num_swapped_pages=runner.stats.num_loaded_pages,
        num_prefix_query_tokens=memory.num_query_tokens,
        num_prefix_hit_tokens=memory.num_hit_tokens,
    )
