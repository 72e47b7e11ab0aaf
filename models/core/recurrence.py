"""Layers that keep a state instead of keys and values: convolution and linear recurrence.

A token with query q, key k, value v, rate beta and decay g <= 0 does to the state S [D, Z]::

    S = exp(g) * S
    S = S + k (beta * (v - k S))^T        the gated delta rule: what k has found is replaced
    S = S + k v^T                         or, without beta, gated linear attention
    out = q S

Tokens come in rows of C, as the caller has them. Several rows may be of one sequence, in order, all
but the last of them full. A row is a chunk: what its tokens do to each other are products of
matrices, for all rows at once (a triangular system for the delta rule); what a row does to the
state of its sequence is then a few products, row by row.

Axes: R rows, C tokens of a row, X channels, W width of the convolution, Y inputs that it keeps,
W - 1, K heads of keys, H heads of values, a multiple of it, D dimension of a key, Z of a value, M
sequences. All is float32.

Yang et al., "Gated Delta Networks" (arXiv:2412.06464); Dao and Gu (arXiv:2405.21060).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from folojax.models.core.recurrent import Recurrent

CHUNK = 64
"""Longer rows are cut into chunks of so many tokens, where that divides them."""

_EXACT: Any = {"precision": lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}


class RecurrentState(NamedTuple):
    """What one layer keeps of M sequences; the last entry is where rows of padding write."""

    conv: Float[Array, "M Y X"]  # the last inputs of the convolution, the latest last
    memory: Float[Array, "M H D Z"] | None  # None: there is the convolution alone


class Rows(NamedTuple):
    """Which sequences R rows of C tokens continue, at most a row of each if `before` is None."""

    slot: Int[Array, " R"]  # whose state
    first: Int[Array, " R"]  # position of the row's first token; at 0 a sequence begins
    length: Int[Array, " R"]  # tokens of the row that are no padding
    before: Int[Array, " R"] | None = None  # tokens of the same sequence in the rows just before

    def is_real(self, columns: int) -> Bool[Array, "R C"]:
        """Which of C tokens of each row are no padding."""
        return jnp.arange(columns)[None, :] < self.length[:, None]


def count_before(
    slot: Int[Array, " R"], first: Int[Array, " R"], length: Int[Array, " R"]
) -> Int[Array, " R"]:
    """`Rows.before`, where rows of one sequence stand one behind the other."""
    number = jnp.arange(len(slot))
    is_start = jnp.append(True, slot[1:] != slot[:-1])
    start = lax.cummax(jnp.where(is_start, number, 0))
    return jnp.where(length > 0, first - first[start], 0)


def convolve_rows(
    state: Float[Array, "M Y X"],
    rows: Rows,
    x: Float[Array, "R C X"],
    kernel: Float[Array, "X W"],
) -> tuple[Float[Array, "M Y X"], Float[Array, "R C X"]]:
    """Each channel's sum of its last W inputs, times the kernel, the latest by its last column."""
    count, columns, channels = x.shape
    width = kernel.shape[1]
    kept = width - 1
    x = jnp.where(rows.is_real(columns)[:, :, None], x.astype(jnp.float32), 0)
    lag = kept - jnp.arange(kept)  # of the inputs before a row
    old = state[rows.slot]
    if rows.before is None:
        context = jnp.where((rows.first == 0)[:, None, None], 0, old)
    else:
        before = rows.before[:, None]
        own = jnp.maximum(jnp.arange(count)[:, None] * columns - lag[None, :], 0)
        older = jnp.clip(kept - (lag[None, :] - before), 0, kept - 1)
        older = jnp.take_along_axis(old, older[:, :, None], axis=1)
        older = jnp.where((rows.first == before[:, 0])[:, None, None], 0, older)
        is_own = (lag[None, :] <= before)[:, :, None]
        context = jnp.where(is_own, x.reshape(-1, channels)[own], older)
    window = jnp.concatenate((context, x), axis=1)
    wide = kernel.astype(jnp.float32)
    out = jnp.zeros_like(x)
    for j in range(width):
        out = out + window[:, j : j + columns] * wide[None, None, :, j]
    last = rows.length[:, None] + jnp.arange(kept)[None, :]
    new = jnp.take_along_axis(window, last[:, :, None], axis=1)
    if rows.before is not None:
        # Of several rows of a sequence the last one's: the others go where padding does.
        is_last = jnp.append(rows.slot[1:] != rows.slot[:-1], True)
        return state.at[jnp.where(is_last, rows.slot, len(state) - 1)].set(new), out
    return state.at[rows.slot].set(new), out


