"""The user's own functions in the step: their effect, and that nobody else feels them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax import (
    LLM,
    ActivationEdit,
    LogitsProcessor,
    RequestOutput,
    RequestState,
    SamplingParams,
    read_residuals,
)
from folojax.models.checkpoint import build_module, load_params, open_checkpoint
from folojax.models.dense_attend import dense_attend
from folojax.residual import intercept
from tests.reference import TINY_LIMITS, load_model, save_tiny

OPEN, CLOSE, BODY = 91, 93, 10
PROMPTS = [list(range(5, 40)), [9, 8, 7], [11, 12, 13, 14], [3]]


def ban_even(logits: jax.Array, state: RequestState) -> tuple[jax.Array, Any]:
    return jnp.where(jnp.arange(logits.shape[0]) % 2 == 0, -jnp.inf, logits), state.value


def force(logits: jax.Array, token: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(logits.shape[0]) == token, logits, -jnp.inf)


def brackets(logits: jax.Array, state: RequestState) -> tuple[jax.Array, Any]:
    """An opening bracket first, a closing one after BODY tokens."""
    is_first, is_last = state.num_outputs == 0, state.num_outputs == BODY + 1
    forced = force(logits, jnp.where(is_first, OPEN, CLOSE))
    return jnp.where(is_first | is_last, forced, logits), state.value


def count_up(logits: jax.Array, state: RequestState) -> tuple[jax.Array, Any]:
    """Forces 0, 1, 2, ... by a count of its own, and NaN should the last token be another."""
    count = state.value["count"]
    is_right = (state.last_token == count - 1) & (state.num_outputs == count)
    return jnp.where(is_right, force(logits, count), jnp.nan), {"count": count + 1}


PROCESSORS = [
    LogitsProcessor("odd", ban_even),
    LogitsProcessor("brackets", brackets),
    LogitsProcessor("count", count_up, lambda: {"count": jnp.int32(0)}),
]


def steer(hidden: jax.Array, layer: int) -> jax.Array:
    direction = jnp.where(jnp.arange(hidden.shape[0]) % 3 == 0, 2.0, -1.0)
    return hidden + direction.astype(hidden.dtype)


EDITS = [
    ActivationEdit("steer", (1,), steer),
    ActivationEdit("twice", (0, 2), lambda hidden, layer: hidden * (2.0 + layer)),
]


def make_llm(model: tuple, **options: Any) -> LLM:
    functions = {"logits_processors": PROCESSORS, "activation_edits": EDITS}
    return LLM(model, **TINY_LIMITS | functions | options)


@pytest.fixture(scope="module")
def llm(tiny_model: tuple) -> LLM:
    return make_llm(tiny_model)


@pytest.fixture(scope="module")
def plain_llm(tiny_model: tuple) -> LLM:
    return LLM(tiny_model, **TINY_LIMITS)


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 14, "ignore_eos": True, "logprobs": 2} | fields)


KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"seed": 1},
    {"seed": 2, "top_p": 0.9},
    {"seed": 3, "frequency_penalty": 1.0},
]


def generate(llm: LLM, asked: list[SamplingParams]) -> list[RequestOutput]:
    return llm.generate(PROMPTS, asked, use_tqdm=False)


def facts(output: RequestOutput) -> tuple:
    """What must be the same to the bit."""
    one = output.outputs[0]
    return one.token_ids, one.cumulative_logprob, one.logprobs


def check_same(found: RequestOutput, expected: RequestOutput, is_to_the_bit: bool) -> None:
    """Steps with edits of activations have programs of their own, which may round otherwise."""
    if is_to_the_bit:
        assert facts(found) == facts(expected)
    one, other = found.outputs[0], expected.outputs[0]
    assert one.token_ids == other.token_ids
    assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-4)
    assert (one.logprobs is None) == (other.logprobs is None)
    for entry, wanted in zip(one.logprobs or [], other.logprobs or [], strict=True):
        assert [*entry] == [*wanted]
        for token, mine in entry.items():
            assert mine.logprob == pytest.approx(wanted[token].logprob, abs=1e-5)


# --- logits processors --------------------------------------------------------------------------


@pytest.mark.parametrize("fields", KINDS)
def test_a_ban_list_bans(llm: LLM, fields: dict[str, Any]) -> None:
    (output,) = llm.generate([PROMPTS[1]], params(**fields), use_tqdm=False)
    assert any(token % 2 == 0 for token in output.outputs[0].token_ids)
    asked = params(**fields, logits_processors=["odd"])
    (output,) = llm.generate([PROMPTS[1]], asked, use_tqdm=False)
    assert all(token % 2 == 1 for token in output.outputs[0].token_ids)


def test_a_greedy_row_takes_the_best_of_what_is_left(tiny_model: tuple, llm: LLM) -> None:
    """And reports the model's own log-probabilities, which know no ban."""
    module, weights = tiny_model
    asked = params(temperature=0, logits_processors=["odd"])
    (output,) = llm.generate([PROMPTS[1]], asked, use_tqdm=False)
    one, sequence = output.outputs[0], PROMPTS[1] + output.outputs[0].token_ids
    tokens = jnp.array(sequence)
    hidden = module.apply(
        {"params": weights}, tokens, jnp.arange(len(sequence)), None, dense_attend
    )[0]
    logits = module.apply({"params": weights}, hidden, method="logits")
    logprobs = np.asarray(jax.nn.log_softmax(logits))[len(PROMPTS[1]) - 1 : -1]
    odd = np.where(np.arange(128) % 2 == 1, logprobs, -np.inf)
    assert one.token_ids == odd.argmax(axis=1).tolist()
    assert one.cumulative_logprob == pytest.approx(odd.max(axis=1).sum(), abs=1e-3)


