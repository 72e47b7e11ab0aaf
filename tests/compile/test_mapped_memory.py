"""Compiled programs take memory areas of a process, of which there are few: nothing may crash."""

import logging
import mmap
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from folojax import LLM, SamplingParams
from folojax.compile import mapped_memory as memory_areas
from folojax.runner import warm_up as ahead
from folojax.sampling.sampler import SamplingClass
from tests.reference import TINY_LIMITS

PROMPT = {"prompt_token_ids": [5, 6, 7, 8]}
PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def test_areas_are_counted() -> None:
    before = memory_areas.share_of_areas()
    if not Path("/proc/self/maps").is_file():
        assert before == 0.0  # only Linux counts areas
        return
    assert 0 < before < 1
    # Neighbours with the same rights would be one area.
    areas = [
        mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | (mmap.PROT_WRITE if i % 2 else 0))
        for i in range(200)
    ]
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    assert memory_areas.share_of_areas() - before >= 150 / limit
    for area in areas:
        area.close()


def test_a_system_that_does_not_tell_has_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    memory_areas._limit.cache_clear()
    monkeypatch.setattr(memory_areas, "_LIMIT", tmp_path / "nothing")
    try:
        assert memory_areas.share_of_areas() == 0.0
    finally:
        memory_areas._limit.cache_clear()


@pytest.mark.parametrize(("share", "is_dropped"), [(0.5, False), (0.95, True)])
def test_programs_are_dropped_before_there_is_one_too_many(
    share: float,
    is_dropped: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(memory_areas, "share_of_areas", lambda: share)
    function: Any = jax.jit(lambda x: x + 1)
    function(jnp.zeros(3))
    with caplog.at_level(logging.WARNING, "folojax"):
        memory_areas.make_room()
    assert (function._cache_size() == 0) == is_dropped
    assert ("vm.max_map_count" in caplog.text) == is_dropped
    assert function(jnp.zeros(3)).tolist() == [1, 1, 1]


def full_after(count: int) -> Any:
    """In place of `share_of_areas`: full from the call after so many on."""
    calls = iter(range(10_000))
    return lambda: float(next(calls) >= count)


def test_a_warm_up_ends_where_the_areas_do(
    tiny_model: tuple, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (expected,) = LLM(tiny_model, **TINY_LIMITS).generate(PROMPT, PARAMS, use_tqdm=False)
    llm = LLM(tiny_model, **TINY_LIMITS)
    monkeypatch.setattr(ahead, "share_of_areas", full_after(3))
    with caplog.at_level(logging.WARNING, "folojax"):
        llm.warm_up([SamplingClass.GREEDY], logprobs=False)
    assert "executables are not compiled ahead of time" in caplog.text
    assert "vm.max_map_count" in caplog.text
    compiled = [one for one in llm.plan().entries if one.compile_s is not None]
    assert len(compiled) == 4  # with the copies of pages, which have no shape to choose
    caplog.clear()
    with caplog.at_level(logging.WARNING, "folojax"):
        (output,) = llm.generate(PROMPT, PARAMS, use_tqdm=False)
    assert not caplog.records  # it has been said
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids


def test_a_strict_engine_is_warm_or_says_why_not(
    tiny_model: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(tiny_model, **TINY_LIMITS, strict=True)
    monkeypatch.setattr(ahead, "share_of_areas", full_after(3))
    with pytest.raises(RuntimeError, match=r"not compiled ahead of time.*vm\.max_map_count"):
        llm.warm_up([SamplingClass.GREEDY], logprobs=False)


def test_an_engine_at_the_brim_goes_on(
    tiny_model: tuple, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (expected,) = LLM(tiny_model, **TINY_LIMITS).generate(PROMPT, PARAMS, use_tqdm=False)
    monkeypatch.setattr(memory_areas, "share_of_areas", lambda: 0.95)
    with caplog.at_level(logging.WARNING, "folojax"):
        (output,) = LLM(tiny_model, **TINY_LIMITS).generate(PROMPT, PARAMS, use_tqdm=False)
    assert "were dropped" in caplog.text
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_freed_memory_goes_back_where_the_allocator_can(
    system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    library = types.SimpleNamespace(malloc_trim=asked.append)
    monkeypatch.setattr(memory_areas.sys, "platform", system)
    monkeypatch.setattr(memory_areas.ctypes, "CDLL", lambda name: library)
    memory_areas.give_back_memory()
    assert asked == ([0] if system == "linux" else [])
    monkeypatch.setattr(memory_areas.ctypes, "CDLL", lambda name: object())  # another libc
    memory_areas.give_back_memory()