def recur_rows(
    memory: Float[Array, "M H D Z"],
    rows: Rows,
    query: Float[Array, "R C K D"],
    key: Float[Array, "R C K D"],
    value: Float[Array, "R C H Z"],
    decay: Float[Array, "R C H"],
    beta: Float[Array, "R C H"] | None = None,
) -> tuple[Float[Array, "M H D Z"], Float[Array, "R C H Z"]]:
    """The recurrence on rows of tokens; what it gives for padding is finite."""
    columns, heads = value.shape[1:3]
    is_real = rows.is_real(columns)[:, :, None]
    query, key, value = (
        jnp.where(is_real[..., None], one.astype(jnp.float32), 0) for one in (query, key, value)
    )
    query, key = (jnp.repeat(one, heads // one.shape[2], axis=2) for one in (query, key))
    decay = jnp.where(is_real, decay.astype(jnp.float32), 0)
    beta = None if beta is None else jnp.where(is_real, beta.astype(jnp.float32), 0)
    if rows.before is None and columns == 1:
        old = jnp.where((rows.first == 0)[:, None, None, None], 0, memory[rows.slot])
        gates = (decay[:, 0], None if beta is None else beta[:, 0])
        new, out = _step(old, query[:, 0], key[:, 0], value[:, 0], *gates)
        return memory.at[rows.slot].set(new), out[:, None]
    if columns > CHUNK and columns % CHUNK == 0:
        rows = _cut(rows, columns // CHUNK)
        given = (query, key, value, decay) if beta is None else (query, key, value, decay, beta)
        cut = [one.reshape(-1, CHUNK, *one.shape[2:]) for one in given]
        memory, out = _recur_chunks(memory, rows, *cut)
        return memory, out.reshape(-1, columns, *out.shape[2:])
    return _recur_chunks(memory, rows, query, key, value, decay, beta)


def _cut(rows: Rows, parts: int) -> Rows:
    """Rows that are so many chunks each, as rows."""
    done = jnp.arange(parts)[None, :] * CHUNK
    length = jnp.clip(rows.length[:, None] - done, 0, CHUNK).reshape(-1)
    first = (rows.first[:, None] + done).reshape(-1)
    return Rows(jnp.repeat(rows.slot, parts), first, length)


def _step(
    state: Float[Array, "*rows H D Z"],
    query: Float[Array, "*rows H D"],
    key: Float[Array, "*rows H D"],
    value: Float[Array, "*rows H Z"],
    decay: Float[Array, "*rows H"],
    beta: Float[Array, "*rows H"] | None,
) -> tuple[Array, Array]:
    """One token of each row."""
    state = state * jnp.exp(decay)[..., None, None]
    if beta is not None:
        found = (state * key[..., None]).sum(axis=-2)
        value = (value - found) * beta[..., None]
    state = state + key[..., None] * value[..., None, :]
    return state, (state * query[..., None]).sum(axis=-2)


def _recur_chunks(
    memory: Array,
    rows: Rows,
    query: Array,
    key: Array,
    value: Array,
    decay: Array,
    beta: Array | None = None,
) -> tuple[Array, Array]:
    """Every row a chunk, one after the other; each reads and writes the state of its slot."""
    is_fresh = rows.first == 0
    if query.shape[1] == 1:
        given = (query, key, value, decay, beta)
        tokens = tuple(None if one is None else one[:, 0] for one in given)

        def one_token(memory: Array, xs: Any) -> tuple[Array, Array]:
            slot, fresh, token = xs
            new, out = _step(jnp.where(fresh, 0, memory[slot]), *token)
            return memory.at[slot].set(new), out

        memory, out = lax.scan(one_token, memory, (rows.slot, is_fresh, tokens))
        return memory, out[:, None]

    def one_chunk(memory: Array, xs: Any) -> tuple[Array, Array]:
        slot, fresh, chunk = xs
        new, out = _apply(jnp.where(fresh, 0, memory[slot]), chunk)
        return memory.at[slot].set(new), out

    chunks = _prepare(query, key, value, decay, beta)
    memory, out = lax.scan(one_chunk, memory, (rows.slot, is_fresh, chunks))
    return memory, jnp.swapaxes(out, 1, 2)


class _Chunk(NamedTuple):
    """What chunks of C tokens do to a state, and read of it."""

    value: Float[Array, "*rows H C Z"]  # what they add, were the state before zero
    erased: Float[Array, "*rows H C D"] | None  # what of the state before is taken from that
    among: Float[Array, "*rows H C C"]  # how much each token reads of what earlier ones add
    query: Float[Array, "*rows H C D"]  # as it reads the state before the chunk
    key: Float[Array, "*rows H C D"]  # as it adds to the state behind the chunk
    kept: Float[Array, "*rows H 1 1"]  # of the state, from before to behind


def _prepare(query: Array, key: Array, value: Array, decay: Array, beta: Array | None) -> _Chunk:
    """All that does not depend on a state: products for all rows and heads at once."""
    query, key, value = (jnp.swapaxes(one, 1, 2) for one in (query, key, value))
    decay = jnp.swapaxes(decay, 1, 2)  # [R, H, C]
    columns = decay.shape[-1]
    is_past = jnp.tri(columns, dtype=bool)[None, None]
    # Sums of what lies between two tokens, not differences of sums: those would lose all digits
    # of little decay behind much.
    later = jnp.tri(columns, k=-1)[None, None] * decay[..., :, None]
    between = jnp.einsum("ik,rhkj->rhij", jnp.tri(columns), later, **_EXACT)
    to_last = between[..., -1, :, None]
    between = jnp.exp(jnp.where(is_past, between, -jnp.inf))
    grown = jnp.exp(jnp.cumsum(decay, axis=-1))[..., None]
    erased = None
    if beta is not None:
        rate = jnp.swapaxes(beta, 1, 2)[..., None]
        products = jnp.einsum("rhid,rhjd->rhij", rate * key, key, **_EXACT) * between
        both = jnp.concatenate((rate * value, rate * key * grown), axis=-1)
        solved = lax.linalg.triangular_solve(
            products, both, left_side=True, lower=True, unit_diagonal=True
        )
        value, erased = solved[..., : value.shape[-1]], solved[..., value.shape[-1] :]
    return _Chunk(
        value=value,
        erased=erased,
        among=jnp.einsum("rhid,rhjd->rhij", query, key, **_EXACT) * between,
        query=query * grown,
        key=key * jnp.exp(to_last),
        kept=grown[..., -1:, :],
    )


def _apply(state: Float[Array, "H D Z"], chunk: _Chunk) -> tuple[Array, Array]:
    """One chunk on the state before it: the state behind it, and what its tokens read."""
    value = chunk.value
    if chunk.erased is not None:
        value = value - jnp.einsum("hcd,hdz->hcz", chunk.erased, state, **_EXACT)
    out = jnp.einsum("hcd,hdz->hcz", chunk.query, state, **_EXACT)
    out = out + jnp.einsum("hij,hjz->hiz", chunk.among, value, **_EXACT)
    added = jnp.einsum("hcd,hcz->hdz", chunk.key, value, **_EXACT)
    return state * chunk.kept + added, out


def l2_normed(x: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
    """Vectors of length 1, in float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt((wide * wide).sum(axis=-1, keepdims=True) + 1e-6)


def split_inputs(
    mixed: Float[Array, "N _"], rates: Float[Array, "N _"], sizes: Recurrent
) -> tuple[Array, Array, Array, Array]:
    """Queries, keys and values side by side [N, X]; gates [N, H * Z]; rates and steps [N, H]."""
    count, keys = sizes.num_key_heads, sizes.key_dim
    if not sizes.is_by_key_head:
        mixed, gate = jnp.split(mixed, (sizes.num_channels,), axis=1)
        rate, step = jnp.split(rates, 2, axis=1)
        return mixed, gate, rate, step
    values = sizes.num_values // count  # that belong to one head of keys
    parts = mixed.reshape(len(mixed), count, 2 * keys + 2 * values)
    query, key, value, gate = jnp.split(parts, (keys, 2 * keys, 2 * keys + values), axis=2)
    rate, step = jnp.split(rates.reshape(len(rates), count, -1), 2, axis=2)
    query, key, value, gate, rate, step = (
        one.reshape(len(mixed), -1) for one in (query, key, value, gate, rate, step)
    )
    return jnp.concatenate((query, key, value), axis=1), gate, rate, step