def test_brackets_are_forced(llm: LLM) -> None:
    asked = params(seed=5, logits_processors=["brackets"], stop_token_ids=[CLOSE], max_tokens=50)
    (output,) = llm.generate([PROMPTS[2]], asked, use_tqdm=False)
    tokens = output.outputs[0].token_ids
    assert tokens[0] == OPEN
    assert tokens[-1] == CLOSE
    assert len(tokens) <= BODY + 2


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_untouched_requests_are_those_of_an_engine_without(
    tiny_model: tuple, plain_llm: LLM, llm: LLM, is_deterministic: bool
) -> None:
    """To the bit, with neighbours that use processors; these compose with every kind of edit."""
    if is_deterministic:
        llm = make_llm(tiny_model, deterministic=True)
        plain_llm = LLM(tiny_model, **TINY_LIMITS, deterministic=True)
    names = [[], ["odd"], [], ["count"]]
    expected = generate(plain_llm, [params(**fields) for fields in KINDS])
    mixed = [params(**f, logits_processors=n) for f, n in zip(KINDS, names, strict=True)]
    found = generate(llm, mixed)
    for i in (0, 2):
        assert facts(found[i]) == facts(expected[i])
    assert found[1].outputs[0].token_ids != expected[1].outputs[0].token_ids
    assert found[3].outputs[0].token_ids == list(range(14))


def test_processors_compose_in_the_order_of_the_engine(llm: LLM) -> None:
    asked = params(seed=1, logits_processors=["brackets", "odd"], max_tokens=BODY + 2)
    (output,) = llm.generate([PROMPTS[1]], asked, use_tqdm=False)
    tokens = output.outputs[0].token_ids
    assert (tokens[0], tokens[-1]) == (OPEN, CLOSE)
    assert all(token % 2 == 1 for token in tokens)


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_states_survive_preemption(tiny_model: tuple, is_deterministic: bool) -> None:
    """A pool that is too small for all: states are put aside, and come back to other slots."""
    llm = make_llm(tiny_model, num_pages=8, deterministic=is_deterministic)
    asked = params(seed=1, logits_processors=["count"], max_tokens=60)
    outputs = generate(llm, [asked] * 4)
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    for output in outputs:
        assert output.outputs[0].finish_reason == "length"
        assert output.outputs[0].token_ids == list(range(60))


@pytest.mark.parametrize("running", ["recompute", "keep", "restart"])
def test_states_survive_new_weights(llm: LLM, running: str) -> None:
    asked = params(seed=1, logits_processors=["count"], max_tokens=30)
    llm.add_request("a", PROMPTS[1], asked)
    for _ in range(8):
        llm.step()
    llm.update_params(llm.params, running=running)
    outputs: list[RequestOutput] = []
    while llm.has_unfinished_requests():
        outputs += [output for output in llm.step() if output.finished]
    assert outputs[0].outputs[0].token_ids == list(range(30))


def test_states_survive_a_sleep(llm: LLM) -> None:
    llm.add_request("a", PROMPTS[1], params(seed=1, logits_processors=["count"], max_tokens=30))
    for _ in range(8):
        llm.step()
    llm.sleep()
    llm.wake_up()
    outputs: list[RequestOutput] = []
    while llm.has_unfinished_requests():
        outputs += [output for output in llm.step() if output.finished]
    assert outputs[0].outputs[0].token_ids == list(range(30))


