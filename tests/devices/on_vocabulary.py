"""A vocabulary that devices share: the draws of one device, of candidates that are gathered."""

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from folojax import LLM, SamplingClass, SamplingParams, join_params
from folojax.sampling.parts import Part, is_drawn_in_parts, sample_part
from folojax.sampling.rows import SamplingRows, greedy_rows
from folojax.sampling.sampler import SamplingSpec, sample
from tests import dense
from tests.devices.on_all import programs_of
from tests.reference import TINY_LIMITS, save_tiny

ROWS, VOCAB = 64, 900  # seven blocks and some
MESH = Mesh(np.array(jax.devices()), ("parts",))


def make_rows(temperature: Any) -> SamplingRows:
    rows = greedy_rows(ROWS)
    seeds = np.random.default_rng(2).integers(0, 2**32, (ROWS, 2), np.uint32)
    return rows._replace(temperature=jnp.full(ROWS, temperature), seed=jnp.asarray(seeds))


def both(logits: Any, rows: SamplingRows, spec: SamplingSpec, count: int) -> tuple[Any, Any]:
    """What one device draws, and what so many do."""
    size = -(-VOCAB // count // 128) * 128
    filled = np.pad(logits, ((0, 0), (0, count * size - VOCAB)), constant_values=7.0)
    position = jnp.arange(ROWS, dtype=jnp.int32)
    own = functools.partial(sample_part, part=Part("parts", VOCAB), spec=spec)
    function = jax.shard_map(
        lambda logits, rows, position: own(logits, rows=rows, position=position),
        mesh=Mesh(MESH.devices[:count], ("parts",)),
        in_specs=(PartitionSpec(None, "parts"), PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    known = jax.jit(functools.partial(sample, spec=spec))(jnp.asarray(logits), rows, position)
    return known, jax.jit(function)(jnp.asarray(filled), rows, position)


@pytest.mark.parametrize(
    ("temperature", "count"),
    [
        *((0.0, 2), (0.7, 4)),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in ((0.02, 2), (0.02, 4), (2.0, 4))),
    ],
)
def test_tokens_are_those_of_one_device(temperature: float, count: int) -> None:
    """Ties, rows that leave one token, rows of NaN, tokens that are no tokens."""
    logits = np.random.default_rng(1).normal(size=(ROWS, VOCAB)).astype(np.float32) * 3
    logits[:, 850:] += 20  # where no token is
    logits[0] = np.round(logits[0])
    logits[1] = -np.inf
    logits[1, 600] = 3.0
    logits[2] = -np.inf
    logits[3, 700] = np.nan
    logits[4, :512] = -np.inf
    logits[5] = 1.0
    logits[6, 10] = np.inf
    needed = SamplingClass.RANDOM if temperature else SamplingClass.GREEDY
    for num_tokens in (None, 840):
        spec = SamplingSpec(needed, num_tokens=num_tokens)
        assert is_drawn_in_parts(spec)
        known, found = both(logits, make_rows(temperature), spec, count)
        assert found.is_valid.tolist() == known.is_valid.tolist()
        assert known.is_valid.sum() == ROWS - 3
        valid = np.asarray(known.is_valid)
        np.testing.assert_array_equal(found.tokens[valid], known.tokens[valid])
        np.testing.assert_allclose(found.logprobs[valid], known.logprobs[valid], atol=1e-5)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), known
        )


def test_greedy_rows_beside_others() -> None:
    logits = np.random.default_rng(3).normal(size=(ROWS, VOCAB)).astype(np.float32)
    rows = make_rows(1.0)
    rows = rows._replace(temperature=rows.temperature.at[::2].set(0.0))
    known, found = both(logits, rows, SamplingSpec(SamplingClass.RANDOM), 2)
    np.testing.assert_array_equal(found.tokens, known.tokens)
    np.testing.assert_array_equal(found.tokens[::2], logits[::2].argmax(axis=1))


@pytest.mark.slow
def test_an_engine_gathers_candidates(tmp_path: Path) -> None:
    """Of greedy rows and of temperature; all else of the vocabulary stays where it is."""
    save_tiny("llama", tmp_path, vocab_size=1000)
    model = dense.load(tmp_path)
    prompts = [list(range(5, 17)), list(range(7, 22))]
    asked = [
        SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
        SamplingParams(seed=4, max_tokens=8, ignore_eos=True),
    ]
    known = LLM(model, **TINY_LIMITS).generate(prompts, asked, use_tqdm=False)
    llm = LLM(model, **TINY_LIMITS, tensor_parallel_size=2)
    found = llm.generate(prompts, asked, use_tqdm=False)
    for ours, theirs in zip(found, known, strict=True):
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
        logprob = theirs.outputs[0].cumulative_logprob
        assert ours.outputs[0].cumulative_logprob == pytest.approx(logprob, abs=1e-4)
    assert llm.params["embed"].addressable_shards[0].data.shape == (512, 64)
    texts = [one.as_text() for one in programs_of(llm)]
    shapes = [
        shape for text in texts for shape in re.findall(r"= f32\[([\d,]+)\]\S* all-gather", text)
    ]
    assert shapes
    assert all(int(np.prod([*map(int, shape.split(","))])) <= 2 * 2 * 7 for shape in shapes)
    assert not any(re.search(r"f32\[\d,1000\]", text) for text in texts)


@pytest.mark.slow
def test_rows_that_fill_the_parts_come_and_go(tmp_path: Path) -> None:
    """Params go in and come out without, and are taken with them."""
    save_tiny("llama", tmp_path / "model", vocab_size=1000, tie_word_embeddings=False)
    module, params = dense.load(tmp_path / "model")
    llm = LLM((module, params), **TINY_LIMITS, tensor_parallel_size=4)
    assert llm.params["lm_head"].shape == (1024, 64)
    llm.save_pretrained(tmp_path / "saved")
    saved = dense.load(tmp_path / "saved")[1]
    joined = join_params(llm.params, module.config)
    for one in (saved, joined):
        same = jax.tree.map(lambda a, b: a.shape == b.shape and bool((a == b).all()), one, params)
        assert jax.tree.all(same)
    asked = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    known = llm.generate([5, 17, 99, 3], asked, use_tqdm=False)[0].outputs[0].token_ids
    made = LLM((module, llm.params), **TINY_LIMITS, tensor_parallel_size=4)
    over = jax.device_put(params, NamedSharding(Mesh(MESH.devices, ("x",)), PartitionSpec()))
    for new in (llm.params, params, over):
        made.update_params(jax.tree.map(lambda leaf: leaf * 1.25, new))
        made.update_params(new)
        assert made.params["embed"].shape == (1024, 64)
        found = made.generate([5, 17, 99, 3], asked, use_tqdm=False)
        assert found[0].outputs[0].token_ids == known
    assert made.engine.weights == LLM((module, params), **TINY_LIMITS).engine.weights
