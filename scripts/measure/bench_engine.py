"""folojax under a workload: requests arrive on time, and the clock is read after every step."""

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from bench_ceilings import time_decode_steps
from bench_counters import EngineCounts, count_compilations, peak_memory_gib
from bench_metrics import Trace, serving_metrics
from bench_profile import Timeline, profile_steps, trace_run
from bench_workloads import BenchRequest, Workload

from folojax import LLM, SamplingClass, SamplingParams

WARM_UPS = ("plan", "rehearsal")


class Folojax:
    """An engine that runs a workload, everything compiled beforehand.

    Attributes:
        name: In the table.
        llm: The engine.
    """

    def __init__(
        self,
        name: str,
        make_llm: Callable[[], LLM],
        *,
        warm_up: str = "plan",
        has_separate_samples: bool = False,
        is_profiled: bool = False,
        is_watched: bool = False,
        trace_path: Path | None = None,
        decode_rows: int = 0,
    ) -> None:
        """Makes the engine.

        Args:
            name: In the table.
            make_llm: Loads and allocates.
            warm_up: "plan" compiles every shape that the engine may need, "rehearsal" what the
                workload does need, by running it once.
            has_separate_samples: Whether samples of one prompt are requests of their own.
            is_profiled: Whether rounds also tell the "step_shares" of phases.
            is_watched: Whether they tell the "timeline" of what the engine holds.
            trace_path: Gets a trace of one more run, which is not timed; None traces none.
            decode_rows: So many rows' decode steps are timed after each round; 0: none.
        """
        self.name = name
        self._warm_up = warm_up
        self._has_separate_samples = has_separate_samples
        self._is_profiled = is_profiled
        self._is_watched = is_watched
        self._trace_path = trace_path
        self._decode_rows = decode_rows
        start = time.perf_counter()
        with count_compilations() as self._compilations:
            self.llm = make_llm()
        self._load_s = time.perf_counter() - start

    def prepare(self, workload: Workload) -> dict[str, Any]:
        """Compiles; returns what that cost."""
        start = time.perf_counter()
        with count_compilations() as counts:
            if self._warm_up == "rehearsal":
                self._drive(workload)
            else:
                # No request of a workload asks for log-probabilities.
                self.llm.warm_up(_sampling_classes(workload), logprobs=False)
        warm_up_s = time.perf_counter() - start
        total = _sum(self._compilations, counts)
        if self._trace_path is not None:
            trace_run(self._trace_path, lambda: self._drive(workload))
        return {
            "load_s": self._load_s,
            "warm_up_s": warm_up_s,
            "num_executables": total.num_executables,
            "num_executables_from_disk": total.num_cached,
            "compile_s": total.compile_s,
            "cold_compile_s": total.cold_compile_s,
            **self._sizes(),
        }

    def run(self, workload: Workload) -> dict[str, Any]:
        """One timed round.

        Raises:
            RuntimeError: something was compiled in it: its times would be the compiler's.
        """
        before = EngineCounts.of(self.llm)
        with contextlib.ExitStack() as stack:
            compilations = stack.enter_context(count_compilations())
            stopwatch = stack.enter_context(profile_steps()) if self._is_profiled else None
            timeline = Timeline(self.llm) if self._is_watched else None
            start_s = time.perf_counter()
            traces, duration_s = self._drive(workload, timeline)
        if compilations.num_executables:
            raise RuntimeError(
                f"{self.name}: {compilations.num_executables} programs were compiled while "
                f"{workload.name} was timed: the warm-up by {self._warm_up} has missed them"
            )
        num_outputs = sum(trace.num_output_tokens for trace in traces)
        num_samples = sum(len(trace.token_times_s) for trace in traces)
        return {
            **serving_metrics(traces, duration_s),
            **EngineCounts.of(self.llm).since(before, num_outputs, num_samples),
            "compilations_timed": compilations.num_executables,
            "peak_memory_gib": peak_memory_gib(),
            **({"step_shares": stopwatch.shares()} if stopwatch else {}),
            **({"timeline": timeline.as_dict(start_s)} if timeline else {}),
            **self._decode_steps(workload),
        }

    def greedy(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """The likeliest tokens after each prompt."""
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        """Nothing is left to be given back."""

    def _sizes(self) -> dict[str, Any]:
        plan = self.llm.memory_plan
        return {
            "dtype": self.llm.config.quantization or str(jax.tree.leaves(self.llm.params)[0].dtype),
            "weights_gib": plan.weights_bytes / 2**30,
            "pool_gib": plan.pages_bytes / 2**30,
            "kv_bytes_per_token": plan.bytes_per_page / plan.page_size,
        }

    def _decode_steps(self, workload: Workload) -> dict[str, Any]:
        if not self._decode_rows:
            return {}
        num_tokens = 1 + max(max(request.prompt) for request in workload.requests)
        steps = time_decode_steps(self.llm, self._decode_rows, workload.longest, num_tokens)
        return {"decode_rows": self._decode_rows, **steps}

    def _drive(
        self, workload: Workload, timeline: Timeline | None = None
    ) -> tuple[list[Trace], float]:
        # What an earlier round has left would be a gift to this one.
        assert self.llm.reset_prefix_cache()
        if self._has_separate_samples:
            workload = workload.with_separate_samples()
        return drive(self.llm, workload, timeline)


def drive(
    llm: LLM, workload: Workload, timeline: Timeline | None = None
) -> tuple[list[Trace], float]:
    """Runs a workload from its first arrival to its last token.

    Args:
        llm: An engine without requests.
        workload: What it is to do.
        timeline: Looks at the engine after each step.

    Returns:
        A trace of each request, and the duration in seconds. A request that came while a step ran
        has arrived when it was due, not when the step was over.
    """
    pending = deque(enumerate(workload.requests))
    traces: list[Trace] = []
    open_traces: dict[str, Trace] = {}
    start = now = time.perf_counter()
    while pending or open_traces:
        while pending and _is_due(pending[0][1], now - start, open_traces.values()):
            index, request = pending.popleft()
            due = start + request.arrival_s if not request.waits_for_tokens else now
            trace = Trace(
                due, len(request.prompt), request.label, [[] for _ in range(request.num_samples)]
            )
            traces.append(trace)
            open_traces[str(index)] = trace
            llm.add_request(
                str(index), {"prompt_token_ids": request.prompt}, _sampling_params(request, index)
            )
        if not open_traces:
            time.sleep(max(0.0, start + pending[0][1].arrival_s - time.perf_counter()))
        outputs = llm.step() if open_traces else []
        now = time.perf_counter()
        if timeline is not None:
            timeline.look(now)
        for output in outputs:
            trace = open_traces[output.request_id]
            for times, sample in zip(trace.token_times_s, output.outputs, strict=True):
                times += [now] * (len(sample.token_ids) - len(times))
            if output.finished:
                trace.finish_s = now
                trace.has_failed = any(one.finish_reason == "error" for one in output.outputs)
                del open_traces[output.request_id]
    return traces, now - start


def _is_due(request: BenchRequest, passed_s: float, running: Any) -> bool:
    waits_for = request.waits_for_tokens
    return request.arrival_s <= passed_s and all(
        len(times) >= waits_for for trace in running for times in trace.token_times_s
    )


def _sampling_params(request: BenchRequest, index: int) -> SamplingParams:
    return SamplingParams(
        n=request.num_samples,
        temperature=1.0 if request.is_sampled else 0.0,
        seed=1000 * index if request.is_sampled else None,
        max_tokens=request.output_len,
        ignore_eos=True,
    )


def _sampling_classes(workload: Workload) -> Sequence[SamplingClass]:
    found = {
        SamplingClass.RANDOM if request.is_sampled else SamplingClass.GREEDY
        for request in workload.requests
    }
    return sorted(found)


def _sum(one: Any, other: Any) -> Any:
    left, right = dataclasses.asdict(one), dataclasses.asdict(other)
    return type(one)(**{key: left[key] + right[key] for key in left})
