"""The user's own functions in the step: processors of logits, and what is refused."""

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
    load_snapshot,
)
from tests import dense
from tests.reference import TIGHT, TINY_LIMITS
from tests.user_functions import (
    BODY,
    CLOSE,
    KINDS,
    OPEN,
    PROCESSORS,
    PROMPTS,
    ban_even,
    facts,
    generate,
    make_llm,
    params,
    steer,
)


@pytest.fixture(scope="module")
def llm(tiny_model: tuple) -> LLM:
    return make_llm(tiny_model)


@pytest.fixture(scope="module")
def plain_llm(tiny_model: tuple) -> LLM:
    return LLM(tiny_model, **TINY_LIMITS)


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
    logits = dense.logits(module, weights, sequence)
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
    llm = make_llm(tiny_model, **TIGHT, deterministic=is_deterministic)
    asked = params(seed=1, logits_processors=["count"], max_tokens=60)
    outputs = generate(llm, [asked] * 4)
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    for output in outputs:
        assert output.outputs[0].finish_reason == "length"
        assert output.outputs[0].token_ids == list(range(60))


def test_a_request_may_say_where_its_state_starts(llm: LLM, tmp_path: Path) -> None:
    """Beside others that do not, and once more from a snapshot."""
    asked = [
        params(seed=1, logits_processors=["count"], max_tokens=10, extra_args=args)
        for args in ({"start": 40}, None, {"start": np.int64(7)}, {})
    ]
    outputs = generate(llm, asked)
    for output, start in zip(outputs, (40, 0, 7, 0), strict=True):
        assert output.outputs[0].token_ids == list(range(start, start + 10))
    llm.add_request("a", PROMPTS[1], asked[0])
    while not llm.step():
        pass
    llm.snapshot("a").save(tmp_path / "one")
    assert load_snapshot(tmp_path / "one").sampling_params == asked[0]
    llm.abort_request("a")


def test_arguments_that_no_processor_takes_are_refused(llm: LLM) -> None:
    for fields, message in (
        ({"extra_args": {"start": 4}}, r"extra_args has \['start'\]; .* that are on take \[\]"),
        ({"logits_processors": ["count"], "extra_args": {"end": 4}}, r"are on take \['start'\]"),
        (
            {"logits_processors": ["count"], "extra_args": {"start": [4, 5]}},
            r"init of logits processor 'count' gives .*int32\[2\].*; without, it gives .*int32\[\]",
        ),
        ({"logits_processors": ["count"], "extra_args": {"start": "x"}}, r"gives \w+Error: "),
    ):
        with pytest.raises(ValueError, match=message):
            llm.generate([PROMPTS[1]], params(**fields))


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
    with pytest.raises(ValueError, match=r"layers holds \[7\]; the model has layers 0 to 1"):
        dense.residuals(weights, jnp.array([1, 2]), (0, 7), model=module)
