"""A test for each method of `LLM`, streams and the caller's own loop aside, on a tiny model."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax import LLM, SamplingParams
from tests.api_calls import CHAT, GREEDY, PROMPT, SEEDED, change, finish, run
from tests.conftest import check_is_empty
from tests.engine.test_engine import CompileCounter
from tests.letters import encode
from tests.reference import MORE_LIMITS, TIGHT


def test_generate_takes_vllms_progress_bar_argument(letters_llm: LLM) -> None:
    made = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            made.append(options["total"])

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *error: object) -> None: ...

        def update(self, count: int) -> None:
            made.append(count)

    letters_llm.generate([PROMPT] * 3, GREEDY, use_tqdm=Bar)
    assert made[0] == sum(made[1:]) == 3


def test_an_exception_in_a_callback_leaves_the_engine_empty(letters_llm: LLM) -> None:
    expected = run(letters_llm, PROMPT)

    class Bar:
        def __init__(self, **options: Any) -> None: ...

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *error: object) -> None: ...

        def update(self, count: int) -> None:
            raise KeyError("callback")

    letters_llm.add_request("mine", PROMPT, GREEDY)
    with pytest.raises(KeyError, match="callback"):
        letters_llm.generate([PROMPT] * 3, [GREEDY, GREEDY, change(GREEDY, max_tokens=2)], Bar)
    # Nothing was wrong with the caller's own request: it goes on.
    assert finish(letters_llm)["mine"].outputs[0].token_ids == expected[0]


def test_chat(letters_llm: LLM) -> None:
    (output,) = letters_llm.chat(CHAT, GREEDY, use_tqdm=False)
    assert output.prompt == "[user]Hi|[assistant]"
    assert output.prompt_token_ids == encode("[user]Hi|[assistant]")
    bare = letters_llm.chat(CHAT, GREEDY, use_tqdm=False, add_generation_prompt=False)
    assert bare[0].prompt == "[user]Hi"
    started = [*CHAT, {"role": "assistant", "content": "Hel"}]
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    (output,) = letters_llm.chat(started, GREEDY, use_tqdm=False, **options)
    assert output.prompt == "[user]Hi|[assistant]Hel"
    own = "{{ greeting }} {{ messages[0].content }} {{ tools | length }}"
    (output,) = letters_llm.chat(
        CHAT,
        GREEDY,
        use_tqdm=False,
        chat_template=own,
        tools=[{"type": "function", "function": {"name": "f"}}],
        chat_template_kwargs={"greeting": "Dear"},
    )
    assert output.prompt == "Dear Hi 1"
    both = letters_llm.chat([CHAT, started], GREEDY, use_tqdm=False)
    assert [one.prompt for one in both] == [
        "[user]Hi|[assistant]",
        "[user]Hi|[assistant]Hel|[assistant]",
    ]
    with pytest.raises(ValueError, match="continue_final_message and add_generation_prompt"):
        letters_llm.chat(started, GREEDY, continue_final_message=True)


def test_score(letters_llm: LLM) -> None:
    """The same numbers as prompt_logprobs, and greedy output is greedy."""
    few = change(GREEDY, logprobs=0, max_tokens=7)  # before a token that is no letter
    greedy = letters_llm.generate(PROMPT, few, use_tqdm=False)[0]
    written = greedy.outputs[0].text
    before = letters_llm.metrics().num_decode_calls
    same, other = letters_llm.score(PROMPT, [written, " blue"], use_tqdm=False)
    assert letters_llm.metrics().num_decode_calls == before
    assert (same.prompt, same.continuation) == (PROMPT, written)
    assert same.prompt_token_ids == encode(PROMPT)
    assert same.token_ids == greedy.outputs[0].token_ids
    expected = [
        entry[token]
        for token, entry in zip(same.token_ids, greedy.outputs[0].logprobs or [], strict=True)
    ]
    np.testing.assert_allclose(same.logprobs, [one.logprob for one in expected], atol=1e-4)
    assert same.ranks == [one.rank for one in expected]
    assert same.cumulative_logprob == pytest.approx(sum(same.logprobs))
    assert same.is_greedy == all(one.rank == 1 for one in expected)
    assert not other.is_greedy
    assert (same.finish_reason, same.metrics.num_output_tokens) == ("length", 0)
    ids = letters_llm.score([encode(PROMPT)] * 2, [encode(written), encode(" blue")], False)
    for one, expected_one in zip(ids, (same, other), strict=True):
        assert one.logprobs == pytest.approx(expected_one.logprobs, abs=1e-4)
    assert ids[0].prompt is ids[0].continuation is None
    assert letters_llm.score(PROMPT, [], use_tqdm=False) == []


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_prompt_is_computed_once_for_all_continuations(
    tiny_model: tuple, is_chunked: bool
) -> None:
    """Whatever its length is to the pages, whether or not it is cached, and with two at a time."""
    rng = np.random.default_rng(0)
    limits = MORE_LIMITS | ({"max_num_seqs": 2, "max_num_batched_tokens": 16} if is_chunked else {})
    llm = LLM(tiny_model, **limits, check_integrity=True)
    apart = LLM(tiny_model, **limits, enable_prefix_caching=False)
    for length in (1, 16, 17, 47, 60):
        context = rng.integers(3, 98, length).tolist()
        lengths = (1, 5, 1, 30, 2, 9)
        continuations = [rng.integers(3, 98, count).tolist() for count in lengths]
        before = llm.engine.runner.stats.num_scheduled_tokens
        outputs = llm.score(context, continuations, use_tqdm=False)
        num_computed = llm.engine.runner.stats.num_scheduled_tokens - before
        # Who comes when nobody of them is left finds whole pages.
        num_behind = (length - 1) % 16 if is_chunked else 0
        assert num_computed <= length + sum(lengths) + num_behind * len(lengths)
        for one, tokens in zip(outputs, continuations, strict=True):
            (alone,) = apart.score(context, tokens, use_tqdm=False)
            assert one.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
            assert one.ranks == alone.ranks
        before = llm.engine.runner.stats.num_scheduled_tokens
        llm.score(context, continuations, use_tqdm=False)
        num_computed = llm.engine.runner.stats.num_scheduled_tokens - before
        assert num_computed <= sum(lengths) + ((length - 1) % 16) * len(lengths)
    check_is_empty(llm)


@pytest.mark.parametrize("options", [TIGHT, {"deterministic": True}, TIGHT | {"num_host_pages": 9}])
def test_scores_that_share_are_preempted_as_any(tiny_model: tuple, options: Any) -> None:
    rng = np.random.default_rng(1)
    context = rng.integers(3, 98, 40).tolist()
    continuations = [rng.integers(3, 98, 30).tolist() for _ in range(6)]
    llm = LLM(tiny_model, **MORE_LIMITS | options, check_integrity=True)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    for index in range(2):
        llm.add_request(str(index), context[:20], params)
    outputs = llm.score(context, continuations, use_tqdm=False)
    finish(llm)
    whole = LLM(tiny_model, **MORE_LIMITS | {"deterministic": "deterministic" in options})
    for one, tokens in zip(outputs, continuations, strict=True):
        (alone,) = whole.score(context, tokens, use_tqdm=False)
        if "deterministic" in options:
            assert one.logprobs == alone.logprobs
        assert one.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_score_of_long_texts_and_single_tokens(letters_llm: LLM) -> None:
    """In chunks of the budget, next to a generation; and the whole of max_model_len."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 98, 128).tolist()
    letters_llm.add_request("mine", PROMPT, GREEDY)
    (whole,) = letters_llm.score(tokens[:1], tokens[1:], use_tqdm=False)
    assert finish(letters_llm)["mine"].outputs[0].finish_reason == "length"
    parts = letters_llm.score(
        [tokens[:10], tokens[:100], tokens[:127]],
        [tokens[10:100], tokens[100:], tokens[127:]],
        use_tqdm=False,
    )
    assert [len(part.logprobs) for part in parts] == [90, 28, 1]
    for part, (start, end) in zip(parts, [(9, 99), (99, 127), (126, 127)], strict=True):
        np.testing.assert_allclose(part.logprobs, whole.logprobs[start:end], atol=1e-3)
        assert part.ranks == whole.ranks[start:end]


