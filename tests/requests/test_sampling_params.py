"""SamplingParams: what is refused and how, and what the sampler is told."""

import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest

from folojax.requests.sampling_params import SamplingParams
from folojax.sampling.sampler import SamplingClass

NAN, INF = math.nan, math.inf
NO_COUNTS = [False, 1.0, "1", NAN, INF, [1], (1,)]
NOT_INTEGERS = [True, *NO_COUNTS]
NOT_NUMBERS = [True, "0.5", NAN, INF, -INF, [0.5], 1j, -0.1, -(10**400), 10**400]

BAD: list[tuple[str, Any]] = [
    *[("n", bad) for bad in (0, -1, 16385, None, *NOT_INTEGERS)],
    *[("temperature", bad) for bad in (None, 1e39, *NOT_NUMBERS)],
    *[("top_p", bad) for bad in (None, 0, 0.0, -0.0, 1.0001, 2, *NOT_NUMBERS)],
    *[("top_k", bad) for bad in (-2, None, *NOT_INTEGERS)],
    *[("min_p", bad) for bad in (None, 1.0001, *NOT_NUMBERS)],
    *[("max_tokens", bad) for bad in (0, -1, *NOT_INTEGERS)],
    *[("min_tokens", bad) for bad in (-1, None, *NOT_INTEGERS)],
    *[("seed", bad) for bad in (-2, 2**64, *NOT_INTEGERS)],
    *[("logprobs", bad) for bad in (-2, *NO_COUNTS)],
    *[("prompt_logprobs", bad) for bad in (-2, *NO_COUNTS)],
    *[("presence_penalty", bad) for bad in (None, 2.01, -2.01, True, "1", NAN, INF)],
    *[("frequency_penalty", bad) for bad in (None, 2.01, -2.01, True, "1", NAN, INF)],
    *[("repetition_penalty", bad) for bad in (None, 0, 0.0, -1, 1e31, True, "1", NAN, INF)],
    *[("stop", bad) for bad in (5, 1.5, True, [""], ["a", ""], [1], [None], [["a"]], b"a")],
    *[("stop_token_ids", bad) for bad in (5, True, [-1], [1.0], [True], ["1"], [None], "12")],
    *[("allowed_token_ids", bad) for bad in (5, True, [], [-1], [1.0], [True], ["1"], "12")],
    *[("bad_words", bad) for bad in (5, True, "ab", [""], ["a", ""], [1], [None], b"a")],
    *[("logits_processors", bad) for bad in (5, True, "ab", [""], [1], [None], [print])],
    *[("activation_edits", bad) for bad in (5, True, "ab", [""], [1], [None], [print])],
    *[("structured_outputs", bad) for bad in (5, "json", [1], print, True)],
    *[("extra_args", one) for one in (5, [1], "ab", {1: 2}, {"a": None}, {"a": print})],
    *[
        ("logit_bias", bad)
        for bad in (
            5,
            [1],
            {"1": 1.0},
            {-1: 1.0},
            {True: 1.0},
            {1.0: 1.0},
            {1: NAN},
            {1: INF},
            {1: -INF},
            {1: 1e31},
            {1: "1"},
            {1: True},
            {1: None},
        )
    ],
    *[
        (name, bad)
        for name in (
            "ignore_eos",
            "record",
            "activations",
            "routed_experts",
            "include_stop_str_in_output",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
        )
        for bad in (0, 1, None, "true")
    ],
]


def test_every_field_has_bad_values_here() -> None:
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert {name for name, _ in BAD} == fields


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_named_with_its_field(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match="SamplingParams: ") as info:
        SamplingParams(**{name: value})
    assert f"{name} is {value!r}; " in str(info.value)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stop is \[''\]"):
        SamplingParams(stop="")


