"""What adapters cost: rows that have one each, rows that have none, and an engine without any.

    python scripts/measure/bench_lora.py                       SmolLM2-135M in float32, 32 rows
    python scripts/measure/bench_lora.py qwen3-8b --rows 64    true shapes, random bfloat16 weights

Two engines of one process share the weights; they take turns round by round, so that what else the
machine does meets all alike. A round is `--rows` requests of `--size` tokens in and out, greedy:

    off      an engine without enable_lora
    none     an engine with it, no request has an adapter
    many     the same engine; the requests have `--loras` adapters of rank `--rank` by turns

Before each round an adapter is updated, one is removed and another takes its place. Ratios are
medians of those of single rounds; `by_cpu` is the same of the process's own processor time, which
says more on a CPU that others use, too. A program compiled after the first round is a fault.
`--small` shrinks the model, to try the script.
"""

import argparse
import collections
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from gpu_common import SHAPES, Report, make_model

from folojax import LLM, LoRARequest, SamplingParams, init_lora

_COMPILED = "/jax/core/compile/backend_compile_duration"


class Comparison:
    """Both engines, and adapters that come and go."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.num_compiled = args, 0
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        limits: dict[str, Any] = {
            "max_model_len": 2 * args.size,
            "max_num_seqs": args.rows,
            "num_pages": args.rows * (2 * args.size // 64 + 2),
            "enable_prefix_caching": False,
            "warm_up": False,  # the first round compiles what it needs, and no more
        }
        room = {"enable_lora": True, "max_loras": args.loras, "max_lora_rank": args.rank}
        if args.model == "smollm2":
            self.off = LLM(dtype="float32", **limits)
        else:
            self.off = LLM(make_model(args.model, args.small), **limits)
        self.on = LLM((self.off.model, self.off.params), **limits, **room)
        shapes = jax.eval_shape(lambda: init_lora(jax.random.key(0), self.off.params, args.rank))
        self.rng = np.random.default_rng(0)
        self.trees = [jax.tree.map(self._normal, shapes) for _ in range(args.loras)]
        self.loras = [self.on.load_lora(f"{i}", tree) for i, tree in enumerate(self.trees)]
        self.num_made = len(self.loras)

    def _normal(self, shape: Any) -> np.ndarray:
        return 0.02 * self.rng.standard_normal(shape.shape, np.float32)

    def _on_duration(self, event: str, duration_secs: float, **_: Any) -> None:
        self.num_compiled += event == _COMPILED

    def change(self) -> tuple[float, float]:
        """An adapter is updated, another goes, a new one comes; seconds of the first and last."""
        first, *_, last = self.trees
        start = time.perf_counter()
        self.on.update_lora(self.loras[0].lora_name, last)
        updated = time.perf_counter()
        self.on.remove_lora(self.loras.pop(1).lora_name)
        self.loras.append(self.on.load_lora(f"{self.num_made}", first))
        self.num_made += 1
        return updated - start, time.perf_counter() - updated

    def run(self, kind: str) -> tuple[float, float]:
        """Seconds of the requests of a round, by the clock and of the processors."""
        args, llm = self.args, self.off if kind == "off" else self.on
        loras: list[LoRARequest | None] = [None] * args.rows
        if kind == "many":
            loras = [self.loras[row % len(self.loras)] for row in range(args.rows)]
        vocab_size = llm.model.config.vocab_size
        prompts = self.rng.integers(3, vocab_size, (args.rows, args.size)).tolist()
        params = SamplingParams(temperature=0, max_tokens=args.size, ignore_eos=True)
        clocks = time.perf_counter, time.process_time
        start = [clock() for clock in clocks]
        llm.generate(prompts, params, False, loras)
        seconds, cpu_seconds = (clock() - one for clock, one in zip(clocks, start, strict=True))
        return seconds, cpu_seconds


def main() -> None:
    """Compares, and prints a line for each kind."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", choices=["smollm2", *SHAPES], default="smollm2")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--size", type=int, default=64, help="tokens in, and tokens out")
    parser.add_argument("--loras", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="shrink the model of true shapes")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")
    args = parser.parse_args()
    if args.loras < 2:
        parser.error("--loras must be at least 2: one is updated, and another one goes")
    report = Report(device=jax.devices()[0].device_kind, jax=jax.__version__)
    print(report.about, flush=True)
    start = time.perf_counter()
    pair = Comparison(args)
    report.add(part="ready", seconds=time.perf_counter() - start)
    times = collections.defaultdict[str, list[tuple[float, float]]](list)
    changes: list[tuple[float, float]] = []
    kinds = ["off", "none", "many"]
    for number in range(args.rounds + 1):
        before = pair.num_compiled
        if number:
            changes.append(pair.change())
        for kind in kinds if number % 2 else kinds[::-1]:
            times[kind].append(pair.run(kind))
        compiled = pair.num_compiled - before
        report.add(
            part="round", number=number, compiled=compiled, **{k: times[k][-1][0] for k in kinds}
        )
        assert not number or not compiled, "a program was compiled when adapters came and went"
    for kind in kinds:
        found = np.array(times[kind][1:])
        ratios, by_cpu = (np.array(times["off"][1:]) / found).T
        report.add(
            part=kind,
            tokens_per_s=args.rows * args.size / float(np.median(found[:, 0])),
            of_off=float(np.median(ratios)),
            lowest=float(ratios.min()),
            highest=float(ratios.max()),
            by_cpu=float(np.median(by_cpu)),
        )
    updated, loaded = np.median(changes, axis=0).tolist()
    report.add(part="changes", update_lora_s=updated, load_lora_s=loaded)
    if args.json is not None:
        report.write(args.json)


if __name__ == "__main__":
    main()
