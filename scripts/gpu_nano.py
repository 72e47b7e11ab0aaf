"""The `nano` workload end to end: how fast, and where the time goes."""

import collections
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
import numpy as np
from gpu_common import Report, make_model, nano_requests

from folojax import LLM, SamplingClass, SamplingParams, batch_metrics, layered, page_copies, step

_COMPILED = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT = "/jax/compilation_cache/cache_hits"


def check_nano(
    small: bool,
    name: str,
    bandwidth: float,
    options: dict[str, Any],
    decode_steps: Sequence[int],
    overlaps: Sequence[bool],
    report: Report,
) -> None:
    """Two runs of the same lengths and other tokens, for each number of steps with each overlap.

    Everything is compiled ahead of time in threads; engines of one process share it, so only the
    first of a kind is cold, and only if the cache of compiled programs was empty.
    """
    compiles, hits = _count_compiles()
    model = make_model(name, small)
    longest = 80 if small else 2048
    if not small:
        options = {"num_pages": 4608 if name == "qwen3-0.6b" else 2560} | options
    options = {"max_model_len": longest, "max_num_seqs": 256} | options
    for most_steps, is_overlapped in itertools.product(decode_steps, overlaps):
        about = {"model": name, "decode_steps": most_steps, "overlap": is_overlapped}
        llm = LLM(model, max_decode_steps=most_steps, async_scheduling=is_overlapped, **options)
        compiles.clear()
        hits.clear()
        start = time.perf_counter()
        num_executables = _warm_up(llm)
        report.add(
            **about,
            warm_up_s=time.perf_counter() - start,
            executables=num_executables,
            compiles=len(compiles),
            compile_s=sum(compiles),
            from_disk=len(hits),
        )
        for attempt in ("first", "second"):
            _run(llm, small, about | {"run": attempt}, bandwidth, compiles, report)
        llm.engine.sleep()
        del llm
        gc.collect()  # the next engine needs the memory


def _warm_up(llm: LLM) -> int:
    """Compiles what random prompts need: no pages are shared, nothing is scored."""
    runner = llm.engine.runner
    listed = runner.list_executables

    def needed(*args: Any) -> Iterator[Any]:
        return (one for one in listed(*args) if not one.shared_items)

    with mock.patch.object(runner, "list_executables", needed):
        return llm.warm_up([SamplingClass.GREEDY], logprobs=False)


def _run(
    llm: LLM,
    small: bool,
    about: dict[str, Any],
    bandwidth: float,
    compiles: list[float],
    report: Report,
) -> None:
    """All requests once, and where the time went."""
    config = llm.engine.runner.model.config
    requests = nano_requests(small, config.vocab_size, seed=0)
    rng = np.random.default_rng(len(report.results) + 1)  # no prefix is ever seen twice
    prompts = [rng.integers(3, config.vocab_size, len(p)).tolist() for p, _ in requests]
    sampling = [
        SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for _, length in requests
    ]
    compiles.clear()
    before = llm.metrics()
    with _clocks(llm) as clocks:
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        wall = time.perf_counter() - start
    after, batch = llm.metrics(), batch_metrics(outputs)
    floor = _floor_s(llm.engine.runner.params, config, requests) / bandwidth
    memory = jax.devices()[0].memory_stats() or {}
    report.add(
        **about,
        wall_s=wall,
        output_tokens_per_s=batch.num_output_tokens / wall,
        of_floor=floor / wall,
        mean_ttft_s=batch.mean_ttft_s,
        mean_tpot_ms=(batch.mean_tpot_s or 0) * 1e3,
        steps=after.num_steps - before.num_steps,
        prefill_calls=after.num_prefill_calls - before.num_prefill_calls,
        preemptions=batch.num_preemptions,
        compiles=len(compiles),
        compile_s=sum(compiles),
        peak_gb=memory.get("peak_bytes_in_use", 0) / 1e9,
    )
    clocks["rest of the host"] = wall - sum(clocks.values())
    report.add(run=about["run"], **{f"{key}_s": value for key, value in clocks.items()})


def _floor_s(params: Any, config: Any, requests: list[tuple[list[int], int]]) -> float:
    """Bytes that decoding must read: the weights once a step, each row's keys and values once."""
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if not config.tie_embeddings:
        weights -= params["embed"].nbytes
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2
    kv = sum(n * (len(prompt) + n / 2) * per_token for prompt, n in requests)
    return weights * max(n for _, n in requests) + kv


def _count_compiles() -> tuple[list[float], list[str]]:
    """Seconds of every program compiled or loaded from here on, and those that were loaded."""
    seconds: list[float] = []
    hits: list[str] = []

    def on_duration(event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILED:
            seconds.append(duration_secs)

    def on_event(event: str, **_: Any) -> None:
        if event == _CACHE_HIT:
            hits.append(event)

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    jax.monitoring.register_event_listener(on_event)
    return seconds, hits


@contextmanager
def _clocks(llm: LLM) -> Iterator[dict[str, float]]:
    """Where a run's time goes: seconds by part of a step."""
    times: dict[str, float] = collections.defaultdict(float)

    def clocked(label: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                times[label] += time.perf_counter() - start

        return run

    scheduler = llm.engine.scheduler
    parts = [
        ("schedule", scheduler, "schedule"),
        ("update", scheduler, "update_from_output"),
        ("prefill dispatch", layered, "_prefill"),
        ("decode dispatch", layered, "_decode"),
        ("decode steps dispatch", step, "decode_steps"),
        ("sample dispatch", step, "sample_tokens"),
        ("page copies", page_copies, "copy_pages"),
        ("wait", jax, "device_get"),
    ]
    patches = [
        mock.patch.object(o, name, clocked(label, getattr(o, name))) for label, o, name in parts
    ]
    for patch in patches:
        patch.start()
    try:
        yield times
    finally:
        for patch in patches:
            patch.stop()