def test_all_problems_are_named_at_once() -> None:
    fields: dict[str, Any] = dict(BAD)
    with pytest.raises(ValueError, match="SamplingParams") as info:
        SamplingParams(**fields)
    assert all(f"{name} is " in str(info.value) for name in fields)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"min_tokens": 17}, ("min_tokens is 17", "max_tokens, 16")),
        ({"min_tokens": 3, "max_tokens": 2}, ("min_tokens is 3", "max_tokens, 2")),
        ({"stop": "a", "detokenize": False}, ("stop is ['a']", "detokenize is False")),
        ({"n": 2, "temperature": 0.0}, ("n is 2", "temperature is 0.0")),
        ({"n": 2, "temperature": 9e-6}, ("n is 2", "temperature is 9e-06")),
    ],
)
def test_fields_that_contradict_each_other_are_refused(
    fields: dict[str, Any], names: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match="SamplingParams: ") as info:
        SamplingParams(**fields)
    assert all(name in str(info.value) for name in names)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 1},
        {"n": 16384},
        {"temperature": 0},
        {"temperature": 0.0},
        {"temperature": 2},
        {"temperature": 100.0},
        {"top_p": 1},
        {"top_p": 1e-6},
        {"top_k": -1},
        {"top_k": 0},
        {"top_k": 1},
        {"top_k": 10**6},
        {"min_p": 0},
        {"min_p": 1},
        {"min_p": 0.05},
        {"max_tokens": None},
        {"max_tokens": 1},
        {"max_tokens": None, "min_tokens": 1000},
        {"min_tokens": 16},
        {"seed": 0},
        {"seed": 2**64 - 1},
        {"logprobs": 0},
        {"logprobs": -1},
        {"prompt_logprobs": 5},
        {"presence_penalty": -2, "frequency_penalty": 2.0},
        {"repetition_penalty": 1.3},
        {"logit_bias": {}},
        {"logit_bias": {5: -100, 7: 2.5}},
        {"allowed_token_ids": [3, 4]},
        {"bad_words": None},
        {"bad_words": ["a", "b c"]},
        {"stop": None},
        {"stop": []},
        {"stop": ["a", "bc"]},
        {"stop_token_ids": None},
        {"stop_token_ids": range(3)},
        {"stop_token_ids": [0, 7]},
        {"detokenize": False, "stop_token_ids": [0]},
        {"ignore_eos": True, "include_stop_str_in_output": True},
        {"skip_special_tokens": False, "spaces_between_special_tokens": False},
    ],
    ids=str,
)
def test_good_values_are_kept_as_they_are(fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    for name, value in fields.items():
        got = getattr(params, name)
        is_list = name in ("stop", "stop_token_ids", "allowed_token_ids", "bad_words")
        assert got == (tuple(value or ()) if is_list else value)


def test_a_stop_string_is_one_string() -> None:
    assert SamplingParams(stop="abc").stop == ("abc",)


def test_lists_and_dicts_are_copied() -> None:
    stop, ids, bias = ["a"], [1], {1: 2.0}
    params = SamplingParams(
        stop=stop, stop_token_ids=ids, allowed_token_ids=ids, bad_words=stop, logit_bias=bias
    )
    stop.append("b")
    ids.append(2)
    bias[3] = 4.0
    assert (params.stop, params.bad_words) == (("a",), ("a",))
    assert (params.stop_token_ids, params.allowed_token_ids) == ((1,), (1,))
    assert params.logit_bias == {1: 2.0}
    with pytest.raises(TypeError):
        params.logit_bias[3] = 4.0  # type: ignore[index]


def test_numpy_numbers_are_numbers() -> None:
    fields: dict[str, Any] = {
        "temperature": np.float32(0.5),
        "top_k": np.int64(3),
        "stop_token_ids": np.array([1, 2]),
        "logit_bias": {np.int32(4): np.float64(1.5)},
    }
    params = SamplingParams(**fields)
    assert (params.temperature, params.top_k, params.stop_token_ids) == (0.5, 3, (1, 2))
    assert params.logit_bias == {4: 1.5}
    assert type(params.top_k) is int


def test_a_name_that_nobody_has_is_an_error() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0.7)  # type: ignore[call-arg]


