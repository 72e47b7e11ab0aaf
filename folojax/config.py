"""The engine's limits and sizes, checked once and frozen."""

import dataclasses
from typing import TypedDict

from folojax.backend import Backend
from folojax.models.quantized.quantize import QUANTIZATIONS
from folojax.sched.config import SchedulerConfig
from folojax.sched.pages import pages_for
from folojax.sched.queue import POLICIES

LOGPROBS_MODES = ("raw", "processed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine is built for.

    Attributes:
        max_model_len: Most tokens of one request, prompt and output; None takes the model's limit.
        max_num_seqs: Most requests that run at once. None is 32 on CPU, 256 elsewhere.
        max_num_batched_tokens: Most tokens computed in one step; longer prompts are cut in chunks.
            None is 512 on CPU, 4,096 elsewhere.
        page_size: Tokens in a KV page. None is 64.
        num_pages: Pages in the pool. None: as many as `memory_fraction` has room for. If that is
            None too, on CPU, room for `max_num_seqs` requests of 512 tokens and for one request
            of `max_model_len`.
        memory_fraction: Share of the device's memory that may be in use in all: by weights, pages
            and temporaries, and by what others hold, such as a training process's arrays; vLLM's
            gpu_memory_utilization. None is 0.9 on a GPU, of what JAX may have of it
            (XLA_PYTHON_CLIENT_MEM_FRACTION, 0.75 by default), and nothing on CPU, whose memory is
            not ours alone.
        scheduling_policy: "fcfs", or "priority" (smallest priority first, then arrival).
        enable_chunked_prefill: False schedules a prompt whole or not at all; the budget must then
            hold `max_model_len` tokens.
        long_prefill_token_threshold: Most tokens of one prompt in one step; 0 is no cap.
        prefill_row_len: Prompts are computed in rows of so many tokens: short rows waste less on
            padding, long rows copy fewer pages. None is 16 on CPU, 128 elsewhere.
        enable_prefix_caching: Pages of earlier requests serve later ones that begin alike.
        async_scheduling: The next step is planned and handed to the device before the last one is
            read, so that the device does not wait for the host. The tokens are the same; a request
            that ends by a token may have one more computed, which nobody sees.
        max_decode_steps: Most tokens that a request may get in one step. With more than 1, steps in
            which nobody waits and nobody's prompt is computed become one call of so many: less host
            work a token, the same tokens. Streamed tokens then come in bursts, a new request
            waits for the burst to end, and up to so many tokens more are computed for nobody. 1 in
            deterministic mode.
        num_host_pages: Pages of room in host memory for the K/V of preempted requests; 0: they are
            computed again.
        min_swap_tokens: From how many tokens on K/V are moved there and back rather than computed
            again. None: estimated from the sizes of model and cache and the kind of machine.
        watermark: Share of the pages that stays free when a request is admitted beside others, so
            that these can grow before anyone is preempted.
        check_integrity: After every step, pages, owners, slots and queues are checked against each
            other; an AssertionError tells of a fault of the engine. For those who look for one:
            it goes through everything.
        quantization: "int8" keeps the kernels of linear layers, token embedding and output in eight
            bits, a scale for each output, and multiplies them with inputs rounded to eight bits row
            by row (W8A8): a quarter of float32's memory, and faster with few rows. "int4" keeps
            linear layers in four bits and embedding and output in eight, in groups of 32 inputs,
            inputs rounded likewise: a fifth of the memory, and about twice as fast where a C++
            compiler is there to build the product for x86-64 (else XLA computes it, slowly, and a
            RuntimeWarning says so). docs/models.md has by how much, and how far log-probabilities
            move. Experts and the rest stay as they are. Only on CPU, and without gradients. None
            computes in the dtype.
        max_logprobs: Most alternatives that a request may have reported with a token; -1 is no cap.
        logprobs_mode: "raw" reports the model's own distribution, "processed" the one that was
            sampled from: after penalties, masks, temperature and truncation.
        deterministic: A request's tokens and log-probabilities are the same bits whatever its
            neighbours, the limits above (`page_size` aside), preemptions and cached prefixes; and
            `LLM.score` gives the bits that sampling gave. Every call then has one fixed shape,
            which costs time.
        seed: Of the seeds that requests without one are given.
        warm_up: Whether an engine compiles, when it is made, what greedy and random sampling need.
            None: on a GPU, where a program takes 10 s to compile, and a step would wait for each.
            `LLM.warm_up` compiles more, such as for penalties and log-probabilities.
        strict: A step that needs an executable outside the compile plan raises a RuntimeError, and
            its requests are aborted. Otherwise it waits for the compiler; after a warm-up the
            first such step is told in the log. For tests and measurements.
    """

    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    page_size: int | None = None
    num_pages: int | None = None
    memory_fraction: float | None = None
    scheduling_policy: str = "fcfs"
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    prefill_row_len: int | None = None
    enable_prefix_caching: bool = True
    async_scheduling: bool = True
    max_decode_steps: int = 1
    num_host_pages: int = 0
    min_swap_tokens: int | None = None
    watermark: float = 0.0
    check_integrity: bool = False
    quantization: str | None = None
    max_logprobs: int = 20
    logprobs_mode: str = "raw"
    deterministic: bool = False
    seed: int = 0
    warm_up: bool | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        problems = []
        for name, low in _LOWEST.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                problems.append(f"{name} is {value!r}; it must be an integer of at least {low}")
        fraction = self.memory_fraction
        if fraction is not None and not _is_fraction(fraction):
            problems.append(
                f"memory_fraction is {fraction!r}; it must be a number above 0 and at most 1"
            )
        elif fraction is not None and self.num_pages is not None:
            problems.append(
                f"num_pages is {self.num_pages!r} and memory_fraction is {fraction!r}; both size "
                "the pool: give one of them"
            )
        for name in _SWITCHES:
            is_open = name == "warm_up" and self.warm_up is None
            if not isinstance(getattr(self, name), bool) and not is_open:
                problems.append(f"{name} is {getattr(self, name)!r}; it must be True or False")
        if not _is_fraction(self.watermark, 0) or self.watermark >= 1:
            problems.append(
                f"watermark is {self.watermark!r}; it must be a number from 0 up to, and not, 1"
            )
        if self.logprobs_mode not in LOGPROBS_MODES:
            problems.append(
                f"logprobs_mode is {self.logprobs_mode!r}; "
                f"it must be one of {', '.join(LOGPROBS_MODES)}"
            )
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            problems.append(
                f"quantization is {self.quantization!r}; it must be None or one of "
                + ", ".join(QUANTIZATIONS)
            )
        if self.scheduling_policy not in POLICIES:
            problems.append(
                f"scheduling_policy is {self.scheduling_policy!r}; "
                f"it must be one of {', '.join(POLICIES)}"
            )
        if self.deterministic is True and _is_above_one(self.max_decode_steps):
            problems.append(
                f"deterministic is True and max_decode_steps is {self.max_decode_steps}; "
                "deterministic mode takes one step at a time: set max_decode_steps to 1"
            )
        if problems:
            raise ValueError("EngineConfig: " + "; ".join(problems))

    def pool_fraction(self, backend: Backend) -> float | None:
        """Share of the device's memory that sizes the pool; None: it is not sized by memory."""
        if self.num_pages is not None:
            return None
        if self.memory_fraction is None:
            return backend.memory_fraction
        return self.memory_fraction

    def resolve(
        self, max_position: int, backend: Backend, min_swap_tokens: int = 1
    ) -> "ResolvedConfig":
        """Fills in what depends on the model and the device, but for its memory.

        A pool that is sized by memory becomes the smallest that will do: one request of
        `max_model_len`. Whoever plans the memory puts the real number in its place.

        Args:
            max_position: Longest sequence the model was made for, in tokens.
            backend: That the engine runs on.
            min_swap_tokens: What takes the place of None.

        Raises:
            ValueError: `max_model_len` is beyond it, the limits contradict each other, or the
                quantisation is not for this platform.
        """
        if self.quantization is not None and backend.name != "cpu":
            raise ValueError(
                f"quantization is {self.quantization!r}, which is for CPU; this is "
                f"{backend.name}: leave it out"
            )
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.warm_up is None:
            fields["warm_up"] = backend.warms_up
        defaults = backend.defaults | {
            "max_model_len": max_position,
            "min_swap_tokens": min_swap_tokens,
        }
        for name, default in defaults.items():
            if fields[name] is None:
                fields[name] = default
        max_model_len = fields["max_model_len"]
        if max_model_len > max_position:
            raise ValueError(
                f"max_model_len is {max_model_len}, but the model was made for {max_position} "
                f"positions: lower EngineConfig.max_model_len to {max_position} or less"
            )
        if fields["num_pages"] is None:
            page_size = fields["page_size"]
            num_pages = pages_for(max_model_len, page_size)
            if self.pool_fraction(backend) is None:
                # Whole pages for each, or all of them running would not fit.
                usual = pages_for(min(max_model_len, 512), page_size)
                num_pages = max(num_pages, fields["max_num_seqs"] * usual)
            fields["num_pages"] = num_pages
        resolved = ResolvedConfig(**{**fields, "memory_fraction": None})
        resolved.scheduler()  # its checks
        return resolved


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedConfig(EngineConfig):
    """An EngineConfig in which nothing is left open; a fraction has become pages."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    num_pages: int
    prefill_row_len: int
    min_swap_tokens: int

    def scheduler(self) -> SchedulerConfig:
        """The scheduler's part."""
        return SchedulerConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            num_pages=self.num_pages,
            page_size=self.page_size,
            policy=self.scheduling_policy,
            enable_chunked_prefill=self.enable_chunked_prefill,
            long_prefill_token_threshold=self.long_prefill_token_threshold,
            enable_prefix_caching=self.enable_prefix_caching,
            max_plans_in_flight=2 if self.async_scheduling else 1,
            max_decode_steps=self.max_decode_steps,
            num_host_pages=self.num_host_pages,
            min_swap_tokens=self.min_swap_tokens,
            watermark=self.watermark,
        )


