"""How fast an engine of true shapes is ready and generates, as a user meets it: default options.

    python scripts/measure/gpu_serve.py qwen3-0.6b                     everything below
    python scripts/measure/gpu_serve.py qwen3-8b --parts ready nano rows
    python scripts/measure/gpu_serve.py qwen3-8b --parts rows prompts --quantization int4
    python scripts/measure/gpu_serve.py qwen3-8b --devices 2 --parts nano rows
    python scripts/measure/gpu_serve.py qwen3-0.6b --set data_parallel_size 2 --parts nano

Parts: `ready` (seconds until the engine is made, which is warm by then), `nano` (256 requests of
100-1,024 tokens in and out, three runs), `rows` (1, 8, 64 and 256 requests of 128 tokens in and
out), `floor` (decode steps of 1, 64 and 256 rows against the bytes that they have to move),
`prompts` (32 prompts of 512 tokens, one token out), `sampling` (64 requests of 128 in and out for
each kind of sampling), `structured` (64 requests, plain and with one of eight JSON schemas),
`profile` (where a run's time goes: seconds of the host by part of a step). Weights are
random, prompts too, and no prefix is seen twice. `--small` shrinks everything, to try the script
on a CPU.
"""

import argparse
import collections
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from gpu_common import SHAPES, Report, make_model, make_tokenizer, nano_requests
from jax.sharding import Mesh

from folojax import LLM, SamplingClass, SamplingParams, StructuredOutputsParams
from folojax.models.quantized.names import QUANTIZATIONS

_COMPILED = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT = "/jax/compilation_cache/cache_hits"

READ_BYTES_PER_S = 4.3e12  # of an H200, in large kernels

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.8},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
    "top-k, min-p": {"temperature": 0.8, "top_k": 50, "min_p": 0.05},
    "penalties": {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1},
    "log-probabilities": {"temperature": 0, "logprobs": 5},
}

_NAMES: dict[str, Any] = {"type": "array", "items": {"type": "string"}, "minItems": 2}
_PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "role": {"enum": ["author", "editor", "reader"]},
        "tags": _NAMES,
    },
    "required": ["name", "age", "role", "tags"],
    "additionalProperties": False,
}


def make_schema(number: int) -> dict[str, Any]:
    """An object with texts, numbers, names and other objects, and another one for each number."""
    field = {f"field_{number}": {"anyOf": [{"type": "number"}, {"type": "boolean"}, _NAMES]}}
    properties = _PERSON["properties"] | field | {"friends": {"type": "array", "items": _PERSON}}
    return _PERSON | {"properties": properties, "required": list(properties)}


