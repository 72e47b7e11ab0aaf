"""GGUF files of K-quants: Q4_K keeps its codes, what has more bits is rounded to those wanted."""

from pathlib import Path
from typing import Any

import chex
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from folojax.models.files.checkpoint import build_module, load_params, open_checkpoint
from folojax.models.files.save import save_pretrained
from folojax.models.quantized.codes import dequantize
from folojax.models.quantized.group_kernels import unpack_groups
from folojax.models.quantized.names import TILED
from folojax.models.quantized.quantize import is_quantized, quantize_params
from folojax.models.quantized.tiled_kernels import TiledKernel
from tests import dense, gguf_writer

Q4_K, Q6_K = gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.Q6_K
METADATA = {
    "llama.context_length": 128,
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 256,
    "llama.block_count": 1,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    **gguf_writer.letters_metadata(64),
}
HEADS = {"attn_q": 4, "attn_k": 2}
SHAPES = {
    **{f"attn_{part}": (256, 256) for part in ("q", "output")},
    **{f"attn_{part}": (128, 256) for part in ("k", "v")},
    **{f"ffn_{part}": (256, 256) for part in ("gate", "up", "down")},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A file as Q4_K_M has it, and the floats that the gguf library reads its kernels as."""
    root = tmp_path_factory.mktemp("k-quants")
    rng = np.random.default_rng(0)
    blocks: dict[str, tuple[np.ndarray, Any]] = {}
    for role, shape in SHAPES.items():
        weights = rng.standard_normal(shape).astype(np.float32) / 16
        kept = role not in ("attn_v", "ffn_down")
        blocks[f"blk.0.{role}.weight"] = (
            (gguf_writer.pack_q4_k(weights), Q4_K) if kept else (random_q6_k(shape, rng), Q6_K)
        )
    blocks["token_embd.weight"] = random_q6_k((64, 256), rng), Q6_K
    blocks["output.weight"] = gguf_writer.pack_q4_k(rng.standard_normal((64, 256)) / 4), Q4_K
    norms = {
        name: np.ones(256, np.float32)
        for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight")
    }
    gguf_writer.write(root / "tiny.gguf", "llama", METADATA, blocks | norms)
    meant = {
        name.removeprefix("blk.0.").removesuffix(".weight"): gguf.quants.dequantize(*one)
        for name, one in blocks.items()
    }
    for role, heads in HEADS.items():
        pairs = meant[role].reshape(heads, 32, 2, 256)
        meant[role] = pairs.swapaxes(1, 2).reshape(-1, 256)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOLOJAX_CACHE_DIR", str(root / "cache"))
        yield open_checkpoint(root / "tiny.gguf"), meant


def random_q6_k(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Random codes and scales; the last two bytes of a block are a float16."""
    blocks = rng.integers(0, 256, (shape[0], shape[1] // 256, 210), dtype=np.uint8)
    blocks[..., 208:] = np.array([2**-16], np.float16).view(np.uint8)
    return blocks.reshape(shape[0], -1)


def joined(meant: dict[str, np.ndarray], *roles: str) -> np.ndarray:
    return np.concatenate([meant[role] for role in roles])


PARTS = {
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "o": ("attn_output",),
    "gate_up": ("ffn_gate", "ffn_up"),
    "down": ("ffn_down",),
}


def test_floats_are_those_of_the_library(written: Any) -> None:
    checkpoint, meant = written
    params = load_params(checkpoint, jnp.float32)
    for name, roles in PARTS.items():
        np.testing.assert_array_equal(params["layers_0"][name], joined(meant, *roles))
    np.testing.assert_array_equal(params["embed"], meant["token_embd"])
    np.testing.assert_array_equal(params["lm_head"], meant["output"])


def test_codes_are_kept_and_only_scales_and_offsets_are_rounded(written: Any) -> None:
    checkpoint, meant = written
    params = load_params(checkpoint, jnp.float32, "int4")
    floats = quantize_params(load_params(checkpoint, jnp.float32), "int4")
    chex.assert_trees_all_equal_shapes_and_dtypes(params, floats)
    layer, rounded = params["layers_0"], floats["layers_0"]
    expected = {name: joined(meant, *roles) for name, roles in PARTS.items()}
    for kernel, weights in (
        (layer["gate_up"], expected["gate_up"]),
        (layer["o"], expected["o"]),
        (params["lm_head"], meant["output"]),
    ):
        codes, scale, offset = (np.asarray(one) for one in unpack_groups(kernel))
        most = 2.0**-11 * (15 * scale.astype(np.float32) + abs(offset.astype(np.float32)))
        off = abs(dequantize(kernel) - weights).reshape(codes.shape)
        assert (off <= 1.01 * most[..., None]).all()
        assert codes.max() < 15, "one that rounded anew would use all codes"
    # Rounding anew moves weights by up to half a step, as no group uses all of its codes.
    off, anew = (
        abs(dequantize(one["gate_up"]) - expected["gate_up"]).mean() for one in (layer, rounded)
    )
    assert off < anew / 10
    # Of what is joined, queries and keys are kept and values rounded to four bits.
    kept, again = dequantize(layer["qkv"]), dequantize(rounded["qkv"])
    np.testing.assert_allclose(kept[:384], expected["qkv"][:384], rtol=0, atol=1e-3)
    np.testing.assert_array_equal(kept[384:], again[384:])
    chex.assert_trees_all_equal(layer["down"], rounded["down"])
    chex.assert_trees_all_equal(params["embed"], floats["embed"])
    assert params["embed"].bits == params["lm_head"].bits == 8


def test_on_a_gpu_codes_are_kept_in_tiles(written: Any) -> None:
    checkpoint, meant = written
    layer = load_params(checkpoint, jnp.float32, TILED)["layers_0"]
    plain = quantize_params(load_params(checkpoint, jnp.float32), TILED)["layers_0"]
    assert isinstance(layer["qkv"], TiledKernel)
    assert layer["qkv"].group == 32
    expected = joined(meant, *PARTS["gate_up"])
    # Scale and offset, the weight of code 8, to the eight bits of bfloat16.
    most = 2.0**-9 * (np.ptp(expected, axis=1) + abs(expected).max(axis=1))
    assert (abs(dequantize(layer["gate_up"]) - expected) <= most[:, None]).all()
    np.testing.assert_array_equal(dequantize(layer["qkv"])[384:], dequantize(plain["qkv"])[384:])


def test_int8_has_a_scale_for_each_output(written: Any) -> None:
    checkpoint, _ = written
    params = load_params(checkpoint, jnp.float32, "int8")
    floats = quantize_params(load_params(checkpoint, jnp.float32), "int8")
    chex.assert_trees_all_equal(params, floats)


def test_logits_are_those_of_what_the_codes_mean(written: Any) -> None:
    """But for inputs, which are rounded to eight bits."""
    checkpoint, _ = written
    module, tokens = build_module(checkpoint.config, jnp.float32), [5, 9, 3, 44, 17]
    params = load_params(checkpoint, jnp.float32, "int4")
    floats = jax.tree.map(
        lambda one: dequantize(one) if is_quantized(one) else one, params, is_leaf=is_quantized
    )
    plain, small = (dense.logits(module, one, tokens) for one in (floats, params))
    assert 0 < abs(small - plain).max() < 0.05 * np.std(plain)


def test_what_is_saved_is_the_floats_that_the_codes_mean(written: Any, tmp_path: Path) -> None:
    checkpoint, _ = written
    params = load_params(checkpoint, jnp.float32, "int4")
    save_pretrained(params, tmp_path, checkpoint.config)
    again = load_params(open_checkpoint(tmp_path), jnp.float32)
    expected = dequantize(params["layers_0"]["o"])
    np.testing.assert_array_equal(again["layers_0"]["o"], expected)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("shape", r"weight_offset is \(256, 4\)"),
        ("dtype", "weight_offset is I8"),
        ("unstated", "weight_offset is there"),
        ("zeros", "weight_offset is there"),
    ],
)
def test_offsets_that_do_not_fit_are_named(
    case: str, message: str, written: Any, tmp_path: Path
) -> None:
    source = written[0].directory
    tensors = load_file(source / "model.safetensors")
    text = (source / "config.json").read_text()
    name = "model.layers.0.self_attn.o_proj.weight"
    offset = f"{name}_offset"
    match case:
        case "shape":
            tensors[offset] = tensors[offset][:, :4].copy()
        case "dtype":
            tensors[offset] = tensors[offset].astype(np.int8)
        case "unstated":
            text = text.replace('"offset": true', '"offset": false')
        case "zeros":
            tensors[f"{name}_zero_point"] = np.zeros((32, 8), np.int32)
    (tmp_path / "config.json").write_text(text)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"o_proj: {message}"):
        load_params(open_checkpoint(tmp_path), jnp.float32)


@pytest.mark.parametrize("case", ["rows of 128", "cut off"])
def test_malformed_files_are_refused(case: str, tmp_path: Path) -> None:
    blocks = np.zeros((32, 144), np.uint8), Q4_K
    path = tmp_path / "tiny.gguf"
    gguf_writer.write(path, "llama", METADATA, {"output.weight": blocks})
    data = path.read_bytes()
    if case == "cut off":
        data = data[:-200]
    else:
        start = data.index(b"output.weight") + len(b"output.weight") + 4
        assert data[start : start + 16] == np.array([256, 32], "<u8").tobytes()
        data = data[:start] + np.array([128, 64], "<u8").tobytes() + data[start + 16 :]
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"tiny\.gguf is truncated or no GGUF file"):
        open_checkpoint(path)
