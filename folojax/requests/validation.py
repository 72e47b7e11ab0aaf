"""What an engine asks of a request before it is queued.

`SamplingParams` has checked what a field may be by itself; here are the rules that depend on the
model, its tokenizer and the engine's limits. All problems of a request come in one ValueError.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from folojax.requests.prompts import ParsedPrompt
from folojax.requests.sampling_params import SamplingParams
from folojax.requests.user_functions import NO_FUNCTIONS, UserFunctions
from folojax.sampling.logit_edits import MAX_BAD_WORD_TOKENS
from folojax.sched.config import SchedulerConfig
from folojax.text.tokenizer import Tokenizer

MAX_REPORTED = 4_000_000
"""Most log-probabilities that a request may ask for, of its prompt or of its outputs: 1 GB."""

MAX_TAPPED_BYTES = 2**30
"""Most bytes of tapped residual streams that a request may ask for."""

MAX_OUTPUT_TOKENS = 16_777_216
"""Most tokens that the samples of a request may have together."""

MAX_BAD_WORDS = 1024


@dataclasses.dataclass(frozen=True)
class CheckedRequest:
    """A request that the engine will take.

    Attributes:
        request_id: The user's, or drawn.
        prompt: The text, if it was given as text.
        prompt_token_ids: The prompt.
        params: As the user gave them.
        priority: Smaller is more urgent.
        max_tokens: Most output tokens of a sample.
        bad_word_ids: Every encoding of every bad word.
        num_logprobs: Alternatives to report with each token; None: no log-probabilities.
        num_prompt_logprobs: The same for the prompt.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    max_tokens: int = 1
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None


