"""Times and counts of requests, alone and together."""

import dataclasses
from typing import Any

import pytest

from folojax.requests.outputs import BatchMetrics, RequestMetrics, RequestOutput, batch_metrics


def metrics(**fields: Any) -> RequestMetrics:
    values: dict[str, Any] = {
        "arrival_time_s": 10.0,
        "first_scheduled_time_s": 10.5,
        "first_token_time_s": 11.0,
        "finish_time_s": 13.0,
        "num_output_tokens": 5,
        "num_preemptions": 0,
    }
    return RequestMetrics(**values | fields)


def output(one: RequestMetrics, prompt_len: int = 3) -> RequestOutput:
    return RequestOutput("id", None, list(range(prompt_len)), None, [], True, one)


def test_times_of_a_request() -> None:
    one = metrics()
    assert one.e2e_s == 3.0
    assert one.ttft_s == 1.0
    assert one.tpot_s == 0.5  # 2 s for the four tokens after the first
    assert one.tokens_per_s == pytest.approx(5 / 3)


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, None), (1, None), (2, 2.0), (3, 1.0)])
def test_time_per_token_needs_two_tokens(num_tokens: int, expected: float | None) -> None:
    assert metrics(num_output_tokens=num_tokens).tpot_s == expected


def test_a_request_without_a_token_has_no_time_to_it() -> None:
    one = metrics(first_token_time_s=None, num_output_tokens=0)
    assert one.ttft_s is None
    assert one.tpot_s is None
    assert one.tokens_per_s == 0.0


def test_a_request_that_took_no_time_has_a_rate() -> None:
    rate = metrics(finish_time_s=10.0).tokens_per_s
    assert rate is not None
    assert rate > 0


def test_a_request_that_goes_on_has_no_end() -> None:
    one = metrics(finish_time_s=None)
    assert one.ttft_s == 1.0
    assert one.e2e_s is one.tpot_s is one.tokens_per_s is None
    assert batch_metrics([output(one)]).duration_s == 0.0


def test_of_no_requests_all_is_zero() -> None:
    none = batch_metrics([])
    assert none == BatchMetrics(0, 0, 0, 0.0, None, None, 0)
    assert none.output_throughput == none.request_throughput == 0.0


def test_of_one_request_the_batch_is_that_request() -> None:
    batch = batch_metrics([output(metrics(num_preemptions=2))])
    assert batch == BatchMetrics(1, 3, 5, 3.0, 1.0, 0.5, 2)
    assert batch.output_throughput == metrics().tokens_per_s


def test_requests_of_all_kinds_are_summed_up() -> None:
    batch = batch_metrics(
        [
            output(metrics(), 3),
            output(metrics(arrival_time_s=8.0, num_preemptions=1), 4),
            output(metrics(finish_time_s=18.0, num_output_tokens=1), 5),
            # Aborted while it waited: it has no first token, and counts in no mean.
            output(
                metrics(
                    first_scheduled_time_s=None,
                    first_token_time_s=None,
                    finish_time_s=12.0,
                    num_output_tokens=0,
                    num_preemptions=2,
                ),
                6,
            ),
        ]
    )
    assert batch == BatchMetrics(
        num_requests=4,
        num_prompt_tokens=18,
        num_output_tokens=11,
        duration_s=10.0,  # from 8 to 18
        mean_ttft_s=5.0 / 3,  # of 1, 3 and 1
        mean_tpot_s=0.5,  # of 0.5 and 0.5
        num_preemptions=3,
    )
    assert batch.output_throughput == pytest.approx(1.1)
    assert batch.request_throughput == pytest.approx(0.4)


def test_the_order_of_requests_does_not_matter() -> None:
    outputs = [output(metrics(arrival_time_s=float(start))) for start in (9, 7, 8)]
    assert batch_metrics(outputs) == batch_metrics(outputs[::-1])


def test_outputs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        output(metrics()).finished = False  # type: ignore[misc]


def test_rates_leave_out_what_went_into_compiling() -> None:
    one = metrics(compile_s=1.5, first_token_compile_s=0.5)
    assert one.ttft_s == 1.0
    assert one.e2e_s == 3.0
    assert one.tpot_s == 0.25  # of the 2 s after the first token, 1 s was compiling
    assert one.tokens_per_s == pytest.approx(5 / 1.5)
    batch = batch_metrics([output(one), output(metrics(compile_s=0.5))])
    assert batch.compile_s == 1.5
    assert batch.duration_s == 3.0
    assert batch.output_throughput == pytest.approx(10 / 1.5)
    assert batch.request_throughput == pytest.approx(2 / 1.5)
