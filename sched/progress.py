"""How far a request has come, and how far it may go: what plans under way will give included."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from folojax.sched.config import SchedulerConfig
from folojax.sched.memory import KVMemory
from folojax.sched.request import Request, RequestStatus
from folojax.sched.step_plan import RequestUpdate, StepPlan


def num_tokens_left(request: Request, max_model_len: int) -> int:
    """How many tokens a running request has to compute; 0: its last result is in flight."""
    # Spelled out: asked of every row in every step.
    num_outputs = len(request.output_token_ids) + request.num_samples_in_flight
    num_tokens = len(request.prompt_token_ids) + num_outputs
    if request.num_samples_in_flight and (
        num_outputs >= request.stop.max_tokens or num_tokens >= max_model_len
    ):
        return 0
    return num_tokens - request.num_planned_tokens


def num_samples_left(request: Request, max_model_len: int) -> int:
    """How many tokens a request may get beyond those in flight; an end token may come first."""
    num_outputs = request.num_output_tokens + request.num_samples_in_flight
    return min(request.stop.max_tokens - num_outputs, max_model_len - request.num_expected_tokens)


def num_decode_steps(config: SchedulerConfig, running: Iterable[Request], memory: KVMemory) -> int:
    """How many tokens the requests of the next plan may get at once, while nobody waits."""
    most = config.max_decode_steps
    if most == 1:
        return 1
    num_missing = 0
    for request in running:
        num_left = num_tokens_left(request, config.max_model_len)
        if num_left > 1 or request.is_prompt_only or request.takes_single_steps:
            return 1
        if num_left:
            num_tokens = min(most, num_samples_left(request, config.max_model_len))
            num_missing += memory.num_missing_pages(request, num_tokens)
    # Nobody is preempted for the sake of more tokens at once.
    return most if num_missing <= memory.allocator.num_available else 1


def uneven(
    plan: StepPlan,
    sampled: Mapping[str, Sequence[int]],
    failed: Collection[str],
    updates: list[RequestUpdate],
) -> Iterator[tuple[Request, Sequence[int]]]:
    """Gives each request that goes on evenly its token, and notes it in `updates`.

    Yields:
        The others that await something and their tokens, in batch order.
    """
    is_single = plan.num_decode_steps == 1 and not failed
    make: Any = tuple.__new__  # half of what `RequestUpdate(...)` takes
    find, note = sampled.get, updates.append
    for request_id, request in plan.awaited.items():
        tokens = find(request_id, ())
        num_computed = request.num_computed_tokens
        is_even = num_computed < request.lands_evenly_until and is_single
        if is_even and tokens[0] not in request.stop.end_ids:
            request.num_computed_tokens = num_computed + 1
            request.num_samples_in_flight -= 1
            request.output_token_ids.append(tokens[0])
            note(make(RequestUpdate, (request, tokens)))
        else:
            yield request, tokens


def append_tokens(
    request: Request, tokens: Sequence[int], max_model_len: int
) -> tuple[Sequence[int], RequestStatus | None, int | None]:
    """Gives a request its tokens, up to one that ends it.

    Returns:
        Those that it got; the finished status, or None to go on; and the stop id, or None.
    """
    output_token_ids = request.output_token_ids
    most_outputs = max_model_len - len(request.prompt_token_ids)
    for count, token in enumerate(tokens, 1):
        output_token_ids.append(token)
        status, stop_reason = request.stop.check(len(output_token_ids), token)
        if status is None and len(output_token_ids) >= most_outputs:
            status = RequestStatus.FINISHED_LENGTH
        if status is not None:
            return tokens[:count], status, stop_reason
    return tokens, None, None
