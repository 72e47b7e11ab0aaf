"""Requests with one prompt: it is computed once, and shared without anyone writing on another."""

import pytest

from tests.sched.helpers import (
    TOKEN,
    add,
    assert_empty,
    make_scheduler,
    step,
)

both = pytest.mark.parametrize("enable_prefix_caching", [False, True])


def add_group(scheduler, names: str, prompt, max_tokens: int = 8, group: str = "g"):
    return [add(scheduler, name, prompt, max_tokens, group=group) for name in names]


@both
def test_one_computes_the_prompt_and_the_others_one_token_each(enable_prefix_caching):
    scheduler = make_scheduler(enable_prefix_caching=enable_prefix_caching)
    requests = add_group(scheduler, "abc", 10)
    plan = step(scheduler)
    assert plan.num_scheduled_tokens == {"a": 10}
    assert plan.page_moves.copies == ()
    plan = step(scheduler)
    assert plan.num_scheduled_tokens == {"a": 1, "b": 1, "c": 1}
    assert plan.sampled_request_ids == ("a", "b", "c")
    # Positions 0 to 8 are there: two full pages, and one token of page 2, which is a's.
    assert [new.num_computed_tokens for new in plan.new_requests] == [9, 9]
    assert [new.page_ids for new in plan.new_requests] == [[0, 1, 3], [0, 1, 4]]
    assert plan.page_moves.copies == ((2, 3), (2, 4))
    assert [scheduler.memory.allocator.ref_count(page) for page in range(5)] == [3, 3, 1, 1, 1]
    assert [request.num_cached_tokens for request in requests] == [0, 9, 9]
    while scheduler.has_unfinished_requests():
        step(scheduler)
    assert [request.output_token_ids for request in requests] == [[TOKEN] * 8] * 3
    assert_empty(scheduler)


@both
def test_prompt_that_ends_with_a_page_but_one_needs_no_copy(enable_prefix_caching):
    scheduler = make_scheduler(enable_prefix_caching=enable_prefix_caching)
    add_group(scheduler, "ab", 9)
    step(scheduler)
    plan = step(scheduler)
    assert plan.num_scheduled_tokens == {"a": 1, "b": 1}
    assert plan.new_requests[0].page_ids == [0, 1, 3]
    assert plan.page_moves.copies == ()


@both
def test_prompt_of_one_token_is_not_waited_for(enable_prefix_caching):
    scheduler = make_scheduler(enable_prefix_caching=enable_prefix_caching)
    add_group(scheduler, "abc", 1)
    plan = step(scheduler)
    assert plan.num_scheduled_tokens == {"a": 1, "b": 1, "c": 1}
    assert plan.page_moves.copies == ()


@both
def test_others_pass_while_the_prompt_is_computed(enable_prefix_caching):
    scheduler = make_scheduler(
        max_num_batched_tokens=16,
        long_prefill_token_threshold=8,
        enable_prefix_caching=enable_prefix_caching,
    )
    add_group(scheduler, "ab", 20)
    add(scheduler, "other", 3)
    assert step(scheduler).num_scheduled_tokens == {"a": 8, "other": 3}
    add(scheduler, "late", 3)
    assert step(scheduler).num_scheduled_tokens == {"a": 8, "other": 1, "late": 3}
    assert step(scheduler).num_scheduled_tokens == {"a": 4, "other": 1, "late": 1}
    add(scheduler, "last", 3)
    # b has kept its place: it comes in before those that arrived after it.
    plan = step(scheduler)
    assert list(plan.num_scheduled_tokens) == ["a", "other", "late", "b", "last"]
    assert plan.num_scheduled_tokens["b"] == 1


def test_child_that_could_come_in_is_not_passed():
    scheduler = make_scheduler(max_num_seqs=2)
    add_group(scheduler, "ab", 10, max_tokens=4)
    add(scheduler, "other", 3, max_tokens=3)
    add(scheduler, "late", 3)
    assert list(step(scheduler).num_scheduled_tokens) == ["a", "other"]
    assert list(step(scheduler).num_scheduled_tokens) == ["a", "other"]
    assert list(step(scheduler).num_scheduled_tokens) == ["a", "other"]
    assert list(step(scheduler).num_scheduled_tokens) == ["a", "b"], "late has to wait for b"


def test_next_in_line_computes_the_prompt_when_the_first_is_aborted():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add_group(scheduler, "abc", 12)
    step(scheduler)
    scheduler.abort_requests("a")
    plans = [step(scheduler) for _ in range(3)]
    assert [plan.num_scheduled_tokens for plan in plans] == [{"b": 8}, {"b": 4}, {"b": 1, "c": 1}]


