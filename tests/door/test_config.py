"""EngineConfig: every field is checked by name, and resolving fills in what the model decides."""

import dataclasses
import math
import re
from typing import Any

import pytest

from folojax.backend.backend import CPU, GPU
from folojax.config import EngineConfig

INTEGERS = {
    "max_model_len": 2,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "page_size": 1,
    "num_pages": 1,
    "long_prefill_token_threshold": 0,
    "prefill_row_len": 1,
    "max_decode_steps": 1,
    "num_host_pages": 0,
    "num_prefix_states": 0,
    "min_swap_tokens": 0,
    "max_logprobs": -1,
    "tensor_parallel_size": 1,
    "data_parallel_size": 1,
    "max_loras": 1,
    "max_lora_rank": 1,
    "seed": 0,
}
NONE_ALLOWED = {
    "max_model_len",
    "max_num_seqs",
    "num_pages",
    "max_num_batched_tokens",
    "page_size",
    "prefill_row_len",
    "min_swap_tokens",
    "num_prefix_states",
}
BAD: list[tuple[str, Any]] = [
    *[(name, low - 1) for name, low in INTEGERS.items()],
    *[(name, bad) for name in INTEGERS for bad in (True, 4.0, "8", -7, [8], math.nan)],
    *[(name, None) for name in INTEGERS if name not in NONE_ALLOWED],
    *[("enable_chunked_prefill", bad) for bad in (1, 0, None, "yes")],
    *[("enable_prefix_caching", bad) for bad in (1, 0, None, "yes")],
    *[("memory_fraction", bad) for bad in (0, -0.5, 1.01, True, "0.9", math.nan, [0.5])],
    *[("enable_lora", bad) for bad in (1, 0, None, "yes")],
    *[("deterministic", bad) for bad in (1, 0, None, "yes")],
    *[("warm_up", bad) for bad in (1, 0, "yes")],
    *[("strict", bad) for bad in (1, 0, None, "yes")],
    *[("async_scheduling", bad) for bad in (1, 0, None, "yes")],
    *[("check_integrity", bad) for bad in (1, 0, None, "yes")],
    *[("watermark", bad) for bad in (-0.1, 1, 1.0, True, "0.1", math.nan, None)],
    *[("logprobs_mode", bad) for bad in ("", "RAW", "raw_logits", None, 3)],
    *[("quantization", bad) for bad in ("", "INT8", "int2", "gptq", 8, True, ["int8"])],
    *[("scheduling_policy", bad) for bad in ("lifo", "", "FCFS", None, 3, ["fcfs"])],
]


def test_the_defaults_are_accepted_and_every_field_is_checked_here() -> None:
    EngineConfig()
    assert {name for name, _ in BAD} == {field.name for field in dataclasses.fields(EngineConfig)}


@pytest.mark.parametrize(("name", "low"), INTEGERS.items())
def test_the_lowest_value_is_accepted(name: str, low: int) -> None:
    fields: dict[str, Any] = {name: low}
    assert getattr(EngineConfig(**fields), name) == low


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_named_with_its_field(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match="EngineConfig: ") as info:
        EngineConfig(**{name: value})
    assert f"{name} is {value!r}" in str(info.value)


def test_all_problems_are_named_at_once() -> None:
    fields: dict[str, Any] = dict(entry for entry in BAD if entry[1] is not None)
    with pytest.raises(ValueError, match="EngineConfig") as info:
        EngineConfig(**fields)
    assert all(f"{name} is {value!r}" in str(info.value) for name, value in fields.items())


def test_it_is_frozen_hashable_and_keyword_only() -> None:
    config = EngineConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.page_size = 3  # type: ignore[misc]
    assert hash(config) == hash(EngineConfig())
    assert config == EngineConfig()
    positional: Any = EngineConfig
    with pytest.raises(TypeError):
        positional(128)


def test_resolving_takes_the_models_limit_and_makes_room() -> None:
    config = EngineConfig(max_num_seqs=3, page_size=64)
    short = config.resolve(100, CPU)
    assert (short.max_model_len, short.num_pages) == (100, 6)  # 3 requests of 2 pages
    long = config.resolve(1000, CPU)
    assert (long.max_model_len, long.num_pages) == (1000, 24)  # 3 requests of 512
    longer = config.resolve(8192, CPU)
    assert (longer.max_model_len, longer.num_pages) == (8192, 128)  # one request of all
    assert config == EngineConfig(max_num_seqs=3, page_size=64)