@dataclasses.dataclass(frozen=True)
class Validator:
    """The limits of one engine.

    Attributes:
        limits: The scheduler's.
        vocab_size: Rows of the model's vocabulary: what a prompt may hold.
        num_tokens: Of these, how many can be sampled; the rest is padding.
        max_logprobs: Most alternatives that are reported with a token; -1 is no cap.
        tokenizer: None: there is no text.
        eos_token_ids: The model's end tokens.
        functions: The user's.
        tapped_bytes: Of the tapped streams of one token.
        is_strict: Whether steps that no compile plan lists are refused.
    """

    limits: SchedulerConfig
    vocab_size: int
    num_tokens: int
    max_logprobs: int
    tokenizer: Tokenizer | None
    eos_token_ids: tuple[int, ...] = ()
    functions: UserFunctions = NO_FUNCTIONS
    tapped_bytes: int = 0
    is_strict: bool = False

    def check(
        self,
        request_id: str,
        prompt: ParsedPrompt,
        params: SamplingParams,
        priority: int = 0,
        *,
        num_given: int = 0,
        has_given_logprobs: bool = True,
    ) -> CheckedRequest:
        """Checks a request for outputs.

        Args:
            request_id: The user's, or drawn.
            prompt: Its tokens, and its text if there is one.
            params: How it is continued.
            priority: Smaller is more urgent.
            num_given: Output tokens that it begins with.
            has_given_logprobs: Whether the log-probabilities of these are known.

        Raises:
            ValueError: it is refused; every reason is named.
        """
        problems = [*_id_problems(request_id, priority), *self._prompt_problems(prompt)]
        max_tokens = self.limits.max_model_len
        if params.max_tokens is not None:
            max_tokens = min(params.max_tokens, max_tokens)
        if not problems:
            problems += self.limits.request_problems(len(prompt.token_ids), max_tokens, num_given)
        if params.logprobs is not None and num_given and not has_given_logprobs:
            problems.append(
                f"logprobs is {params.logprobs!r}, and the {num_given} tokens that are there "
                "already came without: leave logprobs out, or ask for them from the start"
            )
        bad_word_ids, bad_word_problems = self._encode_bad_words(params)
        problems += bad_word_problems
        problems += self._id_list_problems(params)
        problems += self._function_problems(params)
        if self.is_strict and params.record:
            problems.append(
                "record is True, which no compile plan lists: set it, or strict, to False"
            )
        if not problems:
            problems += self._nothing_left(params, bad_word_ids)
        reported = self._num_reported("logprobs", params.logprobs, problems)
        prompt_reported = self._num_reported("prompt_logprobs", params.prompt_logprobs, problems)
        if not problems:
            num_outputs = params.n * min(max_tokens, self._room(prompt))
            problems += _memory_problems(params, num_outputs, reported)
            problems += _prompt_memory_problems(len(prompt.token_ids), prompt_reported)
            num_tokens = params.n * len(prompt.token_ids) + num_outputs
            problems += self._tap_problems(params, num_tokens)
        _raise(problems)
        return CheckedRequest(
            request_id=request_id,
            prompt=prompt.text,
            prompt_token_ids=tuple(int(token) for token in prompt.token_ids),
            params=params,
            priority=priority,
            max_tokens=max_tokens,
            bad_word_ids=bad_word_ids,
            # Padding rows are never reported.
            num_logprobs=None if reported is None else min(reported, self.num_tokens),
            num_prompt_logprobs=(
                None if prompt_reported is None else min(prompt_reported, self.num_tokens)
            ),
        )

    def check_score(self, prompt: ParsedPrompt, continuation: ParsedPrompt) -> None:
        """Checks a prompt and the continuation to be scored.

        Raises:
            ValueError: it is refused.
        """
        problems = [
            *self._prompt_problems(prompt),
            *self._prompt_problems(continuation, "continuation"),
        ]
        if not problems:
            num_tokens = len(prompt.token_ids) + len(continuation.token_ids)
            if not prompt.token_ids:
                problems += self.limits.request_problems(0, 1)
            elif not continuation.token_ids:
                problems.append("the continuation is empty; at least one token can be scored")
            elif num_tokens > self.limits.max_model_len:
                problems.append(
                    f"prompt and continuation have {num_tokens:,} tokens; max_model_len is "
                    f"{self.limits.max_model_len:,}: shorten them or raise max_model_len"
                )
            else:
                # The last token is scored, never computed.
                problems += self.limits.request_problems(num_tokens - 1, 0)
            problems += _prompt_memory_problems(num_tokens, 0)
        _raise(problems)

    def _prompt_problems(self, prompt: ParsedPrompt, name: str = "prompt") -> Iterator[str]:
        token_ids = prompt.token_ids
        if not token_ids and name == "prompt" and prompt.text:
            yield f"prompt {prompt.text!r} has no tokens; at least one is needed to start from"
        yield from _token_problems(name, token_ids, self.vocab_size)

    def _id_list_problems(self, params: SamplingParams) -> Iterator[str]:
        lists: dict[str, Any] = {
            "stop_token_ids": params.stop_token_ids,
            "logit_bias": params.logit_bias,
            "allowed_token_ids": params.allowed_token_ids,
        }
        for name, token_ids in lists.items():
            yield from _token_problems(name, token_ids or (), self.num_tokens)
        if params.stop and self.tokenizer is None:
            yield (
                f"stop is {list(params.stop)!r}, but the engine has no tokenizer: pass tokenizer=, "
                "or use stop_token_ids"
            )

    def _function_problems(self, params: SamplingParams) -> Iterator[str]:
        known = {
            "logits_processors": [one.name for one in self.functions.processors],
            "activation_edits": [one.name for one in self.functions.edits],
        }
        for field, names in known.items():
            unknown = sorted(set(getattr(params, field)) - set(names))
            if unknown:
                yield (
                    f"{field} holds {unknown}; the engine was built with {sorted(names)}: pass "
                    f"{field}= to LLM"
                )
        if params.activations and not self.functions.taps:
            yield (
                "activations is True; the engine was built without taps: pass activation_taps= to "
                "LLM"
            )

    def _tap_problems(self, params: SamplingParams, num_tokens: int) -> Iterator[str]:
        num_bytes = num_tokens * self.tapped_bytes
        if params.activations and num_bytes > MAX_TAPPED_BYTES:
            yield (
                f"activations is True: those of {num_tokens:,} tokens would take {num_bytes:,} "
                f"bytes; at most {MAX_TAPPED_BYTES:,} fit a request: lower n or max_tokens, or tap "
                "fewer layers"
            )

    def _nothing_left(
        self, params: SamplingParams, bad_word_ids: Iterable[tuple[int, ...]]
    ) -> Iterator[str]:
        """Of an explicit choice, something must be left while nothing else has been sampled."""
        if params.allowed_token_ids is None:
            return
        banned = {ids[0] for ids in bad_word_ids if len(ids) == 1}
        reasons = ["bad_words"] if banned & set(params.allowed_token_ids) else []
        if params.min_tokens:
            ends = set(params.stop_token_ids or ())
            ends |= set() if params.ignore_eos else set(self.eos_token_ids)
            banned |= ends
            reasons.append(f"min_tokens={params.min_tokens}")
        if banned.issuperset(params.allowed_token_ids):
            yield (
                f"allowed_token_ids is {list(params.allowed_token_ids)!r}, and "
                f"{' and '.join(reasons)} leave none of them: allow more, or ban less"
            )

    def _encode_bad_words(
        self, params: SamplingParams
    ) -> tuple[tuple[tuple[int, ...], ...], list[str]]:
        """Each word with a leading space and without: at the start of a word, and inside one.

        And both as a whole text and inside of one, which differ where a tokenizer begins texts
        with a space of its own.
        """
        words = tuple(params.bad_words or ())
        if not words:
            return (), []
        if self.tokenizer is None:
            return (), [
                f"bad_words is {list(words)!r}, but the engine has no tokenizer: pass tokenizer=, "
                "or use logit_bias"
            ]
        encodings: dict[tuple[int, ...], None] = {}
        problems = []
        for word in words:
            bare = word.lstrip() or word
            forms = [
                tuple(encode(text))
                for text in (bare, " " + bare)
                for encode in (self._encode_alone, self.tokenizer.encode_inside)
            ]
            wrong = [ids for ids in forms if not 0 < len(ids) <= MAX_BAD_WORD_TOKENS]
            if wrong:
                problems.append(
                    f"bad_words holds {word!r}, which is {len(wrong[0])} tokens; it must be "
                    f"1 to {MAX_BAD_WORD_TOKENS}"
                )
            encodings |= dict.fromkeys(forms)
        if len(encodings) > MAX_BAD_WORDS:
            problems.append(
                f"bad_words has {len(words)} words with {len(encodings)} encodings; there may be "
                f"at most {MAX_BAD_WORDS}"
            )
        return tuple(encodings), problems

    def _encode_alone(self, text: str) -> list[int]:
        assert self.tokenizer is not None, "there is text"
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _num_reported(self, name: str, wanted: int | None, problems: list[str]) -> int | None:
        """How many alternatives -1 or a number means here."""
        if wanted is None:
            return None
        count = self.vocab_size if wanted == -1 else wanted
        if count > self.vocab_size:
            problems.append(
                f"{name} is {wanted}; the vocabulary has {self.vocab_size} tokens (-1 is all)"
            )
        elif -1 < self.max_logprobs < count:
            problems.append(
                f"{name} is {wanted}{f' (all {count})' if wanted == -1 else ''}; it must be at "
                f"most max_logprobs, {self.max_logprobs}: lower it or raise "
                "EngineConfig.max_logprobs (-1 is no cap)"
            )
        return count

    def _room(self, prompt: ParsedPrompt) -> int:
        return self.limits.max_model_len - len(prompt.token_ids)


