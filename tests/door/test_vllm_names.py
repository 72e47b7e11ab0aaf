"""Names of vLLM's: each row of the tables, and of docs/coming_from_vllm.md, is tried."""

import dataclasses
import importlib
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import folojax
from folojax import (
    LLM,
    BeamSearchParams,
    EngineConfig,
    RequestOutput,
    SamplingParams,
    StructuredOutputsParams,
)
from folojax.backend import choose_backend
from folojax.engine.build import make_config
from folojax.requests import vllm_names
from folojax.requests.vllm_names import ANY, Name
from tests.api_calls import CHAT, GREEDY, PROMPT, SEEDED, change, run
from tests.door.test_vllm_programs import PROGRAMS
from tests.letters import encode
from tests.reference import MORE_LIMITS

PAGE = (Path(__file__).parents[2] / "docs" / "coming_from_vllm.md").read_text()


def rows(title: str) -> list[list[str]]:
    """The cells of a table of the page, without its head."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines[1:]]


def values_of(row: Name) -> tuple[Any, ...]:
    """None, and what else changes nothing."""
    return (None, 5, "x", object()) if row.same_at is ANY else (None, *row.same_at)


def refusals(table: dict[str, Name]) -> list[tuple[str, Name]]:
    return [
        (name, row) for name, row in table.items() if not row.becomes and row.same_at is not ANY
    ]


@pytest.mark.parametrize("name", vllm_names.LLM_ARGUMENTS)
def test_an_argument_of_the_constructor(name: str) -> None:
    row = vllm_names.LLM_ARGUMENTS[name]
    for value in values_of(row):
        assert make_config(None, {name: value}) == EngineConfig()
    for theirs, ours in row.values:
        expected = dataclasses.replace(EngineConfig(), **{row.becomes: ours})
        assert make_config(None, {name: theirs}) == expected
    if row.becomes and not row.values:
        value = 0.25 if row.becomes == "memory_fraction" else 3
        assert getattr(make_config(None, {name: value}), row.becomes) == value
        with pytest.raises(ValueError, match=f"{row.becomes} and {name} are two names of the same"):
            make_config(None, {name: value, row.becomes: value})
    if (name, row) in refusals(vllm_names.LLM_ARGUMENTS):
        for bad in ("another", 7, {"a": 1}, np.zeros(3), object()):
            with pytest.raises(ValueError, match=f"^{name} is ") as info:
                make_config(None, {name: bad})
            assert str(info.value).endswith(row.instead)


def test_all_that_is_refused_is_named_at_once(tiny_model: tuple) -> None:
    with pytest.raises(ValueError, match=r"cpu_offload_gb is 4; .*; load_format is 'dummy'; files"):
        LLM(tiny_model, cpu_offload_gb=4, load_format="dummy")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"unknown options \['max_seqs'\]"):
        LLM(tiny_model, max_seqs=4)  # type: ignore[call-arg]


def test_none_is_an_option_that_is_not_given() -> None:
    names = [field.name for field in dataclasses.fields(EngineConfig)]
    assert make_config(None, dict.fromkeys(names)) == EngineConfig()
    kept = EngineConfig(seed=5)
    assert make_config(kept, {"seed": None, "watermark": None}) == kept


@pytest.mark.parametrize("name", vllm_names.CALL_ARGUMENTS)
def test_an_argument_of_a_call(name: str, letters_llm: LLM) -> None:
    row = vllm_names.CALL_ARGUMENTS[name]
    short = change(GREEDY, max_tokens=1)
    calls: list[Callable[..., Any]] = [
        lambda **more: letters_llm.generate(PROMPT, short, use_tqdm=False, **more),
        lambda **more: letters_llm.chat(CHAT, short, use_tqdm=False, **more),
    ]
    for call in calls:
        expected = call()[0].outputs[0].token_ids
        for value in values_of(row):
            assert call(**{name: value})[0].outputs[0].token_ids == expected
        with pytest.raises(ValueError, match=f"{name} is 'another'; ") as info:
            call(**{name: "another"})
        assert row.instead in str(info.value)


def test_a_call_has_no_other_keywords(letters_llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"unknown keywords \['max_tokens'\]"):
        letters_llm.generate(PROMPT, max_tokens=5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="max_tokens"):
        letters_llm.chat(CHAT, max_tokens=5)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="two names of the same"):
        letters_llm.generate(PROMPT, prompt_token_ids=[5])
    with pytest.raises(ValueError, match="chat_template_content_format is 'xml'"):
        letters_llm.chat(CHAT, chat_template_content_format="xml")


@pytest.mark.parametrize("priority", [3, [1], [1, 2, 3], "ab"], ids=str)
def test_there_is_a_priority_for_each_prompt(priority: Any, letters_llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"priority is .* for 2 prompts: give a list"):
        letters_llm.generate([PROMPT, PROMPT], GREEDY, priority=priority)
    with pytest.raises(ValueError, match=r"prompt 1: priority is 1\.5"):
        letters_llm.generate([PROMPT, PROMPT], GREEDY, priority=[0, 1.5])  # type: ignore[list-item]


@pytest.mark.parametrize("name", vllm_names.PROMPT_KEYS)
def test_a_key_of_a_prompt(name: str, letters_llm: LLM) -> None:
    row = vllm_names.PROMPT_KEYS[name]
    for value in values_of(row):
        assert run(letters_llm, {"prompt": PROMPT, name: value}) == run(letters_llm, PROMPT)
    with pytest.raises(ValueError, match=f"prompt 1: {name} is 'another'; ") as info:
        run(letters_llm, [PROMPT, {"prompt": PROMPT, name: "another"}])
    assert row.instead in str(info.value)


@pytest.mark.parametrize("name", vllm_names.SAMPLING_FIELDS)
def test_a_field_of_sampling_params(name: str) -> None:
    row = vllm_names.SAMPLING_FIELDS[name]
    for value in values_of(row):
        assert SamplingParams(**{name: value}) == SamplingParams()
        assert SamplingParams.from_optional(**{name: value}) == SamplingParams()
    for theirs, ours in row.values:
        assert getattr(SamplingParams(**{name: theirs}), row.becomes) == ours
    if (name, row) in refusals(vllm_names.SAMPLING_FIELDS):
        with pytest.raises(ValueError, match=f"^SamplingParams: {name} is 'another'; ") as info:
            SamplingParams(**{name: "another"})  # type: ignore[arg-type]
        assert row.instead in str(info.value)


@pytest.mark.parametrize("name", vllm_names.METHODS)
def test_a_method_that_is_not_here(name: str, letters_llm: LLM) -> None:
    with pytest.raises(NotImplementedError, match=f"LLM.{name} is not here: ") as info:
        getattr(letters_llm, name)("text", use_tqdm=False)
    assert vllm_names.METHODS[name] in str(info.value)
    assert not hasattr(LLM, name)  # or the row is out of date
    assert not hasattr(letters_llm, "no_such_method")


@pytest.mark.parametrize("name", vllm_names.IMPORTS)
def test_an_import_that_is_not_here(name: str) -> None:
    with pytest.raises(ImportError, match=f"{name} of vLLM is not here: ") as info:
        exec(f"from folojax import {name}")
    assert vllm_names.IMPORTS[name] in str(info.value)
    assert name not in folojax.__all__


@pytest.mark.parametrize("module", ["inputs", "outputs", "sampling_params"])
def test_modules_of_vllm_have_our_names(module: str) -> None:
    found = importlib.import_module(f"folojax.{module}")
    for name in found.__all__:
        assert getattr(found, name) is getattr(folojax, name)


def test_one_engine_takes_all_that_changes_nothing(tiny_model: tuple) -> None:
    named = vllm_names.LLM_ARGUMENTS.items()
    neutral: dict[str, Any] = {name: row.same_at[-1] for name, row in named if row.same_at}
    llm = LLM(tiny_model, **MORE_LIMITS, **neutral)
    assert llm.config == LLM(tiny_model, **MORE_LIMITS).config


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        *[(one, "float32") for one in ("float", "float32", np.float32, jnp.float32, torch.float)],
        *[(one, "float32") for one in (np.dtype("float32"), jnp.dtype("float32"), torch.float32)],
        *[(one, "float16") for one in ("half", "float16", np.float16, jnp.float16, torch.half)],
        *[(one, "float16") for one in (np.dtype("float16"), torch.float16)],
        *[(one, "bfloat16") for one in ("bfloat16", jnp.bfloat16, torch.bfloat16)],
        (jnp.dtype("bfloat16"), "bfloat16"),
    ],
    ids=str,
)
def test_a_dtype_may_come_from_anywhere(
    dtype: Any, expected: str, tiny_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LoadedError(Exception):
        pass

    def load(checkpoint: Any, found: Any, *others: Any) -> Any:
        assert jnp.dtype(found).name == expected
        raise LoadedError

    monkeypatch.setattr("folojax.engine.build.load_params", load)
    with pytest.raises(LoadedError):
        LLM(tiny_directory, dtype=dtype, **MORE_LIMITS)


@pytest.mark.parametrize("dtype", ["int8", "double", np.int8, torch.float64, 16, None], ids=str)
def test_other_dtypes_are_refused(dtype: Any, tiny_directory: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype is .*; it must be 'auto', one of"):
        LLM(tiny_directory, dtype=dtype)


def test_a_folder_without_a_tokenizer_has_its_end_tokens(
    tiny_directory: Path, text_directory: Path
) -> None:
    """Of its configs, as where the tokenizer is left alone."""
    llm = LLM(tiny_directory, **MORE_LIMITS)
    assert llm.get_tokenizer() is None
    assert llm.engine.validator.eos_token_ids == (2,)
    (output,) = llm.generate([encode(PROMPT)], GREEDY, use_tqdm=False)
    assert (output.outputs[0].text, len(output.outputs[0].token_ids)) == ("", 12)
    with pytest.raises(ValueError, match="prompt 0 is text, but the engine has no tokenizer"):
        llm.generate(PROMPT)
    bare = LLM(text_directory, **MORE_LIMITS, skip_tokenizer_init=True)
    assert bare.get_tokenizer() is None
    assert bare.engine.validator.eos_token_ids == (2,)


def differs_score(llm: LLM) -> None:
    (one,) = llm.score("The", " sea", use_tqdm=False)
    assert len(one.logprobs) == 4


def differs_limits(llm: LLM) -> None:
    config = EngineConfig().resolve(8192, choose_backend())
    assert (config.max_num_seqs, config.page_size) == (32, 64)


def differs_memory(llm: LLM) -> None:
    limits = {name: value for name, value in MORE_LIMITS.items() if name != "num_pages"}
    capped = LLM((llm.model, llm.params), **limits, gpu_memory_utilization=0.9)
    assert capped.config.num_pages == MORE_LIMITS["max_num_seqs"] * 128 // 16
    assert ", all that max_num_seqs can use of memory_fraction;" in str(capped.memory_plan)
    assert "memory_fraction;" not in str(llm.memory_plan)


def differs_eager(llm: LLM) -> None:
    assert make_config(None, {"enforce_eager": True}).warm_up is False


def differs_temperature(llm: LLM) -> None:
    assert SamplingParams(temperature=0.001).temperature == 0.001
    assert SamplingParams(temperature=9e-6).is_greedy


def differs_seeds(llm: LLM) -> None:
    both = llm.generate(PROMPT, change(SEEDED, n=2), use_tqdm=False)[0].outputs
    again = run(llm, [PROMPT] * 3, [change(SEEDED, seed=8), SEEDED, GREEDY])
    assert [one.token_ids for one in both] == [again[1], again[0]]


def differs_lists(llm: LLM) -> None:
    assert SamplingParams(stop=["a"], stop_token_ids=[1]).stop_token_ids == (1,)
    assert len({SamplingParams(stop=["a"]), SamplingParams(stop="a")}) == 1


def differs_assignment(llm: LLM) -> None:
    params = change(GREEDY, max_tokens=3)
    llm.add_request("mine", PROMPT, params)
    with pytest.raises(ValueError, match="max_tokens is 0"):
        params.max_tokens = 0
    params.max_tokens = 1
    last: list[RequestOutput] = []
    while llm.has_unfinished_requests():
        last = llm.step() or last
    assert len(last[-1].outputs[0].token_ids) == 3


def differs_finished(llm: LLM) -> None:
    assert llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].finished is True


def differs_cumulative(llm: LLM) -> None:
    assert llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].cumulative_logprob < 0


def differs_metrics(llm: LLM) -> None:
    metrics: Any = llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].metrics
    assert metrics.first_token_latency == metrics.first_token_ts - metrics.arrival_time


def differs_sleep(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"level is 2; .* update_params"):
        llm.sleep(level=2)
    with pytest.raises(ValueError, match=r"tags holds \['optimizer'\]"):
        llm.wake_up(tags=["optimizer"])


def differs_all_or_none(llm: LLM) -> None:
    with pytest.raises(ValueError, match="prompt 1: the prompt is empty"):
        run(llm, [PROMPT, []])
    assert not llm.has_unfinished_requests()


def differs_engine(llm: LLM) -> None:
    assert llm.llm_engine is llm


@pytest.mark.parametrize("name", vllm_names.STRUCTURED_FIELDS)
def test_a_field_of_structured_outputs_params(name: str) -> None:
    row, plain = vllm_names.STRUCTURED_FIELDS[name], StructuredOutputsParams(regex="a")
    for value in values_of(row):
        fields: dict[str, Any] = {"regex": "a", name: value}
        assert StructuredOutputsParams(**fields) == plain
        assert SamplingParams(structured_outputs=fields).structured_outputs == plain  # type: ignore[arg-type]
    if (name, row) in refusals(vllm_names.STRUCTURED_FIELDS):
        bad: dict[str, Any] = {"regex": "a", name: "another"}
        with pytest.raises(ValueError, match=f"{name} is 'another'; ") as info:
            StructuredOutputsParams(**bad)
        assert row.instead in str(info.value)


def differs_beams(llm: LLM) -> None:
    """Of two lengths, the prompt's tokens would even out; how many there are changes nothing."""
    params = BeamSearchParams(beam_width=2, max_tokens=4, length_penalty=2.0)
    (output,) = llm.beam_search(PROMPT, params)
    num_prompt_tokens = len(encode(PROMPT))
    scores = [
        one.cum_logprob / (len(one.tokens) - num_prompt_tokens) ** 2 for one in output.sequences
    ]
    assert scores == sorted(scores, reverse=True)


