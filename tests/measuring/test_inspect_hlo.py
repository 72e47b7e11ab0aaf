"""inspect_hlo.py: what it reads in a program, and the rules of a decode step on an H200.

The last test compiles for the card and needs XLA's CUDA compiler: `make test-gpu-programs` installs
it and runs that test, `make test` leaves it out.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]

# A cache of 8 pages, written in place, read where it lies, and then copied, turned and converted.
HLO = """\
HloModule jit_decode, is_scheduled=true

%fused_scatter (p0: bf16[8,4,2], p1: s32[3], p2: bf16[3,2]) -> bf16[8,4,2] {
  %p0 = bf16[8,4,2]{2,1,0} parameter(0)
  %p1 = s32[3]{0} parameter(1)
  %p2 = bf16[3,2]{1,0} parameter(2)
  ROOT %scatter.1 = bf16[8,4,2]{2,1,0} scatter(%p0, %p1, %p2), to_apply=%region
}

%fused_transpose (p0.1: bf16[8,4,2]) -> bf16[4,8,2] {
  %p0.1 = bf16[8,4,2]{2,1,0} parameter(0)
  ROOT %transpose.1 = bf16[4,8,2]{2,1,0} transpose(%p0.1), dimensions={1,0,2}
}

%fused_gather (p0.2: bf16[100,2], p1.2: s32[3]) -> bf16[3,2] {
  %p0.2 = bf16[100,2]{1,0} parameter(0)
  %p1.2 = s32[3]{0} parameter(1)
  ROOT %gather.1 = bf16[3,2]{1,0} gather(%p0.2, %p1.2), offset_dims={1}
}

ENTRY %main (cache: bf16[8,4,2], ids: s32[3], embed: bf16[100,2]) -> bf16[8,4,2] {
  %keys = bf16[8,4,2]{2,1,0} parameter(0), metadata={op_name="cache.keys[0][0]"}
  %ids = s32[3]{0} parameter(1), metadata={op_name="inputs.page"}
  %embed = bf16[100,2]{1,0} parameter(2), metadata={op_name="params['embed']"}
  %rows = bf16[3,2]{1,0} fusion(%embed, %ids), kind=kLoop, calls=%fused_gather
  %new = bf16[8,4,2]{2,1,0} fusion(%keys, %ids, %rows), kind=kInput, calls=%fused_scatter
  %flat = bf16[32,2]{1,0} bitcast(%new)
  %product = (f32[32,1]{1,0:T(8,128)}, s8[64]{0}) custom-call(%flat, %rows), \
custom_call_target="__cublas$lt$matmul"
  MOVES
  ROOT %tuple.1 = (bf16[8,4,2]{2,1,0}) tuple(%new)
}
"""
COPY = "%copy.1 = bf16[8,4,2]{2,1,0} copy(%new)"
TRANSPOSE = "%turned = bf16[4,8,2]{2,1,0} fusion(%keys), kind=kInput, calls=%fused_transpose"
CONVERT = "%wide = f32[32,2]{1,0} convert(%flat)"
CALLBACK = '%out = f32[2]{0} custom-call(%rows), custom_call_target="xla_ffi_python_gpu_callback"'

THUNKS = """\
000: kCommandBuffer [source | sink]
    001: kCustomKernel   [source        | next=002 (1)] loop_fusion grid: [2, 1, 1]
    002: kCopy           [prev=001 (1)  | next=003 (1)] kCopy
    003: kCublasLtMatmul [prev=002 (1)  | sink        ] kCublasLtMatmul
