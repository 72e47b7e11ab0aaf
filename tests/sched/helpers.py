"""Small schedulers and requests, and steps of a model that always says the same token."""

import copy
import dataclasses

from folojax.sched.config import SchedulerConfig
from folojax.sched.request import Request, StopRule
from folojax.sched.scheduler import Scheduler
from folojax.sched.step_plan import StepPlan

TOKEN = 7


def make_config(**changes) -> SchedulerConfig:
    fields = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 100,
        "max_model_len": 64,
        "num_pages": 64,
        "page_size": 4,
        "enable_prefix_caching": False,
    }
    return SchedulerConfig(**(fields | changes))


def make_scheduler(**changes) -> Scheduler:
    return Scheduler(make_config(**changes))


def make_request(
    name: str, prompt: int | tuple[int, ...], max_tokens: int = 8, *, stop=None, **fields
) -> Request:
    """A request; prompts that are given as a length begin alike."""
    tokens = tuple(range(100, 100 + prompt)) if isinstance(prompt, int) else prompt
    rule = StopRule(max_tokens=max_tokens, **(stop or {}))
    return Request(name, tokens, rule, **fields)


def add(
    scheduler: Scheduler, name: str, prompt: int | tuple[int, ...], max_tokens: int = 8, **fields
) -> Request:
    request = make_request(name, prompt, max_tokens, **fields)
    scheduler.add_request(request)
    return request


def commit(scheduler: Scheduler, plan: StepPlan, token: int = TOKEN):
    sampled = {id_: (token,) * plan.num_samples(id_) for id_ in plan.sampled_request_ids}
    updates = scheduler.update_from_output(plan, sampled)
    scheduler.check()
    return updates


def step(scheduler: Scheduler, token: int = TOKEN) -> StepPlan:
    """A step; the requests that joined are told as they stood when it was planned."""
    plan = scheduler.schedule()
    scheduler.check()
    joined = copy.deepcopy(plan.new_requests)
    commit(scheduler, plan, token)
    return dataclasses.replace(plan, new_requests=joined)


def assert_empty(scheduler: Scheduler) -> None:
    scheduler.check()
    assert not scheduler.has_unfinished_requests()
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    pages = scheduler.memory.allocator
    assert pages.num_used == 0
    assert pages.num_free == pages.num_pages - scheduler.memory.cache.num_pages
    scheduler.schedule()