# --- activation edits ---------------------------------------------------------------------------


def reference_greedy(model: tuple, prompt: list[int], count: int, edit: ActivationEdit) -> Any:
    """Greedy tokens of the edited model by dense attention, one sequence at a time."""
    module, weights = model
    size = len(prompt) + count
    is_on = jnp.ones((size, 1), bool)

    @jax.jit
    def next_token(tokens: jax.Array, last: jax.Array) -> jax.Array:
        with intercept((edit,), is_on):
            hidden = module.apply(
                {"params": weights}, tokens, jnp.arange(size), None, dense_attend
            )[0]
        logits = module.apply({"params": weights}, hidden, method="logits")
        return jnp.argmax(logits[last])

    tokens = np.array(prompt + [0] * count)
    for last in range(len(prompt) - 1, size - 1):
        tokens[last + 1] = next_token(jnp.array(tokens), jnp.int32(last))
    return tokens[len(prompt) :].tolist()


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.name)
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_an_edit_changes_prompt_and_output(
    tiny_model: tuple, llm: LLM, edit: ActivationEdit, is_deterministic: bool
) -> None:
    if is_deterministic:
        llm = make_llm(tiny_model, deterministic=True)
    asked = params(temperature=0, activation_edits=[edit.name])
    before = facts(generate(llm, [params(temperature=0)] * 4)[0])
    outputs = generate(llm, [asked] * 4)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.outputs[0].token_ids == reference_greedy(tiny_model, prompt, 14, edit)
        assert output.num_cached_tokens == 0
    assert outputs[0].outputs[0].token_ids != before[0]
    # And what it has computed is not found by others.
    after = facts(generate(llm, [params(temperature=0)] * 4)[0])
    assert after[0] == before[0]
    assert after[1] == pytest.approx(before[1], abs=1e-4)


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_neighbours_of_an_edited_request_stay_what_they_are(
    tiny_model: tuple, is_deterministic: bool
) -> None:
    options = {"deterministic": is_deterministic, "enable_prefix_caching": False}
    plain = LLM(tiny_model, **TINY_LIMITS | options)
    expected = generate(plain, [params(**fields) for fields in KINDS])
    names = [[], ["steer"], [], ["twice", "steer"]]
    mixed = [params(**f, activation_edits=n) for f, n in zip(KINDS, names, strict=True)]
    llm = make_llm(tiny_model, **options)
    found = generate(llm, mixed)
    # The same programs with other edits beside them: to the bit, whatever the mode.
    names[1], names[3] = names[3], names[1]
    others = [params(**f, activation_edits=n) for f, n in zip(KINDS, names, strict=True)]
    swapped = generate(llm, others)
    for i in (0, 2):
        assert facts(found[i]) == facts(swapped[i])
        check_same(found[i], expected[i], is_deterministic)
    for i in (1, 3):
        assert found[i].outputs[0].token_ids != expected[i].outputs[0].token_ids


def test_samples_of_an_edited_prompt(llm: LLM) -> None:
    asked = params(n=3, seed=4, activation_edits=["steer"])
    (output,) = llm.generate([PROMPTS[0]], asked, use_tqdm=False)
    for one in output.outputs:
        alone = params(seed=4 + one.index, activation_edits=["steer"])
        (single,) = llm.generate([PROMPTS[0]], alone, use_tqdm=False)
        assert single.outputs[0].token_ids == one.token_ids


def test_a_snapshot_of_an_edited_request_has_no_keys_and_values(tiny_model: tuple) -> None:
    """Whoever resumes it without the edit gets the model's own."""
    llm = make_llm(tiny_model, min_swap_tokens=0)
    llm.add_request("a", PROMPTS[0], params(temperature=0, activation_edits=["steer"]))
    for _ in range(5):
        llm.step()
    snapshot = llm.snapshot("a")
    llm.abort_request("a")
    assert snapshot.kv is None
    llm.resume(snapshot, "b", params(temperature=0))
    outputs: list[RequestOutput] = []
    while llm.has_unfinished_requests():
        outputs += [output for output in llm.step() if output.finished]
    begin = list(snapshot.output_token_ids)
    rest = params(temperature=0, max_tokens=14 - len(begin))
    (alone,) = llm.generate([PROMPTS[0] + begin], rest, use_tqdm=False)
    assert outputs[0].outputs[0].token_ids == begin + alone.outputs[0].token_ids


