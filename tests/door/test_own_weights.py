"""A trainer's weights: pairs that fit or not, end tokens, a loop that compiles once."""

import importlib
from collections.abc import Callable
from typing import Any

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from folojax import (
    LLM,
    ActivationEdit,
    LogitsProcessor,
    SamplingParams,
    init_lora,
    log_likelihood,
    outputs_to_arrays,
    read_residuals,
)
from folojax.compile.programs import clear_programs
from folojax.sampling.sampling_class import SamplingClass
from tests.conftest import CompileCounter
from tests.house.test_imports import ROOT
from tests.letters import make_letters_tokenizer
from tests.reference import TINY_LIMITS

PROMPT = [5, 6, 7]
GREEDY = SamplingParams(temperature=0, max_tokens=12)


def tokens(llm: LLM, params: SamplingParams = GREEDY) -> list[int]:
    (output,) = llm.generate([PROMPT], params, use_tqdm=False)
    return output.outputs[0].token_ids


@pytest.fixture(scope="module")
def llm(tiny_model: tuple) -> LLM:
    return LLM(tiny_model, **TINY_LIMITS)


# --- what is no pair ------------------------------------------------------------------------------

Make = Callable[[Any, Any], Any]


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda module, params: params, "a dict"),
        (lambda module, params: module, "a Llama"),
        (lambda module, params: [module, params], "a list of Llama, dict"),
        (lambda module, params: (params, module), "a tuple of dict, Llama"),
        (lambda module, params: (module,), "a tuple of Llama"),
        (lambda module, params: (module, [params]), "a tuple of Llama, list"),
        (lambda module, params: (nn.Dense(3), params), "a tuple of Dense, dict"),
        (lambda module, params: (nnx.Dropout(0.1), params), "a tuple of Dropout, dict"),
        (lambda module, params: 7, "a int"),
    ],
)
def test_what_is_no_pair_is_told_in_a_sentence(tiny_model: tuple, make: Make, what: str) -> None:
    with pytest.raises(ValueError, match=f"^model is {what}; it must be a path") as info:
        LLM(make(*tiny_model), **TINY_LIMITS)
    text = str(info.value)
    assert "a tuple (module, params), where module comes from folojax.build_module" in text
    assert "\n" not in text


def wrong_tree(params: Any) -> Any:
    wrong = {**params, "other": params["embed"], "embed": params["embed"].astype(jnp.bfloat16)}
    wrong["layers_1"] = {**params["layers_1"], "qkv": params["layers_1"]["qkv"].T, "o": None}
    del wrong["final_norm"]
    return wrong


def test_a_tree_that_does_not_fit_is_told_alike_by_both_doors(
    llm: LLM, tiny_model: tuple, counter: CompileCounter
) -> None:
    module, params = tiny_model
    wrong, before = wrong_tree(params), llm.params
    count, texts = counter.count, []
    for door in (lambda: LLM((module, wrong), **TINY_LIMITS), lambda: llm.update_params(wrong)):
        with pytest.raises(ValueError, match="params do not fit the model: ") as info:
            door()
        texts.append(str(info.value))
    assert counter.count == count
    assert texts[0] == texts[1]
    for part in (
        "final_norm is missing",
        "other is unknown",
        "embed is bfloat16[128, 64], the model has float32[128, 64]",
        "layers_1/qkv is float32[64, 128], the model has float32[128, 64]",
        "layers_1/o is a NoneType, the model has float32[64, 64]",
    ):
        assert part in texts[0]
    assert llm.params is before


def test_of_many_differences_fifty_are_told(llm: LLM, tiny_model: tuple) -> None:
    module, params = tiny_model
    other = {f"block_{i}": {"kernel": params["embed"]} for i in range(70)}
    for door in (lambda: LLM((module, other), **TINY_LIMITS), lambda: llm.update_params(other)):
        with pytest.raises(ValueError, match="embed is missing") as info:
            door()
        missing = len(jax.tree.leaves(params))
        assert str(info.value).count(" is ") == 50
        assert str(info.value).endswith(f"; and {70 + missing - 50} more")


