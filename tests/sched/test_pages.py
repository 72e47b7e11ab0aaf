"""Pages: all or nothing, the one freed last first, counted owners, and none lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folojax.sched.pages import PageAllocator, pages_for
from folojax.sched.prefix_cache import PrefixCache


@given(num_tokens=st.integers(0, 1000), page_size=st.integers(1, 64))
def test_pages_for_is_the_least_that_holds_them(num_tokens, page_size):
    num_pages = pages_for(num_tokens, page_size)
    assert num_pages * page_size >= num_tokens
    assert num_pages == 0 or (num_pages - 1) * page_size < num_tokens


@given(
    num_pages=st.integers(1, 20),
    actions=st.lists(
        st.tuples(st.sampled_from(["allocate", "share", "free"]), st.integers(0, 30)), max_size=60
    ),
)
def test_allocator_against_a_list_of_counts(num_pages, actions):
    allocator, counts = PageAllocator(num_pages), [0] * num_pages
    free = list(range(num_pages))  # the next one to go first
    for action, number in actions:
        used = [page for page, count in enumerate(counts) if count > 0]
        if action == "allocate":
            wanted = free[:number] if number <= len(free) else None
            assert allocator.allocate(number) == wanted
            for page in wanted or []:
                counts[page] = 1
                free.remove(page)
        elif used:
            page = used[number % len(used)]
            getattr(allocator, action)([page])
            counts[page] += 1 if action == "share" else -1
            if counts[page] == 0:
                free.insert(0, page)
        allocator.check()
        used = [page for page, count in enumerate(counts) if count > 0]
        assert [allocator.ref_count(page) for page in range(num_pages)] == counts
        assert allocator.num_used == len(used)
        assert allocator.num_free == num_pages - len(used) == len(free)


@given(
    num_pages=st.integers(1, 8),
    actions=st.lists(
        st.tuples(
            st.sampled_from(["allocate", "allocate", "leave", "hit", "copy", "step"]),
            st.integers(0, 8),
        ),
        max_size=60,
    ),
)
def test_cached_pages_are_kept_and_evicted_as_a_model_says(num_pages, actions):
    """Every page that is handed out is written, in the next step, with a number of its own."""
    cache = PrefixCache()
    allocator = PageAllocator(num_pages, cache)
    active: list[int] = []
    idle: dict[int, int] = {}  # page by number, the longest unused first
    free = list(range(num_pages))  # the next one to go first
    memory = [-1] * num_pages
    written: dict[int, int] = {}  # by page, in this step
    copied: dict[int, int] = {}  # the number that a page must hold by a copy
    for number, (action, size) in enumerate(actions):
        if action == "allocate":
            wanted = None
            if size <= len(free) + len(idle):
                for evicted in list(idle)[: max(size - len(free), 0)]:
                    free.insert(0, idle.pop(evicted))
                wanted, free = free[:size], free[size:]
            assert allocator.allocate(size) == wanted
            for page in wanted or []:
                active.append(page)
                written[page] = 100 * number + page
        elif action == "copy" and len(active) > 1:
            source, target = active[size % len(active)], active[-1]
            # Only what was computed in an earlier step can be copied.
            if source != target and source not in written and target in written:
                copied[target] = copied.get(source, memory[source])
                del written[target]
                allocator.copy(source, target)
        elif action == "leave" and active:
            page = active.pop(size % len(active))
            if page in written or page in copied:
                written.pop(page, None)
                copied.pop(page, None)
            elif not cache.holds(page) and hit(cache, [memory[page]]) == []:
                cache.insert(cache.root, (memory[page],), page)
            if cache.holds(page):
                idle[cache.prefix_of(page)[-1]] = page
            else:
                free.insert(0, page)
            allocator.free([page])
        elif action == "hit" and idle:
            kept = list(idle)[size % len(idle)]
            page = idle.pop(kept)
            assert hit(cache, [kept]) == [page], "an idle page stays where it is"
            allocator.share([page])
            active.append(page)
        elif action == "step":
            before = list(memory)
            for source, target in allocator.page_copies:
                memory[target] = before[source]
            allocator.forget_copies()
            for page, content in written.items():
                memory[page] = content
            assert all(memory[page] == content for page, content in copied.items())
            written, copied = {}, {}
            assert all(prefix == (memory[page],) for page, prefix in cache.prefixes())
        allocator.check()
        assert [hit(cache, [number]) for number in idle] == [[page] for page in idle.values()]
        assert allocator.num_idle == len(idle)
        assert allocator.num_used == len(active)
        assert allocator.num_free == len(free)


def test_page_freed_last_goes_first():
    allocator = PageAllocator(6)
    assert allocator.allocate(4) == [0, 1, 2, 3]
    allocator.free([0, 2])
    assert allocator.allocate(3) == [2, 0, 4]


def test_all_or_nothing():
    allocator = PageAllocator(3)
    assert allocator.allocate(2) == [0, 1]
    assert allocator.allocate(2) is None
    assert allocator.num_free == 1
    assert allocator.allocate(0) == []
    assert allocator.allocate(1) == [2]


def test_shared_page_returns_with_its_last_owner():
    allocator = PageAllocator(2)
    assert allocator.allocate(1) == [0]
    allocator.share([0])
    allocator.free([0])
    assert allocator.num_used == 1
    allocator.free([0])
    assert allocator.num_free == 2


def test_broken_contracts_are_caught():
    allocator = PageAllocator(2)
    with pytest.raises(AssertionError, match="page 0 is free already"):
        allocator.free([0])
    with pytest.raises(AssertionError, match="page 1 is free: it can't be shared"):
        allocator.share([1])
    with pytest.raises(AssertionError, match="-1 pages asked for"):
        allocator.allocate(-1)
    with pytest.raises(AssertionError, match="a pool of 0 pages"):
        PageAllocator(0)


def cached_pages(num_pages: int, tokens: list[int]) -> tuple[PageAllocator, PrefixCache]:
    """A pool whose pages 0, 1, … were filled with one token each, in a row, and then left."""
    cache = PrefixCache()
    allocator = PageAllocator(num_pages, cache)
    pages = allocator.allocate(len(tokens))
    assert pages is not None
    node = cache.root
    for page, token in zip(pages, tokens, strict=True):
        node = cache.insert(node, (token,), page)
    allocator.free(reversed(pages))
    allocator.check()
    return allocator, cache


def hit(cache: PrefixCache, tokens: list[int]) -> list[int]:
    return cache.match((token,) for token in tokens)[0]


def test_cached_pages_are_idle_and_become_active_where_they_are():
    allocator, cache = cached_pages(5, [7, 8, 9])
    assert (allocator.num_free, allocator.num_idle, allocator.num_used) == (2, 3, 0)
    allocator.share(hit(cache, [7, 8]))
    allocator.check()
    assert (allocator.num_free, allocator.num_idle, allocator.num_used) == (2, 1, 2)
    assert allocator.page_copies == ()


def test_idle_pages_stay_where_they_are_while_others_are_free():
    allocator, cache = cached_pages(6, [7, 8])
    assert allocator.allocate(4) == [2, 3, 4, 5]
    allocator.check()
    assert hit(cache, [7, 8]) == [0, 1]
    assert allocator.num_idle == 2
    assert allocator.page_copies == ()


def test_without_free_pages_the_least_recently_used_go():
    allocator, cache = cached_pages(4, [7, 8, 9])
    # One page was free, so one is evicted: the last of the prefix.
    assert allocator.allocate(2) == [2, 3]
    allocator.check()
    assert hit(cache, [7, 8, 9]) == [0, 1]
    assert allocator.allocate(3) is None
    assert hit(cache, [7, 8, 9]) == [0, 1], "nothing has changed"
    assert allocator.allocate(2) == [0, 1]
    allocator.check()
    assert hit(cache, [7]) == []
    assert allocator.page_copies == ()


def test_copy_of_a_page_that_is_still_to_be_copied_is_one_of_the_first():
    allocator = PageAllocator(4)
    allocator.allocate(3)
    allocator.copy(0, 1)
    allocator.copy(1, 2)
    assert set(allocator.page_copies) == {(0, 1), (0, 2)}
    allocator.check()
    allocator.forget_copies()
    assert allocator.page_copies == ()


def test_page_that_was_handed_on_is_copied_from_where_it_was():
    allocator = PageAllocator(3)
    allocator.allocate(2)
    allocator.copy(0, 1)
    allocator.free([0])
    assert allocator.allocate(2) == [0, 2]  # what page 0 held is read before it is written
    allocator.copy(1, 2)
    assert set(allocator.page_copies) == {(0, 1), (0, 2)}
    allocator.check()


def test_copied_away_and_back_is_no_copy():
    allocator = PageAllocator(2)
    allocator.allocate(2)
    allocator.copy(0, 1)
    allocator.free([0])
    assert allocator.allocate(1) == [0]
    allocator.copy(1, 0)
    assert allocator.page_copies == ((0, 1),)
    allocator.check()


def test_copy_into_a_page_that_is_left_is_dropped():
    allocator = PageAllocator(4)
    allocator.allocate(2)
    allocator.copy(0, 1)
    assert allocator.page_copies == ((0, 1),)
    allocator.free([1])
    assert allocator.page_copies == ()
    allocator.check()
    with pytest.raises(AssertionError, match="page 1 is not active"):
        allocator.copy(0, 1)


def test_drop_idle_frees_what_nobody_owns():
    allocator, cache = cached_pages(5, [7, 8, 9])
    allocator.share(hit(cache, [7]))
    allocator.drop_idle()
    allocator.check()
    assert (allocator.num_free, allocator.num_idle, allocator.num_used) == (4, 0, 1)
    assert hit(cache, [7, 8]) == [0]


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda a: a._ref_counts.__setitem__(1, -1), r"negative count: \[1\]"),
        (lambda a: a._ref_counts.__setitem__(0, 0), "3 pages are free, 0 idle and 0 active"),
        (lambda a: a._free.append(1), "2 pages are free, .* but counted as"),
        (lambda a: a._free.__setitem__(0, 1), "a page is free twice"),
        (lambda a: a._free.__setitem__(0, 0), r"missing or surplus: \[0, 2\]"),
        (lambda a: a._copies.update({2: 0}), "a copy is planned that nobody needs"),
    ],
    ids=["negative", "lost", "surplus", "twice", "missing", "copy"],
)
def test_check_finds_damage(damage, text):
    allocator = PageAllocator(3)
    allocator.allocate(1)
    allocator.check()
    damage(allocator)
    with pytest.raises(AssertionError, match=text):
        allocator.check()
