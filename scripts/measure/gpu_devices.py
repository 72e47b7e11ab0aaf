"""Engines whose layers several GPUs share: right, and what a step between devices costs.

    python scripts/measure/gpu_devices.py qwen3-8b                       everything below
    python scripts/measure/gpu_devices.py qwen3-8b --parts steps sums --devices 2

Parts: `alone` (the kernel that sums over devices, against what it should give, and NCCL beside it,
microseconds), `right` (tokens and log-probabilities against one device, in float32 with four layers
and in bfloat16 with all; a tight pool that preempts, and the prefix cache), `params` (whose arrays
an engine shares with a trainer, and what each device holds), `steps` (tokens a second of 1, 8 and
64 rows), `sums` (kernels of a step from a trace), `long` (some thousand steps with the same tokens
each time). Weights are random, shapes are the true ones; `--small` shrinks everything, to try the
script on forced devices of a CPU.

Exit code: 0; 1 if something is not right.
"""

import argparse
import collections
import functools
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_common import SHAPES, Report, make_model
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from folojax import LLM, RequestOutput, SamplingParams
from folojax.compile.programs import IN_GRAPH
from folojax.models.core import peer_sum

KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 40, "min_p": 0.02, "repetition_penalty": 1.1},
]


class Check:
    """The parts, for one model."""

    def __init__(self, args: argparse.Namespace, report: Report) -> None:
        self.args, self.report, self.is_right = args, report, True
        self.mesh = Mesh(np.array(jax.devices()[: args.devices]), ("all",))
        self.limits: dict[str, Any] = {
            "max_model_len": 128 if args.small else 2048,
            "max_num_seqs": 16 if args.small else 256,
            "warm_up": False,
        }
        self.rng = np.random.default_rng(0)
        self._llm: LLM | None = None

    def _over_all(self) -> LLM:
        """The engine over all devices, made once."""
        if self._llm is None:
            model = make_model(self.args.model, self.args.small, self.mesh)
            self._llm = LLM(model, mesh=self.mesh, **self.limits)
        return self._llm

    def _prompts(self, count: int, longest: int) -> list[list[int]]:
        common = self.rng.integers(3, 500, longest // 2).tolist()
        found = []
        for number in range(count):
            tokens = self.rng.integers(3, 500, int(self.rng.integers(2, longest // 2))).tolist()
            found.append(common + tokens if number % 2 else tokens)
        return found

    def check_alone(self) -> None:
        """Sums of 1 to 256 rows, many in one program."""
        group = peer_sum.open_peers(tuple(self.mesh.devices.flat))
        self.report.add(part="alone", group=group)
        count, width, repeats = self.mesh.size, 4096, 4 if self.args.small else 64
        spec = PartitionSpec("all")

        @functools.partial(jax.jit, static_argnames="way", compiler_options=IN_GRAPH)
        def run(x: jax.Array, way: Callable[..., Any]) -> jax.Array:
            def each(x: jax.Array) -> jax.Array:
                for _ in range(repeats):
                    x = way(x) * jnp.asarray(1 / count, x.dtype)
                return x

            return jax.shard_map(
                each, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False
            )(x)

        ways: dict[str, Callable[..., Any]] = {"nccl": _psum}
        if group:
            ways["kernel"] = lambda x: peer_sum.sum_over_peers(x, group)
        for rows in (1, 8) if self.args.small else (1, 8, 64, 128):
            given = self.rng.normal(size=(count * rows, width)).astype(np.float32)
            x = jax.device_put(jnp.asarray(given, jnp.bfloat16), NamedSharding(self.mesh, spec))
            for name, way in ways.items():
                times = []
                for _ in range(6):
                    start = time.perf_counter()
                    found = jax.block_until_ready(run(x, way))
                    times.append(time.perf_counter() - start)
                parts = np.asarray(x, np.float32).reshape(count, rows, width)
                wanted = np.broadcast_to(parts.mean(axis=0), parts.shape).reshape(found.shape)
                gap = float(np.abs(np.asarray(found, np.float32) - wanted).max())
                us = 1e6 * float(np.median(times[1:])) / repeats
                self.report.add(part="alone", rows=rows, way=name, us=us, largest_gap=gap)
                self.is_right &= gap < 0.05

    def check_right(self) -> None:
        """Against one device."""
        small = self.args.small
        prompts = self._prompts(16 if small else 64, 40 if small else 300)
        params = [
            SamplingParams(max_tokens=48, ignore_eos=True, seed=number, logprobs=1, **kind)
            if kind["temperature"]
            else SamplingParams(max_tokens=48, ignore_eos=True, logprobs=1, **kind)
            for number in range(len(prompts))
            for kind in [KINDS[number % len(KINDS)]]
        ]
        # Float32 is multiplied with ten bits of each number on a GPU unless JAX is told otherwise.
        jax.config.update("jax_default_matmul_precision", "highest")
        for name, dtype, layers in (("bfloat16", jnp.bfloat16, None), ("float32", jnp.float32, 4)):
            changes: dict[str, Any] = {"num_layers": layers} if layers and not small else {}
            model = make_model(self.args.model, small, dtype=dtype, **changes)
            pages: dict[str, Any] = {"num_pages": 64 if small else 2048}
            tight: dict[str, Any] = {"num_pages": 5 if small else 80}
            ways = {
                "one": LLM(model, **self.limits | pages),
                "all": LLM(model, mesh=self.mesh, **self.limits | pages),
                "all, tight": LLM(model, mesh=self.mesh, **self.limits | tight),
            }
            half = len(prompts) // 2  # what the second half finds of the first in the prefix cache
            found = {
                way: [
                    output
                    for part in (slice(half), slice(half, None))
                    for output in llm.generate(prompts[part], params[part], use_tqdm=False)
                ]
                for way, llm in ways.items()
            }
            tokens = [list(one.outputs[0].token_ids) for one in found["one"]]
            for way in ("all", "all, tight"):
                self._compare(name, way, found["one"], found[way])
                metrics = ways[way].metrics()
                self.report.add(
                    part="right",
                    way=way,
                    preemptions=metrics.num_preemptions,
                    prefix_hits=metrics.num_prefix_hit_tokens,
                )
            scores = [
                np.concatenate(
                    [s.logprobs for s in ways[way].score(prompts, tokens, use_tqdm=False)]
                )
                for way in ("one", "all")
            ]
            gap = np.abs(scores[0] - scores[1])
            self.report.add(
                part="right",
                dtype=name,
                scored=gap.size,
                mean=float(gap.mean()),
                p999=float(np.quantile(gap, 0.999)),
                largest=float(gap.max()),
            )
            self.is_right &= name != "float32" or float(gap.max()) < 1e-4

    def _compare(
        self, name: str, way: str, known: list[RequestOutput], found: list[RequestOutput]
    ) -> None:
        """How many requests get other tokens, and how close greedy calls were where they part."""
        different, gaps = 0, []
        for number, (one, other) in enumerate(zip(known, found, strict=True)):
            a, b = one.outputs[0], other.outputs[0]
            pairs = zip(a.token_ids, b.token_ids, strict=True)
            at = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
            if at is None:
                continue
            different += 1
            if KINDS[number % len(KINDS)]["temperature"] == 0:
                gaps.append(abs(_logprob(b, at) - _logprob(a, at)))
        self.report.add(
            part="right",
            dtype=name,
            way=way,
            requests=len(known),
            different=different,
            greedy=len(gaps),
            largest_gap=float(max(gaps, default=0.0)),
        )
        self.is_right &= name != "float32" or different == 0

    def check_params(self) -> None:
        """Arrays that lie as the engine's do are used as they are."""
        llm = self._over_all()
        theirs = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), llm.params)
        llm.update_params(theirs)
        leaves = zip(jax.tree.leaves(theirs), jax.tree.leaves(llm.params), strict=True)
        same = [_pieces(one) == _pieces(other) for one, other in leaves]
        self.report.add(part="params", lying_as_the_engine=f"{sum(same)} of {len(same)} shared")
        self.is_right &= all(same)
        del theirs
        _, trained = make_model(self.args.model, self.args.small, self.mesh)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            llm.update_params(trained)
            jax.block_until_ready(llm.params)
            times.append(time.perf_counter() - start)
        shared = {piece for leaf in jax.tree.leaves(trained) for piece in _pieces(leaf)}
        ours = [piece for leaf in jax.tree.leaves(llm.params) for piece in _pieces(leaf)]
        self.report.add(
            part="params",
            fully_sharded_update_s=times[-1],
            first_s=times[0],
            shared_pieces=f"{sum(piece in shared for piece in ours)} of {len(ours)}",
        )
        del trained
        for device in self.mesh.devices.flat:
            stats = device.memory_stats() or {}
            self.report.add(
                part="params",
                device=device.id,
                weights_gib=_bytes_on(llm.params, device) / 2**30,
                in_use_gib=stats.get("bytes_in_use", 0) / 2**30,
            )

    def check_steps(self) -> None:
        """Of few rows and many."""
        llm, size = self._over_all(), 16 if self.args.small else 128
        for rows in (1, 8) if self.args.small else (1, 8, 64):
            seconds = [self._run(llm, rows, size)[0] for _ in range(4)]
            best = float(np.median(seconds[1:]))
            self.report.add(
                part="steps", rows=rows, tokens_per_s=rows * size / best, first_s=seconds[0]
            )

    def _run(self, llm: LLM, rows: int, size: int) -> tuple[float, list[RequestOutput]]:
        vocab_size = llm.model_config.vocab_size
        prompts = self.rng.integers(3, vocab_size, (rows, size)).tolist()
        params = SamplingParams(temperature=0, max_tokens=size, ignore_eos=True)
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start, outputs

    def check_sums(self) -> None:
        """Kernels of a run of 64 rows, by name."""
        llm, size = self._over_all(), 16 if self.args.small else 64
        rows = 8 if self.args.small else 64
        self._run(llm, rows, size)
        with tempfile.TemporaryDirectory() as folder:
            before = llm.metrics().num_steps
            with jax.profiler.trace(folder):
                seconds, _ = self._run(llm, rows, size)
            steps = llm.metrics().num_steps - before
            (path,) = Path(folder).glob("plugins/profile/*/*.trace.json.gz")
            events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        names = {
            one["pid"]: one["args"]["name"]
            for one in events
            if one.get("ph") == "M" and one["name"] == "process_name"
        }
        times: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
        for one in events:
            where = names.get(one.get("pid"), "")
            if one.get("ph") == "X" and "GPU" in where and "args" in one:
                times[where, one["name"]].append(one["dur"])
        self.report.add(part="sums", steps=steps, ms_a_step=1e3 * seconds / steps)
        for where in sorted({place for place, _ in times}):
            mine = {name: found for (place, name), found in times.items() if place == where}
            for name, found in sorted(mine.items(), key=lambda item: -sum(item[1]))[:14]:
                self.report.add(
                    device=where.split(":")[-1],
                    kernel=name[:70],
                    a_step=len(found) / steps,
                    median_us=float(np.median(found)),
                    p10_us=float(np.quantile(found, 0.1)),
                    ms_a_step=sum(found) / 1e3 / steps,
                )

    def check_long(self) -> None:
        """The same requests again and again."""
        llm, most = self._over_all(), 32 if self.args.small else 1700
        prompts = self.rng.integers(3, 500, (8, 16)).tolist()
        params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True)
        known, start = None, time.perf_counter()
        before = llm.metrics().num_steps
        for _ in range(3):
            outputs = llm.generate(prompts, params, use_tqdm=False)
            tokens = [one.outputs[0].token_ids for one in outputs]
            self.is_right &= known is None or known == tokens
            known = tokens
        steps = llm.metrics().num_steps - before
        seconds = time.perf_counter() - start
        self.report.add(part="long", steps=steps, ms_a_step=1e3 * seconds / steps, ok=self.is_right)


def _logprob(sample: Any, at: int) -> float:
    """The log-probability of the token that a sample has in a place."""
    return sample.logprobs[at][sample.token_ids[at]].logprob


def _psum(x: jax.Array) -> jax.Array:
    return jax.lax.psum(x, "all")


def _pieces(leaf: jax.Array) -> list[tuple[int, int]]:
    return [(one.device.id, one.data.unsafe_buffer_pointer()) for one in leaf.addressable_shards]


def _bytes_on(params: Any, device: Any) -> int:
    leaves = jax.tree.leaves(params)
    parts = [one for leaf in leaves for one in leaf.addressable_shards]
    return sum(one.data.nbytes for one in parts if one.device == device)


def main() -> int:
    """Runs the parts that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ["alone", "right", "params", "steps", "sums", "long"]
    parser.add_argument("model", choices=list(SHAPES))
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--devices", type=int, default=2, metavar="N", help="2 if not given")
    parser.add_argument("--small", action="store_true", help="shrink everything")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")
    args = parser.parse_args()
    report = Report(device=jax.devices()[0].device_kind, jax=jax.__version__)
    print(report.about, flush=True)
    check = Check(args, report)
    for part in args.parts:
        getattr(check, f"check_{part}")()
    report.add(right=check.is_right)
    if args.json is not None:
        report.write(args.json)
    return 0 if check.is_right else 1


if __name__ == "__main__":
    sys.exit(main())
