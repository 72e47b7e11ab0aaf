"""What the scripts for GPUs share: models of true shapes, requests, lines of figures."""

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from folojax.models.core.config import ModelConfig
from folojax.models.core.decoder import Llama, init_params
from folojax.models.core.recurrent import Recurrent

QWEN3: dict[str, Any] = {
    "architecture": "Qwen3ForCausalLM",
    "vocab_size": 151936,
    "num_kv_heads": 8,
    "head_dim": 128,
    "max_position": 40960,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "qkv_bias": False,
    "qk_norm": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": QWEN3
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_layers": 28,
        "num_heads": 16,
        "tie_embeddings": True,
    },
    "qwen3-8b": QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_layers": 36,
        "num_heads": 32,
        "tie_embeddings": False,
    },
    "qwen3-32b": QWEN3
    | {
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_layers": 64,
        "num_heads": 64,
        "tie_embeddings": False,
    },
    # DeepSeek-V2-Lite: one latent for all heads, experts in all layers but the first.
    "deepseek-v2-lite": {
        "architecture": "DeepseekV2ForCausalLM",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "num_layers": 27,
        "num_heads": 16,
        "num_kv_heads": 1,
        "head_dim": 192,
        "kv_rank": 512,
        "rotary_dim": 64,
        "value_dim": 128,
        "is_rope_interleaved": True,
        "max_position": 32768,
        "rope_theta": 1e4,
        "rope_scaling": None,
        "rms_norm_eps": 1e-6,
        "tie_embeddings": False,
        "qkv_bias": False,
        "qk_norm": False,
        "num_experts": 64,
        "num_experts_per_token": 6,
        "expert_size": 1408,
        "shared_expert_size": 2816,
        "is_expert_weight_normed": False,
        "dense_layers": (0,),
    },
    # Half of the layers of Qwen3-Next-80B: three of four are recurrent.
    "qwen3-next-24": {
        "architecture": "Qwen3NextForCausalLM",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "num_layers": 24,
        "num_heads": 16,
        "num_kv_heads": 2,
        "head_dim": 256,
        "rotary_dim": 64,
        "max_position": 32768,
        "rope_theta": 1e7,
        "rope_scaling": None,
        "rms_norm_eps": 1e-6,
        "norm": "rms_offset",
        "tie_embeddings": False,
        "qkv_bias": False,
        "qk_norm": True,
        "has_attention_gate": True,
        "recurrent": Recurrent(
            layers=tuple(layer for layer in range(24) if (layer + 1) % 4),
            num_key_heads=16,
            num_value_heads=32,
            key_dim=128,
            value_dim=128,
            conv_width=4,
            is_by_key_head=True,
        ),
        "num_experts": 512,
        "num_experts_per_token": 10,
        "expert_size": 512,
        "shared_expert_size": 512,
        "has_shared_gate": True,
    },
}
_SMALL: dict[str, Any] = {
    "num_layers": 4,
    "num_experts": 8,
    "num_experts_per_token": 4,
    "expert_size": 64,
    "shared_expert_size": 64,
}
"""Of those with experts, beside what is small of the others."""


def make_model(
    name: str,
    small: bool,
    mesh: Mesh | None = None,
    *,
    dtype: Any = jnp.bfloat16,
    **changes: Any,
) -> tuple[Llama, Any]:
    """A random model, made where it lies; `changes` replace fields of the config.

    With a mesh each array is cut along its first axis that the devices divide, as fully sharded
    training has it.
    """
    shape = SHAPES[name]
    if small:
        of_experts = _SMALL if "num_experts" in shape else {}
        small_shape = {"num_layers": 2, "vocab_size": 512, "intermediate_size": 128}
        shape = shape | small_shape | of_experts
    module = Llama(ModelConfig(**(shape | changes)), dtype)
    return module, jax.block_until_ready(random_params(module, mesh=mesh))


def random_params(module: Llama, scale: float = 0.02, mesh: Mesh | None = None) -> Any:
    """Normal matrices and norms of one, array by array.

    The module's own initialiser in one program takes XLA most of a minute to compile for a GPU.
    """
    shapes = jax.eval_shape(functools.partial(init_params, module), jax.random.key(0))
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    arrays = []
    for key, leaf in zip(keys, leaves, strict=True):
        place = None if mesh is None else cut(mesh, leaf.shape)
        if leaf.ndim == 1:
            arrays.append(jnp.ones(leaf.shape, leaf.dtype, device=place))
        else:
            arrays.append(_drawn(leaf.dtype, leaf.shape, place)(key, scale))
    return jax.tree.unflatten(tree, arrays)


def cut(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Along the first axis that the devices of a mesh of one axis divide."""
    axis = next((axis for axis, size in enumerate(shape) if size % mesh.size == 0), None)
    spec = [] if axis is None else [None] * axis + list(mesh.axis_names)
    return NamedSharding(mesh, PartitionSpec(*spec))


@functools.cache
def _drawn(dtype: Any, shape: tuple[int, ...], place: NamedSharding | None) -> Any:
    def draw(key: Any, scale: float) -> Any:
        return (scale * jax.random.normal(key, shape)).astype(dtype)

    return jax.jit(draw, out_shardings=place)


def make_tokenizer(num_tokens: int) -> Any:
    """A transformers tokenizer of so many tokens: ASCII letters, then pieces of Python's sources.

    What checks a grammar against a vocabulary walks its tokens letter by letter, so they should be
    as alike as those of real ones. Id 0 ends a text.
    """
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    tokens = dict.fromkeys(["</s>", "\t", "\n", *map(chr, range(32, 127))])
    for path in sorted(Path(os.__file__).parent.rglob("*.py")):
        text = path.read_text(encoding="ascii", errors="ignore")
        for piece in re.findall(r" ?[A-Za-z]+|[0-9]{1,3}|[^A-Za-z0-9\s]+|\s+", text):
            tokens.update(dict.fromkeys(piece[:end] for end in range(1, min(len(piece), 16) + 1)))
        if len(tokens) >= num_tokens:
            break
    vocab = {token: id_ for id_, token in zip(range(num_tokens), tokens, strict=False)}
    backend = Backend(models.BPE(vocab, merges=[]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken("</s>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", clean_up_tokenization_spaces=False
    )


def nano_requests(small: bool, vocab_size: int, seed: int) -> list[tuple[list[int], int]]:
    """256 prompts of 100-1024 tokens, each with an output length from the same range."""
    rng = np.random.default_rng(seed)
    count, low, high = (8, 10, 40) if small else (256, 100, 1024)
    lengths, outputs = rng.integers(low, high + 1, (2, count))
    prompts = [rng.integers(3, vocab_size, length).tolist() for length in lengths]
    return list(zip(prompts, outputs.tolist(), strict=True))


class Report:
    """Figures line by line, on the screen as they come and in a file at the end."""

    def __init__(self, **about: Any) -> None:
        self.about = about
        self.results: list[dict[str, Any]] = []

    def add(self, **result: Any) -> None:
        """Prints and keeps one line."""
        self.results.append(result)
        cells = (
            f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in result.items()
        )
        print("  ".join(cells), flush=True)

    def write(self, path: Path) -> None:
        """Writes all lines as JSON."""
        path.write_text(json.dumps(self.about | {"results": self.results}, indent=2) + "\n")
