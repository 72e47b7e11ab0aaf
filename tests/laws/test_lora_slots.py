"""Adapters on their way to a slot: from where they are, as they were, or not at all."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from folojax import LLM, SamplingParams
from folojax.runner import adapter_slots
from tests.conftest import check_is_empty
from tests.laws.test_lora import GREEDY, PROMPTS, ROOM, tree_of
from tests.reference import TINY_LIMITS


@pytest.fixture(scope="module")
def shared_llm(tiny_model: tuple) -> LLM:
    return LLM(tiny_model, **TINY_LIMITS, **ROOM, check_integrity=True)


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    yield shared_llm
    for one in shared_llm.list_loras():
        shared_llm.remove_lora(one.lora_name)
    check_is_empty(shared_llm)


def test_an_adapter_is_brought_to_a_free_slot_when_it_is_loaded(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, params = tree_of(llm, 5), SamplingParams(temperature=0, max_tokens=4)
    from_host = llm.load_lora("host", host)
    given = jax.device_put(host)
    # What lies on the device in full rank goes to its slot from there.
    monkeypatch.setattr(adapter_slots, "fetch", lambda _: pytest.fail("it went by the host"))
    from_device = llm.load_lora("device", given)
    jax.tree.map(lambda leaf: leaf.delete(), given)  # nobody needs it any more
    requests = [from_host, from_device, None]
    outputs = llm.generate([PROMPTS[0]] * 3, params, False, requests)
    first, second, plain = (output.outputs[0].token_ids for output in outputs)
    assert first == second != plain


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that lies as JAX wants arrays which it takes for its own on a CPU."""
    room = np.empty(array.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    found = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    found[:] = array
    return found


def test_arrays_may_change_as_soon_as_they_are_loaded(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program that writes them to a slot may run later than that."""
    tree = {"layers_0": tree_of(llm, 6)["layers_0"]}
    given, write = jax.tree.map(aligned, tree), adapter_slots._write_block

    def late(*args: Any) -> Any:
        for leaf in jax.tree.leaves(given):
            leaf[:] = 7
        return write(*args)

    kept = llm.load_lora("kept", tree)
    monkeypatch.setattr(adapter_slots, "_write_block", late)
    changed = llm.load_lora("changed", given)
    outputs = llm.generate([PROMPTS[0]] * 2, GREEDY, False, [kept, changed])
    first, second = (output.outputs[0] for output in outputs)
    assert first.token_ids == second.token_ids


def test_what_cannot_be_brought_to_a_slot_is_not_taken_in(llm: LLM) -> None:
    """An array that a training step was given to overwrite, behind others that are written."""
    tree = tree_of(llm, 7)
    gone = jax.device_put(tree_of(llm, 8))
    gone["layers_1"]["down"]["a"].delete()
    with pytest.raises(RuntimeError, match="deleted"):
        llm.load_lora("policy", gone)
    assert llm.list_loras() == []
    policy, other = llm.load_lora("policy", tree), llm.load_lora("other", tree)
    with pytest.raises(RuntimeError, match="deleted"):
        llm.update_lora("policy", gone)
    # It goes on with what it was, from the host.
    outputs = llm.generate([PROMPTS[0]] * 2, GREEDY, False, [policy, other])
    first, second = (output.outputs[0] for output in outputs)
    assert first.token_ids == second.token_ids
    assert first.lora_versions == [0] * 10
