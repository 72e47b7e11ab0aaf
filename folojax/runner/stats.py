"""What a runner counts."""

import dataclasses
from collections.abc import Sequence

from folojax.runner.batch import Chunk


@dataclasses.dataclass
class RunnerStats:
    """Counts since the runner was made; padding is in computed minus scheduled tokens.

    Those of prefill calls are in the scheduled and computed tokens too.
    """

    num_prefill_calls: int = 0
    num_decode_calls: int = 0
    num_loaded_pages: int = 0
    num_scheduled_tokens: int = 0
    num_computed_tokens: int = 0
    num_prefill_tokens: int = 0
    num_prefill_padding_tokens: int = 0

    def count_chunks(self, chunks: Sequence[Chunk], num_computed: int, is_by_row: bool) -> None:
        """Of rows that are a token each, no two of one request, the call is a decode step's."""
        num_tokens = sum(chunk.end - chunk.start for chunk in chunks)
        self.num_computed_tokens += num_computed
        requests = {chunk.row.request_id for chunk in chunks}
        if is_by_row and len(requests) == len(chunks):
            self.num_decode_calls += 1
            return
        self.num_prefill_calls += 1
        self.num_prefill_tokens += num_tokens
        self.num_prefill_padding_tokens += num_computed - num_tokens