def test_residuals_are_those_of_transformers(tmp_path: Path) -> None:
    import torch

    save_tiny("qwen2", tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    module = build_module(checkpoint.config, jnp.float32)
    weights = load_params(checkpoint, jnp.float32)
    with torch.no_grad():
        out = load_model(tmp_path)(torch.tensor([PROMPTS[0]]), output_hidden_states=True)
    read = jax.jit(lambda tokens: read_residuals(weights, tokens, [1, 0], model=module))
    found = read(jnp.array(PROMPTS[0]))
    # Entry 0 is the embedding, and the last one has been normed.
    for index, layer in enumerate([1, 0]):
        expected = out.hidden_states[layer + 1][0].numpy()
        np.testing.assert_allclose(found[index], expected, atol=2e-4)


def test_several_decode_steps_in_one_call(tiny_model: tuple, llm: LLM) -> None:
    """Processors, edits and records are those of one step after the other."""
    multiple = make_llm(tiny_model, max_decode_steps=4)
    names: list[dict[str, Any]] = [
        {"logits_processors": ["count"]},
        {"activation_edits": ["steer"]},
        {"logits_processors": ["odd"], "activation_edits": ["twice"]},
        {},
    ]
    asked = [params(**f, **n, record=True) for f, n in zip(KINDS, names, strict=True)]
    for found, expected in zip(generate(multiple, asked), generate(llm, asked), strict=True):
        ours, theirs = found.outputs[0], expected.outputs[0]
        assert ours.token_ids == theirs.token_ids
        assert ours.record is not None
        assert theirs.record is not None
        assert len(ours.record) == len(ours.token_ids) == len(ours.weights_versions)
        pairs = zip(ours.record, theirs.record, strict=True)
        assert all(a.raw == pytest.approx(b.raw, abs=1e-4) for a, b in pairs)


def test_layers_may_be_a_list(tiny_model: tuple) -> None:
    edits = [ActivationEdit("steer", [1], steer)]
    listed = make_llm(tiny_model, activation_edits=edits)
    asked = params(temperature=0, activation_edits=["steer"])
    (found,) = listed.generate([PROMPTS[1]], asked, use_tqdm=False)
    expected = reference_greedy(tiny_model, PROMPTS[1], 14, EDITS[0])
    assert found.outputs[0].token_ids == expected


# --- refusals -----------------------------------------------------------------------------------


def only_logits(logits: jax.Array, state: RequestState) -> Any:
    return logits


def largest(logits: jax.Array, state: RequestState) -> tuple[jax.Array, Any]:
    return logits.max(), state.value


def zeros() -> jax.Array:
    return jnp.zeros(3)


def ban_even_and_forget(logits: jax.Array, state: RequestState) -> tuple[jax.Array, Any]:
    return ban_even(logits, state)[0], jnp.int32(0)


def first(hidden: jax.Array, layer: int) -> jax.Array:
    return hidden[:1]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: {"logits_processors": PROCESSORS * 2}, "more than once; names must differ"),
        (lambda: {"activation_edits": [ActivationEdit("a", (), steer)]}, "'a' has no layers"),
        (lambda: {"logits_processors": [ban_even]}, "holds a function; it must hold LogitsProc"),
        (lambda: {"activation_edits": [steer]}, "holds a function; it must hold ActivationEdits"),
        (lambda: {"logits_processors": [LogitsProcessor("a", only_logits)]}, "return a pair"),
        (
            lambda: {"logits_processors": [LogitsProcessor("a", largest)]},
            r"'a' returns logits float32\[\], of float32\[128\]",
        ),
        (
            lambda: {"logits_processors": [LogitsProcessor("a", ban_even_and_forget, zeros)]},
            r"'a' returns the value int32\[\]; init makes float32\[3\]",
        ),
        (
            lambda: {"activation_edits": [ActivationEdit("a", [1], first)]},
            r"'a' returns float32\[1\], of float32\[64\]",
        ),
        (lambda: {"activation_edits": [ActivationEdit("a", (1, 9), steer)]}, r"names layers \[9\]"),
    ],
)
def test_functions_that_do_not_fit_are_refused(
    tiny_model: tuple, build: Callable[[], dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_llm(tiny_model, **build())


@pytest.mark.parametrize("field", ["logits_processors", "activation_edits"])
def test_unknown_names_are_refused(llm: LLM, field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field} holds \['nothing'\]; the engine was built"):
        llm.generate([PROMPTS[0]], params(**{field: ["nothing"]}), use_tqdm=False)


def test_unknown_layers_are_refused(tiny_model: tuple) -> None:
    module, weights = tiny_model
    with pytest.raises(ValueError, match=r"layers holds \[7\]; the model has layers 0 to 2"):
        read_residuals(weights, jnp.array([1, 2]), [0, 7], model=module)
