"""Whether a model whose config.json ties its output projection has one of its own after all."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from folojax.models.core.config import ModelConfig
from folojax.models.families.families import family_of
from folojax.models.files.quantized_formats import open_weights
from folojax.models.files.safetensors_files import DTYPES, INDEX_FILE, SINGLE_FILE, Tensor

_LOG = logging.getLogger("folojax")


def untie_if_different(directory: Path, config: ModelConfig) -> ModelConfig:
    """The config of what is in the files: untied, if they hold a head that is no copy.

    Fine-tuning can part the two and leave `tie_word_embeddings` as it was. transformers reads both
    then, with a warning (`PreTrainedModel.tie_weights`), and so it is here. Where the directory
    has no weights, the config stands.

    Raises:
        ValueError: a file of the weights is malformed.
    """
    has_weights = any((directory / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))
    if not config.tie_embeddings or not has_weights:
        return config
    parted = parted_head(open_weights(directory, config), config)
    if parted is None:
        return config
    _LOG.warning(
        "config.json of %s says tie_word_embeddings, but %s is there and is not %s: the model has "
        "both, as in transformers. Set tie_word_embeddings to false to say so",
        directory,
        *parted,
    )
    stated = json.loads(config.hf_config) | {"tie_word_embeddings": False}
    return dataclasses.replace(config, tie_embeddings=False, hf_config=json.dumps(stated))


def parted_head(tensors: Mapping[str, Any], config: ModelConfig) -> tuple[str, str] | None:
    """The names of output projection and embedding, if both are there and not the same."""
    _, family = family_of(config.architecture)
    (embed,), (head,) = family.head_names["embed"], family.head_names["lm_head"]
    # The first GPT-2 was saved without the first part of its names.
    embed = embed if embed in tensors else embed.partition(".")[2]
    if head not in tensors or embed not in tensors or _are_equal(tensors[embed], tensors[head]):
        return None
    return head, embed


def _are_equal(first: Tensor, second: Tensor) -> bool:
    """Whether both have the same bits; what cannot be read is refused later."""
    is_readable = len(first.shape) == 2 and first.dtype in DTYPES
    if not is_readable or (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    one, other = (np.empty(first.shape, DTYPES[first.dtype]) for _ in range(2))
    first.read_into(one)
    second.read_into(other)
    return np.array_equal(one.view(np.uint8), other.view(np.uint8))