def test_empty_blocks_are_differences(llm: LLM) -> None:
    with pytest.raises(ValueError, match="layers_9 is unknown"):
        llm.update_params({**llm.params, "layers_9": {}})


@pytest.mark.parametrize(
    "wrap",
    [
        lambda params: {"params": params},
        flax.core.freeze,
        lambda params: flax.core.freeze({"params": params}),
        lambda params: jax.tree.map(np.asarray, params),
    ],
    ids=["params", "frozen", "both", "numpy"],
)
def test_trees_in_other_clothes_are_taken(llm: LLM, tiny_model: tuple, wrap: Any) -> None:
    module, params = tiny_model
    expected = tokens(llm)
    made = LLM((module, wrap(params)), **TINY_LIMITS)
    assert tokens(made) == expected
    llm.update_params(wrap(params))
    assert tokens(llm) == expected
    for one in (llm, made):
        chex.assert_trees_all_equal(one.params, params)
        assert type(one.params) is dict


def test_a_pair_has_its_dtype_and_no_revision(tiny_model: tuple) -> None:
    assert LLM(tiny_model, dtype="float32", **TINY_LIMITS).model.dtype == jnp.float32
    with pytest.raises(ValueError, match=r"dtype is 'bfloat16', and the .* in float32: leave"):
        LLM(tiny_model, dtype="bfloat16", **TINY_LIMITS)
    with pytest.raises(ValueError, match="revision 'main' is for Hub repositories"):
        LLM(tiny_model, revision="main", **TINY_LIMITS)


# --- end tokens -----------------------------------------------------------------------------------


def test_end_tokens_are_the_users(llm: LLM, tiny_model: tuple) -> None:
    free = tokens(llm)
    assert len(free) == 12
    last = free[-1]
    first = next(i for i, token in enumerate(free) if token == last)
    early = next(token for token in free if token != last)
    others = [token for token in range(128) if token not in free]

    def end(eos: Any, tokenizer: Any = None) -> tuple[Any, ...]:
        made = LLM(tiny_model, tokenizer, eos_token_id=eos, **TINY_LIMITS)
        (output,) = made.generate([PROMPT], GREEDY, use_tqdm=False)
        one = output.outputs[0]
        return one.token_ids, one.finish_reason, one.stop_reason

    assert end(last) == (free[: first + 1], "stop", None)
    assert end(np.int32(last)) == (free[: first + 1], "stop", None)
    assert end([others[0], early]) == (free[: free.index(early) + 1], "stop", early)
    assert end(others[:2]) == (free, "length", None)
    assert end([]) == (free, "length", None)


def test_end_tokens_take_the_place_of_the_tokenizers(tiny_model: tuple) -> None:
    tokenizer = make_letters_tokenizer()
    own = tokenizer.eos_token_id
    forced = SamplingParams(seed=1, max_tokens=4, allowed_token_ids=[own])

    def count(**options: Any) -> int:
        return len(tokens(LLM(tiny_model, tokenizer, **TINY_LIMITS, **options), forced))

    assert count() == 1
    assert count(eos_token_id=own + 1) == 4


@pytest.mark.parametrize("eos", [128, -1, "2", True, 1.5, [2, 128], [None]])
def test_what_is_no_end_token_is_refused(tiny_model: tuple, eos: Any) -> None:
    with pytest.raises(ValueError, match=r"eos_token_id holds .*; it must be one token id or"):
        LLM(tiny_model, eos_token_id=eos, **TINY_LIMITS)


# --- training -------------------------------------------------------------------------------------


def as_given(params: Any) -> Any:
    return params


def as_numpy(params: Any) -> Any:
    return jax.tree.map(np.asarray, params)


