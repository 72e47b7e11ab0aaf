"""Quantisations of GGUF files: what they mean, and the codes that are kept."""

import json
from pathlib import Path
from typing import Any

import chex
import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from folojax.models.files.checkpoint import load_params, open_checkpoint
from folojax.models.quantized.codes import dequantize
from tests import gguf_writer
from tests.families import save_family
from tests.models.test_gguf_families import CASES, contents, llama_file


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache directory of every test's own."""
    monkeypatch.setenv("FOLOJAX_CACHE_DIR", str(tmp_path / "cache"))


# Whole numbers and doubles are no quantisation, and no model has them.
QUANTISATIONS = [
    kind
    for kind in gguf.GGMLQuantizationType
    if kind.name not in ("I8", "I16", "I32", "I64", "F64")
]


@pytest.mark.parametrize("kind", QUANTISATIONS, ids=lambda kind: kind.name)
def test_every_quantisation_of_the_library_is_read(kind: Any, tmp_path: Path) -> None:
    """Blocks of random bytes, against the library's own reading of them."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    plain = {
        gguf.GGMLQuantizationType.F32: np.float32,
        gguf.GGMLQuantizationType.F16: np.float16,
    }
    rng = np.random.default_rng(0)
    if kind in plain:
        data = rng.standard_normal((32, 256)).astype(plain[kind])
        tensor: Any = data
    else:
        data = rng.integers(0, 256, (32, 256 // block * size), dtype=np.uint8)
        tensor = (data, kind)
    path = llama_file(tmp_path / "tiny.gguf", {"blk.0.ffn_down.weight": tensor})
    try:
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(data, kind)
    except NotImplementedError:
        with pytest.raises(ValueError, match=f"ffn_down.weight is quantised as {kind.name}"):
            open_checkpoint(path)
        return
    with np.errstate(all="ignore"):
        params = load_params(open_checkpoint(path), jnp.float32)
    np.testing.assert_array_equal(params["layers_0"]["down"], expected)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_codes_are_those_of_the_file(kind: str, tmp_path: Path) -> None:
    """Rows of queries and keys in Hugging Face's order too; int4 rounds none of four bits."""
    shapes = {"attn_q": (32, 32), "attn_k": (32, 32), "ffn_gate": (256, 32), "ffn_up": (256, 32)}
    rng, to = np.random.default_rng(1), gguf.GGMLQuantizationType[kind]
    coded: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for role, shape in shapes.items():
        name = f"blk.0.{role}.weight"
        data = gguf.quants.quantize(rng.standard_normal(shape).astype(np.float32), to)
        coded[name], plain[name] = (data, to), gguf.quants.dequantize(data, to)
    files = (llama_file(tmp_path / "coded.gguf", coded), llama_file(tmp_path / "plain.gguf", plain))
    opened, floats = map(open_checkpoint, files)
    expected = load_params(floats, jnp.float32)
    chex.assert_trees_all_equal(load_params(opened, jnp.float32), expected)
    kernel = load_params(opened, jnp.float32, "int4")["layers_0"]["gate_up"]
    is_kept = np.array_equal(dequantize(kernel), expected["layers_0"]["gate_up"])
    assert kernel.bits == 4
    assert is_kept == (kind == "Q4_0")


@pytest.mark.parametrize("width", [32, 24])
def test_codes_change_places_with_their_heads(width: int, tmp_path: Path) -> None:
    """Inputs of a kernel in few bits, too, unless a group is of two heads: then it is of floats."""
    sizes = {"linear_value_head_dim": width, "linear_num_value_heads": 4}
    model = save_family("qwen3.5", tmp_path / "hf", sizes)
    gguf_writer.convert(model, tmp_path / "hf", "qwen35", tmp_path / "floats.gguf")
    metadata, tensors = contents(tmp_path / "floats.gguf")
    kind, coded = gguf.GGMLQuantizationType.Q8_0, dict(tensors)
    for name, values in tensors.items():
        if values.ndim == 2 and values.shape[1] % 32 == 0 and name.startswith("blk."):
            data = gguf.quants.quantize(values, kind)
            coded[name], tensors[name] = (data, kind), gguf.quants.dequantize(data, kind)
    gguf_writer.write(tmp_path / "coded.gguf", "qwen35", metadata, coded)
    gguf_writer.write(tmp_path / "plain.gguf", "qwen35", metadata, tensors)
    opened = open_checkpoint(tmp_path / "coded.gguf")
    expected = load_params(open_checkpoint(tmp_path / "plain.gguf"), jnp.float32)
    chex.assert_trees_all_equal(load_params(opened, jnp.float32), expected)
    has_codes = "model.layers.0.linear_attn.out_proj" in json.dumps(
        json.loads((opened.directory / "config.json").read_text())["quantization_config"]
    )
    assert has_codes == (width == 32)


@pytest.mark.parametrize("case", ["gemma4/moe", "mistral4/apart", "llama4", "granitemoe"])
def test_codes_of_experts_stay_codes_where_a_checkpoint_has_them_in_one(
    case: str, tmp_path: Path
) -> None:
    """In the cache; in memory they are floats, those that the codes mean."""
    family, changes = CASES[case]
    architecture, _, variant = case.partition("/")
    width = "intermediate_size" if case in ("llama4", "granitemoe") else "moe_intermediate_size"
    model = save_family(family, tmp_path / "hf", changes | {width: 32})
    gguf_writer.convert(model, tmp_path / "hf", architecture, tmp_path / "floats.gguf", variant)
    metadata, tensors = contents(tmp_path / "floats.gguf")
    kind, coded = gguf.GGMLQuantizationType.Q4_0, dict(tensors)
    for name in [name for name in tensors if "_exps.weight" in name]:
        data = gguf.quants.quantize(tensors[name], kind)
        coded[name], tensors[name] = (data, kind), gguf.quants.dequantize(data, kind)
    gguf_writer.write(tmp_path / "coded.gguf", architecture, metadata, coded)
    gguf_writer.write(tmp_path / "plain.gguf", architecture, metadata, tensors)
    opened, plain = (open_checkpoint(tmp_path / f"{one}.gguf") for one in ("coded", "plain"))
    expected = load_params(plain, jnp.float32)
    chex.assert_trees_all_equal(load_params(opened, jnp.float32), expected)
    sizes = [
        sum(file.stat().st_size for file in one.directory.glob("*.safetensors"))
        for one in (opened, plain)
    ]
    experts = sum(4 * values.size for name, values in tensors.items() if "_exps.weight" in name)
    assert sizes[0] < sizes[1] - experts / 2
