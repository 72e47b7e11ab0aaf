"""What a user may ask of a sampler; names and defaults as in vLLM."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from folojax.sampling import SamplingClass

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this are greedy."""

MAX_TEMPERATURE = 1e38
"""The sampler computes in float32, where more than 3.4e38 is infinite."""

MAX_N = 16384


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one prompt is continued.

    Attributes:
        n: Samples of the prompt, 1 to 16384; sample i of seed s has seed s + i.
        temperature: 0 to 1e38; below 1e-5 is greedy: exact argmax, lowest id wins a tie.
        top_p: In (0, 1]: smallest set of tokens that holds this mass. 1 is off.
        top_k: Most tokens to choose from. 0 or -1 is off.
        min_p: In [0, 1]: drops tokens below this share of the likeliest one's probability.
        max_tokens: Most output tokens, at least 1; None goes on to the model's limit.
        min_tokens: Until so many outputs exist, EOS and stop ids cannot be sampled.
        stop: Strings that end the text; it is cut there, `token_ids` keep everything.
        stop_token_ids: Tokens that end the text.
        ignore_eos: The model's end tokens are tokens like any other.
        include_stop_str_in_output: Cut behind the stop string, and keep a stop token's text.
        seed: 0 to 2**64 - 1; None draws one from the engine's seed. Recorded in the output.
        logprobs: None, or 0 for the log-probability of each sampled token.
        detokenize: False leaves the text empty.
        skip_special_tokens: Special tokens leave no text.
        spaces_between_special_tokens: As in the tokenizer's decode.

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
    stop: str | Iterable[str] = ()
    stop_token_ids: Iterable[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Iterable[int] | None = None
    seed: int | None = None
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True

    def __post_init__(self) -> None:
        # Kept as tuples, so that a shared SamplingParams can be neither changed nor unhashable.
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        problems = []
        for name, value in (("stop", stop), ("stop_token_ids", self.stop_token_ids)):
            items = () if value is None else value
            if not isinstance(items, Iterable):
                problems.append(f"{name} is {value!r}; it must be a list")
                items = ()
            object.__setattr__(self, name, tuple(items))
        problems += [problem for problem in self._problems() if problem]
        if problems:
            raise ValueError("SamplingParams: " + "; ".join(problems))

    def _problems(self) -> Iterable[str]:
        yield self._int("n", 1, MAX_N)
        yield self._number("temperature", 0.0, MAX_TEMPERATURE)
        yield self._number("top_p", 0.0, 1.0, is_open_below=True)
        yield self._int("top_k", -1)
        yield self._number("min_p", 0.0, 1.0)
        if self.max_tokens is not None:
            yield self._int("max_tokens", 1)
        yield self._int("min_tokens", 0)
        if self.seed is not None:
            yield self._int("seed", 0, 2**64 - 1)
        if self.logprobs is not None:
            yield self._int("logprobs", 0, 0)
        for name in ("ignore_eos", "include_stop_str_in_output", "detokenize"):
            yield self._bool(name)
        for name in ("skip_special_tokens", "spaces_between_special_tokens"):
            yield self._bool(name)
        if not all(isinstance(text, str) and text for text in self.stop):
            yield f"stop is {list(self.stop)!r}; it must hold strings that are not empty"
        if not all(_is_int(token) and token >= 0 for token in self.stop_token_ids):
            yield f"stop_token_ids is {list(self.stop_token_ids)!r}; it must hold token ids"
        if self.stop and not self.detokenize:
            yield f"stop is {list(self.stop)!r} but detokenize is False; stop strings need text"
        if _is_int(self.max_tokens) and _is_int(self.min_tokens):
            assert self.max_tokens is not None
            if self.min_tokens > self.max_tokens:
                yield f"min_tokens is {self.min_tokens}; it must be at most {self.max_tokens=}"
        if _is_int(self.n) and self.n > 1 and self.is_greedy:
            yield f"n is {self.n} but temperature is {self.temperature}: greedy samples are equal"

    def _int(self, name: str, low: int, high: int | None = None) -> str:
        value = getattr(self, name)
        if _is_int(value) and low <= value and (high is None or value <= high):
            return ""
        bound = f"of at least {low}" if high is None else f"from {low} to {high}"
        return f"{name} is {value!r}; it must be an integer {bound}"

    def _number(self, name: str, low: float, high: float, is_open_below: bool = False) -> str:
        value = getattr(self, name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_excluded = is_open_below and value == low
        if is_number and low <= value <= high and not is_excluded:
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
        """What these parameters need of the sampler, bans aside."""
        if self.is_greedy:
            return SamplingClass.GREEDY
        has_cut = self.top_p < 1 or self.top_k > 0 or self.min_p > 0
        return SamplingClass.TRUNCATED if has_cut else SamplingClass.RANDOM


def _is_int(value: Any) -> bool:
    # bool is an int to Python, but `top_k=True` is a mistake.
    return isinstance(value, int) and not isinstance(value, bool)