class EngineOptions(TypedDict, total=False):
    """The fields of EngineConfig as keywords, so that a type checker knows those of `LLM`."""

    max_model_len: int | None
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    page_size: int | None
    num_pages: int | None
    memory_fraction: float | None
    scheduling_policy: str
    enable_chunked_prefill: bool
    long_prefill_token_threshold: int
    prefill_row_len: int | None
    enable_prefix_caching: bool
    async_scheduling: bool
    max_decode_steps: int
    num_host_pages: int
    min_swap_tokens: int | None
    watermark: float
    check_integrity: bool
    quantization: str | None
    max_logprobs: int
    logprobs_mode: str
    deterministic: bool
    seed: int
    warm_up: bool | None
    strict: bool
    gpu_memory_utilization: float  # vLLM's name of memory_fraction
    tensor_parallel_size: int  # of other engines; only 1


_OPTIONAL = (
    "max_model_len",
    "max_num_seqs",
    "num_pages",
    "max_num_batched_tokens",
    "page_size",
    "prefill_row_len",
    "min_swap_tokens",
)

_SWITCHES = (
    "enable_chunked_prefill",
    "enable_prefix_caching",
    "async_scheduling",
    "deterministic",
    "check_integrity",
    "warm_up",
    "strict",
)

_LOWEST = {
    "max_model_len": 2,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "page_size": 1,
    "num_pages": 1,
    "long_prefill_token_threshold": 0,
    "prefill_row_len": 1,
    "max_decode_steps": 1,
    "num_host_pages": 0,
    "min_swap_tokens": 0,
    "max_logprobs": -1,
    "seed": 0,
}


def _is_above_one(value: object) -> bool:
    return isinstance(value, int) and value > 1


def _is_fraction(value: object, least: float = 1e-9) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= 1
