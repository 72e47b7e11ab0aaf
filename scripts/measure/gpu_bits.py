"""Which changes to a call leave a row's bits alone, on this device."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gpu_common import Report, make_model
from jaxtyping import Array

from folojax import DecodeInputs, KVLayout, PrefillInputs, decode, init_state, prefill
from folojax.backend import choose_backend
from folojax.models.core.decoder import Llama

_PAGE = 64


def check_bits(small: bool, report: Report) -> None:
    """Which changes to a call leave a row's hidden state bit for bit what it was."""
    module, params = make_model("qwen3-0.6b", small, num_layers=4)
    _decode_bits(small, module, params, report)
    _prefill_bits(small, module, params, report)
    _replay_bits(small, module, params, report)


class _Rows(NamedTuple):
    """Rows of a decode step over one cache."""

    token: np.ndarray
    position: np.ndarray
    table: np.ndarray


def _layout(module: Llama, num_pages: int) -> KVLayout:
    return choose_backend().kv_layout(module.config, module.dtype, num_pages, _PAGE)


def _decode_bits(small: bool, module: Llama, params: Any, report: Report) -> None:
    rng = np.random.default_rng(0)
    count, longest = (16, 6 * _PAGE) if small else (256, 16 * _PAGE)
    total = count * longest // _PAGE
    position = rng.integers(longest // 8, longest, count)
    pages = position // _PAGE + 1
    table = np.full((count, longest // _PAGE), total, np.int32)
    ids = rng.permutation(total)
    for row, (first, number) in enumerate(zip(np.cumsum(pages) - pages, pages, strict=True)):
        table[row, :number] = ids[first : first + number]
    rows = _Rows(rng.integers(3, module.config.vocab_size, count), position, table)
    shapes = init_state(_layout(module, total), 1).cache
    key = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))

    def noise(like: Array) -> Array:
        return jax.random.normal(next(key), like.shape, like.dtype)

    cache = jax.tree.map(noise, shapes)

    def run(rows: _Rows, cache: Any = cache) -> np.ndarray:
        inputs = _decode_inputs(*rows)
        spare = jax.tree.map(jnp.copy, cache)
        tokens = jnp.zeros(len(rows.token), jnp.int32)
        return np.asarray(decode(params, spare, tokens, inputs, model=module)[1])

    base = run(rows)

    def compare(change: str, out: np.ndarray, expected: np.ndarray) -> None:
        _compare("decode", change, out, expected, report)

    compare("the same call again", run(rows), base)
    order = rng.permutation(count)
    compare("rows in another order", run(_Rows(*(x[order] for x in rows))), base[order])
    others = rows.token.copy()
    others[1:] = rng.integers(3, module.config.vocab_size, count - 1)
    compare("other tokens in the other rows", run(rows._replace(token=others))[:1], base[:1])
    wider = np.concatenate([table, np.full_like(table, total)], axis=1)
    compare("tables of twice the pages", run(rows._replace(table=wider)), base)
    move = rng.permutation(total)
    moved = jax.tree.map(lambda x: x[np.argsort(move)], cache)
    elsewhere = np.where(table < total, np.append(move, 0)[np.minimum(table, total - 1)], total)
    compare("pages in other places", run(rows._replace(table=elsewhere), moved), base)
    del moved
    for fewer in (1, 4, 8) if small else (1, 4, 8, 16, 64):
        compare(f"{fewer} rows of {count}", run(_Rows(*(x[:fewer] for x in rows))), base[:fewer])
    hidden = jnp.asarray(base)
    everything = _logprobs(module, params, hidden)
    for fewer in (1, 8) if small else (1, 4, 16, 64):
        some = _logprobs(module, params, hidden[:fewer])
        _compare("logits", f"{fewer} rows of {count}", some, everything[:fewer], report)


def _prefill_bits(small: bool, module: Llama, params: Any, report: Report) -> None:
    rng = np.random.default_rng(1)
    most = 8 if small else 32
    tokens = rng.integers(3, module.config.vocab_size, (most, _PAGE)).astype(np.int32)

    def run(rows: int, pages: int) -> np.ndarray:
        table = np.full((rows, pages), most, np.int32)
        table[:, 0] = np.arange(rows)
        inputs = _prefill_inputs(tokens[:rows], table)
        cache = init_state(_layout(module, most), 1).cache
        return np.asarray(prefill(params, cache, inputs, model=module)[2])

    base = run(most, 4)
    for rows in (1, 4) if small else (1, 4, 16):
        _compare("prefill", f"{rows} rows of {most}", run(rows, 4), base[:rows], report)
    _compare("prefill", "tables of 16 pages instead of 4", run(most, 16), base, report)


def _replay_bits(small: bool, module: Llama, params: Any, report: Report) -> None:
    """The same tokens decoded one by one and prefilled at once."""
    rng = np.random.default_rng(2)
    rows, length = (4, 24) if small else (16, _PAGE)
    tokens = rng.integers(3, module.config.vocab_size, (rows, length)).astype(np.int32)
    layout = _layout(module, rows)
    table: Any = np.arange(rows, dtype=np.int32)[:, None]
    _, _, whole = prefill(
        params, init_state(layout, 1).cache, _prefill_inputs(tokens, table), model=module
    )
    half = length // 2
    first = _prefill_inputs(tokens[:, :half], table)
    cache, _, _ = prefill(params, init_state(layout, 1).cache, first, model=module)
    steps = []
    for position in range(half, length):
        inputs = _decode_inputs(tokens[:, position], np.full(rows, position), table)
        cache, hidden = decode(params, cache, jnp.zeros(rows, jnp.int32), inputs, model=module)
        steps.append(np.asarray(hidden))
    expected = np.asarray(whole)[:, half:]
    _compare("decode", "prefilled at once instead", np.stack(steps, axis=1), expected, report)


def _compare(part: str, change: str, out: Any, expected: Any, report: Report) -> None:
    is_equal = (out == expected).all(axis=-1)
    difference = np.abs(out.astype(np.float32) - expected.astype(np.float32))
    report.add(
        part=part,
        change=change,
        rows=is_equal.size,
        equal=int(is_equal.sum()),
        max_difference=float(difference.max()),
    )


def _logprobs(module: Llama, params: Any, hidden: Array) -> np.ndarray:
    return np.asarray(_jitted_logprobs(params, hidden, module))


@functools.partial(jax.jit, static_argnums=2)
def _jitted_logprobs(params: Any, hidden: Array, module: Llama) -> Array:
    logits: Any = module.apply({"params": params}, hidden, method="logits")
    return jax.nn.log_softmax(logits)


def _prefill_inputs(tokens: np.ndarray, table: np.ndarray) -> PrefillInputs:
    rows, length = tokens.shape
    start, lengths = jnp.zeros(rows, jnp.int32), jnp.full(rows, length, jnp.int32)
    return PrefillInputs(jnp.asarray(tokens), start, lengths, jnp.asarray(table))


def _decode_inputs(token: np.ndarray, position: np.ndarray, table: np.ndarray) -> DecodeInputs:
    slot = np.arange(len(token))
    slots, tokens, positions, tables = (
        jnp.asarray(x, jnp.int32) for x in (slot, token, position, table)
    )
    return DecodeInputs(slots, tokens, positions, tables)
