"""What a text must be, it is: whatever the sampling, the batch and the engine."""

import functools
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from scipy.stats import chisquare

from folojax import LLM, RequestOutput, SamplingParams, StructuredOutputsParams, load_snapshot
from tests import dense
from tests.conftest import CompileCounter, check_is_empty
from tests.letters import EOS, decode, encode, make_letters_tokenizer
from tests.reference import MORE_LIMITS, TIGHT
from tests.structured_cases import GRAMMARS, REGEXES, is_json_of, matches, schemas

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "bc"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
COMPACT = StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)
Case = tuple[StructuredOutputsParams, Callable[[str], bool]]


def asked(**fields: Any) -> SamplingParams:
    given: dict[str, Any] = {"max_tokens": 80, "structured_outputs": COMPACT}
    return SamplingParams(**given | fields)


def cases(num_schemas: int, step: int) -> list[Case]:
    """So many schemas, and every so many of the expressions and grammars."""
    found: list[Case] = []
    for schema in schemas(num_schemas):
        params = StructuredOutputsParams(json=schema, disable_any_whitespace=len(found) % 2 == 0)
        found.append((params, functools.partial(is_json_of, schema)))
    for regex in REGEXES[::step]:
        params = StructuredOutputsParams(regex=regex)
        found.append((params, functools.partial(matches, regex)))
    found += [(StructuredOutputsParams(grammar=one), is_one) for one, is_one in GRAMMARS[::step]]
    return found


def check_cases(llm: LLM, found: list[Case], max_tokens: int) -> None:
    params = [
        SamplingParams(seed=i, max_tokens=max_tokens, structured_outputs=one)
        for i, (one, _) in enumerate(found)
    ]
    outputs = llm.generate(["An example: "] * len(found), params, use_tqdm=False)
    num_whole = 0
    for output, (one, is_one) in zip(outputs, found, strict=True):
        (completion,) = output.outputs
        if completion.finish_reason == "length":
            assert len(completion.token_ids) == max_tokens
            continue
        assert completion.finish_reason == "stop", completion.stop_reason
        assert is_one(completion.text), (completion.text, one)
        num_whole += 1
    assert num_whole > len(found) / 2


@pytest.fixture(scope="module")
def text_llm(text_directory: Path) -> LLM:
    return LLM(text_directory, max_model_len=128, max_num_seqs=4, max_num_batched_tokens=32)


def test_whole_texts_of_a_random_model_are_valid(text_llm: LLM) -> None:
    check_cases(text_llm, cases(15, step=4), max_tokens=60)


def test_whole_texts_of_a_real_model_are_valid(real_llm: LLM) -> None:
    check_cases(real_llm, cases(4, step=25), max_tokens=60)


@pytest.mark.slow
def test_all_texts_of_a_random_model_are_valid(text_directory: Path) -> None:
    llm = LLM(text_directory, max_model_len=512, max_num_seqs=32)
    check_cases(llm, cases(300, step=1), max_tokens=250)


@pytest.mark.slow
def test_all_texts_of_a_real_model_are_valid() -> None:
    check_cases(LLM(dtype="float32", max_model_len=512), cases(300, step=1), max_tokens=250)


def test_the_distribution_is_the_models_own_renormalised(
    tiny_model: tuple, letters_llm: LLM
) -> None:
    choice, count = ["a", "ab", "b", "c?", "cd"], 1000
    params = asked(
        n=count, seed=1, structured_outputs=StructuredOutputsParams(choice=choice), max_tokens=4
    )
    (output,) = letters_llm.generate("The sea", params, use_tqdm=False)
    found = Counter(one.text for one in output.outputs)
    expected = [probability(tiny_model, output.prompt_token_ids, text, choice) for text in choice]
    assert sum(expected) == pytest.approx(1, abs=1e-4)
    wanted = np.asarray(expected) / sum(expected) * count
    assert chisquare([found[text] for text in choice], wanted).pvalue > 1e-3


def probability(model: tuple, prompt: list[int], text: str, choice: list[str]) -> float:
    """Of a text among others, token by token, each renormalised over those that may come next."""
    (module, params), product = model, 1.0
    for place in range(len(text) + 1):
        begun = [one for one in choice if one.startswith(text[:place])]
        nexts = {encode(one[place])[0] if one[place:] else EOS for one in begun}
        taken = encode(text[place])[0] if text[place:] else EOS
        logits = np.asarray(dense.logits(module, params, [*prompt, *encode(text[:place])]))[
            -1
        ].astype(np.float64)
        weights = np.exp(logits - logits.max())
        product *= weights[taken] / weights[sorted(nexts)].sum()
    return product


FIELDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "drawn": {"seed": 1},
    "cut": {"seed": 2, "top_p": 0.5, "top_k": 9, "min_p": 0.01},
    "penalties": {"seed": 3, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    "bias": {"temperature": 0, "logit_bias": {encode("a")[0]: 30.0, EOS: 50.0}},
    "words": {"seed": 4, "bad_words": ["q", "bb"], "min_tokens": 2},
    "endless": {"seed": 5, "ignore_eos": True},
    "samples": {"seed": 6, "n": 3},
    "reports": {"seed": 7, "logprobs": 3, "prompt_logprobs": 1, "record": True},
}


