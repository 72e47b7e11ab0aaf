"""What is refused at the boundary, and what only looks too large."""

import pytest

from folojax.sched.request import RequestStatus
from tests.sched.helpers import add, assert_empty, make_config, make_scheduler, step


def test_largest_request_that_fits_the_pool_runs_to_its_end():
    scheduler = make_scheduler(num_pages=10)
    request = add(scheduler, "a", 30, max_tokens=11)  # the last of 41 tokens needs no K/V
    while scheduler.has_unfinished_requests():
        step(scheduler)
    assert len(request.output_token_ids) == 11


def test_duplicate_id_is_refused_while_its_owner_lives():
    scheduler = make_scheduler()
    add(scheduler, "a", 3, max_tokens=1)
    with pytest.raises(AssertionError, match="'a' is in use"):
        add(scheduler, "a", 3)
    step(scheduler)
    add(scheduler, "a", 3)


def test_prompt_over_budget_is_chunked_and_not_stuck():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, "a", 60, max_tokens=1)
    for _ in range(8):
        step(scheduler)
    assert_empty(scheduler)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"enable_chunked_prefill": False, "max_model_len": 128}, "100; without chunked prefill"),
        ({"max_num_seqs": 101}, "max_num_batched_tokens is 100; max_num_seqs is 101"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0; it must be an integer of at least 1"),
        ({"max_model_len": 1}, "max_model_len is 1; .* at least 2"),
        ({"num_pages": 2.0}, "num_pages is 2.0; it must be an integer"),
        ({"page_size": True}, "page_size is True; it must be an integer"),
        ({"long_prefill_token_threshold": -1}, "long_prefill_token_threshold is -1"),
        (
            {"enable_chunked_prefill": False, "long_prefill_token_threshold": 9},
            "which enable_chunked_prefill=False forbids",
        ),
        (
            {"scheduling_policy": "lifo"},
            "scheduling_policy is 'lifo'; it must be one of fcfs, priority",
        ),
        ({"page_size": 0, "num_pages": 0}, "num_pages is 0.*; page_size is 0"),
    ],
)
def test_config_errors(changes, text):
    with pytest.raises(ValueError, match=text):
        make_config(**changes)


def test_finish_reasons():
    assert {status.name: status.finish_reason for status in RequestStatus} == {
        "WAITING": None,
        "RUNNING": None,
        "PREEMPTED": None,
        "FINISHED_STOPPED": "stop",
        "FINISHED_LENGTH": "length",
        "FINISHED_ABORTED": "abort",
        "FINISHED_ERROR": "error",
    }


def test_check_finds_a_leaked_page():
    scheduler = make_scheduler()
    request = add(scheduler, "a", 8)
    step(scheduler)
    request.page_ids.pop()
    with pytest.raises(AssertionError, match="requests own 1 pages, 2 are in use"):
        scheduler.check()