def _id_problems(request_id: Any, priority: Any) -> Iterator[str]:
    if not isinstance(request_id, str):
        yield f"request_id is {request_id!r}; it must be a string"
    if isinstance(priority, bool) or not isinstance(priority, int):
        yield f"priority is {priority!r}; it must be an integer, smaller is more urgent"


def _token_problems(name: str, token_ids: Sequence[int], vocab_size: int) -> Iterator[str]:
    for token in token_ids:
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            yield f"{name} holds {token!r}; token ids must be integers"
            return
        if not 0 <= token < vocab_size:
            yield f"{name} holds id {token}; the vocabulary has ids 0 to {vocab_size - 1}"
            return


def _memory_problems(
    params: SamplingParams, num_outputs: int, num_logprobs: int | None
) -> Iterator[str]:
    if num_outputs > MAX_OUTPUT_TOKENS:
        yield (
            f"n is {params.n}: the samples may have {num_outputs:,} tokens together; at most "
            f"{MAX_OUTPUT_TOKENS:,} fit a request: lower n or max_tokens"
        )
    if num_logprobs is not None and num_outputs * (num_logprobs + 1) > MAX_REPORTED:
        yield (
            f"logprobs is {params.logprobs}: {num_outputs:,} output tokens would have "
            f"{num_outputs * (num_logprobs + 1):,} log-probabilities; at most {MAX_REPORTED:,} "
            "fit a request: lower logprobs, n or max_tokens"
        )


def _prompt_memory_problems(num_tokens: int, num_logprobs: int | None) -> Iterator[str]:
    if num_logprobs is not None and num_tokens * (num_logprobs + 1) > MAX_REPORTED:
        yield (
            f"prompt_logprobs is {num_logprobs}: {num_tokens:,} prompt tokens would have "
            f"{num_tokens * (num_logprobs + 1):,} log-probabilities; at most {MAX_REPORTED:,} fit "
            "a request: lower prompt_logprobs or shorten the prompt"
        )


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise ValueError("; ".join(problems))
