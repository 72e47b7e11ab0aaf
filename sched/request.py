r"""One generation request: what was asked, what has happened, and when it ends.

The life of a request::

    add_request        schedule               update_from_output
        |                  |                          |
        v     admitted     v     EOS or stop id       v
     WAITING ----------> RUNNING ---------------> FINISHED_STOPPED
                         ^     | \--------------> FINISHED_LENGTH   max_tokens, max_model_len,
                         |     |                                   or a prompt-only request is done
                         |     |  \-------------> FINISHED_ERROR    its row failed on the device
               resumed,  |     |
         output kept and |     | out of pages: its pages are freed,
              recomputed |     | num_computed_tokens = 0
                         |     v
                        PREEMPTED

     abort_requests: WAITING, RUNNING or PREEMPTED --> FINISHED_ABORTED (or FINISHED_STOPPED,
     for a stop string, which only the caller can see)

A token that was under way when its request was preempted still counts, and can end it.
"""

import enum
import functools
from collections.abc import Hashable
from dataclasses import KW_ONLY, dataclass, field

from folojax.sched.host_pages import SavedPages

NOT_ARRIVED = -1
"""`Request.arrival_index` of a request that no scheduler has taken yet."""


class RequestStatus(enum.Enum):
    """Where a request is in its life; the drawing is in the module's docstring."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    FINISHED_STOPPED = enum.auto()
    FINISHED_LENGTH = enum.auto()
    FINISHED_ABORTED = enum.auto()
    FINISHED_ERROR = enum.auto()

    @property
    def is_finished(self) -> bool:
        """Whether no token will follow."""
        return self not in _UNFINISHED

    @property
    def finish_reason(self) -> str | None:
        """What the user is told: "stop", "length", "abort" or "error"; None while unfinished."""
        return _FINISH_REASONS.get(self)


# A tuple: the scheduler asks for every request in every step, and hashing a member is slow.
_UNFINISHED = (RequestStatus.RUNNING, RequestStatus.WAITING, RequestStatus.PREEMPTED)

_FINISH_REASONS = {
    RequestStatus.FINISHED_STOPPED: "stop",
    RequestStatus.FINISHED_LENGTH: "length",
    RequestStatus.FINISHED_ABORTED: "abort",
    RequestStatus.FINISHED_ERROR: "error",
}


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """When sampled tokens end a request."""

    max_tokens: int  # most outputs, never "no limit"; 0: the prompt is computed, nothing is sampled
    eos_token_ids: frozenset[int] = frozenset()  # empty when the request ignores them
    stop_token_ids: frozenset[int] = frozenset()  # the user's own end tokens
    # Outputs that must exist, the newest included, before either kind of token ends the request;
    # `max_tokens` ends it all the same.
    min_tokens: int = 0

    @functools.cached_property
    def end_ids(self) -> frozenset[int]:
        """The tokens of either kind."""
        return self.eos_token_ids | self.stop_token_ids

    def check(self, num_output_tokens: int, token: int) -> tuple[RequestStatus | None, int | None]:
        """Says whether the newest token ends the request.

        Args:
            num_output_tokens: outputs so far, `token` included.
            token: the newest output.

        Returns:
            The finished status, or None to go on; and the stop id that ended it, or None. EOS
            wins over a stop id (it has no stop reason), and both win over the length.
        """
        if num_output_tokens >= self.min_tokens and token in self.end_ids:
            if token in self.eos_token_ids:
                return RequestStatus.FINISHED_STOPPED, None
            return RequestStatus.FINISHED_STOPPED, token
        if num_output_tokens >= self.max_tokens:
            return RequestStatus.FINISHED_LENGTH, None
        return None, None


# Requests are compared by identity: an id may be used again once its first owner has finished.
@dataclass(eq=False)
class Request:
    """A prompt, its stop rule and the state that the scheduler keeps of it.

    The caller sets the first fields, up to `is_private`, and may give output tokens that are known
    already, which count as outputs in every respect; the rest is written by the scheduler alone.
    What others want to know of a request is in a subclass of theirs: plans hand the same object on.
    """

    request_id: str  # unique among the unfinished
    prompt_token_ids: tuple[int, ...]
    stop: StopRule
    priority: int = 0  # smaller is more urgent; the "fcfs" policy does not look at it
    # Requests of one group have the same prompt, or its first `most_found_tokens`, and share the
    # K/V of it: it is computed for one of them, while the others wait. None: it is alone.
    group: Hashable = None
    # Compute every token of the prompt, whatever others have left; for a request that reports
    # something about each of them. Its pages may serve others.
    skip_prefix_cache: bool = False
    # Likewise, but for so many tokens at the beginning, which it reports nothing about. None: all.
    most_found_tokens: int | None = None
    # With the same prompt, it gave this one its first outputs: they share pages if it still runs.
    forked_from: "Request | None" = None
    saved: SavedPages | None = None  # what host memory holds of its K/V
    # Its K/V are not what its tokens alone would give, so nobody else is to have its pages; they
    # never enter the prefix cache. Goes with `skip_prefix_cache`.
    is_private: bool = False
    # Its K/V are those of this adapter, and are found by requests that have the same. None: of the
    # model alone.
    adapter: str | None = None
    # What its next token may be is known only when the last one is: it gets one in each plan.
    takes_single_steps: bool = False

    _: KW_ONLY
    arrival_index: int = NOT_ARRIVED  # order of `add_request` calls
    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)  # kept over a preemption
    num_computed_tokens: int = 0  # from the first on, whose K/V are in the cache
    num_planned_tokens: int = 0  # the same once the plans under way have run
    num_samples_in_flight: int = 0  # output tokens that the plans under way sample
    # While fewer tokens are planned, each plan has one for it and samples the next, in pages that
    # it has; and while fewer are computed, taking one in neither fills a page nor ends it.
    plans_evenly_until: int = 0
    lands_evenly_until: int = 0
    page_ids: list[int] = field(
        default_factory=list
    )  # of those K/V, in token order; a reference each
    # Found computed when it was first admitted: in the prefix cache, with another request or in
    # host memory.
    num_cached_tokens: int = 0
    num_passed: int = 0  # how many were admitted while it waited for room for its adapter
    num_preemptions: int = 0  # how often its pages were taken away
    stop_reason: int | str | None = None  # stop id or text that ended it, or why it failed

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_common_tokens(self) -> int:
        """How many first tokens those of its group have computed for it, at most."""
        # What follows the prompt's last token is to be sampled: that one stays to be computed.
        most, last = self.most_found_tokens, len(self.prompt_token_ids) - 1
        return last if most is None else min(most, last)

    @property
    def num_output_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and output together: what `num_computed_tokens` is to catch up with."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_expected_tokens(self) -> int:
        """`num_tokens` once the plans under way have run: what the next is to catch up with."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_samples_in_flight

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt and output, as a copy: O(length), so not for the loop over running requests."""
        return (*self.prompt_token_ids, *self.output_token_ids)

    def tokens_between(self, start: int, end: int) -> tuple[int, ...]:
        """Returns the tokens at positions `start` to `end` - 1; O(their number)."""
        num_prompt_tokens = len(self.prompt_token_ids)
        if end <= num_prompt_tokens:
            return self.prompt_token_ids[start:end]
        outputs = self.output_token_ids[max(start - num_prompt_tokens, 0) : end - num_prompt_tokens]
        return (*self.prompt_token_ids[start:], *outputs)

    def restart(self) -> None:
        """Forgets the output of a request that waits, as if it had just arrived."""
        assert not self.page_ids, f"{self.request_id} runs: preempt it first"
        self.output_token_ids.clear()

    @property
    def is_prompt_only(self) -> bool:
        """Whether it ends, with nothing sampled, once its prompt is computed."""
        return self.stop.max_tokens == 0

    @property
    def is_finished(self) -> bool:
        """Whether no token will follow."""
        return self.status.is_finished
