"""Is the engine right on an accelerator, and how far from the speed of its memory?

    python scripts/gpu_check.py right         against a CPU, and bfloat16 against float32
    python scripts/gpu_check.py bits          what leaves a row's bits alone
    python scripts/gpu_check.py attention     ways of reading the paged cache, one layer
    python scripts/gpu_check.py decode        whole steps
    python scripts/gpu_check.py prefill       whole calls, with cuDNN's attention and without
    python scripts/gpu_check.py nano          256 requests end to end
    python scripts/gpu_check.py peer          the same through transformers

Weights are random; shapes are the true ones. `--small` shrinks everything, to try the script
itself on a CPU. Each part prints a table; `--json OUT` keeps the figures.
"""

import argparse
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_common import SHAPES, Pages, Report, copy_bandwidth, make_model, seconds
from gpu_nano import check_nano
from gpu_prefill import check_prefill
from gpu_right import check_bits, check_right

from folojax import (
    EngineState,
    KVLayout,
    SampleInputs,
    SamplingClass,
    SamplingSpec,
    StepOutput,
    decode,
    greedy_rows,
    init_state,
    sample_tokens,
)
from folojax.state import DecodeInputs


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


def check_attention(small: bool, bandwidth: float, report: Report) -> None:
    """One layer of Qwen3 attention over a pool, each way, against the time to read the KV once."""
    layers, kv_heads, dim = 4, 8, 128
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
                report.add(
                    rows=rows,
                    groups=groups,
                    page_size=page_size,
                    way=name,
                    us=seconds(functools.partial(run, q, ks, vs, arrays)) / layers * 1e6,
                    floor_us=floor * 1e6,
                    temp_mb=_temp_bytes(run) / 1e6,
                    difference=float(np.abs(out - reference).max()),
                )


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


def check_decode(
    small: bool, name: str, sizes: list[int], page_size: int, bandwidth: float, report: Report
) -> None:
    """Whole decode steps of the engine's own function against weights and used KV read once."""
    module, params = make_model(name, small)
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if not module.config.tie_embeddings:
        weight_bytes -= params["embed"].nbytes  # only some rows are read
    for rows in (4,) if small else sizes:
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
        report.add(
            model=name,
            rows=rows,
            page_size=page_size,
            us=us,
            floor_us=floor,
            ratio=us / floor,
            tokens_per_s=rows / us * 1e6,
            temp_mb=_temp_bytes(run) / 1e6,
            cache_mb=layout.bytes_per_page * capacity / 1e6,
            compile_s=compile_s,
        )
        del state, run


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


def main() -> None:
    """Runs one part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ["attention", "decode", "prefill", "nano", "peer", "right", "bits"]
    parser.add_argument("part", choices=parts)
    parser.add_argument("--model", choices=list(SHAPES), default="qwen3-0.6b", help="its shape")
    parser.add_argument("--small", action="store_true", help="shrink everything")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64, 256], help="for decode")
    parser.add_argument("--page-size", type=int, default=128, help="for decode and prefill")
    parser.add_argument("--limit", type=float, default=150, metavar="S", help="for peer, seconds")
    parser.add_argument(
        "--set",
        nargs=2,
        action="append",
        default=[],
        metavar=("FIELD", "VALUE"),
        help="for nano, an integer field of EngineConfig",
    )
    parser.add_argument(
        "--decode-steps", type=int, nargs="+", default=[1], help="for nano, max_decode_steps"
    )
    parser.add_argument(
        "--overlap",
        choices=["on", "off"],
        nargs="+",
        default=["on"],
        help="for nano, async_scheduling",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")
    args = parser.parse_args()
    report = Report(part=args.part, flags=os.environ.get("XLA_FLAGS", ""))
    if args.part == "peer":  # leaves the memory of the card to PyTorch
        from gpu_peer import check_peer

        check_peer(args.small, args.model, args.limit, report)
    else:
        _run_part(args, report)
    if args.json is not None:
        report.write(args.json)


def _run_part(args: Any, report: Report) -> None:
    bandwidth = copy_bandwidth(args.small)
    report.about |= {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "bandwidth": bandwidth,
    }
    print("  ".join(f"{key}={value}" for key, value in report.about.items()))
    if args.part == "attention":
        check_attention(args.small, bandwidth, report)
    elif args.part == "decode":
        check_decode(args.small, args.model, args.rows, args.page_size, bandwidth, report)
    elif args.part == "prefill":
        check_prefill(args.small, args.model, args.page_size, report)
    elif args.part == "nano":
        options = {field: int(value) for field, value in args.set}
        overlaps = [overlap == "on" for overlap in args.overlap]
        steps = args.decode_steps
        check_nano(args.small, args.model, bandwidth, options, steps, overlaps, report)
    elif args.part == "right":
        check_right(args.small, report)
    else:
        check_bits(args.small, report)


if __name__ == "__main__":
    main()
