"""The engine's options, declared once: what they mean, may be, and are unless they are given.

From a field of `EngineConfig` follow its check, its line in the docstring and in docs/options.md,
and its flag on a command line (`add_flags`). `EngineOptions` tells type checkers of them.
"""

import argparse
import dataclasses
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, TypedDict

from folojax.models.quantized.names import QUANTIZATIONS
from folojax.requests.sampling_params import SamplingParams
from folojax.requests.structured_outputs import StructuredOutputsParams
from folojax.sched.config import SchedulerConfig
from folojax.sched.option_fields import (
    documented,
    option,
    option_like,
    option_problems,
    options_of,
)
from folojax.sched.pages import pages_for
from folojax.sched.states import state_options

if TYPE_CHECKING:  # the command line has its options from here, and need not wait for JAX
    from folojax.backend import Backend

LOGPROBS_MODES = ("raw", "processed")


@documented
@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine is built for.

    Raises:
        ValueError: some options are out of range or contradict each other; all of them are named.
    """

    max_model_len: int | None = option_like(
        SchedulerConfig, "max_model_len", None, "None takes the model's limit."
    )
    max_num_seqs: int | None = option_like(
        SchedulerConfig, "max_num_seqs", None, "None is 32 on CPU, 256 elsewhere."
    )
    max_num_batched_tokens: int | None = option_like(
        SchedulerConfig,
        "max_num_batched_tokens",
        None,
        """None is 512 on CPU, 8,192 on a card of which JAX may have 32 GiB, and 4,096 on others;
        more, if `max_num_seqs` or prompts that are not cut in chunks need it.""",
    )
    page_size: int | None = option_like(SchedulerConfig, "page_size", None, "None is 64.")
    num_pages: int | None = option_like(
        SchedulerConfig,
        "num_pages",
        None,
        """None: as many as `memory_fraction` has room for. If that is None too, on CPU, room for
        `max_num_seqs` requests of 512 tokens and for one request of `max_model_len`.""",
    )
    memory_fraction: float | None = option(
        None,
        """Share of the device's memory that may be in use in all: by weights, pages and
        temporaries, and by what others hold, such as a training process's arrays; vLLM's
        gpu_memory_utilization. None is 0.9 on a GPU, of what JAX may have of it
        (XLA_PYTHON_CLIENT_MEM_FRACTION, 0.75 by default), and nothing on CPU, whose memory is not
        ours alone: there the pool is also never larger than `max_num_seqs` requests of
        `max_model_len` tokens can use.""",
        above=0,
        at_most=1,
    )
    scheduling_policy: str = option_like(SchedulerConfig, "scheduling_policy", "fcfs")
    enable_chunked_prefill: bool = option_like(SchedulerConfig, "enable_chunked_prefill", True)
    long_prefill_token_threshold: int = option_like(
        SchedulerConfig, "long_prefill_token_threshold", 0
    )
    prefill_row_len: int | None = option(
        None,
        """Prompts are computed in rows of so many tokens: short rows waste less on padding, long
        rows copy fewer pages. None is 16 on CPU, 128 elsewhere.""",
        at_least=1,
    )
    enable_prefix_caching: bool = option_like(SchedulerConfig, "enable_prefix_caching", True)
    num_prefix_states: int | None = option_like(
        SchedulerConfig,
        "num_prefix_states",
        None,
        """None: as many as `max_num_seqs`, 32 at most. Only for models with recurrent layers.""",
    )
    async_scheduling: bool = option(
        True,
        """The next step is planned and handed to the device before the last one is read, so that
        the device does not wait for the host. The tokens are the same; a request that ends by a
        token may have one more computed, which nobody sees.""",
    )
    max_decode_steps: int = option_like(
        SchedulerConfig, "max_decode_steps", 1, "1 in deterministic mode."
    )
    num_host_pages: int = option_like(SchedulerConfig, "num_host_pages", 0)
    min_swap_tokens: int | None = option_like(
        SchedulerConfig,
        "min_swap_tokens",
        None,
        "None: estimated from the sizes of model and cache and the kind of machine.",
    )
    watermark: float = option_like(SchedulerConfig, "watermark", 0.0)
    check_integrity: bool = option(
        False,
        """After every step, pages, owners, slots and queues are checked against each other; an
        AssertionError tells of a fault of the engine. For those who look for one: it goes through
        everything.""",
    )
    quantization: str | None = option(
        None,
        """"int8" keeps the kernels of linear layers, token embedding and output in eight bits, a
        scale for each output, and multiplies them with inputs rounded to eight bits row by row
        (W8A8): a quarter of float32's memory, and faster with few rows. "int4" keeps linear layers
        in four bits and embedding and output in eight, in groups of 32 inputs, inputs rounded
        likewise: a fifth of the memory, and about twice as fast where a C++ compiler is there to
        build the product for x86-64 (else XLA computes it, slowly, and a RuntimeWarning says so).
        On an NVIDIA GPU inputs of "int4" are bfloat16, and few rows are faster. "fp8" is for these,
        from Ada and Hopper on: linear layers in float8 (e4m3), a scale for each output, and inputs
        of more than 32 rows (on Hopper 128) rounded to it row by row; on CPU it saves memory alone.
        docs/models.md and docs/gpu.md have by how much, how far log-probabilities move, and which
        files' own codes are kept. Experts and the rest stay as they are. On one device, and without
        gradients. None computes in the dtype.""",
        choices=QUANTIZATIONS,
    )
    enable_lora: bool = option(
        False,
        """Requests may have adapters of low rank (`lora_request`), each its own, beside weights
        that stay as they are (docs/lora.md). Steps in which none has one are as without.""",
    )
    max_loras: int = option_like(SchedulerConfig, "max_loras", 1)
    max_lora_rank: int = option(
        16,
        "Highest rank of an adapter; those of lower rank take as much room and time.",
        at_least=1,
        at_most=1024,
    )
    max_logprobs: int = option(
        20,
        "Most alternatives that a request may have reported with a token; -1 is no cap.",
        at_least=-1,
    )
    logprobs_mode: str = option(
        "raw",
        """"raw" reports the model's own distribution, "processed" the one that was sampled from:
        after penalties, masks, temperature and truncation.""",
        choices=LOGPROBS_MODES,
    )
    deterministic: bool = option(
        False,
        """A request's tokens and log-probabilities are the same bits whatever its neighbours, the
        limits above (`page_size` aside), preemptions and cached prefixes; and `LLM.score` gives the
        bits that sampling gave. It costs time (docs/research.md).""",
    )
    seed: int = option(0, "Of the seeds that requests without one are given.", at_least=0)
    warm_up: bool | None = option(
        None,
        """Whether an engine compiles, when it is made, what greedy and random sampling need. None:
        on a GPU, where a program takes 10 s to compile, and a step would wait for each.
        `LLM.warm_up` compiles more, such as for penalties and log-probabilities.""",
    )
    strict: bool = option(
        False,
        """A step that needs an executable outside the compile plan raises a RuntimeError, and its
        requests are aborted. Otherwise it waits for the compiler; after a warm-up the first such
        step is told in the log. For tests and measurements.""",
    )
    tensor_parallel_size: int = option(
        1,
        """Devices that share each layer, by heads, inner widths and vocabulary
        (docs/several_devices.md): the first ones, those that the params lie over, or all of
        `mesh`. The tokens are those of one device.""",
        at_least=1,
    )
    data_parallel_size: int = option(
        1,
        """Engines in this process, each with `tensor_parallel_size` devices, a copy of the params,
        and the limits above (docs/several_devices.md). A request goes to the one that has computed
        the most of its prompt, unless that has too much to do. The tokens are those of one.""",
        at_least=1,
    )

    def __post_init__(self) -> None:
        problems = option_problems(self)
        if self.num_pages is not None and self.memory_fraction is not None:
            problems.append(
                f"num_pages is {self.num_pages!r} and memory_fraction is {self.memory_fraction!r}; "
                "both size the pool: give one of them"
            )
        if self.deterministic is True and self.max_decode_steps != 1:
            problems.append(
                f"deterministic is True and max_decode_steps is {self.max_decode_steps!r}; "
                "deterministic mode takes one step at a time: set max_decode_steps to 1"
            )
        if problems:
            raise ValueError("EngineConfig: " + "; ".join(problems))

    def pool_fraction(self, backend: "Backend") -> float | None:
        """Share of the device's memory that sizes the pool; None: it is not sized by memory."""
        if self.num_pages is not None:
            return None
        if self.memory_fraction is None:
            return backend.memory_fraction
        return self.memory_fraction

    def resolve(
        self,
        max_position: int,
        backend: "Backend",
        min_swap_tokens: int = 1,
        *,
        has_states: bool = False,
    ) -> "ResolvedConfig":
        """Fills in what depends on the model and the device, but for its memory.

        A pool that is sized by memory becomes the smallest that will do: one request of
        `max_model_len`. Whoever plans the memory puts the real number in its place.

        Args:
            max_position: Longest sequence the model was made for, in tokens.
            backend: That the engine runs on.
            min_swap_tokens: What takes the place of None.
            has_states: Whether layers of the model keep states instead of keys and values.

        Raises:
            ValueError: The limits contradict each other, the model or the platform.
        """
        if (problem := backend.quantization_problem(self.quantization)) is not None:
            raise ValueError(f"quantization is {self.quantization!r}, which is {problem}")
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        left_open = {"max_model_len": max_position, "min_swap_tokens": min_swap_tokens}
        left_open["warm_up"] = backend.warms_up
        for name, default in (backend.defaults | left_open).items():
            fields[name] = default if fields[name] is None else fields[name]
        fields |= state_options(fields, has_states)
        max_model_len = fields["max_model_len"]
        if self.max_num_batched_tokens is None:  # it gives way to what somebody has chosen
            least = fields["max_num_seqs"] if self.enable_chunked_prefill else max_model_len
            fields["max_num_batched_tokens"] = max(fields["max_num_batched_tokens"], least)
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
    num_prefix_states: int
    has_states: bool

    @property
    def most_running_pages(self) -> int:
        """Pages of all requests that can run at once, if each is as long as may be."""
        return self.max_num_seqs * pages_for(self.max_model_len, self.page_size)

    def scheduler(self) -> SchedulerConfig:
        """The scheduler's part."""
        names = {one.name for one in options_of(SchedulerConfig)} - {"max_plans_in_flight"}
        return SchedulerConfig(
            **{name: getattr(self, name) for name in names},
            max_plans_in_flight=2 if self.async_scheduling else 1,
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
    num_prefix_states: int | None
    async_scheduling: bool
    max_decode_steps: int
    num_host_pages: int
    min_swap_tokens: int | None
    watermark: float
    check_integrity: bool
    quantization: str | None
    enable_lora: bool
    max_loras: int
    max_lora_rank: int
    max_logprobs: int
    logprobs_mode: str
    deterministic: bool
    seed: int
    warm_up: bool | None
    strict: bool
    tensor_parallel_size: int
    data_parallel_size: int
    gpu_memory_utilization: float  # vLLM's name of memory_fraction


def add_flags(
    parser: Any, cls: type, names: Collection[str], defaults: Mapping[str, Any] = {}
) -> None:
    """Adds options of EngineConfig or SamplingParams to a command line.

    `max_num_seqs` becomes ``--max-num-seqs``; a bool has a ``--no-`` form, a list takes several
    values. An option that is not given is None, and `given_options` leaves it out::

        parser = argparse.ArgumentParser()
        add_flags(parser, EngineConfig, ["max_num_seqs", "quantization"], {"max_num_seqs": 8})
        add_flags(parser, SamplingParams, ["temperature", "stop"])
        args = parser.parse_args()
        llm = LLM(**given_options(args, EngineConfig))
        params = SamplingParams(**given_options(args, SamplingParams))

    What a value may be is not checked here but where the options are used, with their own errors.

    Args:
        parser: An `argparse.ArgumentParser`, or one of its groups.
        cls: Whose options.
        names: Which of them, in this order.
        defaults: In place of the options' own.

    Raises:
        KeyError: there is no option of a name.
    """
    known = {one.name: one for one in options_of(cls)}
    for name in names:
        one = known[name]
        told = one.doc.split(". ")[0].rstrip(".")
        default = defaults.get(name, one.default)
        if default not in (None, (), dataclasses.MISSING):
            told += f"; default: {default}"
        keywords: dict[str, Any] = {"help": told.replace("%", "%%")}
        if one.kind is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            keywords["type"] = one.kind
            keywords["metavar"] = {int: "N", float: "X", str: "TEXT"}[one.kind]
        if one.choices:
            keywords["metavar"] = "{" + ",".join(one.choices) + "}"
        if one.is_list:
            keywords |= {"nargs": "+", "action": "extend"}
        parser.add_argument(f"--{name.replace('_', '-')}", default=defaults.get(name), **keywords)


def given_options(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """What a command line says of the options of a class; those that it leaves open are not in."""
    given = {one.name: getattr(args, one.name, None) for one in options_of(cls)}
    return {name: value for name, value in given.items() if value is not None}


def options_page() -> str:
    """The text of docs/options.md: all options, in tables."""
    head = "# Options\n\nFields of `EngineConfig`, which are keywords of `LLM` too.\n"
    parts = [head, _table(EngineConfig)]
    for cls in (SamplingParams, StructuredOutputsParams):
        parts += [f"\nFields of `{cls.__name__}`.\n", _table(cls)]
    return "\n".join(parts)


def _table(cls: type) -> str:
    rows = ["| option | default | it may be | meaning |", "|---|---|---|---|"]
    for one in options_of(cls):
        wanted = ("None or " if one.has_none and not one.choices else "") + one.wanted
        rows.append(f"| `{one.name}` | `{one.default!r}` | {wanted} | {one.doc} |")
    return "\n".join(rows)
