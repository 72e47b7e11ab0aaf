"""Penalties, biases and bans: against a plain reference, against transformers, row by row."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from folojax.requests.sampling_params import SamplingParams, SamplingRequest
from folojax.runner.row_params import RowTable, slot_edits
from folojax.sampling.logit_edits import (
    NUM_RECENT,
    apply_edits,
    init_edits,
    note_tokens,
    write_slot,
)
from folojax.sampling.sampler import SamplingClass, SamplingSpec
from folojax.sched.request import StopRule

V = 200
M = 8

write = write_slot
edit = jax.jit(apply_edits)
note = jax.jit(note_tokens)


class Request:
    """A request of the table below: what it asks for and what it has so far."""

    def __init__(
        self,
        prompt: Sequence[int] = (1, 2, 3),
        output: Sequence[int] = (),
        bad_words: Sequence[Sequence[int]] = (),
        banned: Sequence[int] = (),
        min_tokens: int = 0,
        **params: Any,
    ) -> None:
        self.prompt, self.output = list(prompt), list(output)
        self.row = SamplingRequest(
            "",
            tuple(prompt),
            StopRule(max_tokens=1),
            sampling_params=SamplingParams(**params),
            banned_ids=tuple(banned),
            banned_until=len(prompt) + min_tokens,
            bad_word_ids=tuple(map(tuple, bad_words)),
        )


def reference(logits: np.ndarray, request: Request) -> np.ndarray:
    """One row, token by token, in float64."""
    x = logits.astype(np.float64)
    params, text = request.row.sampling_params, request.prompt + request.output
    for token in range(len(x)):
        if token in text:
            factor = params.repetition_penalty
            x[token] = x[token] / factor if x[token] > 0 else x[token] * factor
        x[token] -= params.frequency_penalty * request.output.count(token)
        x[token] -= params.presence_penalty * (token in request.output)
        x[token] += (params.logit_bias or {}).get(token, 0.0)
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            x[token] = -np.inf
        for word in request.row.bad_word_ids:
            *prefix, last = word
            if token == last and (not prefix or text[-len(prefix) :] == prefix):
                x[token] = -np.inf
        if token in request.row.banned_ids and len(text) < request.row.banned_until:
            x[token] = -np.inf
    return x


def join(requests: Sequence[Request], vocab_size: int = V) -> tuple[Any, RowTable]:
    """The state and table that hold request i in slot i."""
    table, edits = RowTable(M, vocab_size), init_edits(M, vocab_size)
    for slot, request in enumerate(requests):
        table.put(slot, request.row)
        if request.row.has_slot_edits:
            tokens = np.array(request.prompt + request.output, np.int32)
            new = slot_edits(request.row, tokens, vocab_size)
            edits = write(edits, np.int32(slot), new)
    return edits, table


EDITED = SamplingSpec(SamplingClass.EDITED)


def edit_rows(table: RowTable, slot: Any, position: Any) -> Any:
    return table.sample_inputs(slot, position, EDITED).edits


def positions(requests: Sequence[Request]) -> np.ndarray:
    return np.array([len(r.prompt) + len(r.output) for r in requests], np.int32)


def random_logits(num_rows: int, vocab_size: int = V, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(scale=2, size=(num_rows, vocab_size)).astype(np.float32)


def requests_of_all_kinds() -> list[Request]:
    return [
        Request(repetition_penalty=1.7, prompt=[5, 6, 5], output=[7, 7, 150]),
        Request(presence_penalty=1.5, frequency_penalty=-0.5, prompt=[9], output=[9, 8, 8, 8]),
        Request(
            logit_bias={0: 3.5, V - 1: -2.0, 9: 1e3},
            allowed_token_ids=[0, 9, V - 1, 44],
            bad_words=[[9]],
        ),
        Request(bad_words=[[4], [1, 2], [2, 3, 50], [3, 51], [9, 3, 52], list(range(16))]),
        Request(bad_words=[list(range(16))], prompt=range(10), output=range(10, 15)),
        Request(banned=[0, 17], min_tokens=3, output=[1, 1], repetition_penalty=0.5),
        Request(banned=[0, 17], min_tokens=3, output=[1, 1, 1]),
        Request(temperature=0.3),
    ]


def test_all_edits_are_those_of_the_plain_reference() -> None:
    requests = requests_of_all_kinds()
    edits, table = join(requests)
    logits, slot = random_logits(M), np.arange(M, dtype=np.int32)
    got = edit(jnp.asarray(logits), edits, edit_rows(table, slot, positions(requests)))
    for row, request in enumerate(requests):
        expected = reference(logits[row], request)
        np.testing.assert_allclose(got[row], expected, rtol=1e-6, atol=1e-6, err_msg=str(row))
        assert (np.asarray(got[row]) == -np.inf).tolist() == (expected == -np.inf).tolist(), row


def test_tokens_noted_one_by_one_are_as_if_written_at_once() -> None:
    """What a preempted request is rejoined with is what it had."""
    requests = requests_of_all_kinds()
    edits, table = join(requests)
    rng = np.random.default_rng(0)
    for _ in range(NUM_RECENT + 3):
        order = rng.permutation(M).astype(np.int32)
        slot = np.append(order, [M, M]).astype(np.int32)  # rows in any order, and padding
        tokens = rng.integers(0, V, M + 2).astype(np.int32)
        rows = edit_rows(table, slot, np.zeros(M + 2, np.int32))
        edits = note(edits, rows.slot, jnp.asarray(tokens))
        for place, request in enumerate(order):
            requests[request].output.append(int(tokens[place]))
    expected, _ = join(requests)
    logits, slot = jnp.asarray(random_logits(M)), np.arange(M, dtype=np.int32)
    rows = edit_rows(table, slot, positions(requests))
    np.testing.assert_array_equal(edit(logits, edits, rows), edit(logits, expected, rows))
    has_edits = np.array([request.row.has_slot_edits for request in requests])
    np.testing.assert_array_equal(edits.recent[has_edits], expected.recent[has_edits])


def test_a_neighbour_and_an_earlier_owner_of_the_slot_have_no_effect() -> None:
    requests = requests_of_all_kinds()
    edits, table = join(requests)
    logits, slot = jnp.asarray(random_logits(M)), np.arange(M, dtype=np.int32)
    expected = edit(logits, edits, edit_rows(table, slot, positions(requests)))
    # Each request moves into the slot of the next one, beside other neighbours.
    moved = requests[1:] + requests[:1]
    for i, request in enumerate(moved):
        table.put(i, request.row)
        if request.row.has_slot_edits:
            tokens = np.array(request.prompt + request.output, np.int32)
            edits = write(edits, np.int32(i), slot_edits(request.row, tokens, V))
    order = np.array([3, 0, 5, 1, 7, 2, 6, 4], np.int32)
    rows = edit_rows(table, order, positions(moved)[order])
    got = edit(jnp.roll(logits, -1, axis=0)[order], edits, rows)
    np.testing.assert_array_equal(got, jnp.roll(expected, -1, axis=0)[order])


def test_a_row_without_edits_keeps_its_bits() -> None:
    edits, table = join([Request(temperature=0.5)])
    stale = jax.tree.map(lambda x: x + 7, edits)
    logits = random_logits(2)
    logits[0, :4] = -0.0, np.nan, -np.inf, np.inf
    rows = edit_rows(table, np.array([0, M], np.int32), np.array([3, 0], np.int32))
    got = np.asarray(edit(jnp.asarray(logits), stale, rows))
    np.testing.assert_array_equal(got.view(np.uint32), logits.view(np.uint32))


def test_neutral_penalties_beside_a_bias_change_nothing_else() -> None:
    request = Request(logit_bias={3: 1.0}, prompt=range(100), output=range(50))
    edits, table = join([request])
    logits = random_logits(1)
    got = edit(jnp.asarray(logits), edits, edit_rows(table, np.array([0]), positions([request])))
    logits[0, 3] += 1.0
    np.testing.assert_array_equal(got, logits)


def test_nothing_is_compiled_for_values() -> None:
    traced_edit = jax.jit(chex.assert_max_traces(apply_edits, n=1))
    requests = requests_of_all_kinds()
    edits, table = join(requests)
    num_compiled = write_slot._cache_size()  # type: ignore[attr-defined]
    logits, slot = jnp.asarray(random_logits(M)), np.arange(M, dtype=np.int32)
    for shift in range(3):
        order = np.roll(slot, shift)
        traced_edit(logits, edits, edit_rows(table, order, positions(requests)[order]))
    more = Request(prompt=range(40), output=range(30), frequency_penalty=2.0, bad_words=[[1, 5]])
    tokens = np.array(more.prompt + more.output, np.int32)
    write_slot(edits, np.int32(5), slot_edits(more.row, tokens, V))
    assert write_slot._cache_size() == num_compiled  # type: ignore[attr-defined]


# --- the table ------------------------------------------------------------------------------


def test_the_class_of_a_step_is_that_of_its_most_demanding_row() -> None:
    rows = [
        Request(temperature=0.0),
        Request(temperature=0.5),
        Request(top_p=0.5),
        Request(temperature=0.0, presence_penalty=0.1),
        Request(temperature=0.0, banned=[2], min_tokens=4),
        Request(temperature=0.0, bad_words=[[1, 2]]),
        Request(temperature=0.0, allowed_token_ids=[3]),
        Request(temperature=0.0, logit_bias={3: 1.0}),
    ]
    _, table = join(rows)
    edited = SamplingClass.EDITED
    expected = [SamplingClass.GREEDY, SamplingClass.RANDOM, SamplingClass.TRUNCATED, *[edited] * 5]
    for slot, needed in enumerate(expected):
        for slots in ([slot], [slot, 0, M], [M, slot]):
            index = np.array(slots, np.int32)
            assert table.sampling_class(index, np.full(len(index), 3)) == needed
    # The ban ends with min_tokens, and with it the need for the class.
    assert table.sampling_class(np.array([4, 0]), np.array([6, 6])) == edited
    assert table.sampling_class(np.array([4, 0]), np.array([7, 6])) == SamplingClass.GREEDY


def test_a_slot_forgets_its_earlier_owner() -> None:
    table = RowTable(M, V)
    table.put(0, Request(bad_words=[[1, 2]], repetition_penalty=2.0, top_k=3).row)
    table.put(0, Request(temperature=0.0).row)
    fresh = RowTable(M, V)
    fresh.put(0, Request(temperature=0.0).row)
    slot, position = np.array([0, M]), np.array([5, 5])
    found, expected = (one.sample_inputs(slot, position, EDITED) for one in (table, fresh))
    chex.assert_trees_all_equal(found, expected)
    assert table.sampling_class(slot, position) == SamplingClass.GREEDY


def test_a_prompt_or_a_list_of_any_length_fits_a_size() -> None:
    request = Request(
        repetition_penalty=2.0, prompt=list(range(V)) * 30, allowed_token_ids=range(V)
    )
    new = slot_edits(request.row, np.array(request.prompt), V)
    sizes = {len(x) for x in new[:4]}
    assert sizes == {512}  # 200 different tokens


# --- transformers ---------------------------------------------------------------------------


def transformers_logits(requests: Sequence[Request], logits: np.ndarray) -> np.ndarray:
    """What transformers' own processors make of each row."""
    import torch
    from transformers import (
        LogitsProcessor,
        MinNewTokensLengthLogitsProcessor,
        NoBadWordsLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        SequenceBiasLogitsProcessor,
    )

    rows = []
    for request, row in zip(requests, logits, strict=True):
        processors: list[LogitsProcessor] = []
        if request.row.sampling_params.repetition_penalty != 1:
            penalty = request.row.sampling_params.repetition_penalty
            processors.append(RepetitionPenaltyLogitsProcessor(penalty))
        if request.row.sampling_params.logit_bias:
            bias: Any = [
                [[token], value] for token, value in request.row.sampling_params.logit_bias.items()
            ]
            processors.append(SequenceBiasLogitsProcessor(bias))
        if request.row.bad_word_ids:
            processors.append(
                NoBadWordsLogitsProcessor([list(w) for w in request.row.bad_word_ids])
            )
        if request.row.banned_ids:
            processors.append(
                MinNewTokensLengthLogitsProcessor(
                    len(request.prompt),
                    request.row.banned_until - len(request.prompt),
                    list(request.row.banned_ids),
                )
            )
        scores = torch.tensor(row[None])
        ids = torch.tensor([request.prompt + request.output])
        for processor in processors:
            scores = processor(ids, scores)
        rows.append(scores[0].numpy())
    return np.stack(rows)


