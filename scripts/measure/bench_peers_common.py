"""What peers share: each gets its best, and none is asked for what it cannot do."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

from bench_workloads import BenchRequest, Workload

Setting = TypeVar("Setting")


def check_workload(workload: Workload, needs_all_at_once: bool = False) -> None:
    """Refuses what peers do not run.

    Raises:
        ValueError: a request has several samples or waits for another's tokens; or, if all must be
            there at once, arrives later.
    """
    for request in workload.requests:
        if request.num_samples > 1 or request.waits_for_tokens:
            raise ValueError(f"{workload.name}: peers need one sample a request, and no waiting")
        if request.arrival_s and needs_all_at_once:
            raise ValueError(f"{workload.name}: static batches need all requests at once")


def best_order(requests: Sequence[BenchRequest]) -> list[BenchRequest]:
    """By arrival; the longest outputs first among those that come at once.

    So the last steps are as full as they can be. folojax is not told the lengths.
    """
    return sorted(requests, key=lambda request: (request.arrival_s, -request.output_len))


def halves(most: int) -> list[int]:
    """`most`, its half and its quarter."""
    return sorted({most, max(1, most // 2), max(1, most // 4)})


def sample_of(requests: Sequence[BenchRequest], num_rows: int) -> list[BenchRequest]:
    """A short run that is like the whole: a quarter of the output of as many as run at once."""
    return [
        dataclasses.replace(request, arrival_s=0.0, output_len=max(1, request.output_len // 4))
        for request in requests[:num_rows]
    ]


def quickest(settings: Sequence[Setting], try_one: Callable[[Setting], float]) -> Setting:
    """The setting whose try took the fewest seconds; a single one is not tried."""
    if len(settings) == 1:
        return settings[0]
    seconds = [try_one(setting) for setting in settings]
    return settings[seconds.index(min(seconds))]
