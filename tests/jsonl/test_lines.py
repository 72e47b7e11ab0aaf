"""JSON Lines jobs: what a line may say, what an entry says, what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from folojax import LLM, SamplingParams, StructuredOutputsParams
from folojax.jsonl.lines import line_seed
from tests.jsonl_runs import entries, line, run
from tests.letters import encode
from tests.stub_llm import FAILING_PROMPT, StubLLM


def test_seeds_are_stable_and_exact_in_doubles() -> None:
    # Other numbers would change what a resumed job generates.
    assert [line_seed(0, "a"), line_seed(1, "a"), line_seed(0, 1)] == [
        3649112230393628,
        689793359134330,
        1631926063554650,
    ]
    assert line_seed(0, 1) == line_seed(0, "1")
    assert len({line_seed(seed, line_id) for seed in range(9) for line_id in range(99)}) == 891
    assert all(line_seed(0, i) < 2**52 for i in range(99))
    assert line_seed(0, "\ud800") >= 0


def test_a_seed_of_its_own_wins_and_greedy_has_none(target: Path) -> None:
    run([line("a", seed=5, n=2), line("b", temperature=0), line("c", seed=None)], target)
    seeds = [[sample["seed"] for sample in entry["outputs"]] for entry in entries(target)]
    assert seeds == [[5, 6], [None], [line_seed(0, "c")]]


BAD_LINES: dict[str, tuple[bytes, str]] = {
    "not_json": (b"{", "not JSON"),
    "not_utf8": (b'{"prompt": "\xff"}', "not UTF-8"),
    "not_an_object": (b'"text"', "must be an object"),
    "nested": (b'{"prompt": ' + b"[" * 100_000, "nested"),
    "nan": (b'{"prompt": "a", "sampling": {"top_p": NaN}}', "NaN is no number"),
    "key_twice": (b'{"prompt": "a", "prompt": "b"}', "'prompt' comes twice"),
    "no_prompt": (b"{}", "one of prompt, messages, prompt_token_ids"),
    "two_prompts": (b'{"prompt": "a", "prompt_token_ids": [1]}', "'prompt', 'prompt_token_ids'"),
    "unknown_key": (b'{"prompt": "a", "max_tokens": 3}', "['max_tokens']"),
    "prompt_no_text": (b'{"prompt": 5}', "prompt is 5; it must be text"),
    "prompt_null": (b'{"prompt": null}', "prompt is None"),
    "ids_no_list": (b'{"prompt_token_ids": "1"}', "prompt_token_ids is '1'"),
    "no_messages": (b'{"messages": []}', "messages is []"),
    "message_no_object": (b'{"messages": ["Hi"]}', "messages is ['Hi']"),
    "message_no_role": (b'{"messages": [{"content": "Hi"}]}', "messages is"),
    "message_no_content": (b'{"messages": [{"role": "user", "contents": "Hi"}]}', "messages is"),
    "template_refuses": (b'{"messages": [{"role": "nobody", "content": ""}]}', "'nobody'"),
    "id_no_text": (b'{"prompt": "a", "id": [1]}', "id is [1]"),
    "id_float": (b'{"prompt": "a", "id": 1.5}', "id is 1.5"),
    "id_bool": (b'{"prompt": "a", "id": true}', "id is True"),
    "id_twice": (line("good"), "id 'good' is that of line 1"),
    "sampling_no_object": (b'{"prompt": "a", "sampling": 3}', "sampling is 3"),
    "sampling_unknown": (line("x", temprature=1), "['temprature']"),
    "sampling_value": (line("x", top_p=2), "top_p is 2"),
    "format_unknown": (b'{"prompt": "a", "response_format": {"type": "xml"}}', "must be text"),
    "format_schema": (
        b'{"prompt": "a", "response_format": {"type": "json_schema"}}',
        "json_schema",
    ),
    "format_twice": (
        b'{"prompt": "a", "response_format": {"type": "json_object"}, '
        b'"sampling": {"structured_outputs": {"regex": "a"}}}',
        "say the same",
    ),
    "structure_unknown": (line("x", structured_outputs={"xml": "a"}), "['xml']"),
    "prompt_too_long": (line("x", "x" * 1000), "prompt has 1000 tokens"),
    "prompt_empty": (line("x", ""), "prompt has 0 tokens"),
    "engine_fails": (json.dumps({"prompt_token_ids": FAILING_PROMPT}).encode(), "no distribution"),
}


SCHEMA = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}


def test_what_a_text_must_be_is_spelled_as_by_openai_or_by_vllm(
    letters_llm: LLM, target: Path
) -> None:
    named = {"name": "a", "strict": True, "schema": SCHEMA}
    lines: list[dict[str, Any]] = [
        {"response_format": {"type": "json_schema", "json_schema": named}},
        {"sampling": {"structured_outputs": {"json": SCHEMA}}},
        {"response_format": {"type": "text"}, "sampling": {"max_tokens": 3}},
        {"sampling": {"structured_outputs": {"choice": ["yes", "no"]}}},
    ]
    defaults = SamplingParams(max_tokens=60, logit_bias={encode(letter)[0]: 9 for letter in '"a:}'})
    raw = [json.dumps({"prompt": "The sea", **one}).encode() + b"\n" for one in lines]
    assert run(raw, target, llm=letters_llm, defaults=defaults).num_done == 4
    first, second, free, word = (entry["outputs"][0] for entry in entries(target))
    for one in (first, second):
        assert one["finish_reason"] == "length" or json.loads(one["text"])["a"] is None
        assert one["text"].startswith("{")
    assert free["finish_reason"] == "length"
    assert word["text"] in ("yes", "no")


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_reported_and_the_job_goes_on(case: str, target: Path) -> None:
    raw, reason = BAD_LINES[case]
    bad = []
    summary = run(
        [line("good"), b"  \n", raw.rstrip() + b"\n", line("after")],
        target,
        on_entry=lambda entry: bad.append(entry) if entry["line"] == 3 else None,
    )
    assert (summary.num_done, summary.num_bad) == (2, 1)
    assert [entry["line"] for entry in entries(target)] == [1, 3, 4]
    assert reason in json.dumps(bad, ensure_ascii=False).replace("\\\\", "\\")
    assert "1 bad" in str(summary)


def test_forms_of_prompts(target: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"prompt": "<user>Hi"}\r\n',
        b'{"messages": [{"role": "user", "content": "Hi"}]}\n',
        json.dumps({"prompt_token_ids": list(b"<user>Hi")}).encode(),  # the last has no end
    ]
    run(lines, target, defaults=SamplingParams(temperature=0, max_tokens=3))
    found = entries(target)
    assert [entry["id"] for entry in found] == ["line-1", "line-2", "line-3"]
    assert found[0]["outputs"] == found[1]["outputs"] == found[2]["outputs"]
    assert found[0]["usage"] == {"prompt_tokens": 8, "output_tokens": 3}


def test_an_entry_has_all_of_a_sample(target: Path) -> None:
    run([line("\u2028ü\ud800", logprobs=0, prompt_logprobs=0, n=2, seed=1)], target)
    (entry,) = entries(target)
    assert entry["id"] == "\u2028ü\ud800"
    assert len(target.read_text(encoding="ascii").splitlines()) == 1
    assert [sample["index"] for sample in entry["outputs"]] == [0, 1]
    assert entry["prompt_logprobs"] == [None]
    for sample in entry["outputs"]:
        assert sample["text"] == " ".join(map(str, sample["token_ids"]))
        assert (sample["finish_reason"], sample["stop_reason"]) == ("length", None)
        assert [list(token) for token in sample["logprobs"]] == [
            [str(token)] for token in sample["token_ids"]
        ]
        first = sample["token_ids"][0]
        wanted = {"logprob": None, "rank": 1, "decoded_token": str(first)}
        assert sample["logprobs"][0] == {str(first): wanted}


# Another value than the default for every field, as JSON spells it.
SAMPLING: dict[str, Any] = {
    "n": 3,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.5,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.5,
    "max_tokens": 5,
    "min_tokens": 1,
    "stop": ["a", "b"],
    "include_stop_str_in_output": True,
    "stop_token_ids": [5],
    "ignore_eos": True,
    "logit_bias": {"5": 1.5},
    "allowed_token_ids": [5, 6],
    "bad_words": ["c"],
    "logprobs": 1,
    "prompt_logprobs": 1,
    "seed": 2**63,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "detokenize": False,
    "record": True,
    "routed_experts": True,
    "logits_processors": ["ban"],
    "extra_args": {"strength": 2},
    "structured_outputs": {"regex": "a"},
    "activation_edits": ["steer"],
    "activations": True,
}


def test_all_fields_are_in_the_table() -> None:
    assert set(SAMPLING) == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize("name", SAMPLING)
def test_each_field_of_sampling_reaches_the_engine(name: str, target: Path) -> None:
    class Recorder(StubLLM):
        def add_request(self, *args: Any) -> None:
            seen.append(args[2])
            super().add_request(*args)

    seen: list[SamplingParams] = []
    run(
        [json.dumps({"prompt": "a", "sampling": {name: SAMPLING[name]}}).encode()],
        target,
        llm=Recorder(),
    )
    value = getattr(seen[0], name)
    if name == "logit_bias":
        assert dict(value) == {5: 1.5}
    elif name == "structured_outputs":
        assert value == StructuredOutputsParams(regex="a")
    else:
        assert value == (tuple(SAMPLING[name]) if isinstance(value, tuple) else SAMPLING[name])
    assert seen[0].max_tokens == (5 if name == "max_tokens" else 4)


def test_a_bias_of_no_token_is_refused(target: Path) -> None:
    summary = run([line("a", logit_bias={"the": 1}), line("b")], target)
    assert (summary.num_done, summary.num_bad) == (1, 1)
    assert "'the'; it must be a token id" in entries(target)[0]["error"]
