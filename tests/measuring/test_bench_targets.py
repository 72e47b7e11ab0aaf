"""What the benchmark holds a workload against: operations, ceilings of the machine, targets."""

import functools
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax import LLM
from folojax.models.core.config import ModelConfig
from folojax.models.core.decoder import init_params
from folojax.models.core.dense_attend import dense_attend
from folojax.models.files.checkpoint import build_module

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


# What a workload needs


def config(**changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 4,
        "max_position": 64,
        "rope_theta": 1e4,
        "rope_scaling": None,
        "rms_norm_eps": 1e-5,
        "tie_embeddings": True,
        "qkv_bias": False,
        "qk_norm": False,
    }
    return ModelConfig(**fields | changes)


def test_operations_by_hand() -> None:
    work = script("bench_work")
    # qkv 8 x (8 + 4 + 4), o 8 x 8, gate and up 8 x 32, down 16 x 8.
    layer = 128 + 64 + 256 + 128
    head = 8 * 32
    # 3 prompt tokens and 2 of output: 4 are computed, 2 logits; token i sees i + 1, in each layer
    # and head with 4 products and 4 additions for scores, and as many for values.
    attention = (1 + 2 + 3 + 4) * 2 * (2 * (8 + 8))
    by_hand = 4 * 2 * 2 * layer + 2 * 2 * head + attention
    assert work.workload_flops(config(), workload(request(3, 2))) == by_hand
    assert work.decode_flops(config(), 5, 9) == 5 * (4 * layer + 2 * head + 10 * 2 * 2 * 16)
    assert work.decode_bytes(config(), 2, 100, 5, 9) == 2 * (2 * layer + head) + 5 * 10 * 100


