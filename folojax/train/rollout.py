"""Partial rollouts: run the requests of an engine for a while, and carry on later.

add_request ...          run_for(llm, num_finished=48)      -> 48 outputs for the trainer
llm.update_params(new)   stragglers continue, by policy
add_request ...          run_for(llm, num_finished=48)      -> stragglers come back finished
"""

import time
from typing import NamedTuple

from folojax.llm import LLM
from folojax.requests.outputs import RequestOutput


class Rollouts(NamedTuple):
    """What a budget has given."""

    finished: list[RequestOutput]  # requests that ended meanwhile, in the order of ending
    unfinished: list[RequestOutput]  # the latest output of each that has got a token and goes on


def run_for(
    llm: LLM,
    *,
    num_tokens: int | None = None,
    seconds: float | None = None,
    num_finished: int | None = None,
) -> Rollouts:
    """Steps the engine until a budget is spent or nothing is left to do.

    Requests come from `LLM.add_request`. What is unfinished stays in the engine: another call
    carries on, `LLM.update_params` may come in between, `LLM.abort_request` gives up.

    Args:
        llm: With requests of its own loop.
        num_tokens: Output tokens, of all requests together; the step that reaches it is the last.
        seconds: Of wall-clock time; checked after every step.
        num_finished: Requests that have ended.

    Raises:
        ValueError: a budget is no positive number.
        RuntimeError: the engine sleeps.
    """
    budgets = {"num_tokens": num_tokens, "seconds": seconds, "num_finished": num_finished}
    problems = [
        f"{name} is {value!r}; it must be above 0, or None for no limit"
        for name, value in budgets.items()
        if value is not None
        and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0)
    ]
    if seconds is not None and not llm.engine.runner.backend.devices.is_local:
        problems.append(
            f"seconds is {seconds!r}, and the engine is one of several processes, whose clocks "
            "differ: they have to take the same steps, so give num_tokens or num_finished"
        )
    if problems:
        raise ValueError("; ".join(problems))
    start = time.perf_counter()
    before = {
        request_id: sum(part.num_output_tokens for part in live.parts)
        for request_id, live in llm.replicas.live.items()
    }
    finished: list[RequestOutput] = []
    latest: dict[str, RequestOutput] = {}
    lengths: dict[str, int] = {}
    while llm.has_unfinished_requests():
        for output in llm.step():
            # Only what is new counts: one that had ended before, and is told now, gives nothing.
            length = sum(len(one.token_ids) for one in output.outputs)
            lengths[output.request_id] = length - before.get(output.request_id, length)
            if output.finished:
                latest.pop(output.request_id, None)
                finished.append(output)
            else:
                latest[output.request_id] = output
        if num_tokens is not None and sum(lengths.values()) >= num_tokens:
            break
        if num_finished is not None and len(finished) >= num_finished:
            break
        if seconds is not None and time.perf_counter() - start >= seconds:
            break
    return Rollouts(finished, list(latest.values()))
