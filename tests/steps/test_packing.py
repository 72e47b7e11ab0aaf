"""Small arrays of a step as one, and back."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax.sampling import sampler as sampling
from folojax.sampling.logit_edits import init_edits
from folojax.sampling.rows import StepOutput
from folojax.sampling.sampler import SamplingClass, SamplingSpec
from folojax.steps.packing import Packing, pack_report, report_packing
from folojax.steps.state import DecodeInputs
from tests.sampling_rows import V, draw, edit_nothing, make_rows, random_logits

B = 5


class Inner(NamedTuple):
    """A tree within a tree."""

    seed: Any
    nothing: Any
    table: Any


def make_tree() -> dict[str, Any]:
    """Of every kind: all bits of integers and floats, several axes, and what is not packed."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, (B, 3), dtype=np.uint32)
    floats = np.array([np.nan, -np.inf, -0.0, 1e-42, 3.5], np.float32)
    table = rng.integers(-(2**31), 2**31, (B, 2, 3)).astype(np.int32)
    return {
        "first": np.arange(-2, B - 2, dtype=np.int32),
        "floats": floats,
        "inner": Inner(bits, None, table),
        "other_rows": np.arange(B + 1, dtype=np.int32),
        "half": np.arange(B, dtype=np.int16),
        "scalar": np.array(7, np.int32),
        "empty": np.zeros((B, 0), np.int32),
        "strided": np.arange(2 * B, dtype=np.int32)[::2],
    }


def check_equal(got: Any, expected: Any) -> None:
    """To the bit."""
    chex.assert_trees_all_equal_structs(got, expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_a_tree_is_the_same_on_the_host_and_in_a_jitted_function() -> None:
    tree = make_tree()
    packing = Packing.of(tree, B)
    packed, rest = packing.pack(tree)
    assert (packed.shape, packed.dtype) == ((B, 1 + 1 + 3 + 6 + 1), np.int32)
    check_equal(packing.unpack(packed, rest), tree)
    unpack = jax.jit(Packing.unpack, static_argnums=0)
    check_equal(unpack(packing, packed, rest), tree)


def test_leaves_that_are_no_entry_for_each_row_stay_as_they_are() -> None:
    tree = make_tree()
    _, rest = Packing.of(tree, B).pack(tree)
    kept = [tree["half"], tree["other_rows"], tree["scalar"]]
    assert all(one is other for one, other in zip(rest, kept, strict=True))


def test_packings_of_equal_trees_are_equal_and_of_others_are_not() -> None:
    """They are static arguments: an executable is found by them."""
    tree = make_tree()
    packing = Packing.of(tree, B)
    again = Packing.of(jax.tree.map(np.copy, tree), B)
    assert packing == again
    assert hash(packing) == hash(again)
    assert packing != Packing.of({**tree, "first": tree["first"].astype(np.uint32)}, B)
    assert packing != Packing.of({**tree, "inner": None}, B)
    check_equal(again.unpack(*packing.pack(tree)), tree)


def test_the_inputs_of_a_step_are_one_array() -> None:
    rng = np.random.default_rng(1)
    fields: list[Any] = [rng.integers(0, 9, B).astype(np.int32) for _ in range(3)]
    table: Any = rng.integers(0, 9, (B, 4)).astype(np.int32)
    inputs = DecodeInputs._make([*fields, table])
    packing = Packing.of(inputs, B)
    packed, rest = packing.pack(inputs)
    assert packed.shape == (B, 7)
    assert rest == []
    check_equal(packing.unpack(packed, rest), inputs)


SPECS = [
    SamplingSpec(SamplingClass.GREEDY),
    SamplingSpec(SamplingClass.RANDOM, num_logprobs=0),
    SamplingSpec(SamplingClass.TRUNCATED, num_logprobs=3),
    SamplingSpec(SamplingClass.TRUNCATED, num_logprobs=2, is_processed=True, num_tokens=V - 3),
    SamplingSpec(SamplingClass.GREEDY, has_record=True),
    SamplingSpec(SamplingClass.EDITED, num_logprobs=1, has_record=True),
]


def make_report(spec: SamplingSpec) -> StepOutput:
    rows = make_rows({"temperature": 0}, {"seed": 3}, {"seed": 2**40 + 1, "top_p": 0.5})
    logits = random_logits(3).at[1, 7].set(jnp.nan)
    return draw(logits, rows, jnp.arange(3), spec)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_report_is_one_array_on_its_way(spec: SamplingSpec) -> None:
    report = make_report(spec)
    assert report.is_valid.tolist() == [True, False, True]
    packed = np.asarray(jax.jit(pack_report)(report))
    packing = report_packing(report)
    assert packing == report_packing(jax.eval_shape(lambda: report))
    assert packed.dtype == np.int32
    check_equal(packing.unpack(packed, []), report)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_is_known_of_a_report_beforehand_is_what_the_sampler_gives(
    spec: SamplingSpec,
) -> None:
    rows, logits = make_rows(*[{}] * B), random_logits(B)
    edits = None
    if spec.needed == SamplingClass.EDITED:
        edits = init_edits(1, V), edit_nothing(B)
    sampler = functools.partial(sampling.sample, spec=spec, edits=edits)
    found = jax.eval_shape(sampler, logits, rows, jnp.arange(B))
    known = sampling.report_shapes(spec, B)
    chex.assert_trees_all_equal_structs(found, known)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(known), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
