"""Is the engine right on this device: against a CPU, against float32, and from call to call."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gpu_common import Report, make_model, random_params
from jaxtyping import Array

from folojax import (
    LLM,
    DecodeInputs,
    KVLayout,
    PrefillInputs,
    SamplingParams,
    decode,
    head_params,
    init_state,
    prefill,
    score_tokens,
)
from folojax.models.dense_attend import dense_attend
from folojax.models.llama import Llama

_SIZE = 128  # of a page, and of a prefill row
_TINY = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "num_layers": 3}


def check_right(small: bool, report: Report) -> None:
    """float32 against the CPU, then bfloat16 against float32, and scored against sampled."""
    with jax.default_matmul_precision("highest"):
        tiny = make_model("qwen3-0.6b", True, **_TINY)[0]
        # Larger weights: else a tiny model's distribution would be flat.
        _logprobs_against_cpu("tiny", tiny, 0.2, report)
        _greedy_against_cpu("tiny", tiny, 0.2, report)
        _logprobs_against_cpu("qwen3-0.6b", make_model("qwen3-0.6b", small)[0], 0.02, report)
    _against_float32(small, report)


def check_bits(small: bool, report: Report) -> None:
    """Which changes to a call leave a row's hidden state bit for bit what it was."""
    module, params = make_model("qwen3-0.6b", small, num_layers=4)
    _decode_bits(small, module, params, report)
    _prefill_bits(small, module, params, report)
    _replay_bits(small, module, params, report)


def _on_both(module: Llama, scale: float) -> tuple[Llama, dict[str, Any]]:
    """The module in float32, and the same random parameters on this device and on the CPU."""
    module = dataclasses.replace(module, dtype=jnp.float32)
    params = random_params(module, scale)
    return module, {"here": params, "cpu": jax.device_put(params, jax.devices("cpu")[0])}


def _logprobs_against_cpu(name: str, module: Llama, scale: float, report: Report) -> None:
    module, copies = _on_both(module, scale)
    tokens = np.random.default_rng(0).integers(3, module.config.vocab_size, (4, 32))
    traces = []
    for place, params in copies.items():
        with jax.default_device(jax.devices("cpu")[0] if place == "cpu" else None):
            traces.append(_trace(module, params, tokens.astype(np.int32)))
    for part, here, there in zip(("prefill", "decode"), *traces, strict=True):
        report.add(
            check="float32 log-probabilities against the CPU",
            model=name,
            part=part,
            count=here.size,
            max_difference=float(np.abs(here - there).max()),
            likeliest=float(there.max()),
        )


def _greedy_against_cpu(name: str, module: Llama, scale: float, report: Report) -> None:
    module, copies = _on_both(module, scale)
    cpu = jax.devices("cpu")[0]
    rng = np.random.default_rng(0)
    lengths = (5, 20, 33, 64, 80, 100, 130, 200)
    prompts = [rng.integers(3, module.config.vocab_size, n).tolist() for n in lengths]
    greedy = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    texts = []
    for place, params in copies.items():
        with jax.default_device(cpu if place == "cpu" else None):
            llm = LLM((module, params), max_model_len=256, max_num_seqs=8, num_pages=16)
            outputs = llm.generate(prompts, greedy, use_tqdm=False)
            texts.append([output.outputs[0].token_ids for output in outputs])
    gaps = []
    for prompt, here, there in zip(prompts, *texts, strict=True):
        split = [i for i, (a, b) in enumerate(zip(here, there, strict=True)) if a != b]
        if split:
            with jax.default_device(cpu):
                known = [*prompt, *here[: split[0]]]
                best = np.sort(_dense_logprobs(module, copies["cpu"], known)[-1])[-2:]
            gaps.append(float(best[1] - best[0]))
    report.add(
        check="greedy tokens against the CPU",
        model=name,
        texts=len(prompts),
        equal=len(prompts) - len(gaps),
        gaps_where_they_part=gaps,
    )


def _against_float32(small: bool, report: Report) -> None:
    """Log-probabilities of tokens that the engine sampled in bfloat16."""
    module, params = make_model("qwen3-0.6b", small)
    # Larger logits: a random model's distribution is nearly flat, a trained one's is not.
    params["final_norm"] = params["final_norm"] * 5
    vocab = module.config.vocab_size
    rng = np.random.default_rng(0)
    count, most = (4, 30) if small else (64, 192)
    prompts = [rng.integers(3, vocab, n).tolist() for n in rng.integers(8, most, count)]
    sampling = [
        SamplingParams(temperature=1, seed=i, max_tokens=most, logprobs=0, ignore_eos=True)
        for i in range(count)
    ]
    llm = LLM((module, params), max_model_len=512, max_num_seqs=count, num_pages=4 * count)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    wide_module = dataclasses.replace(module, dtype=jnp.float32)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    sampled: list[Any] = []
    scored: list[Any] = []
    exact: list[Any] = []
    for prompt, output in zip(prompts, outputs, strict=True):
        completion = output.outputs[0]
        assert completion.logprobs is not None
        picks = zip(completion.token_ids, completion.logprobs, strict=True)
        sampled.append([options[token].logprob for token, options in picks])
        tokens = [*prompt, *completion.token_ids]
        part = slice(len(prompt) - 1, len(tokens) - 1)
        scored.append(_score(module, params, tokens)[part])
        with jax.default_matmul_precision("highest"):
            exact.append(_score(wide_module, wide, tokens)[part])
    pairs = {
        "sampled in bfloat16 against float32": (sampled, exact),
        "scored in bfloat16 against float32": (scored, exact),
        "scored against sampled, both bfloat16": (scored, sampled),
    }
    for name, (left, right) in pairs.items():
        log_ratio = np.concatenate(left) - np.concatenate(right)
        difference = np.abs(log_ratio)
        report.add(
            check=f"log-probabilities, {name}",
            count=difference.size,
            mean=float(difference.mean()),
            quantile_99=float(np.quantile(difference, 0.99)),
            max=float(difference.max()),
            bias=float(log_ratio.mean()),
            equal=int((difference == 0).sum()),
            mean_logprob=float(np.concatenate(exact).mean()),
        )


