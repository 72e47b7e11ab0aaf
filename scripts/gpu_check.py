"""How far is a decode step on an accelerator from the speed of its memory?

    python scripts/gpu_check.py attention     ways of reading the paged cache, one layer
    python scripts/gpu_check.py decode        whole steps of Qwen3-0.6B and 8B shapes
    python scripts/gpu_check.py nano          256 requests end to end

Weights are random; shapes are the true ones. `--small` shrinks everything, to try the script
itself on a CPU. Each part prints a table; `--json OUT` keeps the figures.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from folojax import (
    LLM,
    EngineState,
    KVLayout,
    SampleInputs,
    SamplingClass,
    SamplingParams,
    SamplingSpec,
    StepOutput,
    batch_metrics,
    decode,
    greedy_rows,
    init_state,
    sample_tokens,
)
from folojax.models.config import ModelConfig
from folojax.models.llama import Llama, init_params
from folojax.state import DecodeInputs

QWEN3: dict[str, Any] = {
    "architecture": "Qwen3ForCausalLM",
    "vocab_size": 151936,
    "num_kv_heads": 8,
    "head_dim": 128,
    "max_position": 40960,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "qkv_bias": False,
    "qk_norm": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": QWEN3
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_layers": 28,
        "num_heads": 16,
        "tie_embeddings": True,
    },
    "qwen3-8b": QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_layers": 36,
        "num_heads": 32,
        "tie_embeddings": False,
    },
}


def make_model(name: str, small: bool) -> tuple[Llama, Any]:
    """A random model in bfloat16, made on the device."""
    shape = SHAPES[name]
    if small:
        shape = shape | {"num_layers": 2, "vocab_size": 512, "intermediate_size": 128}
    module = Llama(ModelConfig(**shape), jnp.bfloat16)
    params = jax.jit(functools.partial(init_params, module))(jax.random.key(0))
    return module, jax.block_until_ready(params)


def seconds(call: Callable[[], Any], repeats: int = 5, inner: int = 10) -> float:
    """Median time of a call, several in a row so that dispatch overlaps."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(inner):
            out = call()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / inner)
    return float(np.median(times))


