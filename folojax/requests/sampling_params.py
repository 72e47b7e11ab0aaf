"""What a user may ask of a sampler, as in vLLM; and the request that carries it to the runner."""

import copy
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from folojax.requests.frozen_dict import FrozenDict
from folojax.requests.structured_outputs import StructuredOutputsParams, structured_outputs
from folojax.requests.vllm_names import SAMPLING_FIELDS, takes_names
from folojax.sampling.sampling_class import SamplingClass
from folojax.sched.option_fields import (
    Option,
    documented,
    option,
    option_problems,
    options_of,
)
from folojax.sched.request import Request
from folojax.text.plain_numbers import plain

if TYPE_CHECKING:
    import numpy as np

    from folojax.requests.grammars import Grammar

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this are greedy."""

MAX_TEMPERATURE = 1e38
"""The sampler computes in float32, where more than 3.4e38 is infinite."""

MAX_SCALE = 1e30
"""Of a bias and of a repetition penalty: divided by the least temperature they stay finite."""

MAX_N = 16384


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: Any) -> bool:
    # Half of a surrogate pair is in no text that a tokenizer reads or writes.
    return isinstance(value, str) and bool(value) and not re.search("[\ud800-\udfff]", value)


def _is_bias(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and -MAX_SCALE <= value <= MAX_SCALE


def _is_argument(value: Any) -> bool:
    items = value if isinstance(value, tuple) else (value,)
    return all(isinstance(item, bool | int | float | str) for item in items)


_TOKEN_IDS: dict[str, Any] = {
    "is_valid": lambda value: isinstance(value, tuple) and all(map(_is_token_id, value)),
    "must_be": "a list of token ids: integers of at least 0",
}
_TEXTS: dict[str, Any] = {
    "is_valid": lambda value: isinstance(value, tuple) and all(map(_is_text, value)),
    "must_be": "a list of strings that are not empty, and without lone surrogates",
}


@takes_names(SAMPLING_FIELDS)
@documented
@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class SamplingParams:
    """How one prompt is continued.

    Logits processors apply first, then penalties, bias and masks, temperature, min-p, top-k, top-p,
    and the draw.
    Lists are kept as tuples and `logit_bias` as a frozen mapping: a SamplingParams can be shared
    and hashed. A field that is assigned to is checked as when it was made; requests under way keep
    what they came with. What depends on the model (ids in its vocabulary, the cap on
    log-probabilities) is checked by the engine.

    Raises:
        ValueError: some fields are out of range; all of them are named.
    """

    n: int = option(
        1,
        "Samples of the prompt; sample i of seed s has seed s + i.",
        at_least=1,
        at_most=MAX_N,
    )
    temperature: float = option(
        1.0,
        "Divides the logits; below 1e-5 is greedy: exact argmax, lowest id wins a tie.",
        at_least=0,
        at_most=MAX_TEMPERATURE,
    )
    top_p: float = option(
        1.0,
        """Smallest set of tokens that holds this mass, the likeliest first, and of equally likely
        ones the lowest ids. 1 is off.""",
        above=0,
        at_most=1,
    )
    top_k: int = option(
        0,
        "Most tokens to choose from; equals of the last are kept. 0 or -1 is off.",
        at_least=-1,
    )
    min_p: float = option(
        0.0,
        "Drops tokens below this share of the likeliest one's probability. 0 is off.",
        at_least=0,
        at_most=1,
    )
    presence_penalty: float = option(
        0.0,
        "Taken from the logit of every token sampled before. 0 is off.",
        at_least=-2,
        at_most=2,
    )
    frequency_penalty: float = option(
        0.0,
        "Taken from the logit of a token once for each time it was sampled. 0 is off.",
        at_least=-2,
        at_most=2,
    )
    repetition_penalty: float = option(
        1.0,
        """Logits of tokens in the prompt or the output are divided by it where positive, multiplied
        where negative. 1 is off.""",
        at_least=1 / MAX_SCALE,
        at_most=MAX_SCALE,
    )
    max_tokens: int | None = option(
        16, "Most output tokens; None goes on to the model's limit.", at_least=1
    )
    min_tokens: int = option(
        0,
        """Until so many outputs exist, EOS and stop ids cannot be sampled, and stop strings are
        passed over.""",
        at_least=0,
    )
    stop: str | Iterable[str] | None = option(
        (), "Strings that end the text; it is cut there, `token_ids` keep everything.", **_TEXTS
    )
    include_stop_str_in_output: bool = option(
        False, "Cut behind the stop string, and keep a stop token's text."
    )
    stop_token_ids: Iterable[int] | None = option((), "Tokens that end the text.", **_TOKEN_IDS)
    ignore_eos: bool = option(False, "The model's end tokens are tokens like any other.")
    logit_bias: Mapping[int, float] | None = option(
        None,
        "Added to the logits of these ids.",
        is_valid=lambda value: (
            isinstance(value, FrozenDict)
            and all(map(_is_token_id, value))
            and all(map(_is_bias, value.values()))
        ),
        must_be=(
            "a dict of token ids (integers of at least 0) to finite numbers in "
            f"[{-MAX_SCALE:g}, {MAX_SCALE:g}]"
        ),
    )
    allowed_token_ids: Iterable[int] | None = option(
        None,
        "Only these can be sampled; None allows all.",
        is_valid=lambda value: _TOKEN_IDS["is_valid"](value) and len(value) > 0,
        must_be="a list of at least one token id (integers of at least 0); None allows all",
    )
    bad_words: Iterable[str] | None = option(
        (),
        """Texts that cannot be sampled, neither at the start of a word nor inside one: encoded with
        a leading space and without, the last token of each encoding is banned where the tokens
        before it stand, prompt included.""",
        **_TEXTS,
    )
    logprobs: int | None = option(
        None,
        """How many of the likeliest tokens are reported for each output token, besides the sampled
        one; 0 is the sampled one only, -1 the whole vocabulary, None nothing, True one.""",
        at_least=-1,
    )
    prompt_logprobs: int | None = option(
        None, "The same for the tokens of the prompt.", at_least=-1
    )
    record: bool = option(
        False,
        """Whether every output token comes with its log-probability record
        (`CompletionOutput.record`). With top-p it costs some passes over the vocabulary.""",
    )
    logits_processors: Iterable[str] | None = option(
        (),
        """Names of the engine's logits processors that are on, applied to the model's logits in the
        engine's order.""",
        **_TEXTS,
    )
    extra_args: Mapping[str, Any] | None = option(
        None,
        """Keywords of the `init` of these logits processors; each gets those that it takes.""",
        is_valid=lambda value: (
            isinstance(value, FrozenDict)
            and all(isinstance(name, str) for name in value)
            and all(map(_is_argument, value.values()))
        ),
        must_be="a dict of names to numbers, texts or lists of these",
    )
    structured_outputs: StructuredOutputsParams | None = option(  # noqa: RUF009  (a field)
        None,
        """What the text must be (`StructuredOutputsParams`, or its fields as a dict): a mask behind
        all other edits. An end token ends it, whatever `ignore_eos` says.""",
        is_valid=lambda value: isinstance(value, StructuredOutputsParams),
        must_be="a StructuredOutputsParams, or a dict of its fields",
    )
    activation_edits: Iterable[str] | None = option(
        (),
        """Names of the engine's activation edits that are on, for prompt and output. Such a request
        shares no pages with others.""",
        **_TEXTS,
    )
    activations: bool = option(
        False,
        """Whether the residual stream behind the layers of `activation_taps` is returned
        (`CompletionOutput.activations`). Such a request computes all of its prompt.""",
    )
    routed_experts: bool = option(
        False,
        """Whether the experts that each token was sent to are returned
        (`CompletionOutput.routed_experts`). Such a request computes all of its prompt.""",
    )
    seed: int | None = option(
        None,
        "Of the draws, recorded in the output; None or -1 takes one from the engine's seed.",
        at_least=0,
        at_most=2**64 - 1,
    )
    skip_special_tokens: bool = option(True, "Special tokens leave no text.")
    spaces_between_special_tokens: bool = option(
        True,
        """Handed to the tokenizer's `decode`. Byte-level and SentencePiece vocabularies write no
        such spaces, whatever it says.""",
    )
    detokenize: bool = option(True, "False leaves the text empty.")

    def __post_init__(self) -> None:
        own: type = type(self)
        for one in options_of(own):
            object.__setattr__(self, one.name, _frozen(one, getattr(self, one.name)))
        # Fields can be compared only once each of them is what it must be.
        if problems := option_problems(self) or list(self._conflicts()):
            raise ValueError("SamplingParams: " + "; ".join(problems))

    if not TYPE_CHECKING:  # for whom an assignment is that of a dataclass

        def __setattr__(self, name: str, value: Any) -> None:
            if name in self.__dict__:  # or it is being made
                value = getattr(dataclasses.replace(self, **{name: value}), name)
            elif name not in self.__dataclass_fields__:
                raise AttributeError(f"SamplingParams has no field {name!r}")
            object.__setattr__(self, name, value)

    @classmethod
    def from_optional(cls, **fields: Any) -> "SamplingParams":
        """Parameters of which None means the default, also where None is no value."""
        own: type = cls
        numbers = {one.name for one in options_of(own) if not one.has_none}
        return cls(
            **{name: v for name, v in fields.items() if v is not None or name not in numbers}
        )

    def clone(self) -> "SamplingParams":
        """A copy, to be changed by itself."""
        return copy.copy(self)

    def _conflicts(self) -> Iterator[str]:
        if self.stop and not self.detokenize:
            yield (
                f"stop is {list(self.stop)!r} but detokenize is False; stop strings need "
                "detokenize=True"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            yield (
                f"min_tokens is {self.min_tokens}; it must be at most max_tokens, {self.max_tokens}"
            )
        if self.n > 1 and self.is_greedy:
            yield (
                f"n is {self.n} but temperature is {self.temperature}: greedy samples are equal, "
                "so n must be 1"
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, with no draw."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def sampling_class(self) -> SamplingClass:
        """What these parameters need of the sampler; the bans before `min_tokens` aside."""
        has_penalty = (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )
        has_mask = self.allowed_token_ids is not None or bool(self.bad_words)
        if has_penalty or has_mask or bool(self.logit_bias):
            return SamplingClass.EDITED
        if self.is_greedy:
            return SamplingClass.GREEDY
        has_cut = self.top_p < 1 or self.top_k > 0 or self.min_p > 0
        return SamplingClass.TRUNCATED if has_cut else SamplingClass.RANDOM


def _frozen(one: Option, value: Any) -> Any:
    """Plain numbers, tuples and frozen dicts for what came; a value of no such kind stays."""
    if one.name == "structured_outputs" and isinstance(value, Mapping):
        return structured_outputs(value)
    if isinstance(value, Mapping):
        return FrozenDict({plain(key): _listed(item) for key, item in value.items()})
    if not one.is_list:
        return plain(value)
    if value is None:
        return one.default
    if one.name == "stop" and isinstance(value, str):
        return (value,)
    return _listed(value)


def _listed(value: Any) -> Any:
    """A tuple of what came as a list of any kind, or else one plain number."""
    value = plain(value)
    # Letter by letter, a text would be a list of bad words.
    is_listed = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
    return tuple(map(plain, value)) if is_listed else value


@dataclasses.dataclass(eq=False, kw_only=True)
class SamplingRequest(Request):
    """A request of the scheduler, and how its tokens are sampled and reported.

    The fields of `Request` are written by the scheduler, these by the engine, before it queues the
    request; the runner reads both.
    """

    sampling_params: SamplingParams  # as the user gave them
    owner: Any = dataclasses.field(default=None, repr=False)  # the user's request; opaque here
    seed: int | None = None  # of this sample; None for greedy
    banned_ids: tuple[int, ...] = ()  # not to be sampled at positions below `banned_until`
    banned_until: int = 0  # a position in the sequence, prompt included
    # Tokens that may never be completed, within or after the prompt: 1 to `MAX_BAD_WORD_TOKENS`.
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    num_logprobs: int | None = None  # alternatives to report with each token; None: no logprobs
    num_prompt_logprobs: int | None = None  # the same for the tokens of the prompt
    next_token: int | None = None  # follows the prompt, and is to be scored with it
    grammar: "Grammar | None" = None  # that its outputs follow
    # The experts that its tokens are sent to, [N, L, M]; below 0: those that the router chooses.
    # None: all are.
    routing: "np.ndarray | None" = None

    @property
    def is_reported(self) -> bool:
        """Whether more is told of its tokens than how likely each was."""
        return self.num_logprobs is not None or self.sampling_params.record

    @property
    def has_penalty(self) -> bool:
        """Whether a token's logit depends on what was sampled or prompted before."""
        params = self.sampling_params
        return bool(
            params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        )

    @property
    def has_slot_edits(self) -> bool:
        """Whether the request needs its own row of `EditState`, written when it joins."""
        params = self.sampling_params
        has_bias = params.logit_bias or params.allowed_token_ids is not None
        return bool(self.has_penalty or has_bias or self.bad_word_ids)

    def bans(self, position: int) -> list[tuple[int, tuple[int, ...]]]:
        """Tokens banned at a position, with those each may not follow; the bias has others."""
        bans = [(word[-1], word[:-1]) for word in self.bad_word_ids if len(word) > 1]
        if position < self.banned_until:
            bans += [(token, ()) for token in self.banned_ids]
        return bans