@pytest.mark.parametrize("given", [as_given, as_numpy])
def test_the_natural_loop_compiles_its_step_once(
    tiny_model: tuple, counter: CompileCounter, given: Any
) -> None:
    module, params = tiny_model
    llm = LLM((module, given(params)), eos_token_id=2, **TINY_LIMITS)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def train(params: Any, state: Any, tokens: Any, mask: Any) -> tuple[Any, Any, Any]:
        def loss(params: Any) -> Any:
            return -log_likelihood(params, tokens, mask, model=module).sum() / mask.sum()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    wanted = outputs_to_arrays(llm.generate([PROMPT], GREEDY, use_tqdm=False), length=16)
    state = optimizer.init(llm.params)
    losses, compiled = [], 0
    for seed in range(3):
        sampled = llm.generate([PROMPT], SamplingParams(seed=seed, max_tokens=8), use_tqdm=False)
        assert sampled[0].outputs[0].weights_versions[-1] == seed
        before = counter.count
        new, state, loss = train(llm.params, state, wanted.tokens, wanted.mask)
        compiled += counter.count - before
        llm.update_params(new)
        losses.append(float(loss))
    assert compiled == 1
    assert losses[2] < losses[0]
    assert tokens(llm) == tokens(LLM((module, llm.params), eos_token_id=2, **TINY_LIMITS))


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_grpo_compiles_its_step_once(
    rank: int, tiny_model: tuple, counter: CompileCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    grpo = importlib.import_module("grpo")
    module, params = tiny_model
    llm = LLM((module, jax.tree.map(jnp.copy, params)), **TINY_LIMITS, enable_lora=rank > 0)
    optimizer = optax.adam(1e-3)
    step = grpo.make_train_step(llm.model, optimizer, rank > 0)
    trained, base, policy = llm.params, None, None
    if rank:
        trained, base = init_lora(jax.random.key(0), params, rank), llm.params
        policy = llm.load_lora("policy", trained, grpo.LORA_SCALE)
    state = optimizer.init(trained)
    asked = SamplingParams(n=4, seed=1, max_tokens=6, record=True)
    compiled = 0
    for _ in range(3):
        outputs = llm.generate([PROMPT], asked, False, policy)
        arrays = outputs_to_arrays(outputs, length=16)
        batch = grpo.batch_of(arrays, np.array([1.0, -1.0, 0.5, -0.5]))
        before = counter.count
        trained, state, _ = step(trained, state, base, *batch)
        compiled += counter.count - before
        if policy is None:
            llm.update_params(trained)
        else:
            llm.update_lora("policy", trained, grpo.LORA_SCALE)
    assert compiled == 1


# --- one or several, and JAX's settings -----------------------------------------------------------


def louder(hidden: Any, layer: int) -> Any:
    return hidden * 1.5


def only_even(logits: Any, state: Any) -> Any:
    return jnp.where(jnp.arange(logits.shape[0]) % 2 == 0, logits, -jnp.inf), state.value


def test_one_is_taken_as_one_of_several(tiny_model: tuple) -> None:
    made = LLM(
        tiny_model,
        **TINY_LIMITS,
        activation_taps=1,
        activation_edits=ActivationEdit("louder", 1, louder),
        logits_processors=LogitsProcessor("even", only_even),
    )
    asked = SamplingParams(
        temperature=0,
        max_tokens=3,
        activations=True,
        logits_processors=["even"],
        activation_edits=["louder"],
    )
    (output,) = made.generate([PROMPT], asked, use_tqdm=False)
    assert all(token % 2 == 0 for token in output.outputs[0].token_ids)
    assert output.outputs[0].activations is not None
    found = output.outputs[0].activations[1][: len(PROMPT)]
    module, params = tiny_model
    one = read_residuals(params, jnp.array(PROMPT), 1, model=module)
    assert one.shape == (1, len(PROMPT), 64)
    np.testing.assert_allclose(found, 1.5 * one[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: {"activation_taps": 7}, r"activation_taps names layers \[7\]; the model has"),
        (lambda: {"activation_taps": 1.5}, "activation_taps holds 1.5; it must hold numbers"),
        (lambda: {"activation_taps": "all"}, "activation_taps holds 'a'; it must hold numbers"),
        (lambda: {"activation_taps": None}, "activation_taps holds None; it must hold numbers"),
        (
            lambda: {"activation_edits": ActivationEdit("s", 10, louder)},
            r"activation edit 's' names layers \[10\]; the model has layers 0 to 1",
        ),
        (
            lambda: {"activation_edits": ActivationEdit("s", [0, 1.5], louder)},
            "layers of activation edit 's' holds 1.5; it must hold numbers",
        ),
        (lambda: {"activation_edits": louder}, "activation_edits holds a function; it must hold"),
        (lambda: {"logits_processors": only_even}, "logits_processors holds a function; it must"),
    ],
)
def test_what_is_no_layer_or_function_is_told(tiny_model: tuple, make: Any, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        LLM(tiny_model, **TINY_LIMITS, **make())


def test_a_module_need_not_be_static_under_jit(tiny_model: tuple) -> None:
    module, params = tiny_model
    given, mask = jnp.array([PROMPT]), jnp.ones((1, 3), bool)
    expected = log_likelihood(params, given, mask, model=module)
    found = jax.jit(log_likelihood)(params, given, mask, model=module)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match='name it in static_argnames="model"'):
        jax.jit(log_likelihood)(params, given, mask, model=1)