def count_products(jaxpr: Any) -> int:
    """Operations of every product in a traced function."""
    total = 0
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                total += count_products(value.jaxpr)
        if equation.primitive.name == "cond":  # by platform: each way has the same products
            total += count_products(equation.params["branches"][0].jaxpr)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = int(np.prod([left[axis] for axis in contracted]))
            total += 2 * inner * equation.outvars[0].aval.size
    return total


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"is_gated": False}, marks=pytest.mark.slow),
        {"num_kv_heads": 2, "head_dim": 16},
    ],
)
def test_operations_are_those_of_the_model(changes: dict[str, Any]) -> None:
    work, model = script("bench_work"), config(**changes)
    module = build_module(model, jnp.float32)
    params = jax.eval_shape(functools.partial(init_params, module), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((8,), jnp.int32)  # a number of rows that is not padded

    def run(params: Any, tokens: Any) -> Any:
        hidden, _ = module.apply({"params": params}, tokens, tokens, None, dense_attend)
        return module.apply({"params": params}, hidden[-1:], method="logits")

    counted = count_products(jax.make_jaxpr(run)(params, tokens).jaxpr)
    # Dense attention multiplies every pair, and masks those of later tokens.
    pairs = 4 * model.num_heads * model.head_dim * 8 * 8 * model.num_layers
    head = 2 * work.num_weights([work.head_product(model)])
    tables = 2 * 8 * model.head_dim**2  # rotations pass through a product with the identity
    assert counted == 8 * work.token_flops(model) + pairs + head + tables


def test_attention_sees_a_window() -> None:
    model = config(windows=(3, None))
    pairs = sum(min(p + 1, 3) + p + 1 for p in range(2, 9))
    assert script("bench_work").attention_flops(model, 2, 9) == pairs * 4 * 2 * 4


def test_operations_of_experts() -> None:
    work = script("bench_work")
    model = config(
        architecture="Qwen3MoeForCausalLM",
        num_experts=4,
        num_experts_per_token=2,
        expert_size=16,
        dense_layers=(0,),
    )
    dense = 128 + 64 + 256 + 128
    sparse = 128 + 64 + 8 * 4 + 2 * (256 + 128)
    assert work.token_flops(model) == 2 * (dense + sparse)
    all_experts = sparse + 2 * (256 + 128)
    assert work.decode_bytes(model, 1, 0, 32, 5) == dense + all_experts + 8 * 32


def test_every_sample_costs_the_same_beyond_the_prompt() -> None:
    work = script("bench_work")
    one, two, three = (
        work.workload_flops(config(), workload(request(9, 4, num_samples=n))) for n in (1, 2, 3)
    )
    assert 0 < two - one == three - two < one


# Ceilings


@pytest.mark.slow
def test_ceilings_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("bench_ceilings")
    monkeypatch.setattr(module, "_ENOUGH_BYTES", 2**16)
    ceilings = module.Ceilings(config())
    nothing = workload(request(1, 1))
    ceilings.prepare(nothing)
    figures = script("bench_metrics").medians([ceilings.run(nothing) for _ in range(2)])
    assert figures["copy_gb_s"] > 0
    assert figures["read_gb_s"] > 0
    for dtype in ("float32", "bfloat16", "int8", "int4"):
        decode, prefill = (figures[f"gemm_{kind}_gflops"][dtype] for kind in ("decode", "prefill"))
        assert min(decode, prefill) > 0
        assert figures["gemm_gflops"][dtype] > 0


def test_timed_products_are_those_of_the_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("bench_ceilings")
    shapes = [(8, 24), (16, 8), (8, 32), (64, 8)]
    for is_transposed in (False, True):
        products = module._Products(shapes, "float32", is_transposed)
        traced = jax.make_jaxpr(products._run)(jnp.ones((5, 8)), products._matrices)
        assert count_products(traced.jaxpr) == 2 * 5 * sum(i * o for i, o in shapes)
        assert bool(jnp.isfinite(products._run(jnp.ones((5, 8)), products._matrices)).all())
    four_bits = module._Products([(32, 64), (64, 128)], "int4", is_transposed=True)
    assert [kernel.shape for kernel in four_bits._matrices] == [(64, 32), (128, 64)]
    assert {kernel.bits for kernel in four_bits._matrices} == {4}
    assert bool(jnp.isfinite(four_bits._run(jnp.ones((5, 32)), four_bits._matrices)).all())


def test_a_donated_copy_makes_no_new_array() -> None:
    module = script("bench_ceilings")
    target, source = jnp.ones(1 << 16), jnp.zeros(1 << 16)
    place = target.unsafe_buffer_pointer()
    copied = module._copy(target, source)
    assert copied.unsafe_buffer_pointer() == place
    assert float(copied[5]) == 1.0


def test_an_engine_against_the_ceilings() -> None:
    module, work = script("bench_ceilings"), script("bench_work")
    ceilings = {"gemm_gflops": {"float32": 2.0}, "read_gb_s": 4.0}
    figures = {"dtype": "float32", "duration": 0.5}
    one = workload(request(3, 2))
    compared = module.compare(figures, ceilings, config(), one)
    flops = work.workload_flops(config(), one)
    assert compared["gemm_share"] == pytest.approx(flops / 0.5 / 2e9)
    assert set(compared) == {"useful_tflop", "gemm_share"}
    steps = {"decode_step_ms": 0.5, "decode_rows": 2, "decode_position": 9}
    for kv_bytes, bound_s in (
        (0, work.decode_flops(config(), 2, 9) / 2e9),
        (1e6, work.decode_bytes(config(), 4, 1e6, 2, 9) / 4e9),
    ):
        sizes = {"kv_bytes_per_token": kv_bytes}
        compared = module.compare(figures | steps | sizes, ceilings, config(), one)
        assert compared["decode_bound_ms"] == pytest.approx(1e3 * bound_s)
        assert compared["decode_over_bound"] == pytest.approx(0.5e-3 / bound_s)


def test_decode_steps_are_timed(letters_llm: LLM) -> None:
    module = script("bench_ceilings")
    figures = module.time_decode_steps(letters_llm, 3, 64, 90)
    assert figures["decode_step_ms"] > 0
    assert figures["decode_position"] == 16 + 8


def test_a_run_with_ceilings(
    text_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(script("bench_ceilings"), "_ENOUGH_BYTES", 2**16)
    monkeypatch.setattr(script("bench"), "DECODE_ROWS", 4)
    out = tmp_path / "out.json"
    argv = ["uniform", "--model", str(text_directory), "--num-running", "4", "--rounds", "1"]
    argv += ["--num-requests", "4", "--scale", "0.1", "--warm-up", "rehearsal", "--ceilings"]
    argv += ["--dtype", "float32", "int4"]
    peers = ["--peers", "transformers", "--peer-dtype", "float32"]
    assert script("bench").main([*argv, *peers, "--in-process", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    ours, small, theirs = report["results"].values()
    assert (ours["dtype"], small["dtype"]) == ("float32", "int4")
    assert small["weights_gib"] < 0.3 * ours["weights_gib"]
    assert min(small["gemm_share"], small["decode_over_bound"]) > 0
    assert theirs["agreement"] == ours["agreement"] == 1
    assert min(ours["gemm_share"], ours["decode_step_ms"], ours["decode_over_bound"]) > 0
    assert "gemm_share" not in theirs
    assert report["ceilings"]["copy_gb_s"] > 0
    printed = capsys.readouterr().out
    for words in ("ceilings of this machine", "tokens as ours", "decode step of 4 rows"):
        assert words in printed


# Targets


def ratios(name: str, num_running: int, **results: Any) -> dict[str, Any]:
    """By the name that ours is divided by, or else the text."""
    found = script("bench_ratios").find_ratios(name, num_running, results)
    return {ratio.text.rpartition(" / ")[2] or ratio.text: ratio for ratio in found}


def throughputs(**values: float) -> dict[str, Any]:
    names = {"ours": "folojax float32", "torch": "transformers bfloat16", "hf": "generate_batch x"}
    names |= {"bf16": "llama.cpp BF16", "q4": "llama.cpp Q4_0", "one": "one at a time"}
    return {names[key]: {"output_throughput": value} for key, value in values.items()}


def test_the_best_of_all_peers_counts() -> None:
    results = throughputs(ours=150, torch=90, hf=20, bf16=95, q4=101, one=30)
    for running, target, is_met in ((32, 1.5, False), (8, 1.3, True)):
        found = ratios("humaneval", running, **results)
        assert set(found) == {"llama.cpp Q4_0", "one at a time"}
        assert (found["llama.cpp Q4_0"].target, found["llama.cpp Q4_0"].is_met) == (target, is_met)
        assert (found["one at a time"].target, found["one at a time"].is_met) == (5, True)


def test_a_single_request_is_measured_by_two() -> None:
    found = ratios("single", 1, **throughputs(ours=150, torch=90, hf=110, bf16=200, q4=900))
    assert found["generate_batch x"].target == 1.5
    assert not found["generate_batch x"].is_met
    assert (found["llama.cpp BF16"].target, found["llama.cpp BF16"].is_met) == (0.7, True)
    assert found["llama.cpp Q4_0"].target is None


def server(**changes: float) -> dict[str, Any]:
    figures = {"output_throughput": 1.0, "p99_itl_ms": 30.0, "p50_itl_ms": 10.0}
    figures |= {"padding_waste": 0.15, "compilations_timed": 0, "peak_memory_gib": 3.0}
    return {"folojax": figures | {"weights_gib": 1.5, "pool_gib": 0.5} | changes}


@pytest.mark.parametrize(
    "worse",
    [{"p99_itl_ms": 30.1}, {"padding_waste": 0.16}, {"compilations_timed": 1}, {"pool_gib": 0.4}],
)
def test_targets_of_a_server(worse: dict[str, float]) -> None:
    assert all(ratio.is_met for ratio in ratios("sharegpt", 32, **server()).values())
    found = ratios("sharegpt", 32, **server(**worse)).values()
    assert sum(not ratio.is_met for ratio in found) == 1
    assert len(found) == 4


def test_targets_of_the_machine() -> None:
    figures = {"output_throughput": 1.0, "dtype": "float32", "gemm_share": 0.69}
    figures |= {"decode_over_bound": 2.1, "decode_rows": 32}
    figures |= {"decode_step_ms": 21.0, "decode_bound_ms": 10.0}
    share, step = script("bench_ratios").find_ratios("uniform", 32, {"ours": figures})
    assert (share.target, share.is_met) == (0.7, False)
    assert (step.target, step.is_met) == (2, False)
    share, _ = script("bench_ratios").find_ratios("uniform", 8, {"ours": figures})
    assert share.is_met
