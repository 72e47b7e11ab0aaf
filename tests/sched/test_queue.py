"""Order of the waiting requests under both policies."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folojax.sched.queue import POLICIES, WaitingQueue
from folojax.sched.request import Request, StopRule


def make_request(name: str, priority: int = 0, arrival_index: int = 0) -> Request:
    return Request(name, (1,), StopRule(max_tokens=1), priority, arrival_index=arrival_index)


# What to do, to a request of which priority.
actions = st.lists(
    st.tuples(st.sampled_from(["add", "put back", "take", "remove"]), st.integers(0, 3)),
    max_size=40,
)


@given(actions, st.sampled_from(POLICIES))
def test_the_queue_is_a_sorted_list(actions, policy):
    queue = WaitingQueue(policy)
    model: list[Request] = []
    taken: list[Request] = []
    for index, (action, number) in enumerate(actions):
        if action == "add":
            model.append(make_request(str(index), number, index))
            queue.add(model[-1])
        elif action == "put back" and taken:
            model.append(taken.pop())
            queue.add(model[-1])
        elif model and action == "take":
            taken.append(model.pop(0))
            assert next(iter(queue)) is taken[-1]
            queue.remove([taken[-1]])
        elif model:
            queue.remove([model.pop(number % len(model))])
        is_by_priority = policy == "priority"
        model.sort(key=lambda one: (one.priority if is_by_priority else 0, one.arrival_index))
        assert list(queue) == model
        assert len(queue) == len(model)


@pytest.mark.parametrize("policy", POLICIES)
def test_removing_a_stranger_is_an_error(policy):
    queue = WaitingQueue(policy)
    assert not queue
    with pytest.raises(AssertionError, match="'a' is not in the queue"):
        queue.remove([make_request("a")])
    queue.add(make_request("a"))
    with pytest.raises(AssertionError, match="'a' is not in the queue"):
        queue.remove([make_request("a")])
    assert len(queue) == 1


@pytest.mark.parametrize(("policy", "victim"), [("fcfs", 2), ("priority", 1)])
def test_whom_to_preempt(policy, victim):
    running = [make_request("a", 1, 0), make_request("b", 1, 2), make_request("c", 0, 1)]
    assert WaitingQueue(policy).least_urgent(running) is running[victim]
