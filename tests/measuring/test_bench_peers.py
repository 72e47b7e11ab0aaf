"""The benchmark: other engines, their files, and whether they agree. No time is asserted."""

import functools
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from folojax.models.files.checkpoint import load_params, open_checkpoint
from tests import gguf_writer, stub_llama_cpp
from tests.families import save_family

SCRIPTS = Path(__file__).parents[2] / "scripts" / "measure"


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)  # as Python does when it runs a script
        yield


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def request(prompt_len: int, output_len: int, **fields: Any) -> Any:
    prompt = tuple((7 * i + prompt_len) % 50 for i in range(prompt_len))
    return script("bench_workloads").BenchRequest(prompt, output_len, **fields)


def workload(*requests: Any, name: str = "uniform") -> Any:
    return script("bench_workloads").Workload(name, requests)


# GGUF files in other types

METADATA: dict[str, Any] = {
    "general.name": "a name",
    "general.file_type": 3,
    "llama.block_count": 1,
    "llama.rope.freq_base": 10_000.0,
    "tokenizer.ggml.tokens": ["a", "b", "é"],
    "tokenizer.ggml.token_type": [1, 1, 3],
    "tokenizer.ggml.add_bos_token": False,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf"
    kind = gguf.GGMLQuantizationType.Q4_1
    tensors = {
        "token_embd.weight": (quantize(rng.standard_normal((3, 64), np.float32), kind), kind),
        "blk.0.ffn_down.weight": rng.standard_normal((5, 96), np.float32),
        "blk.0.attn_norm.weight": rng.standard_normal(64, np.float32),
    }
    gguf_writer.write(path, "llama", METADATA, tensors)
    return path


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    tensors = gguf.GGUFReader(path).tensors
    return {one.name: np.array(dequantize(one.data, one.tensor_type)) for one in tensors}


def largest_error(kind: str, values: np.ndarray) -> np.ndarray:
    """Of storing each value, from the definitions of the types."""
    largest = np.abs(values.reshape(-1, 32)).max(axis=1, keepdims=True)
    scale_rounding = 2.0**-11  # the scales of blocks are float16
    steps = {
        "BF16": np.abs(values.reshape(-1, 32)) * 2.0**-8,
        "F16": np.abs(values.reshape(-1, 32)) * 2.0**-11 + 2.0**-24,
        "Q8_0": largest * (0.5 / 127 + scale_rounding),
        # Of 16 steps of an eighth one is missing at the far end.
        "Q4_0": largest * (1 / 8 + scale_rounding),
    }
    return np.broadcast_to(steps[kind], (values.size // 32, 32)).reshape(values.shape)


@pytest.mark.parametrize("kind", ["BF16", "F16", "Q8_0", "Q4_0"])
def test_a_file_in_another_type(kind: str, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    script("bench_peers_files").write_variant(source, kind, path)
    reader = gguf.GGUFReader(path)
    written = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    file_type = {"BF16": 32, "F16": 1, "Q8_0": 7, "Q4_0": 2}[kind]
    assert written == METADATA | {
        "general.architecture": "llama",
        "general.file_type": file_type,
    }
    old, new = tensors_of(source), tensors_of(path)
    assert list(new) == list(old)
    np.testing.assert_array_equal(new["blk.0.attn_norm.weight"], old["blk.0.attn_norm.weight"])
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types.pop("blk.0.attn_norm.weight") == "F32"
    assert set(types.values()) == {kind}
    for name in types:
        assert np.all(np.abs(new[name] - old[name]) <= largest_error(kind, old[name]))
        assert not np.array_equal(new[name], np.zeros_like(new[name]))
    if kind == "BF16":
        rounded = old["blk.0.ffn_down.weight"].astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(new["blk.0.ffn_down.weight"], rounded)


def test_types_keep_their_values(source: Path, tmp_path: Path) -> None:
    """Of what a file holds nothing is lost where the new type can say it."""
    files = script("bench_peers_files")
    files.write_variant(source, "Q8_0", tmp_path / "a.gguf")
    files.write_variant(tmp_path / "a.gguf", "Q8_0", tmp_path / "b.gguf")
    once, twice = tensors_of(tmp_path / "a.gguf"), tensors_of(tmp_path / "b.gguf")
    for name in once:
        np.testing.assert_allclose(twice[name], once[name], rtol=2**-10)


def test_a_file_is_written_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOLOJAX_CACHE_DIR", str(tmp_path))
    files = script("bench_peers_files")
    path = files.variant(source, "Q8_0")
    assert path.name == "tiny.Q8_0.gguf"
    assert path.is_relative_to(tmp_path)
    before = path.stat()
    assert files.variant(source, "Q8_0") == path
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert files.variant(source, "Q4_0") != path


def test_types_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    write_variant = script("bench_peers_files").write_variant
    with pytest.raises(ValueError, match="'Q3_K' is not one of BF16"):
        write_variant(source, "Q3_K", tmp_path / "out.gguf")
    narrow = tmp_path / "narrow.gguf"
    gguf_writer.write(narrow, "llama", METADATA, {"x": np.ones((2, 48), np.float32)})
    with pytest.raises(ValueError, match="x has rows of 48; Q8_0 has blocks of 32"):
        write_variant(narrow, "Q8_0", tmp_path / "out.gguf")


def test_a_written_file_is_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLOJAX_CACHE_DIR", str(tmp_path / "cache"))
    directory = tmp_path / "model"
    model = save_family("llama", directory)
    gguf_writer.convert(model, directory, "llama", tmp_path / "tiny.gguf")
    path = script("bench_peers_files").variant(tmp_path / "tiny.gguf", "BF16")
    old, new = (open_checkpoint(one) for one in (tmp_path / "tiny.gguf", path))
    assert new.config == old.config
    assert new.eos_token_ids == old.eos_token_ids
    left, right = (load_params(one, jnp.float32) for one in (old, new))
    close = functools.partial(np.testing.assert_allclose, rtol=2**-8)
    jax.tree.map(close, right, left)


# llama.cpp, with a stand-in for its library


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "llama_cpp", stub_llama_cpp)
    monkeypatch.setattr(stub_llama_cpp.Context, "made", [])
    peers = script("bench_peers_llama")
    monkeypatch.setattr(peers, "_SIZES", [(8, 8)])
    return peers.LlamaCpp("llama.cpp BF16", Path("model.gguf"), 3)


def test_llama_cpp_batches_continuously(llama: Any) -> None:
    requests = [request(5, 4), request(20, 9), request(3, 2), request(11, 1), request(2, 6)]
    prepared = llama.prepare(workload(*requests))
    assert prepared["batch_size"] == 3
    assert prepared["settings"].endswith("8/8")
    context = stub_llama_cpp.Context.made[-1]
    context.sizes.clear()
    figures = llama.run(workload(*requests))
    assert figures["total_output_tokens"] == 22
    assert figures["completed"] == 5
    assert figures["p50_itl_ms"] > 0
    assert not context.cells, "slots are left in use"
    # Every token but the last of each is computed once, and none beside them.
    assert sum(tokens for tokens, _ in context.sizes) == 41 + 22 - 5
    assert sum(wanted for _, wanted in context.sizes) == 22
    assert max(tokens for tokens, _ in context.sizes) == 8
    assert sum(not other.is_free for other in stub_llama_cpp.Context.made) == 1
    llama.close()
    assert context.is_free


def test_llama_cpp_takes_the_likeliest_tokens(llama: Any) -> None:
    llama.prepare(workload(request(4, 4), request(30, 8), request(5, 5)))
    prompts = [request(n, 1).prompt for n in (1, 2, 17, 9, 4)]
    expected = [stub_llama_cpp.continuation(prompt, 6) for prompt in prompts]
    assert llama.greedy(prompts, 6) == expected


def test_llama_cpp_tries_settings(llama: Any) -> None:
    llama.prepare(workload(request(4, 4), request(6, 8)))
    tried = {
        (context.params.flash_attn_type, context.params.kv_unified)
        for context in stub_llama_cpp.Context.made
    }
    # Without flash attention or with it, and then either buffer for the quicker one.
    assert {(0, False), (1, False)} < tried
    assert {is_unified for _, is_unified in tried} == {False, True}
    assert stub_llama_cpp.Context.made[-1].params.n_seq_max == 2
    assert stub_llama_cpp.Context.made[-1].params.n_ctx == 512


def test_llama_cpp_serves_arrivals(llama: Any) -> None:
    late = workload(request(4, 3), request(6, 2, arrival_s=0.02))
    llama.prepare(late)
    figures = llama.run(late)
    assert figures["duration"] > 0.02
    assert figures["mean_ttft_ms"] > 0


def test_what_peers_do_not_run(llama: Any) -> None:
    for bad in (request(4, 4, num_samples=2), request(4, 4, waits_for_tokens=1)):
        with pytest.raises(ValueError, match="one sample a request"):
            llama.prepare(workload(bad))
    check = script("bench_peers_common").check_workload
    with pytest.raises(ValueError, match="all requests at once"):
        check(workload(request(4, 4, arrival_s=1.0)), needs_all_at_once=True)
    with pytest.raises(RuntimeError, match="cannot load missing"):
        script("bench_peers_llama").LlamaCpp("x", Path("missing.gguf"), 1)


# transformers' continuous batching


@pytest.mark.slow
def test_generate_batch_says_the_same(text_directory: Path) -> None:
    requests = workload(request(9, 5), request(30, 8), request(4, 2), request(17, 6))
    batch = script("bench_peers_torch").GenerateBatch(text_directory, "float32", 4)
    static = script("bench_peers_torch").Transformers(text_directory, "float32", 4)
    try:
        assert batch.prepare(requests)["batch_size"] in (1, 2, 4)
        figures = batch.run(requests)
        assert figures["total_output_tokens"] == 21
        assert figures["mean_ttft_ms"] > 0
        prompts = [one.prompt for one in requests.requests]
        assert batch.greedy(prompts, 6) == static.greedy(prompts, 6)
    finally:
        batch.close()


# Which peers


def test_peers_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = script("bench_peers")
    monkeypatch.setattr(peers, "is_llama_cpp_there", lambda: True)
    monkeypatch.setattr(peers, "variant", lambda source, kind: tmp_path / kind)

    def names(wanted: str, one: Any, model: str | None = None) -> list[str]:
        found = peers.find_peers([wanted], model, ["float32"], ["packaged", "BF16"], 4, one)
        return [name for name, _ in found]

    static = workload(request(4, 4))
    llama = ["llama.cpp Q4_1", "llama.cpp BF16"]
    assert names("auto", static) == ["transformers float32", "generate_batch float32", *llama]
    assert names("llama.cpp", static) == llama
    assert names("none", static) == []
    arriving = workload(request(4, 4, arrival_s=1.0))
    assert names("auto", arriving) == ["generate_batch float32", *llama]
    assert names("auto", workload(request(4, 4, num_samples=2))) == []
    monkeypatch.setattr(peers, "is_llama_cpp_there", lambda: False)
    monkeypatch.setattr(peers, "is_transformers_there", lambda: False)
    assert names("auto", static) == []


def test_a_peer_far_behind_its_engine_sits_out(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"folojax": 1.0, "transformers bfloat16": 4.0, "transformers float32": 9.0}
    rates |= {"llama.cpp F16": 50.0, "llama.cpp Q4_0": 99.0}
    ran: list[str] = []

    class Fixed:
        def __init__(self, name: str) -> None:
            self.name = name

        def prepare(self, workload: Any) -> dict[str, Any]:
            return {}

        def run(self, workload: Any) -> dict[str, Any]:
            ran.append(self.name)
            return {"output_throughput": rates[self.name]}

        def close(self) -> None:
            pass

    bench = script("bench")
    monkeypatch.setattr(bench, "find_agreements", lambda contenders, encode: {})
    makers = {name: functools.partial(Fixed, name) for name in rates}
    results = bench.measure(makers, None, 3, False, str.split)
    assert {name: ran.count(name) for name in rates} == {
        "folojax": 3,
        "transformers bfloat16": 1,
        "transformers float32": 3,
        "llama.cpp F16": 3,
        "llama.cpp Q4_0": 3,
    }
    assert results["transformers bfloat16"]["num_rounds"] == 1
    assert results["transformers float32"]["num_rounds"] == 3


def test_llama_cpp_needs_a_gguf_file(text_directory: Path) -> None:
    arguments: Any = (str(text_directory), [], ["packaged"], 4, workload(request(4, 4)))
    peers = script("bench_peers")
    with pytest.raises(ValueError, match=r"llama\.cpp reads GGUF files"):
        list(peers.find_peers(["llama.cpp"], *arguments))


# Agreement


class Fixed:
    def __init__(self, *tokens: int) -> None:
        self.tokens = list(tokens)

    def greedy(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        assert all(prompts)
        return [self.tokens[:num_tokens] for _ in prompts]


def test_agreement_ends_with_the_first_difference() -> None:
    module = script("bench_peers")
    assert module.agreement([[1, 2, 3, 4]], [[1, 2, 3, 4]]) == 1
    assert module.agreement([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 9, 3, 4], [5, 6, 7, 9]]) == 4 / 8
    ours = Fixed(1, 2, 3, 4, 5, 6, 7, 8)
    near = Fixed(1, 2, 3, 4, 0, 6, 7, 8)
    encode = lambda text: list(text.encode())  # noqa: E731
    assert module.find_agreements({"ours": ours, "q": near}, encode) == {"ours": 1, "q": 0.5}
    assert module.find_agreements({}, encode) == {}
    with pytest.raises(RuntimeError, match=r"q does not run .* it shares 12%"):
        module.find_agreements({"ours": ours, "q": Fixed(1, 0, 3, 4, 5, 6, 7, 8)}, encode)
