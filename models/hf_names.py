"""Where each parameter of a decoder lies in a Hugging Face checkpoint, under which names."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from folojax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensors that make up one parameter.

    A checkpoint keeps linear layers apart and as [out, in]; a parameter joins those that read the
    same input, and lies as [in, out].
    """

    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    """(name, shape) in the checkpoint, joined along their first axis in this order."""
    is_transposed: bool = False
    """The parameter is the transpose of the joined tensors."""


def parameter_sources(config: ModelConfig) -> dict[str, Any]:
    """The tree of `init_params`, with a `Source` in the place of each array."""
    width = config.hidden_size
    sources: dict[str, Any] = {
        "embed": _vectors(("model.embed_tokens.weight", (config.vocab_size, width))),
        "final_norm": _vectors(("model.norm.weight", (width,))),
    }
    if not config.tie_embeddings:
        sources["lm_head"] = _kernel(("lm_head.weight", (config.vocab_size, width)))
    for layer in range(config.num_layers):
        sources[f"layers_{layer}"] = _block_sources(config, f"model.layers.{layer}.")
    return sources


def is_ignorable(name: str, config: ModelConfig) -> bool:
    """Whether a tensor that no parameter asks for may be passed over.

    True for rotary frequencies, which old exports store though the config determines them, and
    for the output projection of a model that ties it to the embedding.
    """
    if name == "lm_head.weight":
        return config.tie_embeddings
    return re.fullmatch(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", name) is not None


def _block_sources(config: ModelConfig, prefix: str) -> dict[str, Source]:
    width, head_dim = config.hidden_size, config.head_dim
    rows = {
        "q": config.num_heads * head_dim,
        "k": config.num_kv_heads * head_dim,
        "v": config.num_kv_heads * head_dim,
    }
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    inner = config.intermediate_size
    sources = {
        "attn_norm": _vectors((prefix + "input_layernorm.weight", (width,))),
        "qkv": _kernel(*((f"{attention}{n}_proj.weight", (rows[n], width)) for n in rows)),
        "o": _kernel((attention + "o_proj.weight", (width, config.num_heads * head_dim))),
        "mlp_norm": _vectors((prefix + "post_attention_layernorm.weight", (width,))),
        "gate_up": _kernel(*((f"{mlp}{n}_proj.weight", (inner, width)) for n in ("gate", "up"))),
        "down": _kernel((mlp + "down_proj.weight", (width, inner))),
    }
    if config.qkv_bias:
        sources["qkv_bias"] = _vectors(*((f"{attention}{n}_proj.bias", (rows[n],)) for n in rows))
    if config.qk_norm:
        for n in ("q", "k"):
            sources[f"{n}_norm"] = _vectors((f"{attention}{n}_norm.weight", (head_dim,)))
    return sources


def _vectors(*tensors: tuple[str, tuple[int, ...]]) -> Source:
    return Source(tensors)


def _kernel(*tensors: tuple[str, tuple[int, ...]]) -> Source:
    return Source(tensors, is_transposed=True)
