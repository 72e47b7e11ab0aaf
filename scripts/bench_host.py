"""What the host does in a step, and how long the device waits for it.

    python scripts/bench_host.py rows    host time of a step by rows, without a device
    python scripts/bench_host.py idle    share of the time in which the device has nothing to do

`rows` counts the time of the thread, so other load hardly disturbs it; `idle` runs the real model.
"""

import argparse
import statistics
import threading
import time
from typing import Any
from unittest import mock

import jax
from bench_stub import make_stub_llm, start_rows, without_device

from folojax import LLM

ROWS = (32, 64, 128, 256, 512, 1024)


def host_ms(rows: int, num_steps: int = 40) -> list[float]:
    """Milliseconds of thread time of decode steps with so many rows, without a device."""
    llm = make_stub_llm(
        page_size=64,
        num_pages=2 * rows,
        max_num_seqs=rows,
        max_num_batched_tokens=max(512, 4 * rows),
        max_model_len=128,
    )
    times = []
    with without_device(llm):
        prompts = [[3 + number % 100] * (1 + number % 30) for number in range(rows)]
        start_rows(llm, prompts, num_tokens=2 * num_steps + 16)
        for _ in range(num_steps):
            before = time.thread_time()
            llm.engine.step()
            times.append(1e3 * (time.thread_time() - before))
        assert llm.metrics().num_running == rows, "requests ended while they were measured"
        llm.engine.reset()
    return times


def idle_share(rows: int, is_async: bool, num_steps: int = 40) -> float:
    """Time from a step's last result to the next dispatch, over all of the time."""
    llm = LLM(max_num_seqs=rows, max_model_len=256, async_scheduling=is_async)
    runner = llm.engine.runner
    start_rows(llm, [[100 + number] * 16 for number in range(rows)], num_tokens=2 * num_steps + 16)
    ready: dict[int, float] = {}
    dispatched: list[tuple[float, float]] = []
    watchers = []
    call = runner.dispatch

    def dispatch(plan: Any) -> Any:
        begin = time.perf_counter()
        pending = call(plan)
        number = len(dispatched)
        dispatched.append((begin, time.perf_counter()))

        def watch() -> None:
            jax.block_until_ready([item.out for item in pending])
            ready[number] = time.perf_counter()

        watchers.append(threading.Thread(target=watch))
        watchers[-1].start()
        return pending

    with mock.patch.object(runner, "dispatch", dispatch):
        for _ in range(num_steps):
            llm.step()
        llm.engine.drain()
    for watcher in watchers:
        watcher.join()
    llm.engine.reset()
    idle = sum(
        # Until the dispatch has ended: its first calls may have given it work before.
        max(0.0, end - ready[number])
        for number, (_, end) in enumerate(dispatched[1:])
    )
    return idle / (max(ready.values()) - dispatched[0][0])


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["rows", "idle"])
    args = parser.parse_args()
    if args.what == "rows":
        for rows in ROWS:
            times = host_ms(rows)
            print(
                f"{rows:5} rows  median {statistics.median(times):.2f} ms  least {min(times):.2f}"
            )
        return
    for is_async in (True, False, True, False):
        share = idle_share(32, is_async)
        print(f"32 rows, async_scheduling={is_async}: device idle {share:.3f} of the time")


if __name__ == "__main__":
    main()