def test_edits_are_those_of_transformers() -> None:
    rng = np.random.default_rng(1)
    requests = [
        Request(
            prompt=rng.integers(0, V, 20).tolist(),
            output=rng.integers(0, V, 10).tolist(),
            repetition_penalty=float(rng.choice([1.0, 0.7, 1.3, 3.0])),
            logit_bias={int(token): 2.5 for token in rng.integers(0, V, 5)},
        )
        for _ in range(M)
    ]
    for i, request in enumerate(requests):
        text = request.prompt + request.output
        # Words that are about to be completed, with prefixes over the end of the prompt, and not.
        words = [[3], [*text[-1:], 4], [*text[-15:], 5], [*text[-3:-1], 6], [*text[-4:], 7]]
        banned = (8, 9) if i % 2 else ()
        request.row = dataclasses.replace(
            request.row,
            banned_ids=banned,
            banned_until=20 + 10 + i % 3,
            bad_word_ids=tuple(map(tuple, words)),
        )
    edits, table = join(requests)
    logits = random_logits(M, seed=1)
    rows = edit_rows(table, np.arange(M), positions(requests))
    got = edit(jnp.asarray(logits), edits, rows)
    np.testing.assert_allclose(got, transformers_logits(requests, logits), rtol=1e-6, atol=1e-6)
