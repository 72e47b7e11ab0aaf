"""Several decode steps in one call: the same tokens, fewer calls, nothing shown beyond an end."""

import dataclasses
from typing import Any

import pytest

from folojax import RequestOutput, SamplingParams
from tests.conftest import check_is_empty
from tests.letters import decode
from tests.mixed_requests import GREEDY, check_same, make_llm, make_prompts, run
from tests.reference import TIGHT


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"async_scheduling": False}, marks=pytest.mark.slow),
        {},
        TIGHT,
        {"enable_prefix_caching": False},
    ],
    ids=["sync", "async", "tight", "no-cache"],
)
def test_tokens_are_the_same(
    tiny_model: tuple, mixed_outputs: list[RequestOutput], options: dict[str, Any]
) -> None:
    """Stop ids and strings, penalties, bans, minimum lengths, log-probabilities and n > 1 too."""
    llm = make_llm(tiny_model, max_decode_steps=4, check_integrity=True, **options)
    outputs = run(llm)
    check_same(outputs, mixed_outputs)
    assert llm.metrics().num_discarded_tokens <= 8 * sum(len(o.outputs) for o in outputs)
    assert (llm.metrics().num_preemptions > 0) == ("num_pages" in options)


def test_one_call_gives_several_tokens(tiny_model: tuple) -> None:
    """Twelve tokens: one of the prompt's step, then calls of four; the last has three to give."""
    llm = make_llm(tiny_model, max_decode_steps=4, async_scheduling=False)
    single = make_llm(tiny_model, async_scheduling=False)
    prompt = make_prompts()[0][:9]
    (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
    (wanted,) = single.generate(prompt, GREEDY, use_tqdm=False)
    assert output.outputs[0].token_ids == wanted.outputs[0].token_ids
    assert (llm.metrics().num_decode_calls, single.metrics().num_decode_calls) == (3, 11)
    assert llm.metrics().num_discarded_tokens == 0
    assert llm.metrics().num_scheduled_tokens == single.metrics().num_scheduled_tokens
    check_is_empty(llm)


def test_nobody_waits_for_a_burst(tiny_model: tuple) -> None:
    """While somebody waits or has a prompt to compute, a step gives one token."""
    llm = make_llm(tiny_model, max_decode_steps=4, max_num_seqs=2, async_scheduling=False)
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    prompts = make_prompts()
    for name in "abc":
        llm.add_request(name, prompts[0][:5], params)
    sizes: dict[str, list[int]] = {name: [] for name in "abc"}
    while llm.has_unfinished_requests():
        for output in llm.step():
            sizes[output.request_id].append(len(output.outputs[0].token_ids))
    assert sizes["a"] == sizes["b"] == list(range(1, 10))
    assert sizes["c"] == [1, 5, 9]
    check_is_empty(llm)


def test_a_row_that_goes_wrong_keeps_what_came_before(tiny_model: tuple) -> None:
    """The embedding of one token is NaN: whoever samples it fails at the next, its neighbour not.

    One token at a time and four at a time give the same outputs, and the same errors.
    """
    module, params = tiny_model
    prompts = [make_prompts()[i][:6] for i in (0, 2)]
    ask = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    probe = make_llm(tiny_model)
    token_ids = [o.outputs[0].token_ids for o in probe.generate(prompts, ask, use_tqdm=False)]
    place, token = next(
        (i, token) for i, token in enumerate(token_ids[0]) if i > 1 and token not in token_ids[1]
    )
    broken = {**params, "embed": params["embed"].at[token].set(float("nan"))}
    found = []
    for most in (1, 4):
        llm = make_llm((module, broken), max_decode_steps=most)
        outputs = llm.generate(prompts, ask, use_tqdm=False)
        found.append([(o.outputs[0].token_ids, o.outputs[0].finish_reason) for o in outputs])
        check_is_empty(llm)
    assert found[0] == found[1]
    assert found[0][0] == (token_ids[0][: place + 1], "error")


def test_a_burst_that_a_stop_string_cuts_has_one_entry_a_token(tiny_model: tuple) -> None:
    """Records and versions of the weights too."""
    llm = make_llm(tiny_model, max_decode_steps=4)
    prompt = make_prompts()[0][:6]
    ask = SamplingParams(
        temperature=0, max_tokens=30, ignore_eos=True, logprobs=1, record=True, detokenize=True
    )
    (free,) = llm.generate(prompt, ask, use_tqdm=False)
    token_ids = free.outputs[0].token_ids
    # Bursts end with tokens 1, 5, 9, ...: one in the middle of a burst.
    place = next(
        i
        for i, token in enumerate(token_ids)
        if i % 4 and 3 <= token < 98 and token not in token_ids[:i]
    )
    stop = decode([token_ids[place]])
    (output,) = llm.generate(prompt, dataclasses.replace(ask, stop=stop), use_tqdm=False)
    one = output.outputs[0]
    assert (one.finish_reason, one.stop_reason) == ("stop", stop)
    assert one.token_ids == token_ids[: place + 1]
    assert one.logprobs is not None
    assert one.record is not None
    sizes = {len(part) for part in (one.token_ids, one.logprobs, one.record)}
    assert sizes == {len(one.weights_versions)}


def test_a_row_that_has_ended_cannot_go_wrong(tiny_model: tuple) -> None:
    """What a burst computes behind an end token is for nobody, whatever comes of it."""
    module, params = tiny_model
    prompt = make_prompts()[0][:6]
    ask = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    (output,) = make_llm(tiny_model).generate(prompt, ask, use_tqdm=False)
    token_ids = output.outputs[0].token_ids
    place = next(i for i, token in enumerate(token_ids) if i > 1 and token not in token_ids[:i])
    end = token_ids[place]
    broken = {**params, "embed": params["embed"].at[end].set(float("nan"))}
    for most in (1, 4):
        llm = make_llm((module, broken), max_decode_steps=most)
        stopping = dataclasses.replace(ask, stop_token_ids=[end])
        (output,) = llm.generate(prompt, stopping, use_tqdm=False)
        one = output.outputs[0]
        assert (one.token_ids, one.finish_reason) == (token_ids[: place + 1], "stop")
        assert one.stop_reason == end
        check_is_empty(llm)
