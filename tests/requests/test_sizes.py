"""Sizes of requests: those that can never run are refused, at the border."""

import re

import pytest

from folojax.requests.validation import Validator
from folojax.sched.config import SchedulerConfig

LIMITS = SchedulerConfig(
    max_num_seqs=8, max_num_batched_tokens=100, max_model_len=64, num_pages=10, page_size=4
)
VALIDATOR = Validator(LIMITS, vocab_size=9, num_tokens=9, max_logprobs=5, tokenizer=None)


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens", "num_given", "text"),
    [
        (0, 1, 0, "prompt is empty"),
        (64, 1, 0, "prompt has 64 tokens; max_model_len is 64 .* at most 63 tokens or raise"),
        (5000, 1, 0, "prompt has 5,000 tokens"),
        (30, 12, 0, "prompt of 30 tokens, max_tokens 12.* 11 pages of 4 tokens; the pool has 10"),
        (63, 100, 0, "may need 16 pages"),
        (41, 0, 0, "prompt of 41 tokens, max_tokens 0.* 11 pages"),
        (5, 3, 3, "has 3 output tokens; with max_tokens 3 .* it can have 3: there is none to come"),
    ],
)
def test_requests_that_can_never_run_are_refused(
    prompt_len: int, max_tokens: int, num_given: int, text: str
) -> None:
    (problem,) = VALIDATOR.size_problems(prompt_len, max_tokens, num_given)
    assert re.search(text, problem)


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens", "num_given"), [(30, 11, 0), (40, 1, 0), (40, 0, 0), (5, 3, 2)]
)
def test_the_largest_that_fit_are_not(prompt_len: int, max_tokens: int, num_given: int) -> None:
    """The last of 41 tokens needs no K/V."""
    assert VALIDATOR.size_problems(prompt_len, max_tokens, num_given) == []
