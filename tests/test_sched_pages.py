"""Pages: all or nothing, lowest first, counted owners, and none lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folojax.sched.pages import PageAllocator, pages_for


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
    for action, number in actions:
        free = [page for page, count in enumerate(counts) if count == 0]
        used = [page for page, count in enumerate(counts) if count > 0]
        if action == "allocate":
            wanted = free[:number] if number <= len(free) else None
            assert allocator.allocate(number) == wanted
            for page in wanted or []:
                counts[page] = 1
        elif used:
            page = used[number % len(used)]
            getattr(allocator, action)([page])
            counts[page] += 1 if action == "share" else -1
        allocator.check()
        used = [page for page, count in enumerate(counts) if count > 0]
        assert [allocator.ref_count(page) for page in range(num_pages)] == counts
        assert allocator.num_used == len(used)
        assert allocator.num_free == num_pages - len(used)
        assert allocator.extent == max(used, default=-1) + 1


def test_lowest_free_page_goes_first():
    allocator = PageAllocator(6)
    assert allocator.allocate(4) == [0, 1, 2, 3]
    allocator.free([2, 0])
    assert allocator.allocate(3) == [0, 2, 4]
    assert allocator.extent == 5


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
    assert allocator.extent == 0


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


@pytest.mark.parametrize(
    ("attribute", "value", "text"),
    [
        ("_free", [1, 1, 2], "free twice"),
        ("_free", [0, 1, 2], "both free and in use: \\[0\\]"),
        ("_free", [1], "neither free nor in use: \\[2\\]"),
        ("_ref_counts", [1, -1, 0], "negative count: \\[1\\]"),
    ],
)
def test_check_finds_damage(attribute, value, text):
    allocator = PageAllocator(3)
    allocator.allocate(1)
    allocator.check()
    setattr(allocator, attribute, value)
    with pytest.raises(AssertionError, match=text):
        allocator.check()
