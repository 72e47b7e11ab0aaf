"""Checkpoints in few bits, against transformers on what their writers say that they mean."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from folojax import LLM, SamplingParams
from folojax.models.files.checkpoint import load_params, open_checkpoint
from folojax.models.files.hf_config import config_from_hf
from folojax.models.files.save import save_pretrained
from folojax.models.quantized.codes import dequantize
from folojax.models.quantized.float8_kernels import Float8Kernel
from folojax.models.quantized.group_kernels import GroupKernel
from folojax.models.quantized.int8_kernels import Int8Kernel
from folojax.models.quantized.quantize import quantize_params
from tests import quantized_writer, reference
from tests.dense import load, logits
from tests.families import save_family
from tests.quantized_writer import CASES, compressed, scheme

STEM = "model.layers.0.self_attn.q_proj."
PROMPT = list(range(5, 69))


@pytest.fixture(scope="module")
def written(
    tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict[str, np.ndarray]]]:
    """A directory of each case, and the floats of each."""
    root = tmp_path_factory.mktemp("quantised")
    return {
        name: (root / name, quantized_writer.write(case, tiny_directory, root / name))
        for name, case in CASES.items()
    }


@pytest.fixture(scope="module")
def theirs(tiny_directory: Path) -> Any:
    return reference.load_model(tiny_directory)


def joined(meant: dict[str, np.ndarray], layer: int, *names: str) -> np.ndarray:
    return np.concatenate([meant[f"model.layers.{layer}.{name}.weight"] for name in names])


QKV = [f"self_attn.{name}_proj" for name in "qkv"]


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_floats(name: str, written: Any, theirs: Any) -> None:
    directory, meant = written[name]
    theirs.load_state_dict({name: torch.from_numpy(one) for name, one in meant.items()})
    expected = reference.logits(theirs, PROMPT)
    module, params = load(directory)
    # Every bit of the kernels, and so no more than the order of sums is between the logits.
    np.testing.assert_array_equal(params["layers_1"]["qkv"], joined(meant, 1, *QKV))
    np.testing.assert_allclose(logits(module, params, PROMPT), expected, atol=1e-4)


def test_blocks_of_float8_are_what_transformers_reads(written: Any) -> None:
    directory, meant = written["fp8-blocks"]
    read = reference.load_model(directory).state_dict()
    for name, expected in meant.items():
        np.testing.assert_allclose(read[name].float().numpy(), expected, rtol=1e-6, err_msg=name)


def test_other_ways_to_write_the_same(written: Any, tmp_path: Path) -> None:
    """Biases of zeros that the model has no place for; zeros that are not packed."""
    directory, meant = written["ct-packed-zeros"]
    stored = load_file(directory / "model.safetensors")
    zero = stored[STEM + "weight_zero_point"].numpy()
    shifts = 4 * np.arange(8)[None, :, None]
    plain = (zero[:, None] >> shifts & 15).reshape(64, -1) - 8
    stored[STEM + "weight_zero_point"] = torch.from_numpy(plain.astype(np.int8))
    stored[STEM + "bias"] = torch.zeros(64)
    save_file(stored, tmp_path / "model.safetensors")
    shutil.copy(directory / "config.json", tmp_path)
    params = load_params(open_checkpoint(tmp_path), jnp.float32)
    np.testing.assert_array_equal(params["layers_0"]["qkv"], joined(meant, 0, *QKV))


def test_experts_are_read_one_by_one(tmp_path: Path) -> None:
    """Kernels that are kept transposed, and whose module is one of many of a parameter."""
    save_family("qwen3-moe", tmp_path / "base")
    meant = quantized_writer.write(CASES["fp8-blocks"], tmp_path / "base", tmp_path / "fp8")
    params = load_params(open_checkpoint(tmp_path / "fp8"), jnp.float32)
    expected = meant["model.layers.1.mlp.experts.5.down_proj.weight"].T
    np.testing.assert_array_equal(params["layers_1"]["experts_down"][5], expected)
    gate_up = [meant[f"model.layers.0.mlp.experts.2.{name}_proj.weight"] for name in ("gate", "up")]
    found = params["layers_0"]["experts_gate_up"][2]
    np.testing.assert_array_equal(found, np.concatenate(gate_up).T)


@pytest.mark.parametrize(
    ("name", "quantization", "kind"),
    [
        ("gptq", "int4", GroupKernel),
        ("ct-packed", "int4", GroupKernel),
        ("ct-int8", "int8", Int8Kernel),
        ("ct-packed-8", "int8", Int8Kernel),
    ],
)
def test_symmetric_codes_are_kept_in_their_bits(
    name: str, quantization: str, kind: type[GroupKernel | Int8Kernel], written: Any
) -> None:
    directory, meant = written[name]
    params = load_params(open_checkpoint(directory), jnp.float32, quantization)
    for layer in range(2):
        kernel = params[f"layers_{layer}"]["qkv"]
        assert isinstance(kernel, kind)
        np.testing.assert_array_equal(dequantize(kernel), joined(meant, layer, *QKV))
    # What is not converted is quantised as ever, and all of it is what an engine takes.
    floats = quantize_params(load_params(open_checkpoint(directory), jnp.float32), quantization)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, floats)
    chex.assert_trees_all_equal(params["embed"], floats["embed"])


@pytest.mark.parametrize("name", ["gptq-v2", "awq", "ct-packed-zeros"])
def test_of_other_codes_the_offset_alone_is_rounded(name: str, written: Any) -> None:
    directory, meant = written[name]
    params = load_params(open_checkpoint(directory), jnp.float32, "int4")
    kernel, expected = params["layers_0"]["qkv"], joined(meant, 0, *QKV)
    off = abs(dequantize(kernel) - expected)
    # 15 steps, to the eleven bits of float16.
    assert off.max() < 15 * 2**-11 * np.asarray(kernel.scale, np.float32).max()


@pytest.mark.parametrize(
    ("name", "quantization", "as_written"),
    [
        ("awq", "int4", "ct-packed-zeros"),
        ("gptq", "int4", "ct-packed"),
        ("ct-int8", "int8", "ct-int8"),
    ],
)
def test_kept_codes_are_saved_as_they_are(
    name: str, quantization: str, as_written: str, written: Any, tmp_path: Path
) -> None:
    """The tensors are those that the writer makes of the same kernels."""
    checkpoint = open_checkpoint(written[name][0])
    params = load_params(checkpoint, jnp.float32, quantization)
    save_pretrained(params, tmp_path, checkpoint.config)
    again = open_checkpoint(tmp_path)
    loaded = load_params(again, jnp.float32, quantization)
    chex.assert_trees_all_equal(loaded["layers_0"], params["layers_0"])
    expected = load_file(written[as_written][0] / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == {part for part in expected if not part.endswith("input_scale")}
    for part, tensor in stored.items():
        if "_proj." in part:
            assert torch.equal(tensor, expected[part]), part
    group = json.loads(again.config.hf_config)["quantization_config"]["config_groups"]["group_0"]
    assert "model.layers.1.mlp.gate_proj" in group["targets"]


@pytest.mark.adapters
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("name", "quantization"), [("gptq", "int4"), ("awq", "int4"), ("ct-int8", "int8")]
)
def test_compressed_tensors_reads_what_is_saved(
    name: str, quantization: str, written: Any, tmp_path: Path
) -> None:
    directory, meant = written[name]
    checkpoint = open_checkpoint(directory)
    params = load_params(checkpoint, jnp.float32, quantization)
    save_pretrained(params, tmp_path, checkpoint.config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.CompressedTensorsConfig(dequantize=True)
    ).state_dict()
    for tensor, expected in meant.items():
        if tensor.endswith("proj.weight"):
            # They round to the dtype of the scales.
            found = theirs[tensor].float().numpy()
            np.testing.assert_allclose(found, expected, rtol=2**-11, err_msg=tensor)


@pytest.mark.parametrize(
    ("name", "quantization"),
    [("gptq-order", "int4"), ("gptq-8", "int4"), ("ct-int8-zeros", "int8")],
)
def test_codes_that_no_kernel_has_are_rounded_anew(
    name: str, quantization: str, written: Any
) -> None:
    checkpoint = open_checkpoint(written[name][0])
    params = load_params(checkpoint, jnp.float32, quantization)
    floats = quantize_params(load_params(checkpoint, jnp.float32), quantization)
    chex.assert_trees_all_equal(params, floats)


@pytest.mark.parametrize(
    ("name", "options"), [("gptq", {"quantization": "int4"}), ("fp8-blocks", {})]
)
def test_an_engine_runs_from_the_directory(name: str, options: Any, written: Any) -> None:
    llm = LLM(written[name][0], dtype="float32", **options, **reference.TINY_LIMITS)
    prompt = PROMPT[:9]
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    (output,) = llm.generate([prompt], greedy, use_tqdm=False)
    tokens = list(output.outputs[0].token_ids)
    expected = logits(llm.model, llm.params, prompt + tokens)[len(prompt) - 1 : -1]
    assert expected.argmax(axis=1).tolist() == tokens
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(llm.params))
    assert llm.memory_plan.weights_bytes == size


def config(name: str, **fields: Any) -> dict[str, Any]:
    return CASES[name].config | fields


ct = functools.partial(compressed, "pack-quantized")
REFUSED = {
    "another method": ({"quant_method": "bitsandbytes"}, r"\(bitsandbytes\).* only gptq, awq, fp8"),
    "no method": ({"bits": 4, "group_size": 64}, "only gptq, awq, fp8"),
    "no object": ("int4", r"quantization_config \(int4\): of quantised"),
    "three bits": (config("gptq", bits=3), "bits is 3; supported: 4, 8"),
    "bits of words": (config("gptq", bits="4"), "bits is '4'; supported"),
    "a group of none": (config("gptq", group_size=0), "group_size is 0, not a size"),
    "a group of words": (config("gptq", group_size=True), "group_size is True, not a size"),
    "marlin": (config("gptq", checkpoint_format="marlin"), "checkpoint_format is 'marlin'"),
    "settings by module": (config("gptq", dynamic={"x": {}}), "dynamic .* is not supported"),
    "awq gemv": (config("awq", version="gemv"), "version is 'gemv'; supported: 'gemm'"),
    "awq without zeros": (config("awq", zero_point=False), "zero_point is False"),
    "fp8 e5m2": (config("fp8-blocks", fmt="e5m2"), "fmt is 'e5m2'"),
    "a block of three": (config("fp8-blocks", weight_block_size=[1, 2, 3]), "not two sizes"),
    "a block below": (config("fp8-blocks", weight_block_size=[-1, 4]), "a block is -1, not a size"),
    "sparse": (ct(scheme(4, "channel"), sparsity_config={"format": "2:4"}), "format is '2:4'"),
    "marlin-24": (compressed("marlin-24", scheme(4, "channel")), "format is 'marlin-24'"),
    "rotated": (ct(scheme(4, "channel"), transform_config={"a": 1}), "transform_config"),
    "nvfp4": (ct(scheme(4, "tensor_group", "float")), "num_bits is 4; supported: 8"),
    "no groups": (ct(), "quantise no weights"),
    "groups of words": (ct(config_groups={"a": 3}), "malformed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_by_name(case: str, tiny_directory: Path) -> None:
    stated, message = REFUSED[case]
    mapping = json.loads((tiny_directory / "config.json").read_text())
    with pytest.raises(ValueError, match=message) as error:
        config_from_hf(mapping | {"quantization_config": stated})
    assert "use the model's unquantised version" in str(error.value)


# The case, what becomes of some tensors of one kernel, and what is said.
MALFORMED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no scales": ("gptq", {"scales": None}, "scales is missing"),
    "no codes": ("awq", {"qweight": None}, "qweight is missing"),
    "no zeros": ("awq", {"qzeros": None}, "qzeros is missing"),
    "codes of floats": (
        "gptq",
        {"qweight": np.zeros((8, 64), "float32")},
        "qweight is F32, not I32",
    ),
    "codes of one axis": ("gptq", {"qweight": np.zeros(8, "int32")}, "not of 2 axes"),
    "no codes at all": ("gptq", {"qweight": np.zeros((0, 64), "int32")}, "nothing"),
    "fewer codes": ("gptq", {"qweight": np.zeros((4, 64), "int32")}, r"scales is \(2, 64\), the"),
    "fewer scales": ("gptq", {"scales": np.zeros((1, 64), "float16")}, r"scales is \(1, 64\)"),
    "fewer zeros": ("gptq", {"qzeros": np.zeros((2, 7), "int32")}, r"qzeros is \(2, 7\)"),
    "groups beyond": ("gptq", {"g_idx": np.full(64, 2, "int32")}, "names groups from 2 to 2"),
    "groups below": ("gptq", {"g_idx": np.full(64, -1, "int32")}, "names groups from -1 to -1"),
    "fewer groups": ("gptq", {"g_idx": np.zeros(63, "int32")}, r"g_idx is \(63,\)"),
    "a plain weight too": ("gptq", {"weight": np.zeros((64, 64), "float32")}, "a plain weight is"),
    "another width": (
        "gptq",
        {
            "qweight": np.zeros((16, 64), "int32"),
            "scales": np.zeros((4, 64), "float16"),
            "qzeros": np.zeros((4, 8), "int32"),
            "g_idx": None,
        },
        r"wrong shape: .*q_proj.weight is \(64, 128\)",
    ),
    "no scale": ("fp8-blocks", {"weight_scale_inv": None}, "weight_scale is missing"),
    "a scale of integers": ("fp8-blocks", {"weight_scale_inv": np.zeros((6, 2), "int8")}, "is I8"),
    "another grid": (
        "fp8-blocks",
        {"weight_scale_inv": np.zeros((2, 6), "float32")},
        r"is \(2, 6\); for weights of \(64, 64\) config.json asks for \(4, 2\)",
    ),
    "scales of floats": ("fp8-tensor", {"weight": np.zeros((64, 64), "float32")}, "weight is F32"),
    "int8 among float8": ("fp8-tensor", {"weight": np.zeros((64, 64), "int8")}, "weight is I8"),
    "no shape": ("ct-packed", {"weight_shape": None}, "weight_shape is missing"),
    "a shape of three": (
        "ct-packed",
        {"weight_shape": np.array([1, 2, 3])},
        r"weight_shape is \(3,",
    ),
    "an endless shape": ("ct-packed", {"weight_shape": np.array([64, 2**62])}, "weight_shape is"),
    "a shape below": ("ct-packed", {"weight_shape": np.array([64, -64])}, "weight_shape is"),
    "both kinds": ("ct-packed", {"weight": np.zeros((64, 64), "int8")}, "both weight and weight_p"),
    "zeros that lack": ("ct-packed-zeros", {"weight_zero_point": None}, "zero_point is missing"),
    "zeros of words": ("ct-int8-zeros", {"weight_zero_point": np.zeros((8, 2), "int32")}, "is I32"),
    "zeros of another grid": (
        "ct-packed-zeros",
        {"weight_zero_point": np.zeros((64, 3), "int8")},
        r"weight_zero_point is \(64, 3\)",
    ),
    "a bias": ("gptq", {"bias": np.ones(64, "float32")}, "unexpected: .*q_proj.bias"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_parts_that_do_not_fit_are_named(case: str, written: Any, tmp_path: Path) -> None:
    name, changes, message = MALFORMED[case]
    directory, _ = written[name]
    stored = load_file(directory / "model.safetensors")
    kept = {name: part for name, part in stored.items() if name.removeprefix(STEM) not in changes}
    given = {role: part for role, part in changes.items() if part is not None}
    kept |= {STEM + role: torch.from_numpy(part) for role, part in given.items()}
    save_file(kept, tmp_path / "model.safetensors")
    shutil.copy(directory / "config.json", tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_params(open_checkpoint(tmp_path), jnp.float32)
    assert STEM.removesuffix(".") in str(error.value)


@pytest.mark.parametrize("name", ["fp8-tensor", "fbgemm-fp8", "ct-float8", "fp8-blocks"])
def test_float8_is_kept_where_an_output_has_one_scale(name: str, written: Any) -> None:
    directory, meant = written[name]
    kernel = load_params(open_checkpoint(directory), jnp.float32, "fp8")["layers_0"]["qkv"]
    assert isinstance(kernel, Float8Kernel)
    expected = joined(meant, 0, *QKV)
    if name == "fp8-blocks":
        largest = abs(expected).max(axis=1, keepdims=True)
        assert (abs(dequantize(kernel) - expected) <= largest * 2**-4).all()
    else:
        np.testing.assert_allclose(dequantize(kernel), expected, rtol=1e-6)
