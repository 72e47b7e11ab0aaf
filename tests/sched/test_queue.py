"""Order of the waiting requests under both policies."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folojax.sched.queue import FCFSQueue, PriorityQueue, RequestQueue, make_queue
from folojax.sched.request import Request, StopRule


def make_request(name: str, priority: int = 0, arrival_index: int = 0) -> Request:
    return Request(name, (1,), StopRule(max_tokens=1), priority, arrival_index=arrival_index)


def names(queue: RequestQueue) -> list[str]:
    return [request.request_id for request in queue]


def drain(queue: RequestQueue) -> list[str]:
    return [queue.pop().request_id for _ in range(len(queue))]


both = pytest.mark.parametrize("make", [FCFSQueue, PriorityQueue])

# What to do, to a request of which priority.
actions = st.lists(
    st.tuples(st.sampled_from(["add", "prepend", "pop", "remove"]), st.integers(0, 3)), max_size=40
)


@given(actions)
def test_fcfs_queue_is_a_list(actions):
    queue, model = FCFSQueue(), []
    for index, (action, which) in enumerate(actions):
        if action == "add":
            model.append(make_request(str(index)))
            queue.add(model[-1])
        elif action == "prepend":
            model.insert(0, make_request(str(index)))
            queue.prepend(model[0])
        elif model and action == "pop":
            assert queue.pop() is model.pop(0)
        elif model:
            queue.remove(model.pop(which % len(model)))
        assert list(queue) == model
        assert len(queue) == len(model)


@given(actions)
def test_priority_queue_is_a_sorted_list(actions):
    queue, model = PriorityQueue(), []
    for index, (action, number) in enumerate(actions):
        if action in ("add", "prepend"):
            request = make_request(str(index), number, index)
            getattr(queue, action)(request)
            model.append(request)
            model.sort(key=lambda request: (request.priority, request.arrival_index))
        elif model and action == "pop":
            assert queue.pop() is model.pop(0)
        elif model:
            queue.remove(model.pop(number % len(model)))
        assert list(queue) == model
        assert len(queue) == len(model)


@both
def test_two_adds_and_two_pops_in_order(make: Callable[[], RequestQueue]):
    queue = make()
    queue.add(make_request("a", arrival_index=0))
    queue.add(make_request("b", arrival_index=1))
    assert queue.peek().request_id == "a"
    assert drain(queue) == ["a", "b"]


@both
def test_empty_queue(make: Callable[[], RequestQueue]):
    queue = make()
    assert not queue
    assert len(queue) == 0
    assert list(queue) == []
    with pytest.raises(IndexError, match="empty"):
        queue.peek()
    with pytest.raises(IndexError, match="empty"):
        queue.pop()


def test_prepended_goes_first():
    queue = FCFSQueue()
    queue.add(make_request("a"))
    queue.prepend(make_request("b"))
    assert drain(queue) == ["b", "a"]


def test_prepend_many_keeps_their_order():
    queue = FCFSQueue()
    queue.add(make_request("c"))
    queue.prepend_many(iter([make_request("a"), make_request("b")]))
    assert drain(queue) == ["a", "b", "c"]


def test_priority_goes_before_arrival_also_for_prepended():
    queue = PriorityQueue()
    queue.add(make_request("low", priority=5, arrival_index=0))
    queue.add(make_request("late", priority=1, arrival_index=2))
    queue.prepend_many([make_request("lowest", 9, 3), make_request("early", 1, 1)])
    queue.prepend(make_request("urgent", priority=-1, arrival_index=4))
    assert names(queue) == ["urgent", "early", "late", "low", "lowest"]


@both
def test_remove_one_and_many(make: Callable[[], RequestQueue]):
    queue = make()
    requests = [make_request(name, arrival_index=i) for i, name in enumerate("abcde")]
    for request in requests:
        queue.add(request)
    queue.remove(requests[2])
    assert names(queue) == ["a", "b", "d", "e"]
    queue.remove_many([requests[0], requests[4]])
    assert drain(queue) == ["b", "d"]


@both
def test_removing_a_stranger_is_an_error(make: Callable[[], RequestQueue]):
    queue = make()
    queue.add(make_request("a"))
    twin = make_request("a")
    with pytest.raises(ValueError, match="'a' is not in the queue"):
        queue.remove(twin)
    assert len(queue) == 1


def test_make_queue():
    assert isinstance(make_queue("fcfs"), FCFSQueue)
    assert isinstance(make_queue("priority"), PriorityQueue)
    with pytest.raises(ValueError, match="policy is 'lifo'; it must be one of fcfs, priority"):
        make_queue("lifo")
