"""Streams, and requests of the caller's own loop, on a tiny model."""

import dataclasses

import pytest

from folojax import LLM, RequestOutput
from tests.api_calls import GREEDY, PROMPT, SEEDED, change, finish, run
from tests.letters import EOS, decode


def test_stream(letters_llm: LLM) -> None:
    """Every token of every prompt, text that only grows, and the end is what generate gives."""
    params = [
        GREEDY,
        change(SEEDED, n=2, logprobs=1),
        change(GREEDY, stop="zzz", max_tokens=5),
        change(SEEDED, prompt_logprobs=0),
    ]
    expected = letters_llm.generate([PROMPT] * 4, params, use_tqdm=False)
    last: dict[str, RequestOutput] = {}
    num_outputs = 0
    for output in letters_llm.stream([PROMPT] * 4, params):
        num_outputs += 1
        before = last.get(output.request_id)
        if before is not None:
            assert not before.finished
            for old, new in zip(before.outputs, output.outputs, strict=True):
                assert new.text.startswith(old.text)
                assert new.token_ids[: len(old.token_ids)] == old.token_ids
        if not output.finished:
            assert output.metrics.finish_time_s is output.metrics.e2e_s is None
        last[output.request_id] = output
    assert num_outputs >= 12 + 12 + 5 + 12
    assert len(last) == 4
    for ours, theirs in zip(last.values(), expected, strict=True):
        assert ours.finished
        for one, other in zip(ours.outputs, theirs.outputs, strict=True):
            assert dataclasses.replace(one, logprobs=None, cumulative_logprob=0.0) == (
                dataclasses.replace(other, logprobs=None, cumulative_logprob=0.0)
            )
            assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-4)
            assert (one.logprobs is None) == (other.logprobs is None)
        assert (ours.prompt_logprobs is None) == (theirs.prompt_logprobs is None)


def test_a_stream_holds_back_what_could_be_a_stop_string(letters_llm: LLM) -> None:
    free = letters_llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].text
    stop = free[2:6]
    shown = [
        output.outputs[0].text for output in letters_llm.stream(PROMPT, change(GREEDY, stop=stop))
    ]
    end = free.index(stop)
    assert shown[-1] == free[:end]
    assert all(shown[-1].startswith(text) for text in shown)


def test_a_stream_closed_early_aborts_its_requests(letters_llm: LLM) -> None:
    expected = run(letters_llm, PROMPT)[0]
    letters_llm.add_request("mine", PROMPT, GREEDY)
    stream = letters_llm.stream([PROMPT, "Another"], change(GREEDY, max_tokens=100))
    assert "stream-0" not in letters_llm.engine.live
    for _ in range(5):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert letters_llm.metrics().num_running + letters_llm.metrics().num_waiting == 1
    assert finish(letters_llm)["mine"].outputs[0].token_ids == expected


def test_a_stream_goes_on_while_others_step(letters_llm: LLM) -> None:
    expected = run(letters_llm, PROMPT)[0]
    stream = letters_llm.stream(PROMPT, GREEDY)
    next(stream)
    assert run(letters_llm, [PROMPT, "x"])[0] == expected
    letters_llm.add_request("mine", PROMPT, GREEDY)
    assert set(finish(letters_llm)) == {"mine"}
    assert [output.outputs[0].token_ids for output in stream] == [expected]


def test_a_stream_ends_with_an_abort_from_elsewhere(letters_llm: LLM) -> None:
    stream = letters_llm.stream(PROMPT, GREEDY)
    first = next(stream)
    letters_llm.abort_request(first.request_id)
    (last,) = stream
    assert last.outputs[0].finish_reason == "abort"


def test_a_bad_stream_is_refused_when_it_is_made(letters_llm: LLM) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        letters_llm.stream(["fine", ""], GREEDY)
    letters_llm.stream("fine", GREEDY)  # never asked: nothing is queued
    assert not letters_llm.has_unfinished_requests()


def test_step_reports_every_request_that_changed(letters_llm: LLM) -> None:
    expected = run(letters_llm, [PROMPT, "x"])
    letters_llm.add_request("a", PROMPT, GREEDY)
    letters_llm.add_request("b", "x", change(GREEDY, max_tokens=3))
    seen: dict[str, list[list[int]]] = {"a": [], "b": []}
    while letters_llm.has_unfinished_requests():
        for output in letters_llm.step():
            seen[output.request_id].append(output.outputs[0].token_ids)
            assert output.finished == (output.outputs[0].finish_reason is not None)
            letters = [token for token in output.outputs[0].token_ids if token > EOS]
            assert output.outputs[0].text == decode(letters)  # no special tokens
    assert seen["a"] == [expected[0][:count] for count in range(1, 13)]
    assert seen["b"] == [expected[1][:count] for count in range(1, 4)]
    assert letters_llm.step() == []


def test_abort_request(letters_llm: LLM) -> None:
    letters_llm.add_request("a", PROMPT, change(SEEDED, n=3))
    letters_llm.step()
    (output,) = letters_llm.abort_request(["a", "unknown"])
    assert [one.finish_reason for one in output.outputs] == ["abort"] * 3
    assert not letters_llm.has_unfinished_requests()
    assert letters_llm.abort_request("a") == []


def test_an_aborted_request_is_not_heard_of_again(letters_llm: LLM) -> None:
    """Nor what was taken in for an update of the weights, and that no step had told yet."""
    letters_llm.add_request("a", PROMPT, GREEDY)
    for _ in range(3):
        letters_llm.step()
    letters_llm.update_params(letters_llm.params)
    (output,) = letters_llm.abort_request("a")
    assert output.outputs[0].finish_reason == "abort"
    assert not letters_llm.has_unfinished_requests()
    assert letters_llm.step() == []


def test_the_end_of_an_aborted_id_is_told_if_it_came_before(letters_llm: LLM) -> None:
    letters_llm.add_request("a", PROMPT, change(GREEDY, max_tokens=2))
    letters_llm.step()
    letters_llm.update_params(letters_llm.params)  # takes in the second token
    letters_llm.add_request("a", PROMPT, GREEDY)
    letters_llm.abort_request("a")
    (output,) = letters_llm.step()
    assert (output.request_id, output.outputs[0].finish_reason) == ("a", "length")


def test_what_a_closed_stream_has_not_told_is_dropped(letters_llm: LLM) -> None:
    stream = letters_llm.stream(PROMPT, change(GREEDY, max_tokens=2))
    next(stream)
    letters_llm.update_params(letters_llm.params)  # takes in the second token
    stream.close()  # type: ignore[attr-defined]
    assert not letters_llm.has_unfinished_requests()
    assert letters_llm.step() == []