@pytest.mark.parametrize(
    ("prompts", "continuations", "message"),
    [
        ("", "a", "the prompt is empty"),
        ("a", "", "the continuation is empty"),
        ([[5] * 100], [[5] * 29], "prompt and continuation have 129 tokens; max_model_len is 128"),
        ([[5]], [[128]], "continuation holds id 128; the vocabulary has ids 0 to 127"),
        ([[128]], [[5]], "prompt holds id 128"),
        (["a", "b"], ["c"], "continuations has 1 entries for 2 prompts"),
        (["a", "b"], ["c", 7], "continuation 1 is a int"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    letters_llm: LLM, prompts: Any, continuations: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        letters_llm.score(prompts, continuations)
    assert not letters_llm.has_unfinished_requests()


def test_sleep_and_wake_up(letters_llm: LLM) -> None:
    """The memory is given back, output is kept, and what runs is computed again."""
    expected = run(letters_llm, [PROMPT, "x"])
    letters_llm.add_request("a", PROMPT, GREEDY)
    for _ in range(4):
        letters_llm.step()
    leaves = jax.tree.leaves(letters_llm.engine.runner.state)
    letters_llm.sleep()
    letters_llm.sleep()
    assert all(leaf.is_deleted() for leaf in leaves)
    for call in (letters_llm.step, lambda: run(letters_llm, "x"), lambda: letters_llm.stream("x")):
        with pytest.raises(RuntimeError, match=r"the engine sleeps.*call wake_up"):
            call()
    with pytest.raises(RuntimeError, match="the engine sleeps"):
        letters_llm.score("x", "y")
    letters_llm.add_request("b", "x", GREEDY)
    letters_llm.wake_up()
    letters_llm.wake_up()
    last = finish(letters_llm)
    assert [last[i].outputs[0].token_ids for i in ("a", "b")] == expected
    assert last["a"].metrics.num_preemptions == 1
    with pytest.raises(ValueError, match="level is 2; it must be 1"):
        letters_llm.sleep(level=2)


def test_reset_prefix_cache(letters_llm: LLM) -> None:
    prompt = encode("A prompt that is longer than two pages")
    letters_llm.generate(prompt, GREEDY, use_tqdm=False)
    assert letters_llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens == 32
    assert letters_llm.reset_prefix_cache()
    assert letters_llm.metrics().num_cached_pages == 0
    letters_llm.add_request("a", prompt, GREEDY)
    letters_llm.step()
    assert not letters_llm.reset_prefix_cache()
    assert letters_llm.reset_prefix_cache(reset_running_requests=True)
    output = finish(letters_llm)["a"]
    assert (output.num_cached_tokens, output.metrics.num_preemptions) == (0, 1)


@pytest.fixture
def own_llm(tiny_model: tuple, shared_letters_llm: LLM) -> Iterator[LLM]:
    """The parameters of the shared engine, put back afterwards."""
    yield shared_letters_llm
    shared_letters_llm.update_params(tiny_model[1])


def test_update_params(tiny_model: tuple, own_llm: LLM) -> None:
    """As a new engine with them: nothing cached is used, nothing compiled, nothing copied."""
    _, old = tiny_model
    new = jax.tree.map(lambda leaf: leaf * 1.25, old)
    prompt = encode("A prompt that is longer than two pages")
    before = run(own_llm, prompt)
    own_llm.add_request("a", prompt, GREEDY)
    for _ in range(4):
        own_llm.step()
    kinds = [
        new,
        jax.tree.map(np.asarray, new),
        jax.device_put(new, jax.devices()[0]),
    ]
    own_llm.update_params(new)
    ours, theirs = own_llm.params["embed"], new["embed"]
    assert ours.unsafe_buffer_pointer() == theirs.unsafe_buffer_pointer()
    mixed = finish(own_llm)["a"]
    after = run(own_llm, prompt)
    assert after != before
    assert mixed.outputs[0].token_ids[:4] == before[0][:4]
    assert mixed.metrics.num_preemptions == 1
    counter = CompileCounter()
    jax.monitoring.register_event_duration_secs_listener(counter)
    try:
        for kind in kinds:
            own_llm.update_params(kind)
            assert run(own_llm, prompt) == after
    finally:
        jax.monitoring.unregister_event_duration_listener(counter)
    assert counter.count == 0
    own_llm.update_params(old)
    assert run(own_llm, prompt) == before


def test_params_that_do_not_fit_are_all_named(tiny_model: tuple, own_llm: LLM) -> None:
    _, old = tiny_model
    expected = run(own_llm, PROMPT)
    bad = dict(old)
    embed = bad.pop("embed")
    bad["embedding"] = embed
    bad["final_norm"] = jnp.zeros(3)
    with pytest.raises(ValueError, match="params do not fit the model") as info:
        own_llm.update_params(bad)
    assert "embed is missing" in str(info.value)
    assert "embedding is unknown" in str(info.value)
    assert "float32[3], the model has" in str(info.value)
    with pytest.raises(ValueError, match=r"bfloat16\[128, 64\], the model has float32\[128, 64\]"):
        own_llm.update_params(dict(old) | {"embed": embed.astype(jnp.bfloat16)})
    with pytest.raises(ValueError, match="embed is a int"):
        own_llm.update_params(dict(old) | {"embed": 5})
    assert run(own_llm, PROMPT) == expected


def test_processed_logprobs(tiny_model: tuple) -> None:
    """Of the distribution that was drawn from, on request; a prompt's are the model's own."""
    limits: dict[str, Any] = {
        "page_size": 16,
        "num_pages": 48,
        "max_model_len": 128,
        "max_num_seqs": 8,
    }
    llm = LLM(tiny_model, logprobs_mode="processed", max_num_batched_tokens=64, **limits)
    params = change(SEEDED, top_k=1, logprobs=0, prompt_logprobs=0, max_tokens=3)
    (output,) = llm.generate(encode(PROMPT), params, use_tqdm=False)
    assert output.outputs[0].logprobs is not None
    for entry in output.outputs[0].logprobs:
        assert [(value.logprob, value.rank) for value in entry.values()] == [(0.0, 1)]
    assert output.prompt_logprobs is not None
    for told in output.prompt_logprobs[1:]:
        assert told is not None
        assert all(value.logprob < 0 for value in told.values())


def test_get_tokenizer(letters_llm: LLM) -> None:
    assert letters_llm.get_tokenizer().encode(PROMPT) == encode(PROMPT)


def test_metrics(letters_llm: LLM) -> None:
    metrics = letters_llm.metrics()
    assert metrics.num_pages == 48
    assert metrics.num_used_pages == metrics.num_running == metrics.num_waiting == 0
    assert metrics.num_prefix_query_tokens >= metrics.num_prefix_hit_tokens


def test_the_constructor_refuses_what_is_not_built(tiny_model: tuple) -> None:
    with pytest.raises(ValueError, match="deterministic"):
        LLM(tiny_model, deterministic="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tensor_parallel_size is 2, and there are"):
        LLM(tiny_model, tensor_parallel_size=2)
    with pytest.raises(ValueError, match="trust_remote_code"):
        LLM(tiny_model, trust_remote_code=True)
