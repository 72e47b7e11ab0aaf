"""Which tensors of a checkpoint are one quantised kernel: the way in for all of its weights.

A kernel "q_proj.weight" is stored as several tensors, told apart by their last word: codes, scales,
zeros. `open_weights` gives one for them, checked from the files' headers alone, so what does not
fit together is refused before anything is read. A module that has a plain weight is one of those
that were not converted, whatever lists of names config.json has.
"""

from collections.abc import Mapping, Set
from pathlib import Path

import jax
import numpy as np

from folojax.models.core.config import ModelConfig
from folojax.models.core.param_tree import listed
from folojax.models.families.pictures import text_name
from folojax.models.files.hf_names import parameter_sources
from folojax.models.files.mxfp4 import join_mxfp4
from folojax.models.files.quantized_config import QuantizedFormat, format_of
from folojax.models.files.quantized_tensor import Layout, QuantizedTensor, grid_of
from folojax.models.files.safetensors_files import DTYPES, StoredTensor, Tensor, open_tensors

_GPTQ_ROLES = frozenset({"qweight", "qzeros", "scales", "g_idx"})
_SCALED_ROLES = frozenset(
    {
        *("weight", "weight_packed", "weight_shape", "weight_g_idx"),
        *("weight_scale", "weight_scale_inv", "weight_zero_point", "weight_offset"),
    }
)

# Of activations and the K/V cache, which are floats here: nothing is rounded that need not be.
_UNUSED = frozenset(
    {
        *("input_scale", "input_zero_point", "activation_scale", "activation_scale_ub"),
        *("input_scale_ub", "output_scale", "output_zero_point", "kv_scale"),
        *("q_scale", "k_scale", "v_scale", "q_zero_point", "k_zero_point", "v_zero_point"),
    }
)

_SCALE_DTYPES = frozenset({*DTYPES, "F8_E8M0"})


def open_weights(directory: Path, config: ModelConfig) -> Mapping[str, Tensor]:
    """Every tensor that a model's parameters are read from, by the name that floats would have.

    Raises:
        FileNotFoundError: there are no weights, or a shard is absent.
        ValueError: a file is malformed (`open_tensors`), or the parts of a quantised kernel do not
            fit together; all that do not are listed, fifty at most.
    """
    tensors, form = _text_tensors(open_tensors(directory)), format_of(config)
    if form is None:
        return tensors
    if form.method == "mxfp4":
        return join_mxfp4(tensors)
    sources = jax.tree.leaves(parameter_sources(config))
    return _join_parts(tensors, form, {name for source in sources for name, _ in source.tensors})


