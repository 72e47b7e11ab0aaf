"""Options are declared once: their documentation and their flags follow from their fields."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from folojax import EngineConfig, SamplingParams
from folojax.config import add_flags, given_options, options_page

ROOT = Path(__file__).parents[2]

NO_FLAG = {"logit_bias", "extra_args", "structured_outputs"}
FIELDS: dict[type, list[str]] = {
    cls: [field.name for field in dataclasses.fields(cls)] for cls in (EngineConfig, SamplingParams)
}
FLAGS = {cls: [name for name in names if name not in NO_FLAG] for cls, names in FIELDS.items()}


def parse(cls: type, words: list[str], **defaults: Any) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_flags(parser, cls, FLAGS[cls], defaults)
    return given_options(parser.parse_args(words), cls)


def test_the_page_of_options_is_that_of_the_fields() -> None:
    """Made by `python -c "from folojax.config import *; print(options_page())"`."""
    assert (ROOT / "docs" / "options.md").read_text() == options_page() + "\n"


def test_docstrings_name_every_option() -> None:
    for cls, names in FIELDS.items():
        doc = cls.__doc__ or ""
        assert all(f"\n        {name}: " in doc for name in names)
        assert max(map(len, doc.splitlines())) <= 100


def test_flags_are_read_back_as_options() -> None:
    words = "--max-num-seqs 3 --watermark 0.5 --no-enable-prefix-caching --quantization int8"
    assert parse(EngineConfig, words.split()) == {
        "max_num_seqs": 3,
        "watermark": 0.5,
        "enable_prefix_caching": False,
        "quantization": "int8",
    }
    words = "--stop a b --stop c --stop-token-ids 1 2 --top-p 1 --ignore-eos --seed 0"
    assert parse(SamplingParams, words.split()) == {
        "stop": ["a", "b", "c"],
        "stop_token_ids": [1, 2],
        "top_p": 1.0,
        "ignore_eos": True,
        "seed": 0,
    }


def test_what_is_not_given_is_left_out_unless_there_is_a_default() -> None:
    assert parse(EngineConfig, []) == {}
    assert parse(SamplingParams, [], temperature=0.0) == {"temperature": 0.0}
    assert parse(SamplingParams, ["--temperature", "1"], temperature=0.0) == {"temperature": 1.0}


def test_help_says_what_a_flag_means_and_its_default() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, SamplingParams, FLAGS[SamplingParams], {"max_tokens": 64})
    told = " ".join(parser.format_help().split())
    assert (
        "--max-tokens N Most output tokens; None goes on to the model's limit; default: 64" in told
    )


def test_an_unknown_option_has_no_flag() -> None:
    with pytest.raises(KeyError, match="max_seqs"):
        add_flags(argparse.ArgumentParser(), EngineConfig, ["max_seqs"])
