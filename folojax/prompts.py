"""The forms in which a prompt may come."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from folojax.sampling_params import SamplingParams
from folojax.tokenizer import Tokenizer

Prompt: TypeAlias = str | Mapping[str, Any] | Sequence[int]
"""Text, token ids (a list, or an array in a dict), {"prompt": text}, {"prompt_token_ids": ids}."""


class ParsedPrompt(NamedTuple):
    """The text, where one was given, and its tokens."""

    text: str | None
    token_ids: Sequence[int]


def parse_prompt(prompt: Prompt, tokenizer: Tokenizer | None) -> ParsedPrompt:
    """Reads one prompt; ValueError as in `parse_prompts`."""
    return _parse(prompt, 0, tokenizer)


def parse_prompts(
    prompts: Prompt | Sequence[Prompt], tokenizer: Tokenizer | None
) -> list[ParsedPrompt]:
    """Reads one prompt or a list of them.

    Raises:
        ValueError: a prompt has none of the known forms, or is text without a tokenizer.
    """
    if isinstance(prompts, str | Mapping) or _is_token_ids(prompts):
        return [_parse(prompts, 0, tokenizer)]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray):
        raise ValueError(f"prompts is a {type(prompts).__name__}; it must be a prompt or a list")
    return [_parse(prompt, index, tokenizer) for index, prompt in enumerate(prompts)]


def params_per_prompt(
    params: SamplingParams | Sequence[SamplingParams], num_prompts: int
) -> list[SamplingParams]:
    """One SamplingParams for each prompt.

    Raises:
        ValueError: a list of another length, or something else.
    """
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    is_list = isinstance(params, Sequence)
    if not is_list or not all(isinstance(item, SamplingParams) for item in params):
        raise ValueError("sampling_params must be a SamplingParams, or a list with one per prompt")
    if len(params) != num_prompts:
        raise ValueError(
            f"sampling_params has {len(params)} entries for {num_prompts} prompts: give one for "
            "all, or one for each"
        )
    return list(params)


def _parse(prompt: Any, index: int, tokenizer: Tokenizer | None) -> ParsedPrompt:
    if isinstance(prompt, Mapping):
        if "prompt_token_ids" in prompt:
            return ParsedPrompt(prompt.get("prompt"), _token_ids(prompt["prompt_token_ids"], index))
        if "prompt" not in prompt:
            raise ValueError(
                f'prompt {index} has keys {sorted(prompt)}; it needs "prompt" or "prompt_token_ids"'
            )
        prompt = prompt["prompt"]
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(
                f"prompt {index} is text, but the engine has no tokenizer: pass tokenizer=, or "
                "token ids"
            )
        return ParsedPrompt(prompt, tokenizer.encode(prompt))
    return ParsedPrompt(None, _token_ids(prompt, index))


def _token_ids(prompt: Any, index: int) -> Sequence[int]:
    if isinstance(prompt, np.ndarray | jax.Array) and prompt.ndim == 1:
        return prompt.tolist()
    if isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes | bytearray):
        return prompt
    raise ValueError(
        f"prompt {index} is a {type(prompt).__name__}; it must be text, token ids or a dict"
    )


def _is_token_ids(prompts: Any) -> bool:
    """Whether a list is one prompt of ids; an empty list is no prompts rather than an empty one."""
    is_list = isinstance(prompts, Sequence) and not isinstance(prompts, str | bytes | bytearray)
    return is_list and len(prompts) > 0 and all(isinstance(item, int) for item in prompts)
