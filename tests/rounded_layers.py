"""Models of transformers whose linear layers compute as quantised kernels do, by NumPy."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from folojax.models.core.dense_attend import dense_attend
from folojax.models.files.checkpoint import build_module, load_params, open_checkpoint
from tests import reference
from tests.families import save_family

CASES = ("llama", "qwen2", "qwen3", "gpt2", "olmo2", "granite", "qwen3-moe")


def save_case(case: str, directory: Path) -> Any:
    """A tiny model of transformers, saved and returned; embeddings are tied in some."""
    if case in ("llama", "qwen2", "qwen3"):
        # Three layers: with two more values of llama's lie on borders between two integers.
        changes: dict[str, Any] = {"tie_word_embeddings": case != "llama", "num_hidden_layers": 3}
        return reference.save_tiny(case, directory, **changes)
    return save_family(case, directory)


def rounded(
    model: Any,
    multiply: Callable[[str, np.ndarray, np.ndarray], np.ndarray],
    table: Callable[[np.ndarray], np.ndarray],
) -> Any:
    """The model with other linear layers, routers apart, and another token embedding.

    Args:
        model: Of transformers; changed in place.
        multiply: Gives [N, O] for a layer's name, inputs [N, I] and kernel [O, I].
        table: Gives the embedding that is read, for the model's [V, E].
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    def linear(name: str, kernel: np.ndarray, bias: Any, x: Any) -> Any:
        flat = x.detach().numpy().reshape(-1, x.shape[-1])
        out = torch.from_numpy(multiply(name, flat, kernel)).reshape(*x.shape[:-1], -1)
        return out if bias is None else out + bias

    def embed(rows: np.ndarray, ids: Any) -> Any:
        return torch.from_numpy(rows)[ids]

    def instead(forward: Any, _: Any, args: tuple, __: Any) -> Any:
        return forward(*args)

    for name, layer in model.named_modules():
        is_router = name.endswith((".gate", ".router"))
        if isinstance(layer, torch.nn.Linear | Conv1D) and not is_router:
            kernel = layer.weight.detach().numpy()
            kernel = kernel.T if isinstance(layer, Conv1D) else kernel
            forward: Any = functools.partial(linear, name, kernel.copy(), layer.bias)
        elif isinstance(layer, torch.nn.Embedding) and "wpe" not in name:
            forward = functools.partial(embed, table(layer.weight.detach().numpy()))
        else:
            continue
        layer.register_forward_hook(functools.partial(instead, forward))
    return model


def _logits(module: Any, params: Any, tokens: list[int]) -> np.ndarray:
    """Scores [T, V], operation by operation: a compiled whole rounds inputs of layers otherwise."""
    ids = jnp.asarray(tokens)
    hidden, _ = module.apply({"params": params}, ids, jnp.arange(len(tokens)), None, dense_attend)
    return np.asarray(module.apply({"params": params}, hidden, method="logits"))


def check_case(
    directory: Path,
    case: str,
    quantization: str,
    multiply: Callable[[str, np.ndarray, np.ndarray], np.ndarray],
    table: Callable[[np.ndarray], np.ndarray],
    share: float,
) -> None:
    """Loads a case with its kernels quantised, and compares with the rounded model's scores.

    A value on the border between two integers may fall to either side of it, and later tokens
    attend to it: such a `share` of all scores is equal, and the others are near.
    """
    model = save_case(case, directory)
    tokens = np.random.default_rng(0).integers(3, 120, 24).tolist()
    plain = reference.logits(model, tokens)
    expected = reference.logits(rounded(model, multiply, table), tokens)
    checkpoint = open_checkpoint(directory)
    params = load_params(checkpoint, jnp.float32, quantization)
    found = _logits(build_module(checkpoint.config, jnp.float32), params, tokens)
    difference = np.abs(found - expected)
    assert np.quantile(difference, share) < 2e-4
    assert difference.max() < 0.1 * np.abs(plain - expected).max()
