"""A vocabulary that devices share: the draws of one device, of candidates that are gathered."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from folojax import LLM, SamplingClass, SamplingParams, join_params
from folojax.sampling.logit_edits import ANY_TOKEN, NUM_RECENT, EditRows, EditState
from folojax.sampling.part_sampler import sample_part
from folojax.sampling.parts import Part
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


def both(
    logits: Any, rows: SamplingRows, spec: SamplingSpec, count: int, *more: Any
) -> tuple[Any, Any]:
    """What one device draws, and what so many do; with edits and masks."""
    size = -(-VOCAB // count // 128) * 128
    filled = np.pad(logits, ((0, 0), (0, count * size - VOCAB)), constant_values=7.0)
    args = rows, jnp.arange(ROWS, dtype=jnp.int32), *more

    def own(logits: Any, rows: Any, position: Any, *more: Any) -> Any:
        return sample_part(logits, Part("parts", VOCAB), rows, position, spec, *more)

    def alone(logits: Any, rows: Any, position: Any, edits: Any = None, mask: Any = None) -> Any:
        return sample(logits, rows, position, spec, edits, mask=mask)

    function = jax.shard_map(
        own,
        mesh=Mesh(MESH.devices[:count], ("parts",)),
        in_specs=(PartitionSpec(None, "parts"), *[PartitionSpec()] * len(args)),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    known = jax.jit(alone)(jnp.asarray(logits), *args)
    return known, jax.jit(function)(jnp.asarray(filled), *args)


def check_same(found: Any, known: Any) -> None:
    """Tokens and ranks are the same, and all else to rounding, of rows that give a token."""
    assert found.is_valid.tolist() == known.is_valid.tolist()
    valid = np.asarray(known.is_valid)
    forms = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), out) for out in (found, known)]
    assert forms[0] == forms[1]
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(known), strict=True):
        if jnp.issubdtype(theirs.dtype, jnp.floating):
            np.testing.assert_allclose(ours[valid], theirs[valid], atol=1e-5)
        else:
            np.testing.assert_array_equal(ours[valid], theirs[valid])


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
        known, found = both(logits, make_rows(temperature), spec, count)
        assert known.is_valid.sum() == ROWS - 3
        check_same(found, known)


def make_edits(rng: np.random.Generator) -> tuple[EditState, EditRows]:
    """Penalties, biases and banned words of every other row."""
    slots = jnp.where(jnp.arange(ROWS) % 2 == 0, jnp.arange(ROWS), ROWS)
    history = rng.integers(0, 3, (ROWS, VOCAB)) * (rng.random((ROWS, VOCAB)) < 0.3)
    bias = np.where(rng.random((ROWS, VOCAB)) < 0.1, rng.normal(size=(ROWS, VOCAB)), 0.0)
    bias[4, 100:] = -np.inf
    recent = rng.integers(0, 5, (ROWS, NUM_RECENT))
    bans = np.full((40, 2 + NUM_RECENT), ANY_TOKEN)
    bans[:, 0] = rng.integers(0, ROWS, 40)
    bans[:, 1] = rng.integers(0, VOCAB, 40)
    bans[20:, -1] = recent[bans[20:, 0], -1]
    edits = EditState(
        jnp.asarray(history, jnp.int32), jnp.asarray(bias, jnp.float32), jnp.asarray(recent)
    )
    repetition, presence, frequency = jnp.asarray(rng.uniform(0.2, 1.5, (3, ROWS)), jnp.float32)
    return edits, EditRows(slots, repetition, presence, frequency, jnp.asarray(bans))


TRUNCATED = SamplingSpec(SamplingClass.TRUNCATED)
EDITED = SamplingSpec(SamplingClass.EDITED, num_logprobs=2, num_tokens=840)
SPECS = [
    TRUNCATED,
    EDITED,
    SamplingSpec(SamplingClass.GREEDY, num_logprobs=5, has_record=True, has_mask=True),
    SamplingSpec(SamplingClass.RANDOM, num_logprobs=0, num_tokens=840, has_record=True),
    SamplingSpec(SamplingClass.RANDOM, num_logprobs=3, is_processed=True),
    dataclasses.replace(TRUNCATED, num_logprobs=3, has_record=True),
    dataclasses.replace(TRUNCATED, num_logprobs=4, is_processed=True, has_mask=True),
    dataclasses.replace(EDITED, is_processed=True, has_record=True, has_mask=True),
    SamplingSpec(SamplingClass.GREEDY, num_logprobs=VOCAB, is_processed=True),
]


@pytest.mark.parametrize("largest_k", [50, VOCAB])
@pytest.mark.parametrize(
    ("spec", "count"),
    [
        pytest.param(
            spec, count, marks=[] if (index, count) in {(1, 2), (7, 4)} else pytest.mark.slow
        )
        for index, spec in enumerate(SPECS)
        for count in (2, 4)
    ],
)
def test_all_that_can_be_asked_for(spec: SamplingSpec, count: int, largest_k: int) -> None:
    """Truncation, edits, grammars, log-probabilities of either kind and records."""
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(ROWS, VOCAB)).astype(np.float32) * 3
    logits[:8] = np.round(logits[:8])  # equals
    logits[9] = 1.0
    logits[10, 700] = np.nan
    logits[11] = -np.inf
    rows = make_rows(rng.choice([0.0, 0.5, 1.0, 1.7], ROWS))._replace(
        top_k=jnp.asarray(
            np.where(rng.random(ROWS) < 0.5, rng.integers(1, largest_k, ROWS), VOCAB)
        ),
        top_p=jnp.asarray(rng.choice([1.0, 0.9, 0.5, 1e-3], ROWS), jnp.float32),
        min_p=jnp.asarray(rng.choice([0.0, 0.01, 0.2], ROWS), jnp.float32),
    )
    if spec.needed == SamplingClass.GREEDY:
        rows = rows._replace(temperature=jnp.zeros(ROWS))
    edits = make_edits(rng) if spec.needed >= SamplingClass.EDITED else None
    words = rng.integers(0, 2**32, (ROWS, -(-VOCAB // 32)), np.uint32)
    mask = jnp.asarray(words) if spec.has_mask else None
    known, found = both(logits, rows, spec, count, edits, mask)
    check_same(found, known)
    assert known.is_valid.sum() == ROWS - 2


def test_greedy_rows_beside_others() -> None:
    logits = np.random.default_rng(3).normal(size=(ROWS, VOCAB)).astype(np.float32)
    rows = make_rows(1.0)
    rows = rows._replace(temperature=rows.temperature.at[::2].set(0.0))
    known, found = both(logits, rows, SamplingSpec(SamplingClass.RANDOM), 2)
    np.testing.assert_array_equal(found.tokens, known.tokens)
    np.testing.assert_array_equal(found.tokens[::2], logits[::2].argmax(axis=1))


@pytest.mark.slow
def test_an_engine_gathers_candidates(tmp_path: Path) -> None:
    """For all kinds of requests; all else of the vocabulary stays where it is."""
    save_tiny("llama", tmp_path, vocab_size=1000)
    model = dense.load(tmp_path)
    prompts = [list(range(5, 17)), list(range(7, 22))]
    asked = [
        SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
        SamplingParams(
            seed=4,
            top_p=0.9,
            top_k=70,
            min_p=0.001,
            repetition_penalty=1.2,
            logit_bias={7: 2.0},
            max_tokens=8,
            ignore_eos=True,
            logprobs=3,
            prompt_logprobs=2,
            record=True,
        ),
    ]
    known = LLM(model, **TINY_LIMITS).generate(prompts, asked, use_tqdm=False)
    llm = LLM(model, **TINY_LIMITS, tensor_parallel_size=2)
    found = llm.generate(prompts, asked, use_tqdm=False)
    for ours, theirs in zip(found, known, strict=True):
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
        logprob = theirs.outputs[0].cumulative_logprob
        assert ours.outputs[0].cumulative_logprob == pytest.approx(logprob, abs=1e-4)
    assert llm.params["embed"].addressable_shards[0].data.shape == (512, 64)
    texts = [one.as_text() for one in programs_of(llm, asked)]
    shapes = [
        shape for text in texts for shape in re.findall(r"= f32\[([\d,]+)\]\S* all-gather", text)
    ]
    assert shapes
    assert max(int(shape.split(",")[-1]) for shape in shapes) <= 74, set(shapes)
    assert not any(re.search(r"f32\[(\d,)?\d,(1000|1024)\]\S* all-gather", text) for text in texts)


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
