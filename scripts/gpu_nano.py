"""The `nano` workload end to end: through the engine, and through transformers on the same card."""

import collections
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
import numpy as np
from gpu_common import SHAPES, Report, make_model, nano_requests

from folojax import LLM, SamplingParams, batch_metrics, step

_COMPILED = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT = "/jax/compilation_cache/cache_hits"


def check_nano(
    small: bool, name: str, bandwidth: float, options: dict[str, Any], report: Report
) -> None:
    """Two runs of the same lengths and other tokens: with compiling, and warm.

    A cold run is cold only if the cache of compiled programs was empty.
    """
    compiles, hits = _count_compiles()
    module, params = make_model(name, small)
    longest = 80 if small else 2048
    if not small:
        options = {"num_pages": 4608 if name == "qwen3-0.6b" else 2560} | options
    llm = LLM((module, params), **{"max_model_len": longest, "max_num_seqs": 256} | options)
    for attempt in ("first", "second"):
        requests = nano_requests(small, module.config.vocab_size, seed=0)
        rng = np.random.default_rng(len(report.results) + 1)  # no prefix is ever seen twice
        prompts = [rng.integers(3, module.config.vocab_size, len(p)).tolist() for p, _ in requests]
        sampling = [
            SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
            for _, length in requests
        ]
        compiles.clear()
        hits.clear()
        before = llm.metrics()
        with _clocks(llm) as clocks:
            start = time.perf_counter()
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
            wall = time.perf_counter() - start
        after, batch = llm.metrics(), batch_metrics(outputs)
        floor = _floor_s(params, module.config, requests) / bandwidth
        memory = jax.devices()[0].memory_stats() or {}
        report.add(
            engine="folojax",
            model=name,
            run=attempt,
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
            from_disk=len(hits),
            peak_gb=memory.get("peak_bytes_in_use", 0) / 1e9,
        )
        clocks["rest of the host"] = wall - sum(clocks.values())
        report.add(run=attempt, **{f"{key}_s": value for key, value in clocks.items()})


def check_peer(small: bool, name: str, limit_s: float, report: Report) -> None:
    """The same lengths through transformers' continuous batching, random weights of the shape.

    What is not finished after `limit_s` is cut off; its tokens so far count.
    """
    import torch
    import transformers

    shape = dict(SHAPES[name])
    config = transformers.Qwen3Config(
        vocab_size=512 if small else shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        intermediate_size=128 if small else shape["intermediate_size"],
        num_hidden_layers=2 if small else shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"],
        max_position_embeddings=shape["max_position"],
        tie_word_embeddings=shape["tie_embeddings"],
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.eval()
    generation: Any = transformers.GenerationConfig(do_sample=False, eos_token_id=-1)
    requests = nano_requests(small, config.vocab_size, seed=0)
    with torch.no_grad():
        manager = model.init_continuous_batching(generation_config=generation)
        manager.warmup()
        manager.start()
        start = time.perf_counter()
        for index, (prompt, length) in enumerate(requests):
            manager.add_request(prompt, str(index), max_new_tokens=length, record_timestamps=True)
        seen: dict[str, list[float]] = {}
        unfinished = len(requests)
        while unfinished and time.perf_counter() - start < limit_s:
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    break
                continue
            seen[result.request_id] = list(result.timestamps or [])
            unfinished -= 1
        wall = time.perf_counter() - start
        for request_id, state in manager.batch_processor.scheduler.active_requests.items():
            seen[request_id] = list(state.timestamps or [])
        attention = model.config._attn_implementation
        manager.stop(block=True, timeout=5)
        manager.destroy()
    stamps = [times for times in seen.values() if times]
    per_token = [(t[-1] - t[0]) / (len(t) - 1) for t in stamps if len(t) > 1]
    report.add(
        engine=f"transformers {transformers.__version__}",
        attention=attention,
        model=name,
        wall_s=wall,
        unfinished=unfinished,
        output_tokens_per_s=sum(len(t) for t in stamps) / wall,
        mean_ttft_s=float(np.mean([t[0] - start for t in stamps])) if stamps else None,
        mean_tpot_ms=float(np.mean(per_token)) * 1e3 if per_token else None,
        peak_gb=torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0,
    )


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
        ("prefill dispatch", step, "prefill"),
        ("decode dispatch", step, "decode"),
        ("sample dispatch", step, "sample_tokens"),
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