def test_a_field_that_is_assigned_to_is_checked_as_when_it_was_made() -> None:
    params = SamplingParams(stop=["a"])
    before = params.clone()
    params.max_tokens = 5
    params.stop = "b"
    params.seed = -1
    params.logprobs = True
    assert params == SamplingParams(stop=["b"], max_tokens=5, logprobs=1)
    assert before == SamplingParams(stop=["a"])
    with pytest.raises(ValueError, match=r"top_k is 1\.5; it must be"):
        params.top_k = 1.5  # type: ignore[assignment]
    with pytest.raises(ValueError, match="min_tokens is 6; it must be at most max_tokens, 5"):
        params.min_tokens = 6
    with pytest.raises(AttributeError, match="has no field 'max_token'"):
        params.max_token = 5  # type: ignore[attr-defined]
    assert (params.top_k, params.min_tokens) == (0, 0)


def test_none_is_the_default_of_optional_fields() -> None:
    every: dict[str, Any] = dict.fromkeys(dataclasses.asdict(SamplingParams()))
    assert SamplingParams.from_optional(**every) == SamplingParams(max_tokens=None)
    assert SamplingParams.from_optional(n=2, seed=-1) == SamplingParams(n=2)
    with pytest.raises(ValueError, match="top_p is 2"):
        SamplingParams.from_optional(top_p=2)


def test_nothing_is_asked_for_with_none() -> None:
    nothing: dict[str, Any] = dict.fromkeys(
        (
            *("stop", "stop_token_ids", "logit_bias", "allowed_token_ids", "bad_words"),
            *("logprobs", "prompt_logprobs", "seed"),
        )
    )
    assert SamplingParams(**nothing) == SamplingParams()


def test_iterators_are_read_once() -> None:
    params = SamplingParams(stop=iter(["a", "b"]), stop_token_ids=iter([1, 2]))
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (1, 2))


def test_it_is_hashable_and_keyword_only() -> None:
    params = SamplingParams(stop=["a"], stop_token_ids=[1])
    same = SamplingParams(stop="a", stop_token_ids=(1,))
    assert params == same
    assert hash(params) == hash(same)
    biased = dataclasses.replace(params, logit_bias={1: 2, 3: 4})
    assert hash(biased) == hash(dataclasses.replace(params, logit_bias={3: 4, 1: 2}))
    assert pickle.loads(pickle.dumps(biased)) == dataclasses.replace(biased) != params
    positional: Any = SamplingParams
    with pytest.raises(TypeError):
        positional(1)
    assert dataclasses.replace(params, top_k=3).stop == ("a",)


@pytest.mark.parametrize(
    ("temperature", "is_greedy"),
    [(0, True), (0.0, True), (9.9e-6, True), (1e-5, False), (1, False)],
)
def test_temperatures_below_the_limit_are_greedy(temperature: float, is_greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).is_greedy == is_greedy


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, SamplingClass.RANDOM),
        ({"temperature": 0.0}, SamplingClass.GREEDY),
        ({"temperature": 0.0, "top_k": 5, "top_p": 0.5, "min_p": 0.1}, SamplingClass.GREEDY),
        ({"temperature": 0.3, "seed": 1}, SamplingClass.RANDOM),
        ({"top_k": 0}, SamplingClass.RANDOM),
        ({"top_k": -1}, SamplingClass.RANDOM),
        ({"top_k": 1}, SamplingClass.TRUNCATED),
        ({"top_p": 0.99}, SamplingClass.TRUNCATED),
        ({"min_p": 0.01}, SamplingClass.TRUNCATED),
        ({"presence_penalty": 0.1}, SamplingClass.EDITED),
        ({"frequency_penalty": -0.1, "temperature": 0}, SamplingClass.EDITED),
        ({"repetition_penalty": 1.1}, SamplingClass.EDITED),
        ({"logit_bias": {1: 1.0}}, SamplingClass.EDITED),
        ({"logit_bias": {}}, SamplingClass.RANDOM),
        ({"allowed_token_ids": [1]}, SamplingClass.EDITED),
        ({"bad_words": ["a"], "top_k": 3}, SamplingClass.EDITED),
        ({"bad_words": []}, SamplingClass.RANDOM),
    ],
    ids=str,
)
def test_the_class_is_the_least_that_serves(
    fields: dict[str, Any], expected: SamplingClass
) -> None:
    assert SamplingParams(**fields).sampling_class == expected