def prompts() -> list[str]:
    return [f"{'An example: ' * (i % 3)}number {i}" for i in range(len(FIELDS))]


def run(llm: LLM) -> list[RequestOutput]:
    """Beside rows that follow no grammar."""
    params = [asked(**fields) for fields in FIELDS.values()]
    params[3:3] = plain = [SamplingParams(seed=9, max_tokens=40)] * 2
    texts = prompts()
    texts[3:3] = ["The sea is"] * len(plain)
    outputs = llm.generate(texts, params, use_tqdm=False)
    check_is_empty(llm)
    return outputs


@pytest.fixture(scope="module")
def outputs(shared_letters_llm: LLM) -> list[RequestOutput]:
    return run(shared_letters_llm)


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[one.token_ids for one in output.outputs] for output in outputs]


def test_every_sampling_parameter_keeps_to_the_grammar(outputs: list[RequestOutput]) -> None:
    num_whole = 0
    for output in (*outputs[:3], *outputs[5:]):
        for one in output.outputs:
            assert one.finish_reason in ("stop", "length")
            assert one.finish_reason == "length" or is_json_of(SCHEMA, one.text)
            assert one.text.startswith('{"name":"')
            num_whole += one.finish_reason == "stop"
    assert num_whole >= len(FIELDS)


def test_rows_without_a_grammar_keep_their_tokens(
    outputs: list[RequestOutput], letters_llm: LLM
) -> None:
    params = SamplingParams(seed=9, max_tokens=40)
    alone = letters_llm.generate(["The sea is"], params, use_tqdm=False)
    assert tokens(outputs)[3] == tokens(outputs)[4] == tokens(alone)[0]


