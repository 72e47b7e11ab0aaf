"""Hits are exact, eviction takes the longest unused first, and the tree keeps nothing dead."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folojax.sched.prefix_cache import PrefixCache
from folojax.sched.request import RequestStatus
from tests.sched.helpers import TOKEN, add, assert_empty, make_scheduler, step


def fill(cache: PrefixCache, pieces: list[tuple[int, ...]], first_page: int = 0) -> None:
    node = cache.root
    for index, tokens in enumerate(pieces):
        node = cache.insert(node, tokens, first_page + index)


def pages(cache: PrefixCache, *pieces: tuple[int, ...]) -> list[int]:
    return cache.match(pieces)[0]


def test_longest_known_beginning_is_hit():
    cache = PrefixCache()
    fill(cache, [(1, 2), (3, 4), (5, 6)])
    fill(cache, [(1, 2), (0, 0)], first_page=10)
    assert pages(cache, (1, 2), (3, 4), (5, 6), (7, 8)) == [0, 1, 2]
    assert pages(cache, (1, 2), (0, 0)) == [0, 11], "the page that was there first stays"
    assert pages(cache, (1, 2), (5, 6)) == [0]
    assert pages(cache, (3, 4)) == pages(cache) == []
    assert not cache.holds(10)
    assert dict(cache.prefixes())[11] == (1, 2, 0, 0)
    cache.check(idle_pages=())


class Clash(int):
    """A token whose hash is that of every other."""

    def __hash__(self) -> int:
        return 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), max_size=8), st.data())
def test_colliding_hashes_never_give_a_false_hit(prefixes, data):
    cache = PrefixCache()
    contents: dict[int, tuple[int, ...]] = {}
    for index, prefix in enumerate(prefixes):
        fill(cache, [(Clash(token),) for token in prefix], first_page=10 * index)
        for depth in range(len(prefix)):
            contents[10 * index + depth] = tuple(prefix[: depth + 1])
    for prefix in [*prefixes, data.draw(st.lists(st.integers(0, 2), max_size=6))]:
        hits = pages(cache, *[(Clash(token),) for token in prefix])
        assert [contents[page] for page in hits] == [
            tuple(prefix[: depth + 1]) for depth in range(len(hits))
        ]
        known = any(other[: len(hits) + 1] == prefix[: len(hits) + 1] for other in prefixes)
        assert len(hits) == len(prefix) or not known
    assert hash((Clash(1),)) == hash((Clash(2),))


def test_real_tokens_collide_too():
    """In Python -1 and -2 have one hash; tokens are compared, so nothing comes of it."""
    assert hash((-1,)) == hash((-2,))
    cache = PrefixCache()
    fill(cache, [(-1,)])
    assert pages(cache, (-2,)) == []


def test_least_recently_left_is_evicted_first():
    cache = PrefixCache()
    fill(cache, [(1,), (2,), (3,)])
    for page in (2, 1, 0):
        cache.set_idle(page)
    cache.set_active(2)
    cache.set_idle(2)
    cache.check(idle_pages=(1, 0, 2))
    assert [cache.evict() for _ in range(3)] == [1, 0, 2]
    assert cache.root.children == {}, "nothing dead is kept"
    cache.check(idle_pages=())


def test_page_behind_an_evicted_one_is_found_again_with_it():
    cache = PrefixCache()
    fill(cache, [(1,), (2,)])
    cache.set_idle(0)
    assert cache.evict() == 0
    assert pages(cache, (1,), (2,)) == []
    cache.insert(cache.root, (1,), 5)
    assert pages(cache, (1,), (2,)) == [5, 1]


def test_broken_contracts_are_caught():
    cache = PrefixCache()
    fill(cache, [(1,), (2,)])
    cache.set_idle(1)
    with pytest.raises(AssertionError, match="page 1 is idle"):
        cache.discard(1)
    with pytest.raises(AssertionError, match="unpinned once too often"):
        cache.unpin(cache.root)
    cache = PrefixCache()
    fill(cache, [(1,)])
    with pytest.raises(AssertionError, match="page 0 holds the tokens of another prefix"):
        fill(cache, [(2,)])
    with pytest.raises(AssertionError, match="other pages are idle"):
        cache.check(idle_pages=(0,))


# What the scheduler makes of it. Prompts of `add` begin alike; pages have 4 tokens.


def caching(**changes):
    return make_scheduler(enable_prefix_caching=True, **changes)


def test_second_request_computes_what_the_first_has_not():
    scheduler = caching()
    first = add(scheduler, "a", 10, max_tokens=1)
    step(scheduler)
    second = add(scheduler, "b", 11, max_tokens=2)
    plan = step(scheduler)
    assert plan.num_scheduled_tokens == {"b": 3}
    assert plan.new_requests[0].num_computed_tokens == 8
    assert plan.new_requests[0].page_ids[:2] == [0, 1]
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 8)
    memory = scheduler.memory
    assert (memory.num_query_tokens, memory.num_hit_tokens) == (21, 8)
    step(scheduler)
    assert_empty(scheduler)


def test_last_token_is_always_computed():
    scheduler = caching()
    add(scheduler, "a", 8, max_tokens=1)
    step(scheduler)
    request = add(scheduler, "b", 8, max_tokens=1)
    assert step(scheduler).num_scheduled_tokens == {"b": 4}
    assert request.num_cached_tokens == 4


def test_running_requests_share_and_pages_come_back_with_the_last():
    scheduler = caching()
    add(scheduler, "a", 9)
    step(scheduler)
    add(scheduler, "b", 9)
    step(scheduler)
    assert [scheduler.memory.allocator.ref_count(page) for page in (0, 1)] == [2, 2]
    scheduler.abort_requests("a")
    assert [scheduler.memory.allocator.ref_count(page) for page in (0, 1)] == [1, 1]
    scheduler.abort_requests("b")
    assert (scheduler.memory.allocator.num_used, scheduler.memory.allocator.num_idle) == (0, 2)
    assert_empty(scheduler)


def test_next_turn_of_a_chat_hits_what_was_sampled():
    scheduler = caching()
    first = add(scheduler, "a", 6, max_tokens=7)
    while not first.is_finished:
        step(scheduler)
    second = add(scheduler, "b", (*first.token_ids, 1, 2, 3))
    step(scheduler)
    assert second.num_cached_tokens == 12, "13 tokens, of which the last was never computed"


def test_other_beginning_is_no_hit():
    scheduler = caching()
    add(scheduler, "a", 12, max_tokens=1)
    step(scheduler)
    other = add(scheduler, "b", (1, *range(101, 112)))
    step(scheduler)
    assert other.num_cached_tokens == 0


def test_only_computed_pages_are_hit():
    scheduler = caching(max_num_batched_tokens=10)
    add(scheduler, "a", 20)
    request = add(scheduler, "b", 20)
    assert step(scheduler).num_scheduled_tokens == {"a": 10}
    plan = step(scheduler)
    assert plan.num_scheduled_tokens == {"a": 10}
    assert step(scheduler).num_scheduled_tokens == {"a": 1, "b": 4}
    assert request.num_cached_tokens == 16


def test_resumed_request_hits_its_own_pages_and_is_counted_once():
    scheduler = caching(num_pages=4)
    add(scheduler, "a", 7, max_tokens=9)
    b = add(scheduler, "b", tuple(range(7)), max_tokens=9)
    step(scheduler)
    step(scheduler)
    plan = step(scheduler)
    assert plan.preempted_request_ids == ("b",)
    scheduler.abort_requests("a")
    plan = step(scheduler)
    assert plan.new_requests[0].num_computed_tokens in (4, 8)
    assert b.num_cached_tokens == 0
    assert scheduler.memory.num_query_tokens == 14
    assert scheduler.memory.num_hit_tokens == 0


def test_request_that_skips_the_cache_computes_all_and_serves_others():
    scheduler = caching()
    add(scheduler, "a", 10, max_tokens=1)
    step(scheduler)
    request = add(scheduler, "b", 18, max_tokens=1, skip_prefix_cache=True)
    assert step(scheduler).num_scheduled_tokens == {"b": 18}
    assert request.num_cached_tokens == 0
    assert scheduler.memory.num_query_tokens == 10
    after = add(scheduler, "c", 18, max_tokens=1)
    step(scheduler)
    assert after.num_cached_tokens == 16


def test_pages_of_a_failed_request_are_no_longer_hit():
    scheduler = caching(max_num_batched_tokens=8)
    request = add(scheduler, "a", 12)
    step(scheduler)
    assert scheduler.memory.cache.num_pages == 2
    scheduler.update_from_output(scheduler.schedule(), {}, failed={"a": "NaN"})
    assert request.status is RequestStatus.FINISHED_ERROR
    assert scheduler.memory.cache.num_pages == 0
    after = add(scheduler, "b", 12)
    step(scheduler)
    assert after.num_cached_tokens == 0


def test_reset_is_refused_while_requests_run_unless_asked():
    scheduler = caching()
    running = add(scheduler, "a", 9)
    step(scheduler)
    waiting = add(scheduler, "b", 9)
    assert not scheduler.reset_prefix_cache()
    assert running.status is RequestStatus.RUNNING
    assert scheduler.memory.cache.num_pages == 2
    assert scheduler.reset_prefix_cache(preempt_running=True)
    scheduler.check()
    assert scheduler.memory.cache.num_pages == 0
    assert scheduler.memory.allocator.num_free == 64
    plan = step(scheduler)
    assert plan.num_scheduled_tokens == {"a": 10, "b": 9}, "nothing old was hit"
    assert plan.preempted_request_ids == ("a",)
    assert (running.output_token_ids, waiting.output_token_ids) == ([TOKEN] * 2, [TOKEN])


def test_reset_after_all_have_finished_drops_their_pages():
    scheduler = caching()
    add(scheduler, "a", 9, max_tokens=1)
    step(scheduler)
    assert scheduler.reset_prefix_cache()
    request = add(scheduler, "b", 9, max_tokens=1)
    step(scheduler)
    assert request.num_cached_tokens == 0


def test_idle_pages_stay_where_they_are():
    scheduler = caching(num_pages=16)
    add(scheduler, "a", 12, max_tokens=1)
    step(scheduler)
    assert scheduler.memory.allocator.num_idle == 3
    add(scheduler, "b", tuple(range(5)), max_tokens=4)
    plan = step(scheduler)
    assert plan.new_requests[0].page_ids == [3, 4]
    assert plan.page_moves.copies == ()
    assert step(scheduler).page_moves.copies == ()
    again = add(scheduler, "c", 13, max_tokens=1)
    plan = step(scheduler)
    assert plan.new_requests[0].page_ids[:3] == [0, 1, 2], "a hit is used where it is"
    assert plan.page_moves.copies == ()
    assert again.num_cached_tokens == 12


def test_common_beginning_outlives_the_ends():
    scheduler = caching(num_pages=4)
    add(scheduler, "a", 12, max_tokens=1)
    step(scheduler)
    add(scheduler, "b", (1, 2, 3, 4, 5), max_tokens=1)
    step(scheduler)  # two pages: the free one, and that of the end of a's prompt
    after = add(scheduler, "c", 13, max_tokens=1)
    step(scheduler)
    assert after.num_cached_tokens == 8


def forking(scheduler):
    """Two requests with one prompt, of which the second is to be given a copy of its last page."""
    for name in "ab":
        add(scheduler, name, 10, group="g")
    step(scheduler)


def test_shutdown_forgets_what_pages_hold():
    scheduler = caching(num_pages=8)
    add(scheduler, "z", 9, max_tokens=1)
    step(scheduler)
    forking(scheduler)
    assert len(scheduler.schedule().page_moves.copies) == 1
    scheduler.shutdown()
    assert scheduler.memory.allocator.num_free == 8
    plan = scheduler.schedule()
    assert (set(plan.finished_request_ids), plan.page_moves.copies) == ({"a", "b"}, ())


def test_dropped_plan_has_its_copies_planned_again():
    scheduler = caching(num_pages=8)
    forking(scheduler)
    first, second = (scheduler.schedule().page_moves.copies for _ in range(2))
    assert first == second == ((2, 3),)
