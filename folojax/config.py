"""The engine's limits and sizes, checked once and frozen."""

import dataclasses

from folojax.sched.config import SchedulerConfig
from folojax.sched.pages import pages_for
from folojax.sched.queue import POLICIES


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine is built for.

    Attributes:
        max_model_len: Most tokens of one request, prompt and output; None takes the model's limit.
        max_num_seqs: Most requests that run at once.
        max_num_batched_tokens: Most tokens computed in one step; longer prompts are cut in chunks.
        page_size: Tokens in a KV page.
        num_pages: Pages in the pool; None makes room for `max_num_seqs` requests of 512 tokens,
            and for one request of `max_model_len`.
        scheduling_policy: "fcfs", or "priority" (smallest priority first, then arrival).
        enable_chunked_prefill: False schedules a prompt whole or not at all; the budget must then
            hold `max_model_len` tokens.
        long_prefill_token_threshold: Most tokens of one prompt in one step; 0 is no cap.
        prefill_row_len: Prompts are computed in rows of so many tokens: short rows waste less on
            padding, long rows copy fewer pages.
        seed: Of the seeds that requests without one are given.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    page_size: int = 64
    num_pages: int | None = None
    scheduling_policy: str = "fcfs"
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    prefill_row_len: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        for name, low in _LOWEST.items():
            value = getattr(self, name)
            if value is None and name in ("max_model_len", "num_pages"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                problems.append(f"{name} is {value!r}; it must be an integer of at least {low}")
        if not isinstance(self.enable_chunked_prefill, bool):
            problems.append(
                f"enable_chunked_prefill is {self.enable_chunked_prefill!r}; "
                "it must be True or False"
            )
        if self.scheduling_policy not in POLICIES:
            problems.append(
                f"scheduling_policy is {self.scheduling_policy!r}; "
                f"it must be one of {', '.join(POLICIES)}"
            )
        if problems:
            raise ValueError("EngineConfig: " + "; ".join(problems))

    def resolve(self, max_position: int) -> "EngineConfig":
        """Fills in what depends on the model.

        Args:
            max_position: Longest sequence the model was made for, in tokens.

        Raises:
            ValueError: `max_model_len` is beyond it, or the limits contradict each other.
        """
        max_model_len = max_position if self.max_model_len is None else self.max_model_len
        if max_model_len > max_position:
            raise ValueError(
                f"max_model_len is {max_model_len}, but the model was made for {max_position} "
                f"positions: lower EngineConfig.max_model_len to {max_position} or less"
            )
        num_pages = self.num_pages
        if num_pages is None:
            num_tokens = max(max_model_len, self.max_num_seqs * min(max_model_len, 512))
            num_pages = pages_for(num_tokens, self.page_size)
        resolved = dataclasses.replace(self, max_model_len=max_model_len, num_pages=num_pages)
        resolved.scheduler()  # its checks
        return resolved

    def scheduler(self) -> SchedulerConfig:
        """The scheduler's part of a resolved config."""
        assert self.max_model_len is not None, "resolve first"
        assert self.num_pages is not None, "resolve first"
        return SchedulerConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            num_pages=self.num_pages,
            page_size=self.page_size,
            policy=self.scheduling_policy,
            enable_chunked_prefill=self.enable_chunked_prefill,
            long_prefill_token_threshold=self.long_prefill_token_threshold,
        )


_LOWEST = {
    "max_model_len": 2,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "page_size": 1,
    "num_pages": 1,
    "long_prefill_token_threshold": 0,
    "prefill_row_len": 1,
    "seed": 0,
}
