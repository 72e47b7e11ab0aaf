"""The scheduler's limits, checked once and frozen."""

from dataclasses import MISSING, dataclass

from folojax.sched.option_fields import documented, option, option_problems
from folojax.sched.queue import POLICIES


@documented
@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of every step and of every request.

    Raises:
        ValueError: with every mismatch in one text.
    """

    max_num_seqs: int = option(MISSING, "Most requests that run at once.", at_least=1)
    max_num_batched_tokens: int = option(
        MISSING,
        "Most tokens computed in one step; longer prompts are cut in chunks.",
        at_least=1,
    )
    max_model_len: int = option(
        MISSING,
        "Most tokens of one request, prompt and output.",
        at_least=2,  # one to start from and one to answer with
    )
    num_pages: int = option(MISSING, "Pages in the KV pool.", at_least=1)
    page_size: int = option(MISSING, "Tokens in a KV page.", at_least=1)
    scheduling_policy: str = option(
        "fcfs",
        """"fcfs", first come first served, or "priority": the smallest priority first, then
        arrival.""",
        choices=POLICIES,
    )
    enable_chunked_prefill: bool = option(
        True,
        """False schedules a prompt whole or not at all; `max_num_batched_tokens` must then hold
        `max_model_len` tokens.""",
    )
    long_prefill_token_threshold: int = option(
        0, "Most tokens of one prompt in one step; 0 is no cap.", at_least=0
    )
    enable_prefix_caching: bool = option(
        True, "Pages of earlier requests serve later ones that begin alike."
    )
    max_plans_in_flight: int = option(
        1,
        """Plans that may be made before the first of them is taken in; with 2, one is planned while
        the device computes the one before.""",
        at_least=1,
    )
    max_decode_steps: int = option(
        1,
        """Most tokens that a request may get in one step. With more than 1, steps in which nobody
        waits and nobody's prompt is computed become one call of so many: less host work a token,
        the same tokens. Streamed tokens then come in bursts, a new request waits for the burst to
        end, and up to so many tokens more are computed for nobody.""",
        at_least=1,
    )
    num_host_pages: int = option(
        0,
        """Pages of room in host memory for the K/V of preempted requests; 0: they are computed
        again.""",
        at_least=0,
    )
    min_swap_tokens: int = option(
        1,
        """From how many tokens on K/V are moved to host memory and back rather than computed
        again.""",
        at_least=0,
    )
    max_loras: int = option(
        1,
        """Adapters that the requests of a step may have together, and that are on the device;
        others wait for one of these to be left.""",
        at_least=1,
        at_most=256,
    )
    has_states: bool = option(
        False,
        """Requests have a state of their own beside pages, that of all their tokens so far: another
        request can begin only where one was kept.""",
    )
    num_prefix_states: int = option(
        0,
        """States of recurrent layers that are kept so that pages of earlier requests can be used,
        each as large as that of a running request. Chunks of prompts then end where one is kept: at
        the last full page of a prompt, and where prompts part. 0: nothing is used again.""",
        at_least=0,
    )
    watermark: float = option(
        0.0,
        """Share of the pages that stays free when a request is admitted beside others, so that
        these can grow before anyone is preempted.""",
        at_least=0,
        below=1,
    )

    def __post_init__(self) -> None:
        # The limits can be compared only once each of them is a number.
        if problems := option_problems(self) or self._conflicts():
            raise ValueError("; ".join(problems))

    def _conflicts(self) -> list[str]:
        budget = self.max_num_batched_tokens
        conflicts = []
        if self.has_states and self.num_host_pages:
            conflicts.append("has_states goes without num_host_pages, which keeps pages alone")
        if self.has_states and self.enable_prefix_caching != (self.num_prefix_states > 0):
            conflicts.append(
                f"num_prefix_states is {self.num_prefix_states} and enable_prefix_caching is "
                f"{self.enable_prefix_caching}: pages are used again where states are kept"
            )
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
