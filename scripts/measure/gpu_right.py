"""Is the engine right on this device: its kernels, and engines against a CPU and float32."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gpu_common import Report, make_model, random_params
from jaxtyping import Array

from folojax import LLM, SamplingParams
from folojax.attention import attend
from folojax.attention.attend import KERNELS
from folojax.attention.interface import AttentionSpec
from folojax.backend import choose_backend
from folojax.kv.cache import KVCache, PageFormat
from folojax.kv.placement import place_tokens
from folojax.models.core.decoder import Llama
from folojax.models.core.dense_attend import dense_attend
from folojax.models.core.interface import Scoring

_PAGE = 64


def check_right(small: bool, report: Report) -> None:
    """Kernels alone, then engines with a tiny model, then one of the true width."""
    for case in _small_cases() if small else _cases():
        _compare_kernels(case, report)
    _check_engines(small, report)
    _check_width(small, report)


class _Case(NamedTuple):
    """Rows of tokens behind cached ones."""

    head_dim: int
    groups: int  # query heads of a kv head
    columns: int  # tokens of a row
    before: tuple[int, ...]  # cached tokens of each row
    length: tuple[int, ...]  # tokens of each row; 0 is padding
    window: int | None = None
    value_dim: int | None = None  # of values that are the first numbers of the only key


def _cases() -> Iterator[_Case]:
    decode = (0, 1, 62, 63, 64, 700, 2047, 0)
    one = (1, 1, 1, 1, 1, 1, 1, 0)
    for head_dim, groups in ((64, 1), (80, 2), (128, 2), (128, 8), (256, 4)):
        yield _Case(head_dim, groups, 1, decode, one)
    yield _Case(128, 2, 1, decode, one, window=100)
    yield _Case(80, 4, 64, (0, 64, 65, 1000, 0), (64, 64, 1, 30, 0))
    yield _Case(128, 2, 64, (0, 64, 65, 1000, 0), (64, 64, 1, 30, 0), window=100)
    yield _Case(128, 8, 256, (0, 256, 1000, 0), (256, 200, 1, 0))
    yield _Case(64, 1, 2048, (0, 320), (2048, 1700))
    for groups, window in ((16, None), (128, None), (16, 100)):
        yield _Case(576, groups, 1, decode, one, window, 512)
        yield _Case(576, groups, 256, (0, 256, 1000, 0), (256, 200, 1, 0), window, 512)


def _small_cases() -> Iterator[_Case]:
    yield _Case(64, 1, 1, (0, 70, 0), (1, 1, 0))
    yield _Case(80, 2, 16, (0, 70, 0), (16, 3, 0), window=20)
    yield _Case(48, 4, 16, (0, 70, 0), (16, 3, 0), None, 32)


def _compare_kernels(case: _Case, report: Report) -> None:
    """Kernels in the dtype that the device is for, against `reference` in float32."""
    backend = choose_backend()
    dtype = jnp.dtype(backend.default_dtype)
    storage = jnp.dtype(jnp.float32) if backend.stores_float32 else dtype
    scale = 192**-0.5 if case.value_dim else None  # of heads, as DeepSeek has them
    scoring = Scoring(window=case.window, value_dim=case.value_dim, scale=scale)
    kv_heads = 1 if case.value_dim else 2
    heads, rows = kv_heads * case.groups, len(case.before)
    counts = -(-np.add(case.before, case.length) // _PAGE)
    num_pages = int(counts.sum()) + 1
    table = np.full((rows, 1 + int(counts.max())), num_pages, np.int32)
    ids = iter(np.random.default_rng(0).permutation(num_pages).tolist())
    for row, count in enumerate(counts):
        table[row, :count] = [next(ids) for _ in range(count)]
    # Whoever has a whole cached page shares that of the last such row.
    sharing = [row for row, before in enumerate(case.before) if before >= _PAGE]
    table[sharing, 0] = table[sharing[-1], 0]
    first, length = (np.array(x, np.int32) for x in (case.before, case.length))
    tokens = rows * case.columns
    keys = jax.random.split(jax.random.key(0), 4)
    format_ = PageFormat(_PAGE, backend.page_order, ("reference",), backend.capability)
    shapes = [
        format_.shape(num_pages, kv_heads, case.head_dim, 1 if case.value_dim else 2),
        *((tokens, count, case.head_dim) for count in (heads, kv_heads, kv_heads)),
    ]
    arrays = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]

    @functools.partial(jax.jit, static_argnums=0)
    def run(name: str, pages: Any, query: Any, key: Any, value: Any) -> Any:
        cache = KVCache((pages,), dataclasses.replace(format_, kernels=(name,)))
        rows = jnp.asarray(table), jnp.asarray(first), jnp.asarray(length)
        placement, _ = place_tokens(cache, rows[0], rows[1], rows[2], case.columns)
        value = None if case.value_dim else value
        return attend(placement, cache, 0, query, key, value, scoring)[1]

    with jax.default_matmul_precision("highest"):
        exact = np.asarray(run("reference", *(x.astype(jnp.float32) for x in arrays)))
    is_real = (np.arange(case.columns)[None, :] < length[:, None]).reshape(-1)
    names = dict.fromkeys((*backend.kernels, "ordered", *backend.exact_kernels))
    for name in [name for name in names if name != "reference"]:
        about = {"check": f"attention, {name}", **case._asdict(), "dtype": dtype.name}
        own_format = dataclasses.replace(format_, kernels=(name,))
        spec = AttentionSpec(dtype, storage, case.head_dim, own_format, scoring)
        if (reason := KERNELS[name].refusal(spec)) is not None:
            report.add(**about, refusal=reason)
            continue
        found = np.asarray(run(name, arrays[0].astype(storage), *arrays[1:]), np.float32)
        difference = np.abs(found - exact)[is_real]
        report.add(
            **about,
            mean=float(difference.mean()),
            max=float(difference.max()),
            is_finite=bool(np.isfinite(found).all()),
        )


def _check_engines(small: bool, report: Report) -> None:
    """Engines that cut prompts differently, and whose pages do not suffice.

    In float32 on this device against the CPU, in bfloat16 against float32; all without a cache.
    """
    size: dict[str, Any] = {"hidden_size": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 128}
    module = make_model("qwen3-0.6b", True, num_layers=2, **size)[0]
    longest = 200 if small else 2048
    pool = longest // _PAGE + 4
    kinds: list[tuple[str, Any, dict[str, Any]]] = [
        ("prefixes", jnp.bfloat16, {"prefill_row_len": longest, "num_pages": 8 * pool}),
        ("preemption", jnp.bfloat16, {"prefill_row_len": 64, "num_pages": pool}),
        ("swap", jnp.bfloat16, {"prefill_row_len": 256, "num_pages": pool, "num_host_pages": 99}),
        ("swap", jnp.float32, {"prefill_row_len": 256, "num_pages": pool, "num_host_pages": 99}),
    ]
    for name, dtype, options in kinds:
        model = dataclasses.replace(module, dtype=dtype)
        # Larger weights: else a tiny model's distribution would be flat.
        params = random_params(model, 0.1)
        is_wide = dtype == jnp.float32
        with jax.default_matmul_precision("highest" if is_wide else None):
            texts, counts = _generate(model, params, longest, options)
        place = jax.devices("cpu")[0] if is_wide else jax.devices()[0]
        report.add(
            check="engine, greedy log-probabilities",
            against="the CPU" if is_wide else "float32",
            dtype=jnp.dtype(dtype).name,
            **options,
            **counts,
            **_against_dense(model, params, texts, place),
        )
        if name != "prefixes" and not counts["preemptions"]:
            raise RuntimeError("nobody was preempted: the pool is too large for this check")


class _Text(NamedTuple):
    """What an engine gave for a prompt."""

    prompt: list[int]
    output: list[int]
    logprobs: list[float]


def _generate(
    module: Llama, params: Any, longest: int, options: dict[str, Any]
) -> tuple[list[_Text], dict[str, int]]:
    """Prompts of all lengths, such that begin like them, and such that outgrow a small pool."""
    row_len = options["prefill_row_len"]
    llm = LLM(
        (module, params),
        max_model_len=longest + _PAGE,
        max_num_seqs=8,
        page_size=_PAGE,
        max_num_batched_tokens=max(row_len, longest // 2),
        min_swap_tokens=1,
        warm_up=False,
        **options,
    )
    rng = np.random.default_rng(0)
    vocab = module.config.vocab_size
    common = rng.integers(3, vocab, longest).tolist()
    lengths = (1, 2, 63, 64, 65, 150, 300, 1000, longest)
    prompts = [common[-n:] for n in lengths if n <= longest]
    longer = [[*common[:n], 5, 6, 7] for n in (64, 130, longest // 2)]
    grow = longest // 8 + 10
    growing = [rng.integers(3, vocab, 60).tolist() for _ in range(8)]
    rounds = [(prompts, 8), ([common], 1), (longer, 8), (growing, grow)]
    texts = [text for batch, count in rounds for text in _texts(llm, batch, count, 0)]
    metrics = llm.metrics()
    counts = {
        "prefix_hits": metrics.num_prefix_hit_tokens,
        "preemptions": metrics.num_preemptions,
        "swapped_pages": metrics.num_swapped_pages,
    }
    return texts, counts


def _texts(llm: LLM, prompts: list[list[int]], count: int, temperature: float) -> list[_Text]:
    seed: dict[str, Any] = {} if temperature == 0 else {"seed": 1}
    sampling = SamplingParams(
        temperature=temperature, max_tokens=count, logprobs=0, ignore_eos=True, **seed
    )
    texts = []
    for prompt, output in zip(
        prompts, llm.generate(prompts, sampling, use_tqdm=False), strict=True
    ):
        completion = output.outputs[0]
        assert completion.logprobs is not None
        picks = zip(completion.token_ids, completion.logprobs, strict=True)
        found = [options[token].logprob for token, options in picks]
        texts.append(_Text(prompt, list(completion.token_ids), found))
    return texts


def _against_dense(module: Llama, params: Any, texts: list[_Text], place: Any) -> dict[str, Any]:
    """How far log-probabilities are from those in float32 without a cache, on a device."""
    wide = dataclasses.replace(module, dtype=jnp.float32)
    params = jax.device_put(jax.tree.map(lambda x: x.astype(jnp.float32), params), place)
    most = max(len(text.prompt) + len(text.output) for text in texts)
    differences, gaps, likely = [], [], []
    for text in texts:
        padded = np.zeros(most, np.int32)
        padded[: len(text.prompt) + len(text.output)] = text.prompt + text.output
        tokens = jax.device_put(padded, place)
        with jax.default_matmul_precision("highest"):
            chosen, top = (np.asarray(x) for x in _dense_scores(params, tokens, wide))
        part = slice(len(text.prompt) - 1, len(text.prompt) + len(text.output) - 1)
        differences.append(np.array(text.logprobs) - chosen[part])
        gaps.append(top[part] - chosen[part])
        likely.append(chosen[part])
    difference = np.concatenate(differences)
    size = np.abs(difference)
    return {
        "count": size.size,
        "mean": float(size.mean()),
        "quantile_999": float(np.quantile(size, 0.999)),
        "max": float(size.max()),
        "bias": float(difference.mean()),
        "mean_logprob": float(np.concatenate(likely).mean()),
        "not_likeliest": int((np.concatenate(gaps) > 0).sum()),
        "most_gap": float(np.concatenate(gaps).max()),
    }


@functools.partial(jax.jit, static_argnums=2)
def _dense_scores(params: Any, tokens: Array, module: Llama) -> tuple[Array, Array]:
    """Log-probabilities of the tokens that follow, and of the likeliest."""
    position = jnp.arange(tokens.shape[0])
    variables = {"params": params}
    hidden: Any = module.apply(variables, tokens, position, None, dense_attend)
    logits: Any = module.apply(variables, hidden[0], method="logits")
    logprobs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs, jnp.roll(tokens, -1)[:, None], axis=1)
    return chosen[:, 0], logprobs.max(axis=1)


def _check_width(small: bool, report: Report) -> None:
    """Log-probabilities of what an engine samples in bfloat16, with layers of the true width."""
    module, params = make_model("qwen3-0.6b", small, num_layers=2 if small else 8)
    # Larger logits: a random model's distribution is nearly flat, a trained one's is not.
    params["final_norm"] = params["final_norm"] * 5
    rng = np.random.default_rng(0)
    count, most = (4, 30) if small else (64, 128)
    lengths = rng.integers(8, most, count)
    prompts = [rng.integers(3, module.config.vocab_size, n).tolist() for n in lengths]
    llm = LLM(
        (module, params),
        max_model_len=2 * most,
        max_num_seqs=count,
        num_pages=count * (2 * most // _PAGE + 1),
        warm_up=False,
    )
    texts = _texts(llm, prompts, most, 1.0)
    report.add(
        check="engine, log-probabilities of samples",
        against="float32",
        dtype="bfloat16",
        layers=module.config.num_layers,
        **_against_dense(module, params, texts, jax.devices()[0]),
    )