class Serving:
    """One engine, and prompts that it has not seen."""

    def __init__(
        self, name: str, small: bool, report: Report, structured: bool = False, **options: Any
    ) -> None:
        self.name, self.small, self.report = name, small, report
        self.compiles: list[float] = []
        self.hits: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)
        model = make_model(name, small, options.get("mesh"))
        self.vocab_size = model[0].config.vocab_size
        start = time.perf_counter()
        limits: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 16} if small else {}
        if structured:
            limits |= {"tokenizer": make_tokenizer(self.vocab_size)}
        self.llm = LLM(model, **({"max_model_len": 2048, "max_num_seqs": 256} | limits | options))
        self.rng = np.random.default_rng(0)
        self._add(
            part="ready",
            seconds=time.perf_counter() - start,
            compiled=len(self.compiles) - len(self.hits),
            from_disk=len(self.hits),
            compile_s=sum(self.compiles),
            memory=str(self.llm.memory_plan),
        )

    def _on_duration(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILED:
            self.compiles.append(duration_secs)

    def _on_event(self, event: str, **_: Any) -> None:
        if event == _CACHE_HIT:
            self.hits.append(event)

    def _add(self, **figures: Any) -> None:
        self.report.add(model=self.name, **figures)

    def run(self, lengths: list[tuple[int, int]], **sampling: Any) -> float:
        """Seconds to generate for random prompts of these lengths, in and out."""
        prompts = [self.rng.integers(3, self.vocab_size, n).tolist() for n, _ in lengths]
        seeds: dict[str, Any] = {} if sampling.get("temperature") == 0 else {"seed": 1}
        params = [
            SamplingParams(max_tokens=most, ignore_eos=True, **seeds, **sampling)
            for _, most in lengths
        ]
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        given = [len(output.outputs[0].token_ids) for output in outputs]
        assert given == [most for _, most in lengths], "a request has other tokens than asked for"
        return seconds

    def check_nano(self, runs: int = 3) -> None:
        """The mix, as often as is said; for several engines that share requests, so many times."""
        lengths = [(len(p), n) for p, n in nano_requests(self.small, self.vocab_size, seed=0)]
        lengths *= self.llm.config.data_parallel_size
        for number in range(runs):
            self.compiles.clear()
            before = self.llm.metrics()
            seconds = self.run(lengths, temperature=0)
            after = self.llm.metrics()
            self._add(
                part="nano",
                run=number,
                seconds=seconds,
                tokens_per_s=sum(n for _, n in lengths) / seconds,
                steps=after.num_steps - before.num_steps,
                prefills=after.num_prefill_calls - before.num_prefill_calls,
                preemptions=after.num_preemptions - before.num_preemptions,
                compiles=len(self.compiles),
            )

    def check_rows(self, runs: int = 3) -> None:
        """Few requests."""
        size = 16 if self.small else 128
        for rows in (1, 8) if self.small else (1, 8, 64, 256):
            times = [self.run([(size, size)] * rows, temperature=0) for _ in range(runs)]
            best = float(np.median(times))
            self._add(part="rows", rows=rows, seconds=best, tokens_per_s=rows * size / best)

    def check_floor(self, runs: int = 3) -> None:
        """Decode steps behind 128 tokens, as a share of what moving their bytes would take.

        These are the weights, of experts those that so many rows meet by chance, the pages of all
        rows, and states, which are read and written.
        """
        size = 16 if self.small else 128
        for rows in (1, 8) if self.small else (1, 64, 256):
            first = [self.run([(size, 1)] * rows, temperature=0) for _ in range(runs + 1)]
            whole = [self.run([(size, size + 1)] * rows, temperature=0) for _ in range(runs + 1)]
            step_s = float(np.median(whole[1:]) - np.median(first[1:])) / size
            num_bytes = self._step_bytes(rows, size + size // 2)
            floor_s = num_bytes / READ_BYTES_PER_S
            self._add(
                part="floor",
                rows=rows,
                step_ms=step_s * 1e3,
                floor_ms=floor_s * 1e3,
                gigabytes=num_bytes / 1e9,
                share=floor_s / step_s,
            )

    def _step_bytes(self, rows: int, num_tokens: int) -> float:
        """That a decode step has to move, each row behind so many tokens."""
        setup = self.llm.engine.runner.setup
        config, layout = setup.model.config, setup.layout
        met = 1.0
        if config.num_experts:
            met -= (1 - config.num_experts_per_token / config.num_experts) ** rows
        total = 0.0
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.llm.params):
            name = str(getattr(path[-1], "key", ""))
            if name == "embed" and not config.tie_embeddings:
                continue  # of which rows are looked up
            total += leaf.nbytes * (met if name.startswith("experts_") else 1.0)
        total += rows * num_tokens * layout.bytes_per_page / layout.page_size
        return total + 2 * rows * layout.state_bytes / layout.num_states

    def check_prompts(self, runs: int = 3) -> None:
        """Prompts alone."""
        count, size = (2, 32) if self.small else (32, 512)
        times = [self.run([(size, 1)] * count, temperature=0) for _ in range(runs)]
        best = float(np.median(times))
        self._add(part="prompts", seconds=best, tokens_per_s=count * size / best)

    def check_sampling(self, runs: int = 3) -> None:
        """Each kind of sampling, interleaved."""
        size, rows = (16, 4) if self.small else (128, 64)
        times = collections.defaultdict(list)
        for _ in range(runs + 1):
            for kind, sampling in KINDS.items():
                times[kind].append(self.run([(size, size)] * rows, **sampling))
        greedy = float(np.median(times["greedy"][1:]))
        for kind, found in times.items():
            best = float(np.median(found[1:]))
            figures = {"tokens_per_s": rows * size / best, "of_greedy": greedy / best}
            self._add(part="sampling", kind=kind, **figures, first_s=found[0])

    def check_structured(self, runs: int = 5) -> None:
        """JSON by one of eight schemas, and plain; the same prompts and lengths, interleaved."""
        size, rows = (16, 4) if self.small else (128, 64)
        self.llm.warm_up([SamplingClass.GREEDY], logprobs=False, structured_outputs=True)
        prompts = self.rng.integers(3, self.vocab_size, (rows, size)).tolist()
        schemas = [StructuredOutputsParams(json=make_schema(row % 8)) for row in range(rows)]
        asked = [
            SamplingParams(temperature=0, max_tokens=size, structured_outputs=schema)
            for schema in schemas
        ]
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, asked, use_tqdm=False)
        first = time.perf_counter() - start
        lengths = [len(output.outputs[0].token_ids) for output in outputs]
        plain = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
        times = collections.defaultdict(list)
        for _ in range(runs):
            for kind, params in (("plain", plain), ("json", asked)):
                self.llm.reset_prefix_cache()
                start = time.perf_counter()
                self.llm.generate(prompts, params, use_tqdm=False)
                times[kind].append(time.perf_counter() - start)
        median = {kind: float(np.median(found)) for kind, found in times.items()}
        self._add(
            part="structured",
            tokens=sum(lengths),
            plain_tokens_per_s=sum(lengths) / median["plain"],
            json_tokens_per_s=sum(lengths) / median["json"],
            of_plain=median["plain"] / median["json"],
            first_s=first,
        )

    def check_profile(self) -> None:
        """Where the host's time goes in the mix."""
        lengths = [(len(p), n) for p, n in nano_requests(self.small, self.vocab_size, seed=0)]
        with _clocks(self.llm) as clocks:
            seconds = self.run(lengths, temperature=0)
        clocks["rest"] = seconds - sum(clocks.values())
        self._add(part="profile", **{f"{part}_s": value for part, value in clocks.items()})