@pytest.mark.parametrize(
    "options",
    [
        {"async_scheduling": False},
        TIGHT,
        {"max_decode_steps": 4},
        {"enable_prefix_caching": False, "max_num_seqs": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_engines_options_change_no_token(
    tiny_model: tuple, outputs: list[RequestOutput], options: dict[str, Any]
) -> None:
    llm = LLM(tiny_model, make_letters_tokenizer(), **MORE_LIMITS | options, max_logprobs=-1)
    assert tokens(run(llm)) == tokens(outputs)
    assert llm.metrics().num_preemptions > 0 or options is not TIGHT


def test_deterministic_mode(tiny_model: tuple) -> None:
    llm = LLM(tiny_model, make_letters_tokenizer(), **MORE_LIMITS, deterministic=True)
    first = run(llm)
    texts = prompts()[::-1]
    params = [asked(**fields) for fields in FIELDS.values()][::-1]
    again = llm.generate(texts, params, use_tqdm=False)
    own = [*first[:3], *first[5:]]
    assert tokens(own) == tokens(again[::-1])
    assert own[-1].outputs[0].logprobs == again[0].outputs[0].logprobs
    assert all(is_json_of(SCHEMA, one.outputs[0].text) for one in own[:2])


def test_one_program_serves_every_grammar(letters_llm: LLM, counter: CompileCounter) -> None:
    def run_one(regex: str) -> None:
        params = asked(structured_outputs=StructuredOutputsParams(regex=regex), seed=1)
        letters_llm.generate(["The sea", "is"], params, use_tqdm=False)

    run_one("(x|y{2}){9}")  # of which one ends before the other
    before = counter.count
    run_one("[a-c]{9}")
    run_one("abc")
    assert counter.count == before


@pytest.mark.parametrize("mode", ["raw", "processed"])
def test_log_probabilities_before_and_behind_the_mask(
    tiny_model: tuple, letters_llm: LLM, mode: Any
) -> None:
    llm = letters_llm
    if mode == "processed":
        options: dict[str, Any] = {"max_logprobs": -1, "logprobs_mode": mode}
        llm = LLM(tiny_model, make_letters_tokenizer(), **MORE_LIMITS, **options)
    module, weights = tiny_model
    choice = StructuredOutputsParams(choice=["a", "b"])
    params = asked(structured_outputs=choice, temperature=0, logprobs=3, record=True)
    (output,) = llm.generate("The sea", params, use_tqdm=False)
    (one,) = output.outputs
    logits = np.asarray(dense.logits(module, weights, output.prompt_token_ids))[-1]
    raw = np.asarray(jax.nn.log_softmax(logits))
    pair = [raw[encode(letter)[0]] for letter in "ab"]
    masked = max(pair) - np.logaddexp(*pair)
    assert one.logprobs is not None
    assert one.record is not None
    reported = one.logprobs[0][one.token_ids[0]].logprob
    assert reported == pytest.approx(max(pair) if mode == "raw" else masked, abs=1e-3)
    assert one.record[0].raw == pytest.approx(max(pair), abs=1e-3)
    assert one.record[0].processed == pytest.approx(masked, abs=1e-3)
    if mode == "processed":
        assert one.logprobs[1][EOS].logprob == pytest.approx(0, abs=1e-6)


def test_streams_and_chats(letters_llm: LLM) -> None:
    shown = ""
    for output in letters_llm.stream("The sea", asked(seed=1)):
        assert output.outputs[0].text.startswith(shown)
        shown = output.outputs[0].text
    assert is_json_of(SCHEMA, shown)
    messages = [{"role": "user", "content": "Hello"}]
    (answer,) = letters_llm.chat(messages, asked(seed=2), use_tqdm=False)
    assert is_json_of(SCHEMA, answer.outputs[0].text)


def test_forks_and_snapshots_go_on_in_the_grammar(letters_llm: LLM, tmp_path: Path) -> None:
    llm, params = letters_llm, asked(seed=3)
    (whole,) = llm.generate("The sea is", params, use_tqdm=False)
    llm.add_request("trunk", "The sea is", params)
    while not any(len(output.outputs[0].token_ids) >= 12 for output in llm.step()):
        pass
    llm.fork("trunk", "same")
    llm.fork("trunk", "other", asked(seed=8, n=2))
    words = StructuredOutputsParams(regex="[a-z]+")
    with pytest.raises(ValueError, match="12 output tokens, and behind 0 of them they leave"):
        llm.fork("trunk", "none", asked(structured_outputs=words), num_output_tokens=12)
    llm.snapshot("trunk").save(tmp_path / "snapshot")
    llm.resume(load_snapshot(tmp_path / "snapshot"), "again")
    done: dict[str, RequestOutput] = {}
    while llm.has_unfinished_requests():
        done |= {output.request_id: output for output in llm.step()}
    for name in ("trunk", "same", "again"):
        assert done[name].outputs[0].token_ids == whole.outputs[0].token_ids
    for one in done["other"].outputs:
        assert one.token_ids[:12] == whole.outputs[0].token_ids[:12]
        assert is_json_of(SCHEMA, one.text)


def test_a_contradiction_ends_as_an_error(letters_llm: LLM) -> None:
    """The mask leaves a token that something else has taken."""
    choice = StructuredOutputsParams(choice=["ab"])
    banned: list[dict[str, Any]] = [
        {"allowed_token_ids": encode("xyz")},
        {"min_tokens": 5},
        {"bad_words": ["b"]},
    ]
    params = [asked(structured_outputs=choice, seed=1, **fields) for fields in banned]
    plain = SamplingParams(seed=1)
    found = letters_llm.generate(["The sea"] * 4, [*params, plain], use_tqdm=False)
    assert [one.outputs[0].finish_reason for one in found] == ["error"] * 3 + ["length"]
    assert [len(one.outputs[0].token_ids) for one in found[:3]] == [0, 2, 1]
    assert "grammars leave" in str(found[0].outputs[0].stop_reason)


def test_structural_tags(letters_llm: LLM) -> None:
    """Free text until a trigger, and then what the tag says."""
    tag = {
        "triggers": ["<f"],
        "structures": [{"begin": "<f=a>", "schema": SCHEMA, "end": "</f>"}],
    }
    params = asked(
        structured_outputs=StructuredOutputsParams(structural_tag=tag, disable_any_whitespace=True),
        seed=1,
        logit_bias={encode("<")[0]: 20.0, encode("f")[0]: 21.0},
        max_tokens=100,
    )
    (output,) = letters_llm.generate("The sea", params, use_tqdm=False)
    text = output.outputs[0].text
    found = re.search("<f=a>(.*?)</f>", text)
    assert found is not None, text
    assert is_json_of(SCHEMA, found[1])


def test_options_of_json(letters_llm: LLM) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
    options: dict[str, Any] = {"json": schema, "disable_additional_properties": True}
    kinds: list[tuple[dict[str, Any], str]] = [
        ({"disable_any_whitespace": True}, '{"a":null}'),
        ({"whitespace_pattern": " {2}"}, '{  "a"  :  null  }'),
    ]
    for fields, wanted in kinds:
        one = StructuredOutputsParams(**options, **fields)
        params = asked(structured_outputs=one, temperature=0, logit_bias={encode(" ")[0]: 50.0})
        (output,) = letters_llm.generate("The sea", params, use_tqdm=False)
        assert output.outputs[0].text.replace(" ", "") == '{"a":null}'
        assert output.outputs[0].text == wanted
    free = StructuredOutputsParams(json_object=True)
    bias = {encode(letter)[0]: 30.0 for letter in '{}"'}
    params = asked(structured_outputs=free, seed=1, logit_bias=bias)
    (output,) = letters_llm.generate("The sea", params, use_tqdm=False)
    assert isinstance(json.loads(output.outputs[0].text), dict)


def test_letters_are_decoded_as_they_stand(outputs: list[RequestOutput]) -> None:
    one = outputs[0].outputs[0]
    assert decode(one.token_ids).removesuffix("</s>") == one.text