"""


@pytest.fixture(scope="module")
def read() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts" / "measure")
        yield importlib.import_module("hlo_read")


@pytest.fixture(scope="module")
def inspect(read: ModuleType) -> ModuleType:
    return importlib.import_module("inspect_hlo")


def test_a_cache_that_stays_where_it_lies(read: ModuleType) -> None:
    program = read.Program(HLO.replace("MOVES", ""))
    assert set(program.cache_values) == {"keys", "new", "flat"}
    assert program.cache_moves() == []
    assert program.host_calls() == []
    assert program.opcodes() == {"fusion": 2, "custom-call": 1}


@pytest.mark.parametrize(
    ("line", "words"), [(COPY, "copy"), (TRANSPOSE, "transpose"), (CONVERT, "convert")]
)
def test_a_cache_that_is_moved(read: ModuleType, line: str, words: str) -> None:
    (move,) = read.Program(HLO.replace("MOVES", line)).cache_moves()
    assert words in move


def test_a_call_to_the_host(read: ModuleType) -> None:
    (call,) = read.Program(HLO.replace("MOVES", CALLBACK)).host_calls()
    assert "python_gpu_callback" in call


def test_bytes_are_those_that_kernels_touch(read: ModuleType) -> None:
    ids, rows, cache, product = 3 * 4, 3 * 2 * 2, 8 * 4 * 2 * 2, 32 * 4 + 64
    gather = (rows + ids) + rows  # of the embedding only the rows that are picked
    scatter = rows + (ids + rows)  # of the cache only the rows that are written
    assert (
        read.Program(HLO.replace("MOVES", "")).bytes_moved()
        == gather + scatter + cache + rows + product
    )


def test_a_text_without_a_program_is_refused(read: ModuleType) -> None:
    with pytest.raises(ValueError, match="no ENTRY computation"):
        read.Program("")


def test_thunks_inside_and_outside_a_command_buffer(read: ModuleType) -> None:
    thunks = read.read_thunks(THUNKS + "004: kCopy [source | sink] kCopy\n")
    assert [thunk.depth for thunk in thunks] == [0, 1, 1, 1, 0]
    assert read.num_command_buffers(thunks) == 1
    assert read.count_kernels(thunks) == 4
    assert [thunk.kind for thunk in read.outside_buffers(thunks)] == ["kCopy"]


def test_kernels_of_a_layer_are_those_between_two_calls_of_attention(read: ModuleType) -> None:
    kinds = ["kCopy", "kCuDnn", "kCustomKernel", "kCuDnn", "kCustomKernel", "kCopy", "kCuDnn"]
    thunks = [read.Thunk(kind, "", 1) for kind in kinds]
    assert read.kernels_per_layer(thunks) == 2
    assert read.kernels_per_layer(thunks[:2]) == 0
    names = ["read_pieces", "join_pieces", "a", "b", "c", "read_pieces", "join_pieces", "d"]
    assert read.kernels_per_layer([read.Thunk("kCustomKernel", name, 1) for name in names]) == 3


def test_pages_that_attention_reads_do_not_count(read: ModuleType) -> None:
    call = '%out = (bf16[3,2]{1,0}) custom-call(%rows, %flat), custom_call_target="TARGET"'
    attention, other = (
        read.Program(HLO.replace("MOVES", call.replace("TARGET", name))).bytes_moved()
        for name in ("__cudnn$fmhaSoftmax", "other")
    )
    assert other - attention == 8 * 4 * 2 * 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"command_buffers": 2}, "2 command buffers"),
        ({"outside_buffers": 1, "outside": ["kCopy"]}, "kCopy"),
        ({"command_buffers": 3, "has_loops_over_devices": True}, None),
        ({"moves": ["copy.1"]}, "the cache is moved"),
        ({"temporary_share": 0.06}, "6.0% of the pool"),
        ({"layer_kernels": 13}, "13 kernels in a layer"),
        ({"layer_kernels": 14, "sums": 9, "wanted_sums": 9}, None),
        ({"sums": 13, "wanted_sums": 9}, "13 sums over devices, of 9"),
        ({"host_calls": ["callback"]}, "calls to the host"),
        ({"gathers": 2, "wanted_gathers": 1}, "2 gathers, of 1"),
        ({"gathers": 2, "wanted_gathers": None}, None),
        ({"gathered": 1000, "most_gathered": 500}, "1000 numbers gathered; 500 are enough"),
        ({"layer_kernels": 20, "rounds_inputs": True}, None),
        ({"layer_kernels": 20, "has_loras": True}, None),
        ({"layer_kernels": 21, "has_loras": True}, "21 kernels in a layer; 20 are enough"),
        ({"layer_kernels": 21, "rounds_inputs": True}, "21 kernels in a layer; 20 are enough"),
    ],
)
def test_rules_of_decode(inspect: ModuleType, changes: dict, words: str | None) -> None:
    good = {
        "layer_kernels": 12,
        "command_buffers": 1,
        "outside_buffers": 0,
        "outside": [],
        "moves": [],
        "temporary_share": 0.01,
        "host_calls": [],
        "sums": 0,
        "has_loops_over_devices": False,
        "wanted_sums": 0,
        "gathers": 0,
        "wanted_gathers": 0,
        "gathered": 0,
        "most_gathered": 128,
        "has_pieces": False,
        "rounds_inputs": False,
        "has_loras": False,
    }
    broken = inspect.broken_rules(good | changes)
    assert [words in line for line in broken if words] == ([True] if words else [])
    assert bool(broken) == bool(words)


def compile_for_h200(out: Path, pytestconfig: pytest.Config, *options: str) -> dict:
    script = ROOT / "scripts" / "measure" / "inspect_hlo.py"
    paths = os.pathsep.join([str(ROOT), pytestconfig.getoption("--gpu-compiler")])
    subprocess.run(
        [sys.executable, script, "--json", out, *options],
        env={**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
        check=True,
    )
    return json.loads(out.read_text())


@pytest.mark.gpu_compiler
def test_two_h200s_sum_twice_a_layer(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    report = compile_for_h200(tmp_path / "out.json", pytestconfig, "--devices=2", "--layers=4")
    assert report["broken"] == []
    assert [one["sums"] for one in report["results"]] == [2 * 4 + 1] * 7
    assert all(one["moves"] == [] for one in report["results"])


@pytest.mark.gpu_compiler
@pytest.mark.parametrize("devices", [2, 4])
def test_h200s_that_share_the_vocabulary_gather_candidates(
    devices: int, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """For every kind of draw and report."""
    options = [f"--devices={devices}", "--layers=1", "--rows=64", "--calls"]
    report = compile_for_h200(
        tmp_path / "out.json", pytestconfig, *options, "greedy", "truncated", "recorded"
    )
    assert report["broken"] == []
    greedy, truncated, recorded = report["results"]
    assert greedy["gathered"] < truncated["gathered"] <= 128 * 64 * devices
    assert (greedy["gathers"], truncated["gathers"]) == (1, 1)
    assert recorded["gathers"] > 1
    assert [one["sums"] for one in report["results"]] == [3] * 3


@pytest.mark.gpu_compiler
@pytest.mark.parametrize(("quantization", "most"), [("int4", 12), ("fp8", 16), ("int8", 16)])
def test_decode_in_few_bits_reads_them_once(
    quantization: str, most: int, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    options = ["--model=qwen3-8b", "--layers=3", "--calls=greedy", f"--quantization={quantization}"]
    report = compile_for_h200(tmp_path / "out.json", pytestconfig, *options)
    assert report["broken"] == []
    few, *many = report["results"]
    # One kernel a product for codes of four bits, and one that adds its parts.
    assert all(one["layer_kernels"] <= most for one in many)
    assert few["moved_to_weights"] < 1.3
    whole = compile_for_h200(tmp_path / "out.json", pytestconfig, *options[:3])
    share = few["weights_mb"] / whole["results"][0]["weights_mb"]
    assert share == pytest.approx({"int4": 0.41, "fp8": 0.5, "int8": 0.5}[quantization], abs=0.02)


@pytest.mark.gpu_compiler
@pytest.mark.parametrize("quantization", ["int4", "fp8", "int8"])
def test_two_h200s_share_kernels_in_few_bits(
    quantization: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    options = ["--model=qwen3-8b", "--layers=2", "--calls=greedy", "--devices=2"]
    options += [f"--quantization={quantization}"]
    report = compile_for_h200(tmp_path / "out.json", pytestconfig, *options)
    assert report["broken"] == []
    assert [one["sums"] for one in report["results"]] == [2 * 2 + 1] * 3
    assert report["results"][0]["moved_to_weights"] < 1.3


_PRODUCT = """
import sys
import jax, jax.numpy as jnp
from hlo_compile import target_devices
from folojax.models.quantized.tiled_product import multiply_tiles