@contextmanager
def _clocks(llm: LLM) -> Iterator[dict[str, float]]:
    """Seconds of the host by part of a step, calls by their kind; `wait` is for the device."""
    times: dict[str, float] = collections.defaultdict(float)

    def clocked(label: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                part = args[0].kind if label == "call" else label
                times[part] += time.perf_counter() - start

        return run

    scheduler, runner = llm.engine.scheduler, llm.engine.runner
    parts = [
        ("schedule", scheduler, "schedule"),
        ("update", scheduler, "update_from_output"),
        ("call", runner, "call"),
        ("wait", jax, "device_get"),
    ]
    patches = [
        mock.patch.object(owner, name, clocked(label, getattr(owner, name)))
        for label, owner, name in parts
    ]
    for patch in patches:
        patch.start()
    try:
        yield times
    finally:
        for patch in patches:
            patch.stop()


def main() -> None:
    """Measures the parts that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ["nano", "rows", "floor", "prompts", "sampling", "structured", "profile"]
    parser.add_argument("model", choices=list(SHAPES))
    parser.add_argument("--parts", nargs="+", choices=["ready", *parts], default=parts)
    parser.add_argument("--small", action="store_true", help="shrink everything")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="of the random weights")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="that share the layers")
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("FIELD", "VALUE"))
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")
    args = parser.parse_args()
    report = Report(device=jax.devices()[0].device_kind, jax=jax.__version__)
    print(report.about, flush=True)
    options: dict[str, Any] = {field: float(v) if "." in v else int(v) for field, v in args.set}
    options |= {"quantization": args.quantization}
    if args.devices > 1:
        options["mesh"] = Mesh(np.array(jax.devices()[: args.devices]), ("all",))
    structured = "structured" in args.parts
    serving = Serving(args.model, args.small, report, structured, **options)
    for part in args.parts:
        if part != "ready":
            getattr(serving, f"check_{part}")()
    if args.json is not None:
        report.write(args.json)


if __name__ == "__main__":
    main()
