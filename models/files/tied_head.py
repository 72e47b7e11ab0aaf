"""Whether a model whose config.json ties its output projection has one of its own after all."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np

from folojax.models.core.config import ModelConfig
from folojax.models.core.registry import family_of
from folojax.models.files.safetensors_files import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorFiles,
    open_tensors,
)

_LOG = logging.getLogger("folojax")


def untie_if_different(directory: Path, config: ModelConfig) -> ModelConfig:
    """The config of what is in the files: untied, if they hold a head that is no copy.

    Fine-tuning can part the two and leave `tie_word_embeddings` as it was. transformers reads both
    then, with a warning (`PreTrainedModel.tie_weights`), and so it is here.

    Args:
        directory: In the Hugging Face layout; where it has no weights, the config stands.
        config: As config.json says.

    Raises:
        ValueError: a file of the weights is malformed.
    """
    if not config.tie_embeddings or not any(
        (directory / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)
    ):
        return config
    _, family = family_of(config.architecture)
    (embed,), (head,) = family.head_names["embed"], family.head_names["lm_head"]
    tensors = open_tensors(directory)
    there = tensors.names()
    # The first GPT-2 was saved without the first part of its names.
    embed = embed if embed in there else embed.partition(".")[2]
    if head not in there or embed not in there or _are_equal(tensors, embed, head):
        return config
    _LOG.warning(
        "config.json of %s says tie_word_embeddings, but %s is there and is not %s: the model has "
        "both, as in transformers. Set tie_word_embeddings to false to say so",
        directory,
        head,
        embed,
    )
    stated = json.loads(config.hf_config) | {"tie_word_embeddings": False}
    return dataclasses.replace(config, tie_embeddings=False, hf_config=json.dumps(stated))


def _are_equal(tensors: TensorFiles, first: str, second: str) -> bool:
    shape = tensors.shape(first)
    if shape != tensors.shape(second) or tensors.dtype(first) != tensors.dtype(second):
        return False
    return all(
        np.array_equal(one, other)
        for one, other in zip(tensors.blocks(first), tensors.blocks(second), strict=True)
    )
