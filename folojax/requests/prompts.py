"""The forms in which a prompt may come."""

from collections.abc import Callable, Mapping, Sequence
from typing import (
    Any,
    NamedTuple,
    NotRequired,
    Protocol,
    SupportsIndex,
    TypeAlias,
    TypedDict,
    TypeVar,
)

from folojax.requests.sampling_params import SamplingParams
from folojax.requests.vllm_names import PROMPT_KEYS, own_names
from folojax.text.plain_numbers import is_array, plain
from folojax.text.tokenizer import Tokenizer


class IdArray(Protocol):
    """An array of token ids: of NumPy, JAX or PyTorch."""

    @property
    def ndim(self) -> int:
        """Number of axes: 1 for a prompt, 2 for prompts of the same length."""

    def __array__(self) -> Any:
        """As a NumPy array."""


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt as token ids, and its text to be shown in the output."""

    prompt_token_ids: Sequence[SupportsIndex] | IdArray
    prompt: NotRequired[str]


Prompt: TypeAlias = str | Mapping[str, Any] | Sequence[SupportsIndex] | IdArray
"""Text, token ids (a list or an array), {"prompt": text}, {"prompt_token_ids": ids}."""


_OWN_KEYS = ("prompt", "prompt_token_ids")

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class ParsedPrompt(NamedTuple):
    """The text, where one was given, and its tokens."""

    text: str | None
    token_ids: Sequence[int]


def parse_prompt(
    prompt: Any,
    tokenizer: Tokenizer | None,
    name: str = "prompt 0",
    add_special_tokens: bool = True,
) -> ParsedPrompt:
    """Reads one prompt, called `name` in errors; the rest is as in `parse_prompts`."""
    text: Any = prompt
    token_ids: Any = None
    if isinstance(prompt, Mapping):
        others = {key: prompt[key] for key in prompt if key not in _OWN_KEYS}
        if others and (unknown := own_names(others, PROMPT_KEYS, f"{name}: ")):
            raise ValueError(
                f"{name} has keys {sorted(map(str, unknown))}; it may have "
                '"prompt" and "prompt_token_ids"'
            )
        text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if text is None and token_ids is None:
            raise ValueError(
                f'{name} has keys {sorted(prompt)}; it needs "prompt" or "prompt_token_ids"'
            )
        if text is not None and not isinstance(text, str):
            raise ValueError(f'"prompt" of {name} is a {type(text).__name__}; it must be text')
    elif not isinstance(prompt, str):
        text, token_ids = None, prompt
    if text is None or token_ids is not None:
        if is_array(token_ids, 1):
            return ParsedPrompt(text, token_ids.tolist())
        if not _is_list(token_ids):
            kind = type(token_ids).__name__
            raise ValueError(f"{name} is a {kind}; it must be text, token ids or a dict")
        is_plain = all(type(token) is int for token in token_ids)
        return ParsedPrompt(text, token_ids if is_plain else list(map(plain, token_ids)))
    if tokenizer is None:
        raise ValueError(
            f"{name} is text, but the engine has no tokenizer: pass tokenizer=, or token ids"
        )
    try:
        return ParsedPrompt(text, tokenizer.encode(text, add_special_tokens))
    except ValueError as error:
        raise ValueError(f"{name} cannot be encoded: {error}") from error


def parse_prompts(
    prompts: Prompt | Sequence[Prompt],
    tokenizer: Tokenizer | None,
    name: str = "prompt",
    add_special_tokens: bool = True,
) -> list[ParsedPrompt]:
    """Reads one prompt or a list of them.

    Args:
        prompts: What the user gave.
        tokenizer: For text.
        name: What they are called in errors.
        add_special_tokens: Whether text gets those that the model expects around a prompt.

    Raises:
        ValueError: a prompt has none of the known forms, or is text without a tokenizer.
    """
    return [
        parse_prompt(prompt, tokenizer, f"{name} {index}", add_special_tokens)
        for index, prompt in enumerate(as_list(prompts, name))
    ]


def as_list(prompts: Any, name: str = "prompt") -> Sequence[Any]:
    """The prompts, of which one may stand alone; ValueError as in `parse_prompts`.

    An empty list is no prompts, rather than an empty one.
    """
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if _is_list(prompts):
        is_one = len(prompts) > 0 and all(map(_is_integer, prompts))
        return [prompts] if is_one else prompts
    if is_array(prompts, 1):
        return [prompts]
    if is_array(prompts, 2):
        return list(prompts)
    raise ValueError(f"{name}s is a {type(prompts).__name__}; it must be a {name} or a list")


def each_named(
    name: str, items: Sequence[_Item], function: Callable[[_Item], _Result]
) -> list[_Result]:
    """What a function makes of each item of a user's list.

    Raises:
        ValueError: one that the function raised; where there are several items, with the name and
            the index of its item before it.
    """
    results = []
    for index, item in enumerate(items):
        try:
            results.append(function(item))
        except ValueError as error:
            if len(items) == 1:
                raise
            raise ValueError(f"{name} {index}: {error}") from error
    return results


def conversations(messages: Any) -> list[Any]:
    """A list of conversations, of one that may stand alone.

    Raises:
        ValueError: it is no list of messages, nor of lists of them.
    """
    if not _is_list(messages):
        raise ValueError(
            f'messages is a {type(messages).__name__}; it must be a list of {{"role": ..., '
            '"content": ...}, or a list of such lists'
        )
    if messages and all(isinstance(message, Mapping) for message in messages):
        return [messages]
    for index, conversation in enumerate(messages):
        if not _is_list(conversation) or not conversation:
            raise ValueError(
                f"messages {index} is {conversation!r}; a conversation must be a list of at least "
                'one {"role": ..., "content": ...}'
            )
    return list(messages)


def sampling_params_per_prompt(
    sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    num_prompts: int,
    default: SamplingParams,
) -> list[SamplingParams]:
    """One SamplingParams for each prompt; None is the default.

    Raises:
        ValueError: a list of another length, or something else.
    """
    sampling_params = default if sampling_params is None else sampling_params
    if isinstance(sampling_params, SamplingParams):
        return [sampling_params] * num_prompts
    is_list = isinstance(sampling_params, Sequence)
    if not is_list or not all(isinstance(item, SamplingParams) for item in sampling_params):
        raise ValueError("sampling_params must be a SamplingParams, or a list with one per prompt")
    if len(sampling_params) != num_prompts:
        raise ValueError(
            f"sampling_params has {len(sampling_params)} entries for {num_prompts} prompts: "
            "give one for all, or one for each"
        )
    return list(sampling_params)


def priority_per_prompt(priority: Sequence[int] | None, num_prompts: int) -> list[int]:
    """One priority for each prompt; None is 0 for all.

    Raises:
        ValueError: no list, or one of another length.
    """
    if priority is None:
        return [0] * num_prompts
    if not _is_list(priority) or len(priority) != num_prompts:
        raise ValueError(
            f"priority is {priority!r:.80} for {num_prompts} prompts: give a list with one for each"
        )
    return [plain(one) for one in priority]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _is_integer(value: Any) -> bool:
    return not isinstance(value, str | Mapping) and isinstance(plain(value), int)
