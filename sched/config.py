"""The scheduler's limits, checked once and frozen."""

from dataclasses import dataclass

from folojax.sched.pages import pages_for
from folojax.sched.queue import POLICIES


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of every step and of every request.

    Attributes:
        max_num_seqs: most requests that run at once.
        max_num_batched_tokens: most tokens in one step, the budget.
        max_model_len: most tokens of one request, prompt and output; at least 2.
        num_pages: pages in the KV pool.
        page_size: tokens in a page.
        policy: "fcfs", or "priority" (smallest priority first, then arrival).
        enable_chunked_prefill: whether a prompt may be spread over several steps.
        long_prefill_token_threshold: most tokens of one request in one step; 0 is no cap.
        enable_prefix_caching: whether K/V are kept, as long as there is room, for later requests
            that begin with the same tokens.
        max_plans_in_flight: plans that may be made before the first of them is taken in; with 2,
            one is planned while the device computes the one before.
        max_decode_steps: most tokens that a request may get in one plan. More than 1 are planned
            when all requests run, and none of them has anything but its next token to compute.
        num_host_pages: room for K/V of preempted requests in host memory; 0: all is computed again.
        min_swap_tokens: from how many tokens on it is cheaper to move their K/V to host memory and
            back than to compute them again.
        watermark: share of the pages that is to stay free when a request is admitted while others
            run: they have some room to grow before anyone is preempted.

    Raises:
        ValueError: with every mismatch in one text.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    num_pages: int
    page_size: int
    policy: str = "fcfs"
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    enable_prefix_caching: bool = False
    max_plans_in_flight: int = 1
    max_decode_steps: int = 1
    num_host_pages: int = 0
    min_swap_tokens: int = 1
    watermark: float = 0.0

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)!r}; it must be an int of at least {least}"
            for name, least in _LEAST.items()
            if not _is_int_from(getattr(self, name), least)
        ]
        problems += [
            f"{name} is {getattr(self, name)!r}; it must be True or False"
            for name in ("enable_chunked_prefill", "enable_prefix_caching")
            if not isinstance(getattr(self, name), bool)
        ]
        if not _is_share(self.watermark):
            problems.append(
                f"watermark is {self.watermark!r}; it must be a number from 0 up to, and not, 1"
            )
        if self.policy not in POLICIES:
            problems.append(f"policy is {self.policy!r}; it must be one of {', '.join(POLICIES)}")
        if not problems:  # the limits can be compared only once each of them is a number
            problems = self._conflicts()
        if problems:
            raise ValueError("; ".join(problems))

    def request_problems(self, prompt_len: int, max_tokens: int, num_outputs: int = 0) -> list[str]:
        """Says why a request of this size, with outputs so far, can never run; empty if it can."""
        if prompt_len == 0:
            return ["the prompt is empty; at least one token is needed to start from"]
        if prompt_len >= self.max_model_len:
            return [
                f"prompt has {prompt_len:,} tokens; max_model_len is {self.max_model_len:,} and "
                f"one token must be left for the output: shorten it to at most "
                f"{self.max_model_len - 1:,} tokens or raise max_model_len"
            ]
        most_outputs = min(max_tokens, self.max_model_len - prompt_len)
        if num_outputs > 0 and most_outputs <= num_outputs:
            return [
                f"the request has {num_outputs:,} output tokens; with max_tokens {max_tokens:,} "
                f"and a max_model_len of {self.max_model_len:,} it can have {most_outputs:,}: "
                f"there is none to come, raise max_tokens or continue an earlier token"
            ]
        # The last token is returned, never fed back: its K/V are not needed. A prompt alone has
        # no such token.
        most_tokens = min(prompt_len + max(max_tokens, 1), self.max_model_len) - 1
        num_pages = pages_for(most_tokens, self.page_size)
        if num_pages > self.num_pages:
            return [
                f"the request (prompt of {prompt_len:,} tokens, max_tokens {max_tokens:,}) may "
                f"need {num_pages:,} pages of {self.page_size:,} tokens; the pool has "
                f"{self.num_pages:,}: shorten it, lower max_tokens or raise num_pages"
            ]
        return []

    def _conflicts(self) -> list[str]:
        budget = self.max_num_batched_tokens
        conflicts = []
        if budget < self.max_num_seqs:
            conflicts.append(
                f"max_num_batched_tokens is {budget:,}; max_num_seqs is {self.max_num_seqs:,} and "
                f"each running request needs one token a step: raise the first to at least "
                f"{self.max_num_seqs:,} or lower the second"
            )
        if not self.enable_chunked_prefill:
            if budget < self.max_model_len:
                conflicts.append(
                    f"max_num_batched_tokens is {budget:,}; without chunked prefill a prompt of "
                    f"max_model_len, {self.max_model_len:,}, must fit in one step: raise it to at "
                    f"least {self.max_model_len:,}, lower max_model_len, or set "
                    f"enable_chunked_prefill=True"
                )
            if self.long_prefill_token_threshold:
                conflicts.append(
                    f"long_prefill_token_threshold is {self.long_prefill_token_threshold:,}; it "
                    f"cuts prompts into chunks, which enable_chunked_prefill=False forbids: set "
                    f"it to 0 or enable chunked prefill"
                )
        return conflicts


_LEAST = {
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "max_model_len": 2,  # one token to start from and one to answer with
    "num_pages": 1,
    "page_size": 1,
    "long_prefill_token_threshold": 0,
    "max_plans_in_flight": 1,
    "max_decode_steps": 1,
    "num_host_pages": 0,
    "min_swap_tokens": 0,
}


def _is_int_from(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
