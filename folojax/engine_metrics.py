"""What an engine counts."""

import dataclasses


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
    num_discarded_tokens: int
    num_preemptions: int
    num_swapped_pages: int
    num_prefix_query_tokens: int
    num_prefix_hit_tokens: int
