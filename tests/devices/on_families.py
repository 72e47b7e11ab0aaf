"""Every family whose layers two or four devices share: the tokens of one device."""

import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from folojax import LLM, join_params
from tests import dense, mixed_requests
from tests.devices.on_all import ASKED, check_close
from tests.families import FAMILIES, save_family
from tests.reference import MORE_LIMITS, TIGHT


def cases() -> list[Any]:
    """Not slow are biases, all kinds of experts, norms over what is less than devices, a state."""
    few = (("qwen2", 2), ("glm4-moe", 2), ("olmo2", 4), ("granite-hybrid-dense", 2))
    return [
        pytest.param(*one, marks=[] if one in few else [pytest.mark.slow])
        for one in itertools.product(FAMILIES, (2, 4))
    ]


@pytest.mark.parametrize(("family", "count"), cases())
def test_every_family(family: str, count: int, tmp_path: Path) -> None:
    more = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
    save_family(family, tmp_path, more if family.startswith(("qwen3.5", "qwen3-next")) else None)
    model = dense.load(tmp_path)
    prompts = [list(range(5, 17)), list(range(7, 22))]  # a row each: few programs
    known, found = (
        LLM(model, **MORE_LIMITS, tensor_parallel_size=each).generate(
            prompts, ASKED, use_tqdm=False
        )
        for each in (1, count)
    )
    check_close(found, known)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "count", "widths"),
    [
        ("qwen3-next", 2, (56, 2)),
        ("qwen3.5", 2, (48, 1)),
        ("bamba", 2, (112, 4)),
        ("nemotron-h", 4, (56, 2)),  # of two heads of keys: neighbours have the same
        ("falcon-h1", 2, (112, 4)),  # beside attention
        ("lfm2", 2, (32,)),
    ],
)
def test_states_by_heads(family: str, count: int, widths: tuple[int, ...], tmp_path: Path) -> None:
    """Kept for the prefix cache, of requests that are preempted; the parts join to the model's."""
    save_family(family, tmp_path)
    model = dense.load(tmp_path)
    options: dict[str, Any] = {**TIGHT, "num_prefix_states": 4}
    known, found = (
        mixed_requests.make_llm(model, **options, tensor_parallel_size=each) for each in (1, count)
    )
    check_close(mixed_requests.run(found), mixed_requests.run(known))
    assert found.metrics().num_preemptions > 0
    joined = join_params(found.params, model[0].config)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), joined, model[1]))
    (state, *_) = found.engine.runner.state.cache.states
    conv, *memory = (one.addressable_shards[1].data.shape for one in jax.tree.leaves(state))
    assert (conv[2], *(one[1] for one in memory)) == widths
    assert found.memory_plan.slots_bytes < known.memory_plan.slots_bytes


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3n", "gemma4", "gemma4-moe"])
def test_heads_that_differ_by_layer(family: str, tmp_path: Path) -> None:
    """Of two sizes, or another layer's: on the host and back, and in snapshots of one device."""
    save_family(family, tmp_path)
    model = dense.load(tmp_path)
    options: dict[str, Any] = {**TIGHT, "num_host_pages": 20, "min_swap_tokens": 1}
    known, found = (
        mixed_requests.make_llm(model, **options, tensor_parallel_size=each) for each in (1, 4)
    )
    check_close(mixed_requests.run(found), mixed_requests.run(known))
    assert found.metrics().num_preemptions > 0
    joined = join_params(found.params, model[0].config)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), joined, model[1]))
    taken: list[Any] = []
    for one in (known, found):
        one.add_request("parent", [*range(5, 25)], mixed_requests.GREEDY)
        for _ in range(3):
            one.step()
        taken.append(one.snapshot("parent"))
        one.abort_request("parent")
    np.testing.assert_allclose(taken[0].kv.keys, taken[1].kv.keys, atol=1e-4)
    outputs = []
    for one, given in ((known, taken[1]), (found, taken[0])):
        one.resume(given, "child")
        outputs += [done for _ in range(20) for done in one.step() if done.finished]
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "count", "told"),
    [
        ("qwen3-next", 4, "num_key_heads of recurrent layers is 2, not a multiple of it"),
        ("qwen3.5", 4, "num_value_heads of recurrent layers is 2, not a multiple of it"),
        ("bamba", 3, "num_key_heads of recurrent layers is 2, neither a multiple nor a part of it"),
        ("lfm2", 3, "num_channels of short convolutions is 64, not a multiple of it"),
        ("gemma3n", 3, "intermediate_size of layer 2 is 64, not a multiple of it"),
    ],
)
def test_what_does_not_divide_is_refused(
    family: str, count: int, told: str, tmp_path: Path
) -> None:
    save_family(family, tmp_path)
    with pytest.raises(ValueError, match=told):
        LLM(dense.load(tmp_path), **MORE_LIMITS, tensor_parallel_size=count)