def copy_bandwidth(small: bool) -> float:
    """Bytes per second of a device copy, read and written."""
    x = jnp.zeros((1 << (20 if small else 30)) // 2, jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / seconds(lambda: copy(x))


class Pages:
    """A random batch: lengths up to `longest`, pages dealt in a random order."""

    def __init__(self, rows: int, longest: int, page_size: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.lengths = rng.integers(longest // 16, longest, rows)
        self.counts = self.lengths // page_size + 1
        self.rows = np.repeat(np.arange(rows), self.counts)
        self.index = np.concatenate([np.arange(count) for count in self.counts])
        self.num_pages = len(self.rows)
        self.ids = rng.permutation(self.num_pages)
        self.table = np.full((rows, self.counts.max()), self.num_pages, np.int32)
        self.table[self.rows, self.index] = self.ids

    def inputs(self, capacity: int) -> DecodeInputs:
        """The inputs of a greedy step over a cache of `capacity` pages."""
        rows = len(self.lengths)
        table: Any = np.where(self.table < self.num_pages, self.table, capacity)
        slot: Any = np.arange(rows, dtype=np.int32)
        position: Any = self.lengths.astype(np.int32)
        token: Any = np.full(rows, -1, np.int32)
        return jax.device_put(DecodeInputs(slot, token, position, table))


def attention_ways(page_size: int, lengths: Any) -> dict[str, Callable[..., Any]]:
    """Ways to attend with one query a row; all take (q, k, v, pages) and give [B, K, G, D]."""

    def masks(owner: Any, index: Any) -> Any:
        position = index[:, None] * page_size + jnp.arange(page_size)[None, :]
        return position <= jnp.append(lengths, -1)[owner][:, None]

    def combine(m: Any, total: Any, partial: Any, table: Any) -> Any:
        """Through the block table: [B, N] partials a row."""
        is_page = (table < m.shape[0])[:, :, None, None]
        rows = jnp.where(is_page, m.at[table].get(mode="clip"), -1e30)
        scale = jnp.exp(rows - rows.max(axis=1, keepdims=True)) * is_page
        numerator = (scale[..., None] * partial.at[table].get(mode="clip")).sum(1)
        return numerator / (scale * total.at[table].get(mode="clip")).sum(1)[..., None]

    def paged(q: Any, k: Any, v: Any, p: Any, *, how: str, scatter: bool) -> Any:
        dim = q.shape[3]
        mine = q.at[p["owner"]].get(mode="clip")
        if how == "dot":
            score = jnp.einsum("pkgd,pkds->pkgs", mine, k, preferred_element_type=jnp.float32)
        else:
            mine = mine.astype(jnp.float32)
            score = (mine[..., None] * k[:, :, None].astype(jnp.float32)).sum(3)
        valid = masks(p["owner"], p["index"])[:, None, None, :]
        score = jnp.where(valid, score * dim**-0.5, -1e30)
        if scatter:
            top = jax.ops.segment_max(score.max(-1), p["owner"], q.shape[0] + 1)
            weight = jnp.where(valid, jnp.exp(score - top[p["owner"]][..., None]), 0)
        else:
            m = score.max(-1)
            weight = jnp.where(valid, jnp.exp(score - m[..., None]), 0)
        if how == "dot":
            partial = jnp.einsum(
                "pkgs,pksd->pkgd", weight.astype(v.dtype), v, preferred_element_type=jnp.float32
            )
        else:
            partial = (weight[..., None] * v[:, :, None].astype(jnp.float32)).sum(3)
        if not scatter:
            return combine(m, weight.sum(-1), partial, p["table"]).astype(q.dtype)
        num, rows = q.shape[0], p["owner"]
        numerator = jax.ops.segment_sum(partial, rows, num + 1)[:num]
        total = jax.ops.segment_sum(weight.sum(-1), rows, num + 1)[:num]
        return (numerator / total[..., None]).astype(q.dtype)

    def gathered(q: Any, k: Any, v: Any, p: Any) -> Any:
        keys = k.at[p["table"]].get(mode="clip")
        values = v.at[p["table"]].get(mode="clip")
        score = jnp.einsum("bkgd,bnkds->bkgns", q, keys, preferred_element_type=jnp.float32)
        position = jnp.arange(score.shape[3] * page_size).reshape(1, 1, 1, -1, page_size)
        visible = position <= lengths[:, None, None, None, None]
        score = jnp.where(visible, score * q.shape[3] ** -0.5, -1e30)
        weight = jax.nn.softmax(score, axis=(3, 4)).astype(v.dtype)
        return jnp.einsum(
            "bkgns,bnksd->bkgd", weight, values, preferred_element_type=jnp.float32
        ).astype(q.dtype)

    return {
        "paged dot, table": functools.partial(paged, how="dot", scatter=False),
        "paged dot, scatter": functools.partial(paged, how="dot", scatter=True),
        "paged sum, table": functools.partial(paged, how="sum", scatter=False),
        "paged sum, scatter": functools.partial(paged, how="sum", scatter=True),
        "gather": gathered,
    }


def check_attention(small: bool, bandwidth: float) -> list[dict[str, Any]]:
    """One layer of Qwen3 attention over a pool, each way, against the time to read the KV once."""
    results, layers, kv_heads, dim = [], 4, 8, 128
    for rows, groups in ((4, 2),) if small else ((64, 2), (256, 2), (256, 4)):
        for page_size in (64, 128):
            pages = Pages(rows, 128 if small else 2048, page_size)
            keys = jax.random.split(jax.random.key(0), 2 * layers + 1)
            shape = (pages.num_pages, kv_heads, dim, page_size)
            ks = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:layers]]
            vs = [
                jax.random.normal(key, (*shape[:2], page_size, dim), jnp.bfloat16)
                for key in keys[layers:-1]
            ]
            q = jax.random.normal(keys[-1], (rows, kv_heads, groups, dim), jnp.bfloat16)
            owner, index = np.zeros((2, pages.num_pages), np.int32)
            owner[pages.ids], index[pages.ids] = pages.rows, pages.index
            arrays = {"owner": owner, "index": index, "table": pages.table}
            arrays = jax.device_put(arrays)
            floor = 4 * float(pages.lengths.sum() + rows) * kv_heads * dim / bandwidth
            reference = None
            for name, way in attention_ways(page_size, jnp.asarray(pages.lengths)).items():

                def chain(q: Any, ks: Any, vs: Any, p: Any, way: Any = way) -> Any:
                    for k, v in zip(ks, vs, strict=True):
                        q = q + way(q, k, v, p)
                    return q

                run = jax.jit(chain).lower(q, ks, vs, arrays).compile()
                out = np.asarray(run(q, ks, vs, arrays), np.float32)
                reference = out if reference is None else reference
                result = {
                    "rows": rows,
                    "groups": groups,
                    "page_size": page_size,
                    "way": name,
                    "us": seconds(functools.partial(run, q, ks, vs, arrays)) / layers * 1e6,
                    "floor_us": floor * 1e6,
                    "temp_mb": _temp_bytes(run) / 1e6,
                    "difference": float(np.abs(out - reference).max()),
                }
                results.append(result)
                _print(result)
    return results


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def greedy_step(
    params: Any, state: EngineState, inputs: DecodeInputs, *, model: Any
) -> tuple[EngineState, StepOutput]:
    """The engine's two calls of a step as one program."""
    cache, hidden = decode(params, state.cache, state.slots.tokens, inputs, model=model)
    rows = SampleInputs(inputs.slot, inputs.position + 1, greedy_rows(len(inputs.slot)))
    spec = SamplingSpec(SamplingClass.GREEDY)
    slots, out = sample_tokens(params, state.slots, hidden, rows, model=model, spec=spec)
    return EngineState(cache, slots), out


def check_decode(small: bool, bandwidth: float) -> list[dict[str, Any]]:
    """Whole decode steps of the engine's own function against weights and used KV read once."""
    results = []
    for name in SHAPES:
        module, params = make_model(name, small)
        weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        if not module.config.tie_embeddings:
            weight_bytes -= params["embed"].nbytes  # only some rows are read
        for rows in (4,) if small else (8, 64, 256):
            for page_size in (64, 128):
                pages = Pages(rows, 128 if small else 2048, page_size)
                capacity = -(-pages.num_pages // 64) * 64
                layout = KVLayout.of(module.config, jnp.bfloat16, (capacity,), page_size)
                state = init_state(layout, rows)
                inputs = pages.inputs(capacity)
                start = time.perf_counter()
                run = greedy_step.lower(params, state, inputs, model=module).compile()
                compile_s = time.perf_counter() - start
                kv_bytes = layout.bytes_per_page / page_size * float(pages.lengths.sum() + rows)
                us = seconds(_threaded(run, params, state, inputs), inner=20) * 1e6
                floor = (weight_bytes + kv_bytes) / bandwidth * 1e6
                text = run.as_text() or ""
                result = {
                    "model": name,
                    "rows": rows,
                    "page_size": page_size,
                    "us": us,
                    "floor_us": floor,
                    "ratio": us / floor,
                    "tokens_per_s": rows / us * 1e6,
                    "command_buffers": text.count("command_buffer") // 2,
                    "copies": text.count(" copy("),
                    "temp_mb": _temp_bytes(run) / 1e6,
                    "cache_mb": layout.bytes_per_page * capacity / 1e6,
                    "compile_s": compile_s,
                }
                results.append(result)
                _print(result)
                del state, run
        del params
    return results


def check_nano(small: bool, name: str) -> list[dict[str, Any]]:
    """256 requests, 100-1024 tokens in and out, through the engine."""
    module, params = make_model(name, small)
    rng = np.random.default_rng(0)
    count, low, high = (8, 10, 40) if small else (256, 100, 1024)
    prompts = [
        rng.integers(3, module.config.vocab_size, length).tolist()
        for length in rng.integers(low, high + 1, count)
    ]
    sampling = [
        SamplingParams(temperature=0, max_tokens=int(length), ignore_eos=True)
        for length in rng.integers(low, high + 1, count)
    ]
    options: dict[str, Any] = {"max_model_len": 2 * high, "max_num_seqs": count}
    if not small:
        options |= {"max_num_batched_tokens": 4096, "prefill_row_len": 128, "num_pages": 4608}
    llm = LLM((module, params), **options)
    results = []
    for attempt in ("cold", "warm"):
        start = time.perf_counter()
        before = llm.metrics()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        wall, after, batch = time.perf_counter() - start, llm.metrics(), batch_metrics(outputs)
        result = {
            "model": name,
            "attempt": attempt,
            "wall_s": wall,
            "output_tokens_per_s": batch.num_output_tokens / wall,
            "mean_ttft_s": batch.mean_ttft_s,
            "mean_tpot_ms": (batch.mean_tpot_s or 0) * 1e3,
            "steps": after.num_steps - before.num_steps,
            "prefill_calls": after.num_prefill_calls - before.num_prefill_calls,
            "preemptions": batch.num_preemptions,
        }
        results.append(result)
        _print(result)
    return results


def _threaded(run: Any, params: Any, state: Any, inputs: Any) -> Callable[[], Any]:
    """A step that hands its own state on, as the engine does."""

    def step() -> Any:
        nonlocal state
        state, out = run(params, state, inputs)
        return out

    return step


def _temp_bytes(compiled: Any) -> int:
    analysis = compiled.memory_analysis()
    return analysis.temp_size_in_bytes if analysis else 0


def _print(result: dict[str, Any]) -> None:
    cells = (
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in result.items()
    )
    print("  ".join(cells), flush=True)


def main() -> None:
    """Runs one part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["attention", "decode", "nano"])
    parser.add_argument("--model", choices=list(SHAPES), default="qwen3-0.6b", help="for nano")
    parser.add_argument("--small", action="store_true", help="shrink everything")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")
    args = parser.parse_args()
    device = jax.devices()[0]
    bandwidth = copy_bandwidth(args.small)
    print(f"{device.device_kind}, jax {jax.__version__}, copy {bandwidth / 1e12:.3f} TB/s")
    if args.part == "attention":
        results = check_attention(args.small, bandwidth)
    elif args.part == "decode":
        results = check_decode(args.small, bandwidth)
    else:
        results = check_nano(args.small, args.model)
    if args.json is not None:
        report = {"device": device.device_kind, "jax": jax.__version__, "bandwidth": bandwidth}
        args.json.write_text(json.dumps(report | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