MIXED = [
    SamplingParams(temperature=0, max_tokens=6, logprobs=2),
    SamplingParams(seed=3, max_tokens=6, top_p=0.9, presence_penalty=0.5, record=True),
]


def run_mixed(llm: LLM) -> list[Any]:
    outputs = llm.generate([PROMPT, [9, 8]], MIXED, use_tqdm=False)
    scores = llm.score([PROMPT], [[9, 8]], use_tqdm=False)
    ones = [output.outputs[0] for output in outputs]
    return [(one.token_ids, one.cumulative_logprob) for one in ones] + [scores[0].logprobs]


@pytest.mark.slow
def test_wide_numbers_of_the_users_program_change_nothing(llm: LLM, tiny_model: tuple) -> None:
    """Set for all threads, as a warm-up compiles in several; all is traced anew."""
    expected = run_mixed(llm)
    clear_programs()
    jax.config.update("jax_enable_x64", True)
    try:
        wide = LLM(tiny_model, **TINY_LIMITS)
        assert wide.warm_up((SamplingClass.GREEDY,), logprobs=False) > 0
        assert run_mixed(wide) == expected
        wide.update_params(wide.params)
        assert run_mixed(wide) == expected
        assert jnp.zeros(()).dtype == jnp.float64  # the user's are still wide
        assert init_lora(jax.random.key(0), wide.params, 2)["layers_0"]["o"]["a"].dtype == "float32"
    finally:
        jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param(jax.disable_jit, marks=pytest.mark.slow),
        lambda: jax.numpy_dtype_promotion("strict"),
    ],
    ids=["jit", "strict"],
)
def test_other_settings_of_the_users_program_change_nothing(
    llm: LLM, tiny_model: tuple, setting: Any
) -> None:
    expected = run_mixed(llm)
    module, params = tiny_model
    with setting():
        assert run_mixed(LLM(tiny_model, **TINY_LIMITS)) == expected
        (streamed,) = [one for one in llm.stream([PROMPT], GREEDY) if one.finished]
    assert streamed.outputs[0].token_ids == tokens(llm)
    with jax.disable_jit():
        given = jnp.array([PROMPT])
        found = log_likelihood(params, given, jnp.ones((1, 3), bool), model=module)
    assert found.shape == (1, 3)