def _text_tensors(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """By the names that they have in a model without pictures, as far as they are in it."""
    named = {tensor: text_name(name) for name, tensor in tensors.items()}
    return {name: tensor._replace(name=name) for tensor, name in named.items() if name is not None}


def _join_parts(
    tensors: Mapping[str, StoredTensor], form: QuantizedFormat, wanted: Set[str]
) -> dict[str, Tensor]:
    roles = _SCALED_ROLES if form.method == "scaled" else _GPTQ_ROLES
    found: dict[str, Tensor] = {}
    kernels: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        module, _, role = name.rpartition(".")
        if role in roles:
            kernels.setdefault(module, {})[role] = tensor
        elif role not in _UNUSED:
            found[name] = tensor
    problems = []
    for module, parts in kernels.items():
        name = f"{module}.weight"
        if parts.keys() == {"weight"} and parts["weight"].dtype in DTYPES:
            found[name] = parts["weight"]
            continue
        try:
            if name in found:
                raise ValueError("a plain weight is there too")
            join = _join_scaled if form.method == "scaled" else _join_gptq
            found[name] = join(name, parts, form)
            # AutoGPTQ gave every layer a bias, of zeros where the model has none.
            bias = tensors.get(f"{module}.bias")
            if bias is not None and bias.name not in wanted and _is_zero(bias):
                del found[bias.name]
        except ValueError as error:
            problems.append(f"{module}: {error}")
    if problems:
        raise ValueError("quantised kernels are malformed:\n  " + listed(problems, "\n  "))
    return found


def _join_gptq(
    name: str, parts: Mapping[str, StoredTensor], form: QuantizedFormat
) -> QuantizedTensor:
    """A kernel of GPTQ or AWQ."""
    _need(parts, "qweight", "qzeros", "scales")
    (bits,) = form.bits
    per_word = 32 // bits
    _check(parts["qweight"], ("I32",), None, rank=2)
    rows, columns = parts["qweight"].shape
    is_awq = form.method == "awq"
    shape = (columns * per_word, rows) if is_awq else (columns, rows * per_word)
    block = _block(form, shape)
    groups = grid_of(shape, block)[1]
    _check(parts["scales"], _SCALE_DTYPES, (groups, shape[0]))
    _check(parts["qzeros"], ("I32",), (groups, -(-shape[0] // per_word)))
    return QuantizedTensor(
        name,
        shape,
        "awq" if is_awq else "gptq",
        bits,
        parts["qweight"],
        parts["scales"],
        parts["qzeros"],
        block,
        _group_of(parts.get("g_idx"), shape, block),
        form.zero_step,
    )


def _join_scaled(
    name: str, parts: Mapping[str, StoredTensor], form: QuantizedFormat
) -> QuantizedTensor:
    """A kernel of float8, or one of compressed-tensors."""
    if "weight" in parts and "weight_packed" in parts:
        raise ValueError("it has both weight and weight_packed")
    layout: Layout
    if "weight_packed" in parts:
        layout, (shape, bits) = "packed", _packed_shape(parts, form)
        codes = parts["weight_packed"]
    else:
        _need(parts, "weight")
        codes, bits = parts["weight"], 8
        _check(codes, ("F8_E4M3", *(("I8",) if 8 in form.bits else ())), None, rank=2)
        shape = codes.shape[0], codes.shape[1]
        layout = "float8" if codes.dtype == "F8_E4M3" else "int8"
    scale = parts.get("weight_scale_inv") or parts.get("weight_scale")
    if scale is None:
        raise ValueError("weight_scale is missing")
    _check(scale, _SCALE_DTYPES, None)
    block = _block(form, shape, scale)
    rows, groups = grid_of(shape, block)
    zero = None if layout == "float8" else parts.get("weight_zero_point")
    if zero is not None and layout == "packed" and zero.dtype == "I32":
        _check(zero, ("I32",), (-(-rows * bits // 32), groups))
    elif zero is not None:
        _check(zero, ("I8",), scale.shape)
    elif form.has_zeros and layout != "float8":
        raise ValueError("weight_zero_point is missing")
    offset = parts.get("weight_offset")
    if offset is not None:
        if not form.has_offsets or zero is not None or layout == "float8":
            raise ValueError(
                "weight_offset is there, but config.json or the codes have no use of it"
            )
        _check(offset, _SCALE_DTYPES, (rows, groups))
    group_of = _group_of(parts.get("weight_g_idx"), shape, block)
    return QuantizedTensor(
        name, shape, layout, bits, codes, scale, zero, block, group_of, offset=offset
    )


def _packed_shape(
    parts: Mapping[str, StoredTensor], form: QuantizedFormat
) -> tuple[tuple[int, int], int]:
    """Shape and bits of a kernel whose last word may be filled in part only."""
    _need(parts, "weight_shape")
    _check(parts["weight_packed"], ("I32",), None, rank=2)
    _check(parts["weight_shape"], ("I64", "I32"), (2,))
    outputs, words = parts["weight_packed"].shape
    stated = tuple(map(int, parts["weight_shape"].read()))
    for bits in form.bits:
        if stated[0] == outputs and stated[1] > 0 and -(-stated[1] * bits // 32) == words:
            return (outputs, stated[1]), bits
    raise ValueError(
        f"weight_shape is {stated}, and weight_packed {(outputs, words)} of "
        f"{' or '.join(map(str, form.bits)) or 'no'} bits"
    )


def _block(
    form: QuantizedFormat, shape: tuple[int, int], scale: StoredTensor | None = None
) -> tuple[int, int]:
    """What shares a scale: of the blocks that config.json has, the one that the scales fit."""
    if 0 in shape:
        raise ValueError(f"it is {shape}: nothing")
    rows, columns = shape
    blocks = [
        (min(outputs or rows, rows), min(inputs or columns, columns))
        for outputs, inputs in form.blocks
    ]
    grids = [grid_of(shape, block) for block in blocks]
    for block, grid in zip(blocks, grids, strict=True):
        # One axis less, or none, where there is one number along it.
        short = {grid, *((grid[:1],) if grid[1] == 1 else ()), *(((),) if grid == (1, 1) else ())}
        if scale is None or scale.shape in short:
            return block
    assert scale is not None
    raise ValueError(
        f"{scale.name.rpartition('.')[2]} is {scale.shape}; for weights of {shape} config.json "
        f"asks for {' or '.join(map(str, grids))}"
    )


def _group_of(
    index: StoredTensor | None, shape: tuple[int, int], block: tuple[int, int]
) -> np.ndarray | None:
    """The group of each input; None where they follow each other, as they do without an index."""
    if index is None:
        return None
    _check(index, ("I32", "I64"), (shape[1],))
    groups, count = index.read(), grid_of(shape, block)[1]
    if groups.min() < 0 or groups.max() >= count:
        raise ValueError(
            f"{index.name.rpartition('.')[2]} names groups from {groups.min()} to {groups.max()}; "
            f"there are {count}"
        )
    is_plain = np.array_equal(groups, np.arange(shape[1]) // block[1])
    return None if is_plain else groups


def _is_zero(tensor: StoredTensor) -> bool:
    return tensor.dtype in DTYPES and not tensor.read().any()


def _need(parts: Mapping[str, StoredTensor], *roles: str) -> None:
    missing = [role for role in roles if role not in parts]
    if missing:
        raise ValueError(f"{', '.join(missing)} is missing")


def _check(
    tensor: StoredTensor,
    dtypes: frozenset[str] | tuple[str, ...],
    shape: tuple[int, ...] | None,
    rank: int | None = None,
) -> None:
    role = tensor.name.rpartition(".")[2]
    if tensor.dtype not in dtypes:
        raise ValueError(f"{role} is {tensor.dtype}, not {' or '.join(sorted(dtypes))}")
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"{role} is {tensor.shape}, the others ask for {shape}")
    if rank is not None and len(tensor.shape) != rank:
        raise ValueError(f"{role} is {tensor.shape}, not of {rank} axes")
