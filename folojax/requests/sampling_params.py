"""What a user may ask of a sampler; names and defaults as in vLLM."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from folojax.sampling.sampler import SamplingClass
from folojax.text.plain_numbers import plain

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this are greedy."""

MAX_TEMPERATURE = 1e38
"""The sampler computes in float32, where more than 3.4e38 is infinite."""

MAX_SCALE = 1e30
"""Of a bias and of a repetition penalty: divided by the least temperature they stay finite."""

MAX_N = 16384


class FrozenDict(Mapping[int, float]):
    """A dictionary that cannot change, so that what holds it can be hashed and shared."""

    def __init__(self, items: Mapping[Any, Any]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: int) -> float:
        return self._items[key]

    def __iter__(self) -> Iterator[int]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one prompt is continued.

    Penalties, bias and masks apply first, then temperature, min-p, top-k, top-p, and the draw.
    Lists are kept as tuples and `logit_bias` as a frozen mapping: a SamplingParams can be shared
    and hashed. What depends on the model (ids in its vocabulary, the cap on log-probabilities) is
    checked by the engine.

    Attributes:
        n: Samples of the prompt, 1 to 16384; sample i of seed s has seed s + i.
        temperature: 0 to 1e38; below 1e-5 is greedy: exact argmax, lowest id wins a tie.
        top_p: In (0, 1]: smallest set of tokens that holds this mass, the likeliest first, and of
            equally likely ones the lowest ids. 1 is off.
        top_k: Most tokens to choose from; equals of the last are kept. 0 or -1 is off.
        min_p: In [0, 1]: drops tokens below this share of the likeliest one's probability.
        presence_penalty: In [-2, 2]: taken from the logit of every token sampled before.
        frequency_penalty: In [-2, 2]: taken from it once for each time it was sampled.
        repetition_penalty: 1e-30 to 1e30: logits of tokens in the prompt or the output are
            divided by it where positive, multiplied where negative. 1 is off.
        max_tokens: Most output tokens, at least 1; None goes on to the model's limit.
        min_tokens: Until so many outputs exist, EOS and stop ids cannot be sampled, and stop
            strings are passed over.
        stop: Strings that end the text; it is cut there, `token_ids` keep everything.
        include_stop_str_in_output: Cut behind the stop string, and keep a stop token's text.
        stop_token_ids: Tokens that end the text.
        ignore_eos: The model's end tokens are tokens like any other.
        logit_bias: Added to the logits of these ids; each in [-1e30, 1e30].
        allowed_token_ids: Only these can be sampled; None allows all.
        bad_words: Texts that cannot be sampled, neither at the start of a word nor inside one:
            encoded with a leading space and without, the last token of each encoding is banned
            where the tokens before it stand, prompt included.
        logprobs: How many of the likeliest tokens are reported for each output token, besides
            the sampled one; 0 is the sampled one only, -1 the whole vocabulary, None nothing.
        prompt_logprobs: The same for the tokens of the prompt.
        record: Whether every output token comes with its log-probability record
            (`CompletionOutput.record`). With top-p it costs some passes over the vocabulary.
        logits_processors: Names of the engine's logits processors that are on, applied to the
            model's logits in the engine's order.
        activation_edits: Names of the engine's activation edits that are on, for prompt and
            output. Such a request shares no pages with others.
        activations: Whether the streams behind the engine's tapped layers are returned
            (`CompletionOutput.activations`). Such a request computes all of its prompt.
        seed: 0 to 2**64 - 1; None draws one from the engine's seed. Recorded in the output.
        skip_special_tokens: Special tokens leave no text.
        spaces_between_special_tokens: Handed to the tokenizer's `decode`. Byte-level and
            SentencePiece vocabularies write no such spaces, whatever it says.
        detokenize: False leaves the text empty.

    Raises:
        ValueError: some fields are out of range; all of them are named.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Iterable[str] | None = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: Iterable[int] | None = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Iterable[int] | None = None
    bad_words: Iterable[str] | None = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    record: bool = False
    logits_processors: Iterable[str] | None = ()
    activation_edits: Iterable[str] | None = ()
    activations: bool = False
    seed: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        problems = [
            *self._freeze_lists(),
            *self._freeze_bias(),
            *self._scalar_problems(),
            *self._conflicts(),
        ]
        if problems := [problem for problem in problems if problem]:
            raise ValueError("SamplingParams: " + "; ".join(problems))

    def _freeze_lists(self) -> Iterator[str]:
        """Keeps tuples; a value that is no list stays as it came."""
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, is_wanted, wanted in _LISTS:
            value = getattr(self, name)
            if value is None and name == "allowed_token_ids":
                continue
            value = () if value is None else value
            # Letter by letter, a text would be a list of bad words.
            if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
                yield f"{name} is {value!r}; it must be a list of {wanted}"
                continue
            items = tuple(plain(item) for item in value)
            object.__setattr__(self, name, items)
            if not all(is_wanted(item) for item in items):
                yield f"{name} is {list(items)!r}; it must hold {wanted}"
        if self.allowed_token_ids == ():
            yield "allowed_token_ids is []; it must hold at least one id, or be None to allow all"

    def _freeze_bias(self) -> Iterator[str]:
        bias = self.logit_bias
        if bias is None:
            return
        if not isinstance(bias, Mapping):
            yield f"logit_bias is {bias!r}; it must be a dict of token ids to numbers"
            return
        frozen = FrozenDict({plain(key): plain(value) for key, value in bias.items()})
        object.__setattr__(self, "logit_bias", frozen)
        if not all(_is_token_id(key) for key in frozen):
            yield f"logit_bias is {frozen!r}; its keys must be token ids: integers of at least 0"
        if not all(_is_number(value) and abs(value) <= MAX_SCALE for value in frozen.values()):
            yield (
                f"logit_bias is {frozen!r}; its values must be finite numbers in "
                f"[{-MAX_SCALE}, {MAX_SCALE}]"
            )

    def _scalar_problems(self) -> Iterator[str]:
        for field in dataclasses.fields(self):
            if field.name not in _STRUCTURED:
                object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        yield self._int("n", 1, MAX_N)
        yield self._number("temperature", 0.0, MAX_TEMPERATURE)
        yield self._number("top_p", 0.0, 1.0, is_open_below=True)
        yield self._int("top_k", -1)
        yield self._number("min_p", 0.0, 1.0)
        yield self._number("presence_penalty", -2.0, 2.0)
        yield self._number("frequency_penalty", -2.0, 2.0)
        yield self._number("repetition_penalty", 1 / MAX_SCALE, MAX_SCALE)
        if self.max_tokens is not None:
            yield self._int("max_tokens", 1)
        yield self._int("min_tokens", 0)
        if self.seed is not None:
            yield self._int("seed", 0, 2**64 - 1)
        if self.logprobs is not None:
            yield self._int("logprobs", -1)
        if self.prompt_logprobs is not None:
            yield self._int("prompt_logprobs", -1)
        for name in ("include_stop_str_in_output", "ignore_eos", "detokenize", "record"):
            yield self._bool(name)
        for name in ("skip_special_tokens", "spaces_between_special_tokens", "activations"):
            yield self._bool(name)

    def _conflicts(self) -> Iterator[str]:
        if isinstance(self.stop, tuple) and self.stop and self.detokenize is False:
            yield (
                f"stop is {list(self.stop)!r} but detokenize is False; stop strings need "
                "detokenize=True"
            )
        if _is_int(self.max_tokens) and _is_int(self.min_tokens):
            assert self.max_tokens is not None
            if self.min_tokens > self.max_tokens:
                yield (
                    f"min_tokens is {self.min_tokens}; it must be at most max_tokens, "
                    f"{self.max_tokens}"
                )
        if _is_int(self.n) and self.n > 1 and self.is_greedy:
            yield (
                f"n is {self.n} but temperature is {self.temperature}: greedy samples are equal, "
                "so n must be 1"
            )

    def _int(self, name: str, low: int, high: int | None = None) -> str:
        value = getattr(self, name)
        if _is_int(value) and low <= value and (high is None or value <= high):
            return ""
        bound = f"of at least {low}" if high is None else f"from {low} to {high}"
        return f"{name} is {value!r}; it must be an integer {bound}"

    def _number(self, name: str, low: float, high: float, is_open_below: bool = False) -> str:
        value = getattr(self, name)
        is_excluded = is_open_below and value == low
        if _is_number(value) and low <= value <= high and not is_excluded:
            return ""
        bracket = "(" if is_open_below else "["
        return f"{name} is {value!r}; it must be a finite number in {bracket}{low}, {high}]"

    def _bool(self, name: str) -> str:
        value = getattr(self, name)
        return "" if isinstance(value, bool) else f"{name} is {value!r}; it must be True or False"

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, with no draw."""
        return isinstance(self.temperature, int | float) and self.temperature < GREEDY_TEMPERATURE

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


def _is_int(value: Any) -> bool:
    # bool is an int to Python, but `top_k=True` is a mistake.
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and (isinstance(value, int) or math.isfinite(value))


def _is_token_id(value: Any) -> bool:
    return _is_int(value) and value >= 0


def _is_text(value: Any) -> bool:
    # Half of a surrogate pair is in no text that a tokenizer reads or writes.
    return isinstance(value, str) and bool(value) and not re.search("[\ud800-\udfff]", value)


_TEXTS = "strings that are not empty, and without lone surrogates"
_IDS = "token ids: integers of at least 0"
_LISTS: tuple[tuple[str, Any, str], ...] = (
    ("stop", _is_text, _TEXTS),
    ("stop_token_ids", _is_token_id, _IDS),
    ("allowed_token_ids", _is_token_id, _IDS),
    ("bad_words", _is_text, _TEXTS),
    ("logits_processors", _is_text, _TEXTS),
    ("activation_edits", _is_text, _TEXTS),
)
_STRUCTURED = (*(name for name, _, _ in _LISTS), "logit_bias")