place = target_devices().whole
shapes = ((256, 4096), jnp.bfloat16), ((32, 4096, 32), jnp.int16), ((128, 4096), jnp.int32)
args = [jax.ShapeDtypeStruct(*one, sharding=place) for one in shapes]
traced = jax.jit(lambda *args: multiply_tiles(*args, jnp.bfloat16)).trace(*args)
options = {"xla_dump_to": sys.argv[1]}
traced.lower(lowering_platforms=("cuda",)).compile(compiler_options=options)
"""


@pytest.mark.gpu_compiler
def test_a_product_in_four_bits_ends_before_its_registers_are_taken(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Hopper's product reads weights from registers until it is waited for."""
    measure, compiler = ROOT / "scripts" / "measure", pytestconfig.getoption("--gpu-compiler")
    paths = os.pathsep.join([str(ROOT), str(measure), compiler])
    subprocess.run(
        [sys.executable, "-c", _PRODUCT, tmp_path],
        env={**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
        check=True,
    )
    texts = [path.read_text() for path in tmp_path.glob("*.ptx")]
    (text,) = (text for text in texts if "wgmma" in text)
    steps = re.findall(r"wgmma\.(mma_async|commit_group|wait_group)\S*(?: *(\d+))?|\bbra\b", text)
    is_running = False
    for name, count in steps:
        assert name or not is_running, "the loop goes on while a product runs"
        if name == "mma_async":
            is_running = True
        elif name == "wait_group":
            is_running = count != "0"
    assert sum(name == "mma_async" for name, _ in steps) == 8


@pytest.mark.gpu_compiler
def test_decode_with_adapters_reads_weights_once(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    options = ["--model=qwen3-8b", "--layers=3", "--loras", "8", "16"]
    report = compile_for_h200(tmp_path / "out.json", pytestconfig, *options)
    assert report["broken"] == []
    assert report["results"][0]["moved_to_weights"] < 1.2
    assert all(one["moves"] == [] for one in report["results"])


@pytest.mark.gpu_compiler
@pytest.mark.parametrize(
    ("model", "card"), [("qwen3-0.6b", "h200"), ("qwen3-8b", "h200"), ("qwen3-8b", "a100")]
)
def test_deterministic_mode_adds_in_kernels_of_its_own(
    model: str, card: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Of the A100 that they compile: in that mode it goes another way, as nobody has run it."""
    target = f"--target=scripts/measure/data/{card}_target.textproto"
    options = [f"--model={model}", "--layers=3", target, "--deterministic"]
    options += ["--calls", "greedy", "prefill"]
    text = tmp_path / "text"
    report = compile_for_h200(
        tmp_path / "out.json", pytestconfig, *options, "--pool-gb=20", "--text", str(text)
    )
    assert report["broken"] == []
    assert len(report["results"]) == len(list(text.iterdir())) == 4
    for path in text.iterdir():
        lines = path.read_text().splitlines()
        names = [re.sub(r"__\d+$", "", line).split()[-1] for line in lines]
        is_decode = "greedy" in path.name
        assert names.count("ordered_product") == 4 * 3 + is_decode
        attends = names.count("attend_in_order") + names.count("attend_pieces_in_order")
        assert (attends, names.count("store_tokens"), names.count("add_norm")) == (3, 3, 7)
        assert names.count("mass_of_rows") == is_decode
        # One of XLA's: with the identity, of the rotation (`rotary_tables`).
        assert sum("dot" in name or "gemm" in name or "cublas" in name for name in names) <= 1


@pytest.mark.gpu_compiler
def test_latents_and_experts_on_an_h200_have_kernels_of_their_own(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Of two layers, the second has experts."""
    text = tmp_path / "text"
    options = ["--model=deepseek-v2-lite", "--layers=2", "--rows=64", "--calls", "greedy"]
    options += ["prefill", "--pool-gb=20", "--text", str(text)]
    report = compile_for_h200(tmp_path / "out.json", pytestconfig, *options)
    for one in report["results"]:
        assert (one["moves"], one["host_calls"], one["command_buffers"]) == ([], [], 1)
        assert one["moved_to_weights"] < 1.6
        lines = next(text.glob(f"*-{one['call']}-*")).read_text().splitlines()
        names = [re.sub(r"__\d+$", "", line).split()[-1] for line in lines]
        own = {"greedy": ("read_pieces", "join_pieces"), "prefill": ("attend_latents",)}
        assert all(names.count(name) == 2 for name in own[one["call"]])
        assert names.count("multiply_by_expert") == 2


@pytest.mark.gpu_compiler
@pytest.mark.parametrize("model", ["qwen3-0.6b", "qwen3-8b"])
def test_decode_on_an_h200_keeps_the_rules(
    model: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    report = compile_for_h200(tmp_path / "out.json", pytestconfig, "--model", model)
    assert report["broken"] == []
    *decode, prefill = report["results"]
    assert [(one["call"], one["rows"]) for one in decode] == [
        (call, rows) for call in ("greedy", "truncated") for rows in (1, 64, 256)
    ]
    for one in decode:
        assert one["command_buffers"] == 1
        # Four products, with the gate; two sums and norms; norm and rotation of heads. Of a single
        # row XLA multiplies, and of 256 rows of 8B the widest product, whose gate is a kernel.
        assert one["layer_kernels"] in {1: range(8, 13), 64: [7], 256: [7, 8]}[one["rows"]]
        assert 1 <= one["moved_to_weights"] < (1.1 if one["rows"] == 1 else 4.5)
    assert prefill["host_calls"] == []
    assert prefill["moves"] == []
    assert prefill["command_buffers"] == 1