def differs_threads(llm: LLM) -> None:
    found: list[list[int]] = []
    threads = [threading.Thread(target=lambda: found.extend(run(llm, PROMPT))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == run(llm, PROMPT) * 2


DIFFERENT: dict[str, Callable[[LLM], None]] = {
    "`LLM.score`": differs_score,
    "`max_num_seqs`, `block_size`": differs_limits,
    "`gpu_memory_utilization` on CPU": differs_memory,
    "`enforce_eager`": differs_eager,
    "temperatures between 0 and 0.01": differs_temperature,
    "scores of beams": differs_beams,
    "seeds": differs_seeds,
    "lists in `SamplingParams`": differs_lists,
    "fields that are assigned to": differs_assignment,
    "`CompletionOutput.finished`": differs_finished,
    "`cumulative_logprob`": differs_cumulative,
    "`metrics` of an output": differs_metrics,
    "`sleep(level=2)`": differs_sleep,
    "a bad prompt among good ones": differs_all_or_none,
    "`llm.llm_engine`": differs_engine,
    "threads": differs_threads,
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_is_different(what: str, letters_llm: LLM) -> None:
    DIFFERENT[what](letters_llm)


def test_the_page_has_these_rows() -> None:
    """Its tables at the end are made by `tables_page`."""
    assert PAGE.endswith(f"\n{vllm_names.tables_page()}\n")
    assert [row[0] for row in rows("Different")] == list(DIFFERENT)
    named = [name for row in rows("The same") for name in re.findall(r"`(\w+)`", row[-1])]
    assert sorted(named) == sorted(PROGRAMS)
