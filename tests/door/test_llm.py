"""The user's door: forms of prompts, refusals, defaults, text; and what the seed got wrong."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from folojax import LLM, EngineConfig, SamplingParams
from folojax.backend import choose_backend

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def shared_llm(text_directory: Path) -> LLM:
    return LLM(text_directory, max_model_len=128, max_num_seqs=4, max_num_batched_tokens=32)


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    yield shared_llm
    assert not shared_llm.has_unfinished_requests()
    shared_llm.engine.scheduler.check()


def generate(llm: LLM, prompts: Any, params: Any = GREEDY) -> list:
    return llm.generate(prompts, params, use_tqdm=False)


def test_every_form_of_a_prompt_is_the_same_prompt(llm: LLM) -> None:
    text = "The sea is"
    ids = llm.get_tokenizer().encode(text)
    array = np.array(ids)
    forms: list[Any] = [text, ids, {"prompt": text}, {"prompt_token_ids": array}]
    expected = generate(llm, [text])[0]
    assert expected.prompt_token_ids == ids
    for form in [*forms, forms]:
        for output in generate(llm, form):
            assert output.outputs[0].token_ids == expected.outputs[0].token_ids
            assert output.outputs[0].text == expected.outputs[0].text
    assert [output.prompt for output in generate(llm, forms)] == [text, None, text, None]


def test_outputs_keep_the_order_of_the_prompts(llm: LLM) -> None:
    params = [dataclasses.replace(GREEDY, max_tokens=m) for m in (9, 1, 5, 3, 7, 2)]
    prompts = [f"Number {i} is" for i in range(6)]
    outputs = generate(llm, prompts, params)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [9, 1, 5, 3, 7, 2]


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert generate(llm, []) == []
    assert llm.chat([], GREEDY, use_tqdm=False) == []


def test_text_is_the_tokenizers_own(llm: LLM) -> None:
    completion = generate(llm, "The sea is")[0].outputs[0]
    tokenizer = llm.get_tokenizer()
    assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    silent = dataclasses.replace(GREEDY, detokenize=False)
    assert generate(llm, "The sea is", silent)[0].outputs[0].text == ""


def test_a_stop_string_cuts_the_text_and_keeps_the_tokens(llm: LLM) -> None:
    free = generate(llm, "The sea is")[0].outputs[0]
    tokenizer = llm.get_tokenizer()
    # From the middle of one token's text into the next one's.
    second, third = (tokenizer.decode([token]) for token in free.token_ids[2:4])
    stop = second[-1:] + third[:1]
    end = free.text.index(stop)
    params = dataclasses.replace(GREEDY, stop=[stop, "never to be seen"])
    output = generate(llm, "The sea is", params)[0].outputs[0]
    assert output.text == free.text[:end]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.token_ids == free.token_ids[: len(output.token_ids)]
    assert len(output.token_ids) <= 4
    kept = dataclasses.replace(params, include_stop_str_in_output=True)
    assert generate(llm, "The sea is", kept)[0].outputs[0].text == free.text[:end] + stop


def test_a_stop_token_leaves_no_text_unless_asked_for(llm: LLM) -> None:
    free = generate(llm, "The sea is")[0].outputs[0]
    params = dataclasses.replace(GREEDY, stop_token_ids=[free.token_ids[3]])
    decode = llm.get_tokenizer().decode
    assert generate(llm, "The sea is", params)[0].outputs[0].text == decode(free.token_ids[:3])
    kept = dataclasses.replace(params, include_stop_str_in_output=True)
    assert generate(llm, "The sea is", kept)[0].outputs[0].text == decode(free.token_ids[:4])


def test_logprobs_are_of_the_sampled_tokens(llm: LLM) -> None:
    params = dataclasses.replace(GREEDY, logprobs=0)
    completion = generate(llm, "The sea is", params)[0].outputs[0]
    assert completion.logprobs is not None
    assert [list(entry) for entry in completion.logprobs] == [[t] for t in completion.token_ids]
    values = [entry[t] for entry, t in zip(completion.logprobs, completion.token_ids, strict=True)]
    assert all(value.logprob <= 0 for value in values)
    assert completion.cumulative_logprob == pytest.approx(sum(v.logprob for v in values))
    decode = llm.get_tokenizer().decode
    assert [value.decoded_token for value in values] == [decode([t]) for t in completion.token_ids]
    assert generate(llm, "The sea is")[0].outputs[0].logprobs is None


def test_chat_renders_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    one = llm.chat(messages, GREEDY, use_tqdm=False)[0]
    rendered = llm.get_tokenizer().decode(one.prompt_token_ids)
    assert "<|im_start|>user\nHello<|im_end|>" in rendered
    assert rendered.endswith("<|im_start|>assistant\n")
    many = llm.chat([messages, messages], GREEDY, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in many] == [one.outputs[0].token_ids] * 2
    custom = llm.chat(messages, GREEDY, use_tqdm=False, chat_template="{{ messages[0].content }}")
    assert custom[0].prompt_token_ids == llm.get_tokenizer().encode("Hello")


def test_a_template_cannot_leave_the_sandbox(llm: LLM) -> None:
    hostile = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ValueError, match="unsafe"):
        llm.chat([{"role": "user", "content": "x"}], GREEDY, chat_template=hostile)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([""], "prompt is empty|empty"),
        ([[]], "empty"),
        ([[1, 2, 49152]], "49152"),
        ([[-1]], "-1"),
        ([[True]], "True"),
        ([[1.5]], "1.5"),
        ([[5] * 128], "128"),
        ([[5] * 500], "500"),
        ([7], "int"),
        ([None], "NoneType"),
        (7, "int"),
        ([{"text": "x"}], "text"),
        ([{"prompt_token_ids": 5}], "int"),
    ],
)
def test_a_bad_prompt_is_refused_and_queues_nothing(llm: LLM, prompts: Any, message: str) -> None:
    good = ["The sea is"]
    with pytest.raises(ValueError, match=message):
        generate(llm, good + prompts if isinstance(prompts, list) else prompts)
    assert not llm.has_unfinished_requests()
    assert llm.metrics().num_waiting == 0


def test_a_bad_prompt_does_not_hurt_what_is_in_flight(llm: LLM) -> None:
    expected = generate(llm, "The sea is")[0].outputs[0].token_ids
    llm.add_request("mine", "The sea is", GREEDY)
    llm.step()
    with pytest.raises(ValueError, match="empty"):
        generate(llm, ["fine", []])
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    assert outputs[-1].outputs[0].token_ids == expected


def test_generate_leaves_the_outputs_of_others_to_step(llm: LLM) -> None:
    llm.add_request("mine", "The sea is", dataclasses.replace(GREEDY, max_tokens=2))
    (output,) = generate(llm, "A longer one")
    assert len(output.outputs[0].token_ids) == 8
    assert llm.has_unfinished_requests()
    assert [output.request_id for output in llm.step()] == ["mine"]


def test_params_must_match_the_prompts(llm: LLM) -> None:
    with pytest.raises(ValueError, match="2 entries for 1 prompts"):
        generate(llm, ["x"], [GREEDY, GREEDY])
    with pytest.raises(ValueError, match="SamplingParams"):
        generate(llm, ["x"], [{"temperature": 0}])


def test_add_request_takes_one_prompt(llm: LLM) -> None:
    for bad in (5, [["x"]], ["x", "y"], None):
        with pytest.raises(ValueError, match="prompt"):
            llm.add_request("one", bad, GREEDY)  # type: ignore[arg-type]


def test_a_huge_top_k_is_off(llm: LLM) -> None:
    seeded = SamplingParams(seed=3, max_tokens=4, ignore_eos=True)
    huge = dataclasses.replace(seeded, top_k=2**40)
    expected = generate(llm, "The sea is", seeded)[0].outputs[0].token_ids
    assert generate(llm, "The sea is", huge)[0].outputs[0].token_ids == expected


def test_a_duplicate_id_is_refused(llm: LLM) -> None:
    llm.add_request("twice", "The sea is", GREEDY)
    with pytest.raises(ValueError, match="'twice'"):
        llm.add_request("twice", "The sea is", GREEDY)
    llm.abort_request("twice")
    llm.add_request("twice", "The sea is", GREEDY)  # free again
    llm.abort_request("twice")


def test_bad_ids_in_params_are_refused(llm: LLM) -> None:
    params = dataclasses.replace(GREEDY, stop_token_ids=[49152])
    with pytest.raises(ValueError, match="49152"):
        generate(llm, "x", params)


def test_a_request_larger_than_the_pool_is_refused(text_directory: Path) -> None:
    llm = LLM(text_directory, max_model_len=128, max_num_seqs=2, page_size=16, num_pages=4)
    with pytest.raises(ValueError, match="pages"):
        generate(llm, [[5] * 60], dataclasses.replace(GREEDY, max_tokens=20))
    assert len(generate(llm, [[5] * 60], dataclasses.replace(GREEDY, max_tokens=5))) == 1


def test_defaults_come_from_the_generation_config(text_directory: Path, llm: LLM) -> None:
    assert llm.default_sampling_params == SamplingParams()
    assert len(llm.generate("The sea is", use_tqdm=False)[0].outputs[0].token_ids) <= 16
    path = text_directory / "generation_config.json"
    before = path.read_text()
    path.write_text(
        '{"temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [2, 0], '
        '"repetition_penalty": 1.1, "max_new_tokens": 99}'
    )
    try:
        other = LLM(text_directory, max_model_len=128, max_num_seqs=4)
        assert other.default_sampling_params == SamplingParams(
            temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.1, max_tokens=99
        )
        assert other.engine.validator.eos_token_ids == (2, 0)
    finally:
        path.write_text(before)


def test_the_default_config_works_on_the_default_model(real_llm: LLM) -> None:
    """And greedy decoding of it is not the same text for every prompt."""
    config = EngineConfig().resolve(8192, choose_backend())
    assert config.max_model_len == 8192
    question = [{"role": "user", "content": "What is the capital of France?"}]
    params = SamplingParams(temperature=0, max_tokens=20)
    (output,) = real_llm.chat(question, params, use_tqdm=False)
    assert "Paris" in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "int8"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size"),
        ({"deterministic": 1}, "deterministic is 1; it must be True or False"),
        ({"max_logprobs": -2}, "max_logprobs is -2"),
        ({"logprobs_mode": "raw_logits"}, "logprobs_mode is 'raw_logits'"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching is 1"),
        ({"max_model_len": 10_000}, "10000"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, "max_num_batched_tokens"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 64}, "chunk"),
        ({"scheduling_policy": "random"}, "random"),
    ],
)
def test_bad_options_are_refused(text_directory: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(text_directory, **options)


def test_text_needs_a_tokenizer(tiny_model: tuple) -> None:
    llm = LLM(tiny_model, max_model_len=160, page_size=16, num_pages=48)
    with pytest.raises(ValueError, match="no tokenizer"):
        generate(llm, "text")
    with pytest.raises(ValueError, match="no tokenizer"):
        generate(llm, [[5, 6]], dataclasses.replace(GREEDY, stop="x"))
    with pytest.raises(ValueError, match="needs a tokenizer"):
        llm.chat([{"role": "user", "content": "x"}])
    assert generate(llm, [[5, 6]])[0].outputs[0].text == ""