def _trace(module: Llama, params: Any, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities after a prefilled prompt's tokens, and after each decoded one."""
    rows, length = tokens.shape
    half = length // 2
    layout = KVLayout.of(module.config, module.dtype, (rows,), _SIZE)
    cache = init_state(layout, rows).cache
    table: Any = np.arange(rows, dtype=np.int32)[:, None]
    cache, _, hidden = prefill(
        params, cache, _prefill_inputs(tokens[:, :half], table), model=module
    )
    first = _logprobs(module, params, hidden.reshape(rows * half, -1))
    steps = []
    for position in range(half, length):
        inputs = _decode_inputs(tokens[:, position], np.full(rows, position), table)
        cache, hidden = decode(params, cache, jnp.zeros(rows, jnp.int32), inputs, model=module)
        steps.append(_logprobs(module, params, hidden))
    return first, np.stack(steps)


def _score(module: Llama, params: Any, tokens: Sequence[int]) -> np.ndarray:
    """The log-probability of every token but the first, by one prefill call."""
    padded = np.zeros((1, 3 * _SIZE), np.int32)
    padded[0, : len(tokens)] = tokens
    layout = KVLayout.of(module.config, module.dtype, (3,), _SIZE)
    table: Any = np.arange(3, dtype=np.int32)[None, :]
    inputs = _prefill_inputs(padded, table)
    _, _, hidden = prefill(params, init_state(layout, 1).cache, inputs, model=module)
    targets: Any = np.roll(padded, -1, axis=1)
    scores = score_tokens(head_params(params), hidden, targets, model=module, num_logprobs=0)
    return np.asarray(scores.logprobs)[0]


def _dense_logprobs(module: Llama, params: Any, tokens: Sequence[int]) -> np.ndarray:
    """Log-probabilities after every token, without a cache."""

    def run(params: Any, ids: Array) -> Any:
        position = jnp.arange(ids.shape[0])
        result: Any = module.apply({"params": params}, ids, position, None, dense_attend)
        return result[0]

    return _logprobs(module, params, run(params, jnp.array(tokens, jnp.int32)))


def _logprobs(module: Llama, params: Any, hidden: Array) -> np.ndarray:
    return np.asarray(_jitted_logprobs(params, hidden, module))


@functools.partial(jax.jit, static_argnums=2)
def _jitted_logprobs(params: Any, hidden: Array, module: Llama) -> Array:
    logits: Any = module.apply({"params": params}, hidden, method="logits")
    return jax.nn.log_softmax(logits)


class _Rows(NamedTuple):
    """Rows of a decode step over one cache."""

    token: np.ndarray
    position: np.ndarray
    table: np.ndarray


def _decode_bits(small: bool, module: Llama, params: Any, report: Report) -> None:
    rng = np.random.default_rng(0)
    count, segments = (16, (32, 32, 64)) if small else (256, (512, 512, 1024))
    longest, total = 6 * _SIZE if small else 8 * _SIZE, sum(segments)
    position = rng.integers(longest // 8, longest, count)
    pages = position // _SIZE + 1
    table = np.full((count, longest // _SIZE), total, np.int32)
    ids = rng.permutation(total)
    for row, (first, number) in enumerate(zip(np.cumsum(pages) - pages, pages, strict=True)):
        table[row, :number] = ids[first : first + number]
    rows = _Rows(rng.integers(3, module.config.vocab_size, count), position, table)
    layout = KVLayout.of(module.config, jnp.bfloat16, segments, _SIZE)
    shapes = init_state(layout, 1).cache
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
    joined = type(cache)(
        *(
            (tuple(jnp.concatenate(layer) for layer in zip(*arrays, strict=True)),)
            for arrays in cache
        )
    )
    compare("one segment instead of three", run(rows, joined), base)
    move = rng.permutation(total)
    moved = jax.tree.map(lambda x: x[np.argsort(move)], joined)
    elsewhere = np.where(table < total, np.append(move, 0)[np.minimum(table, total - 1)], total)
    compare("pages in other places", run(rows._replace(table=elsewhere), moved), run(rows, joined))
    del joined, moved
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
    tokens = rng.integers(3, module.config.vocab_size, (most, _SIZE)).astype(np.int32)
    layout = KVLayout.of(module.config, jnp.bfloat16, (most,), _SIZE)

    def run(rows: int, pages: int) -> np.ndarray:
        table = np.full((rows, pages), most, np.int32)
        table[:, 0] = np.arange(rows)
        inputs = _prefill_inputs(tokens[:rows], table)
        return np.asarray(prefill(params, init_state(layout, 1).cache, inputs, model=module)[2])

    base = run(most, 4)
    for rows in (1, 4) if small else (1, 4, 16):
        _compare("prefill", f"{rows} rows of {most}", run(rows, 4), base[:rows], report)
    _compare("prefill", "tables of 16 pages instead of 4", run(most, 16), base, report)


def _replay_bits(small: bool, module: Llama, params: Any, report: Report) -> None:
    """The same tokens decoded one by one and prefilled at once."""
    rng = np.random.default_rng(2)
    rows, length = (4, 24) if small else (16, _SIZE)
    tokens = rng.integers(3, module.config.vocab_size, (rows, length)).astype(np.int32)
    layout = KVLayout.of(module.config, jnp.bfloat16, (rows,), _SIZE)
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
