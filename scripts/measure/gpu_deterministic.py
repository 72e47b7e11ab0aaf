"""Deterministic mode on an accelerator: does it keep every bit, and what does it cost?

    python scripts/measure/gpu_deterministic.py qwen3-0.6b                 everything below
    python scripts/measure/gpu_deterministic.py qwen3-8b --layers 4 --parts bits

Parts: `bits` (256 requests, greedy and seeded, in many ways: at most 1, 2, 7, 64 and 256 at a time,
shuffled, budgets of 256 and 8,192 tokens, with and without prefix cache, twice, from a pool that
all of them at once do not fit; their scores; and default mode, which must differ), `loop`
(rollouts, their scores, new weights, again), `nano` (tokens a second of the mix of
scripts/measure/gpu_serve.py in both modes, in turn). Weights are random, shapes are the true ones;
`--small` shrinks everything, to try the script on a CPU.

Exit code: 0; 1 if a bit differs that must not, or none that must.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gpu_common import SHAPES, Report, make_model, nano_requests

from folojax import LLM, SamplingClass, SamplingParams

KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "logprobs": 0},
    {"temperature": 0},
    {"temperature": 0.8, "top_p": 0.9, "logprobs": 0},
    {"temperature": 0, "logprobs": 0},
    {"temperature": 0.9, "top_k": 40, "frequency_penalty": 0.5, "logprobs": 0},
]


MODES = ("deterministic", "default")


class Request(NamedTuple):
    """What is asked, again and again."""

    prompt: list[int]
    params: SamplingParams


class Found(NamedTuple):
    """What a request got: log-probabilities only where it asked for them."""

    tokens: list[int]
    logprobs: list[float] | None


@dataclasses.dataclass
class Way:
    """A way to run the requests."""

    name: str
    running: int  # at most at a time
    count: int  # of the requests
    seed: int = 0  # of their order; 0 is as they come


def make_requests(count: int, vocab_size: int, longest: int, most_out: int) -> list[Request]:
    """Of every kind; half of the prompts begin alike, which a prefix cache finds."""
    rng = np.random.default_rng(0)
    common = rng.integers(3, vocab_size, longest // 2).tolist()
    found = []
    for number in range(count):
        tokens = rng.integers(3, vocab_size, int(rng.integers(2, longest // 2))).tolist()
        kind = KINDS[number % len(KINDS)]
        seed: dict[str, Any] = {} if kind["temperature"] == 0 else {"seed": number}
        most = int(rng.integers(most_out // 2, most_out + 1))
        params = SamplingParams(max_tokens=most, ignore_eos=True, **kind, **seed)
        found.append(Request(common + tokens if number % 2 else tokens, params))
    return found


def run(llm: LLM, requests: Sequence[Request], way: Way) -> dict[int, Found]:
    """All requests of a way, and a new one for each that ends."""
    order = list(range(way.count))
    if way.seed:
        order = np.random.default_rng(way.seed).permutation(order).tolist()
    found: dict[int, Found] = {}
    waiting, running = order[::-1], 0
    while waiting or running:
        while waiting and running < way.running:
            number = waiting.pop()
            llm.add_request(str(number), requests[number].prompt, requests[number].params)
            running += 1
        for output in llm.step():
            if output.finished:
                (one,) = output.outputs
                logprobs = None
                if one.logprobs is not None:
                    both = zip(one.logprobs, one.token_ids, strict=True)
                    logprobs = [entry[token].logprob for entry, token in both]
                found[int(output.request_id)] = Found(list(one.token_ids), logprobs)
                running -= 1
    return found


def num_different(found: dict[int, Found], expected: dict[int, Found]) -> int:
    """Requests that got another token or another bit."""
    return sum(found[number] != expected[number] for number in found)


class Check:
    """The parts, for one model."""

    def __init__(self, args: argparse.Namespace, report: Report) -> None:
        self.args, self.report, self.is_right = args, report, True
        changes = {"num_layers": args.layers} if args.layers else {}
        self.model = make_model(args.model, args.small, **changes)
        self.limits: dict[str, Any] = {
            "max_model_len": 128 if args.small else 2048,
            "max_num_seqs": 32 if args.small else 256,
        }
        # One size of the pool, so that all engines share their programs.
        self.pool = 12 if args.small else 640

    def make(
        self,
        deterministic: bool = True,
        sampling: Sequence[SamplingClass] = tuple(SamplingClass),
        logprobs: bool | None = None,
        **options: Any,
    ) -> LLM:
        """An engine, warm for these kinds of sampling."""
        start = time.perf_counter()
        limits = {"warm_up": False} | self.limits | options
        llm = LLM(self.model, deterministic=deterministic, **limits)
        if not self.args.small:
            llm.warm_up(sampling, logprobs=len(sampling) > 1 if logprobs is None else logprobs)
        kind = llm.engine.runner.steps.kind
        self._add(part="ready", steps=kind, seconds=time.perf_counter() - start)
        return llm

    def check_bits(self) -> None:
        """What a request gets, in every way."""
        small = self.args.small
        count, most = (24, 32) if small else (self.args.requests, 256)
        sizes = (60, 16) if small else (900, 32)
        requests = make_requests(count, self.model[0].config.vocab_size, *sizes)
        few = min(count, self.args.few)
        wide: dict[str, Any] = {
            "num_pages": self.pool,
            "max_num_batched_tokens": 128 if small else 8192,
        }
        llm = self.make(**wide)
        expected = run(llm, requests, Way("all at once", most, count))
        for way in (
            Way("again", most, count),
            Way("one at a time", 1, few, 1),
            Way("two", 2, few, 2),
            Way("seven, shuffled", 7, count, 3),
            Way("sixty-four, shuffled", 64, count, 4),
        ):
            self._compare(llm, requests, way, expected)
        self._score(llm, requests, expected)
        preemptions = [llm.metrics().num_preemptions]
        del llm
        narrow: dict[str, Any] = {
            "max_num_batched_tokens": 32 if small else 256,
            "enable_prefix_caching": False,
        }
        llm = self.make(**wide | narrow)
        self._compare(llm, requests, Way("small budget, no prefix cache", most, count, 5), expected)
        self._score(llm, requests, expected)
        preemptions.append(llm.metrics().num_preemptions)
        self._add(part="bits", preemptions=str(preemptions))
        self.is_right &= sum(preemptions) > 0
        del llm
        llm = self.make(False, (SamplingClass.GREEDY,), logprobs=True, **wide)
        greedy = [one for one in requests if one.params.temperature == 0]
        both = [run(llm, greedy, Way("", running, len(greedy))) for running in (most, 7)]
        different = num_different(*both)
        self._add(part="control", way="default mode: seven instead of all", different=different)
        self.is_right &= different > 0 or small

    def check_loop(self) -> None:
        """Log-probabilities of samples against their scores, before each of some updates."""
        llm = self.make(num_pages=self.pool)
        vocab_size = self.model[0].config.vocab_size
        rng = np.random.default_rng(1)
        for number in range(3):
            prompts = rng.integers(3, vocab_size, (4 if self.args.small else 16, 20)).tolist()
            sampling = SamplingParams(n=4, max_tokens=12, seed=number, ignore_eos=True, record=True)
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
            pairs = [(one.prompt_token_ids, sample) for one in outputs for sample in one.outputs]
            tokens = [list(sample.token_ids) for _, sample in pairs]
            scores = llm.score([prompt for prompt, _ in pairs], tokens, use_tqdm=False)
            raw = [[entry.raw for entry in sample.record or []] for _, sample in pairs]
            gaps = np.abs(np.subtract(raw, [list(score.logprobs) for score in scores]))
            mean = float(gaps.mean())
            self._add(part="loop", step=number, tokens=gaps.size, mean_log_ratio=mean)
            self.is_right &= mean == 0.0
            llm.update_params(_moved(llm.params, jax.random.key(number)))

    def check_nano(self) -> None:
        """Both modes, one after the other."""
        mix = nano_requests(self.args.small, self.model[0].config.vocab_size, seed=0)
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for _, n in mix]
        speeds: dict[bool, float] = {}
        for deterministic in self.args.modes:
            options: dict[str, Any] = {"num_pages": 64} if self.args.small else {}
            llm = self.make(deterministic, (SamplingClass.GREEDY,), **options)
            found: list[float] = []
            tokens: list[Any] = []
            for _ in range(self.args.runs):
                llm.reset_prefix_cache()
                start = time.perf_counter()
                outputs = llm.generate([prompt for prompt, _ in mix], params, use_tqdm=False)
                seconds = time.perf_counter() - start
                tokens.append([list(one.outputs[0].token_ids) for one in outputs])
                found.append(sum(n for _, n in mix) / seconds)
                self._add(part="nano", deterministic=deterministic, tokens_per_s=found[-1])
            speeds[deterministic] = float(np.median(found[1:] or found))
            if deterministic:
                self.is_right &= all(one == tokens[0] for one in tokens)
                self._begin_again(llm, mix, tokens[0])
            del llm
        if len(speeds) == 2:
            self._add(part="nano", ratio=speeds[True] / speeds[False])

    def _begin_again(self, llm: LLM, mix: Any, tokens: list[list[int]]) -> None:
        """The first tokens of some requests of the mix, fewer at a time."""
        few, most = (8, 4) if self.args.small else (64, 24)
        cut = [Found(one[:most], None) for one in tokens]
        params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True)
        requests = [Request(prompt, params) for prompt, _ in mix]
        expected = {n: one for n, one in enumerate(cut) if len(one.tokens) == most}
        for way in (Way("seven", 7, few, 1), Way("one", 1, few // 4, 2), Way("64", few, few, 3)):
            llm.reset_prefix_cache()
            self._compare(llm, requests, way, expected)

    def _compare(
        self, llm: LLM, requests: Sequence[Request], way: Way, expected: dict[int, Found]
    ) -> None:
        start = time.perf_counter()
        found = run(llm, requests, way)
        different, seconds = num_different(found, expected), time.perf_counter() - start
        self._add(
            part="bits", way=way.name, requests=len(found), different=different, seconds=seconds
        )
        self.is_right &= different == 0

    def _score(self, llm: LLM, requests: Sequence[Request], expected: dict[int, Found]) -> None:
        asked = [number for number, one in expected.items() if one.logprobs is not None]
        scores = llm.score(
            [requests[number].prompt for number in asked],
            [expected[number].tokens for number in asked],
            use_tqdm=False,
        )
        different = sum(
            list(score.logprobs) != expected[number].logprobs
            for number, score in zip(asked, scores, strict=True)
        )
        self._add(
            part="bits", way="scores of the samples", requests=len(asked), different=different
        )
        self.is_right &= different == 0

    def _add(self, **figures: Any) -> None:
        self.report.add(model=self.args.model, **figures)


@jax.jit
def _moved(params: Any, key: Any) -> Any:
    """Weights a little off, as after an update."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    moved = [
        (leaf + 0.01 * leaf * jax.random.normal(key, leaf.shape, jnp.float32)).astype(leaf.dtype)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


def main() -> int:
    """Runs the parts that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ["bits", "loop", "nano"]
    parser.add_argument("model", choices=list(SHAPES))
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--layers", type=int, metavar="N", help="instead of all")
    parser.add_argument("--requests", type=int, default=256, metavar="N", help="for bits")
    parser.add_argument(
        "--few", type=int, default=256, metavar="N", help="for bits, of one and two at a time"
    )
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="for nano")
    parser.add_argument("--mode", choices=MODES, help="for nano, the only one")
    parser.add_argument("--small", action="store_true", help="shrink everything")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")
    args = parser.parse_args()
    args.modes = [mode == "deterministic" for mode in ([args.mode] if args.mode else MODES)]
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