def test_resolving_keeps_what_was_given_and_is_idempotent() -> None:
    config = EngineConfig(max_model_len=50, num_pages=7, page_size=4, max_num_seqs=2, seed=3)
    resolved = config.resolve(64, CPU)
    for field in dataclasses.fields(config):
        given = getattr(config, field.name)
        assert getattr(resolved, field.name) == given or given is None
    assert EngineConfig().resolve(512, CPU) == EngineConfig().resolve(512, CPU).resolve(512, CPU)


def test_the_device_chooses_what_was_left_open() -> None:
    cpu, gpu = EngineConfig().resolve(4096, CPU), EngineConfig().resolve(4096, GPU)
    names = ("max_num_seqs", "max_num_batched_tokens", "page_size", "prefill_row_len", "warm_up")
    assert [getattr(cpu, name) for name in names] == [32, 512, 64, 16, False]
    assert [getattr(gpu, name) for name in names] == [256, 4096, 64, 128, True]
    assert EngineConfig(warm_up=False).resolve(4096, GPU).warm_up is False
    assert EngineConfig(warm_up=True).resolve(4096, CPU).warm_up is True
    assert EngineConfig(page_size=32).resolve(4096, GPU).page_size == 32


def test_a_budget_that_nobody_chose_gives_way() -> None:
    """To a number of requests, and to whole prompts; as with vLLM."""
    assert EngineConfig(max_num_seqs=600).resolve(4096, CPU).max_num_batched_tokens == 600
    whole = EngineConfig(enable_chunked_prefill=False)
    assert whole.resolve(4096, CPU).max_num_batched_tokens == 4096
    assert whole.resolve(128, CPU).max_num_batched_tokens == 512


@pytest.mark.parametrize(
    ("quantization", "capability", "least"),
    [
        *(("int8", 7.5, None), ("int4", 8.0, None), ("int4", 7.5, 8.0)),
        *(("fp8", 8.9, None), ("fp8", 8.6, 8.9)),
    ],
)
def test_a_quantization_is_for_cards_that_have_its_products(
    quantization: str, capability: float, least: float | None
) -> None:
    config = EngineConfig(quantization=quantization)
    assert config.resolve(4096, CPU).quantization == quantization
    card = dataclasses.replace(GPU, capability=capability)
    if least is None:
        assert config.resolve(4096, card).quantization == quantization
        return
    message = (
        f"quantization is '{quantization}', which is for cards of compute capability {least} on, "
        f'and this one\'s is {capability}; take "int8"'
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        config.resolve(4096, card)


def test_no_quantization_on_other_accelerators() -> None:
    with pytest.raises(ValueError, match="which is for CPU and NVIDIA GPUs; leave it out"):
        EngineConfig(quantization="int8").resolve(4096, GPU)


def test_the_scheduler_gets_every_limit() -> None:
    config = EngineConfig(
        max_model_len=50,
        max_num_seqs=2,
        max_num_batched_tokens=20,
        page_size=4,
        num_pages=7,
        scheduling_policy="priority",
        long_prefill_token_threshold=9,
    ).resolve(64, CPU)
    scheduler = config.scheduler()
    assert scheduler.max_plans_in_flight == 2
    assert dataclasses.replace(config, async_scheduling=False).scheduler().max_plans_in_flight == 1
    for field in dataclasses.fields(scheduler):
        if field.name != "max_plans_in_flight":
            assert getattr(scheduler, field.name) == getattr(config, field.name)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"max_model_len": 513}, ("max_model_len", "513", "512")),
        (
            {"max_num_seqs": 33, "max_num_batched_tokens": 32},
            ("max_num_batched_tokens", "32", "max_num_seqs", "33"),
        ),
        (
            {"enable_chunked_prefill": False, "max_num_batched_tokens": 511},
            ("max_num_batched_tokens", "511", "512"),
        ),
        (
            {"enable_chunked_prefill": False, "long_prefill_token_threshold": 5},
            ("long_prefill_token_threshold", "5", "enable_chunked_prefill"),
        ),
    ],
)
def test_limits_that_contradict_each_other_are_refused(
    fields: dict[str, Any], names: tuple[str, ...]
) -> None:
    config = EngineConfig(**fields)
    with pytest.raises(ValueError, match=f"{names[0]} is ") as info:
        config.resolve(512, CPU)
    assert all(name in str(info.value) for name in names)


def test_deterministic_mode_takes_one_step_at_a_time() -> None:
    with pytest.raises(ValueError, match=r"max_decode_steps is 4; .* set max_decode_steps to 1"):
        EngineConfig(deterministic=True, max_decode_steps=4)
    EngineConfig(deterministic=True, max_decode_steps=1)