def test_child_shares_with_whoever_still_has_the_prompt():
    scheduler = make_scheduler(max_num_seqs=2)
    add_group(scheduler, "abc", 10, max_tokens=3)
    for _ in range(3):
        step(scheduler)  # a has ended, b goes on
    plan = step(scheduler)
    assert plan.finished_request_ids == ("a",)
    assert plan.num_scheduled_tokens == {"b": 1, "c": 1}
    ((source, target),) = plan.page_moves.copies
    assert (source, target) == (3, 2), "copied from b's page into the one that a has left"


def test_child_of_a_child_of_the_same_step_is_copied_from_the_first():
    scheduler = make_scheduler()
    add_group(scheduler, "abc", 10)
    step(scheduler)
    holder = scheduler.memory._find_holder
    scheduler.memory._find_holder = lambda request: (  # type: ignore[method-assign]
        holder(request) and (scheduler._running[-1], request.num_prompt_tokens - 1)
    )
    plan = step(scheduler)
    assert plan.page_moves.copies == ((2, 3), (2, 4)), "not from page 3, which is only being filled"


@both
def test_resumed_child_shares_again(enable_prefix_caching):
    scheduler = make_scheduler(num_pages=7, enable_prefix_caching=enable_prefix_caching)
    a, b = add_group(scheduler, "ab", 10, max_tokens=16)
    plan = step(scheduler)
    while not plan.preempted_request_ids:
        plan = step(scheduler)
    assert plan.preempted_request_ids == ("b",)
    num_outputs = b.num_output_tokens
    add(scheduler, "stranger", 1)
    while not b.page_ids:
        plan = step(scheduler)
        assert scheduler.has_unfinished_requests()
    new = plan.new_requests[0]
    assert new.request_id == "b"
    assert new.output_token_ids == [TOKEN] * num_outputs
    if not a.is_finished:
        assert new.num_computed_tokens >= 9
    while scheduler.has_unfinished_requests():
        step(scheduler)
    assert a.output_token_ids == b.output_token_ids == [TOKEN] * 16
    assert b.num_cached_tokens == 9, "counted at the first admission, and once"
    assert_empty(scheduler)


def test_the_longer_of_cache_and_sibling_is_taken():
    scheduler = make_scheduler(enable_prefix_caching=True)
    old = add(scheduler, "old", 10, max_tokens=6)
    while not old.is_finished:
        step(scheduler)
    a, b = add_group(scheduler, "ab", 10)
    assert step(scheduler).num_scheduled_tokens == {"a": 2}, "8 of 10 are in the cache"
    assert step(scheduler).num_scheduled_tokens == {"a": 1, "b": 1}
    assert (a.num_cached_tokens, b.num_cached_tokens) == (8, 9)
    assert scheduler.memory.num_query_tokens == 30
    assert scheduler.memory.num_hit_tokens == 17


def test_request_that_skips_the_cache_shares_with_nobody_and_waits_for_nobody():
    scheduler = make_scheduler(max_num_batched_tokens=16, long_prefill_token_threshold=8)
    add(scheduler, "a", 12, group="g")
    add(scheduler, "b", 12, group="g", skip_prefix_cache=True)
    add(scheduler, "c", 12, group="g")
    assert step(scheduler).num_scheduled_tokens == {"a": 8, "b": 8}
    assert step(scheduler).num_scheduled_tokens == {"a": 4, "b": 4}
    plan = step(scheduler)
    assert plan.num_scheduled_tokens == {"a": 1, "b": 1, "c": 1}


def test_groups_do_not_mix():
    scheduler = make_scheduler()
    add_group(scheduler, "ab", 10, group="")
    add_group(scheduler, "cd", 10, group="h")
    add(scheduler, "e", 10)
    assert step(scheduler).num_scheduled_tokens == {"a": 10, "c": 10, "e": 10}
    assert step(scheduler).page_moves.copies == ((2, 9), (5, 10))


@pytest.mark.parametrize("num_samples", [4, 16])
def test_a_group_computes_its_prompt_once(num_samples):
    scheduler = make_scheduler(max_num_seqs=8, max_num_batched_tokens=32)
    for index in range(num_samples):
        add(scheduler, str(index), 60, max_tokens=2, group="g")
    num_tokens = 0
    while scheduler.has_unfinished_requests():
        num_tokens += step(scheduler).total_num_scheduled_tokens
    # Per sample the last token of the prompt and the first output; the first has the rest too.
    assert num_tokens <= 60 + 2 * num_samples + 60 * (num_samples // 8)
