"""What an engine asks of a request before it is queued.

`SamplingParams` has checked what a field may be by itself; here are the rules that depend on the
model, its tokenizer and the engine's limits. All problems of a request come in one ValueError.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from folojax.requests.continuations import AskedScore
from folojax.requests.grammars import Grammar, Grammars
from folojax.requests.prompts import ParsedPrompt
from folojax.requests.sampling_params import SamplingParams
from folojax.requests.user_functions import NO_FUNCTIONS, UserFunctions
from folojax.sampling.logit_edits import MAX_BAD_WORD_TOKENS
from folojax.sched.config import SchedulerConfig
from folojax.sched.pages import pages_for
from folojax.text.tokenizer import Tokenizer

MAX_REPORTED = 4_000_000
"""Most log-probabilities that a request may ask for, of its prompt or of its outputs: 1 GB."""

MAX_TAPPED_BYTES = 2**30
"""Most bytes of residual streams that a request may ask for."""

MAX_OUTPUT_TOKENS = 16_777_216
"""Most tokens that the samples of a request may have together."""

MAX_BAD_WORDS = 1024


@dataclasses.dataclass(frozen=True)
class CheckedRequest:
    """A request that the engine will take."""

    request_id: str
    prompt: str | None  # the text, if it was given as text
    prompt_token_ids: tuple[int, ...]
    sampling_params: SamplingParams  # as the user gave them
    priority: int
    max_tokens: int  # most output tokens of a sample
    bad_word_ids: tuple[tuple[int, ...], ...]  # every encoding of every bad word
    num_logprobs: int | None  # alternatives to report with each token; None: no log-probabilities
    num_prompt_logprobs: int | None  # the same for the prompt
    grammar: Grammar | None = None  # that its outputs follow


@dataclasses.dataclass(frozen=True)
class Validator:
    """The limits of one engine."""

    limits: SchedulerConfig
    vocab_size: int  # rows of the model's vocabulary: what a prompt may hold
    num_tokens: int  # of these, how many can be sampled; the rest is padding
    max_logprobs: int  # most alternatives that are reported with a token; -1 is no cap
    tokenizer: Tokenizer | None  # None: there is no text
    eos_token_ids: tuple[int, ...] = ()  # the model's, the one first that is no `stop_reason`
    functions: UserFunctions = NO_FUNCTIONS
    residual_bytes: int = 0  # of the residual stream of one token, at all layers read
    # L layers with experts, M experts of a token in each, and X to choose from; 0: there are none.
    num_experts: tuple[int, int, int] = (0, 0, 0)
    is_strict: bool = False  # whether steps that no compile plan lists are refused

    def check(
        self,
        request_id: str,
        prompt: ParsedPrompt,
        sampling_params: SamplingParams,
        priority: int = 0,
        *,
        given: Sequence[int] = (),
        has_given_logprobs: bool = True,
    ) -> CheckedRequest:
        """Checks a request for outputs.

        Args:
            request_id: The user's, or drawn.
            prompt: Its tokens, and its text if there is one.
            sampling_params: How it is continued.
            priority: Smaller is more urgent.
            given: Output tokens that it begins with.
            has_given_logprobs: Whether the log-probabilities of these are known.

        Raises:
            ValueError: it is refused; every reason is named.
        """
        num_prompt_tokens, num_given = len(prompt.token_ids), len(given)
        max_tokens = self.limits.max_model_len
        if sampling_params.max_tokens is not None:
            max_tokens = min(sampling_params.max_tokens, max_tokens)
        problems = [*_id_problems(request_id, priority), *self._prompt_problems(prompt)]
        if not problems:
            problems += self.size_problems(num_prompt_tokens, max_tokens, num_given)
        if sampling_params.logprobs is not None and num_given and not has_given_logprobs:
            problems.append(
                f"logprobs is {sampling_params.logprobs!r}, and the {num_given} tokens that are "
                "there already came without: leave logprobs out, or ask for them from the start"
            )
        bad_word_ids = self._encode_bad_words(sampling_params, problems)
        problems += self._id_list_problems(sampling_params)
        problems += self._function_problems(sampling_params)
        if not problems:
            problems += self._nothing_left(sampling_params, bad_word_ids)
        num_logprobs = self._num_reported("logprobs", sampling_params.logprobs, problems)
        num_prompt_logprobs = self._num_reported(
            "prompt_logprobs", sampling_params.prompt_logprobs, problems
        )
        if not problems:
            room = self.limits.max_model_len - num_prompt_tokens
            num_outputs = sampling_params.n * min(max_tokens, room)
            num_tokens = sampling_params.n * num_prompt_tokens + num_outputs
            problems += _memory_problems(sampling_params, num_outputs, num_logprobs)
            problems += _prompt_memory_problems(num_prompt_tokens, num_prompt_logprobs)
            problems += self._tap_problems(sampling_params, num_tokens)
        _raise(problems)
        grammar = self._grammar(sampling_params, given)
        return CheckedRequest(
            request_id=request_id,
            prompt=prompt.text,
            prompt_token_ids=tuple(int(token) for token in prompt.token_ids),
            # What is assigned to them later is for later requests.
            sampling_params=sampling_params.clone(),
            priority=priority,
            max_tokens=max_tokens,
            bad_word_ids=bad_word_ids,
            # Padding rows are never reported.
            num_logprobs=num_logprobs and min(num_logprobs, self.num_tokens),
            num_prompt_logprobs=num_prompt_logprobs and min(num_prompt_logprobs, self.num_tokens),
            grammar=grammar,
        )

    def check_score(self, asked: AskedScore) -> None:
        """Checks a prompt and the continuation to be scored.

        Raises:
            ValueError: it is refused.
        """
        prompt, continuation = asked.prompt, asked.continuation
        problems = [
            *self._prompt_problems(prompt),
            *_token_problems("continuation", continuation.token_ids, self.vocab_size),
        ]
        if not problems:
            num_tokens = len(prompt.token_ids) + len(continuation.token_ids)
            if not prompt.token_ids:
                problems += self.size_problems(0, 1)
            elif not continuation.token_ids:
                problems.append("the continuation is empty; at least one token can be scored")
            elif num_tokens > self.limits.max_model_len:
                problems.append(
                    f"prompt and continuation have {num_tokens:,} tokens; max_model_len is "
                    f"{self.limits.max_model_len:,}: shorten them or raise max_model_len"
                )
            else:
                # The last token is scored, never computed.
                problems += self.size_problems(num_tokens - 1, 0)
            problems += _prompt_memory_problems(num_tokens, 0)
            problems += asked.routing_problems(self.num_experts, self.is_strict)
        _raise(problems)

    def size_problems(self, prompt_len: int, max_tokens: int, num_given: int = 0) -> list[str]:
        """Says why a request of this size, with outputs so far, can never run; empty if it can."""
        limits = self.limits
        if prompt_len == 0:
            return ["the prompt is empty; at least one token is needed to start from"]
        if prompt_len >= limits.max_model_len:
            return [
                f"prompt has {prompt_len:,} tokens; max_model_len is {limits.max_model_len:,} and "
                f"one token must be left for the output: shorten it to at most "
                f"{limits.max_model_len - 1:,} tokens or raise max_model_len"
            ]
        most_outputs = min(max_tokens, limits.max_model_len - prompt_len)
        if num_given > 0 and most_outputs <= num_given:
            return [
                f"the request has {num_given:,} output tokens; with max_tokens {max_tokens:,} "
                f"and a max_model_len of {limits.max_model_len:,} it can have {most_outputs:,}: "
                f"there is none to come, raise max_tokens or continue an earlier token"
            ]
        # The last token is returned, never fed back: its K/V are not needed. A prompt alone has
        # no such token.
        most_tokens = min(prompt_len + max(max_tokens, 1), limits.max_model_len) - 1
        num_pages = pages_for(most_tokens, limits.page_size)
        if num_pages > limits.num_pages:
            return [
                f"the request (prompt of {prompt_len:,} tokens, max_tokens {max_tokens:,}) may "
                f"need {num_pages:,} pages of {limits.page_size:,} tokens; the pool has "
                f"{limits.num_pages:,}: shorten it, lower max_tokens or raise num_pages"
            ]
        return []

    def _prompt_problems(self, prompt: ParsedPrompt) -> Iterator[str]:
        if prompt.text and not prompt.token_ids:
            yield f"prompt {prompt.text!r} has no tokens; at least one is needed to start from"
        yield from _token_problems("prompt", prompt.token_ids, self.vocab_size)

    def _id_list_problems(self, sampling_params: SamplingParams) -> Iterator[str]:
        lists: dict[str, Any] = {
            "stop_token_ids": sampling_params.stop_token_ids,
            "logit_bias": sampling_params.logit_bias,
            "allowed_token_ids": sampling_params.allowed_token_ids,
        }
        for name, token_ids in lists.items():
            yield from _token_problems(name, token_ids or (), self.num_tokens)
        if sampling_params.stop and self.tokenizer is None:
            yield (
                f"stop is {list(sampling_params.stop)!r}, but the engine has no tokenizer: pass "
                "tokenizer=, or use stop_token_ids"
            )

    def _function_problems(self, sampling_params: SamplingParams) -> Iterator[str]:
        known = {
            "logits_processors": [one.name for one in self.functions.processors],
            "activation_edits": [one.name for one in self.functions.activation_edits],
        }
        for field, names in known.items():
            unknown = sorted(set(getattr(sampling_params, field)) - set(names))
            if unknown:
                yield (
                    f"{field} holds {unknown}; the engine was built with {sorted(names)}: pass "
                    f"{field}= to LLM"
                )
        if sampling_params.extra_args:
            on = tuple(sampling_params.logits_processors or ())
            yield from self.functions.argument_problems(on, sampling_params.extra_args)
        if self.is_strict and sampling_params.record:
            yield "record is True, which no compile plan lists: set it, or strict, to False"
        if sampling_params.activations and not self.functions.residual_layers:
            yield (
                "activations is True; the engine was built without taps: pass activation_taps= to "
                "LLM"
            )
        if sampling_params.routed_experts and not self.num_experts[-1]:
            yield "routed_experts is True; the model has no experts: leave it out"
        if self.is_strict and sampling_params.routed_experts:
            yield "routed_experts is True, which no compile plan lists: set it, or strict, to False"

    def _grammar(self, sampling_params: SamplingParams, given: Sequence[int]) -> Grammar | None:
        """What the outputs follow; ValueError if refused. Last of all checks: it takes longest."""
        if sampling_params.structured_outputs is None:
            return None
        if self._grammars is None:
            raise ValueError(
                "structured_outputs needs a tokenizer and an end token: pass tokenizer= and "
                "eos_token_id= to LLM"
            )
        return self._grammars.compile(sampling_params.structured_outputs, given)

    @functools.cached_property
    def _grammars(self) -> Grammars | None:
        if self.tokenizer is None or not self.eos_token_ids:
            return None
        return Grammars(self.tokenizer, self.vocab_size, self.eos_token_ids)

    def _tap_problems(self, sampling_params: SamplingParams, num_tokens: int) -> Iterator[str]:
        num_bytes = num_tokens * self.residual_bytes
        if sampling_params.activations and num_bytes > MAX_TAPPED_BYTES:
            yield (
                f"activations is True: those of {num_tokens:,} tokens would take {num_bytes:,} "
                f"bytes; at most {MAX_TAPPED_BYTES:,} fit a request: lower n or max_tokens, or tap "
                "fewer layers"
            )
        num_layers, per_token, _ = self.num_experts
        num_bytes = num_tokens * num_layers * per_token * np.dtype(np.int32).itemsize
        if sampling_params.routed_experts and num_bytes > MAX_TAPPED_BYTES:
            yield (
                f"routed_experts is True: those of {num_tokens:,} tokens would take {num_bytes:,} "
                f"bytes; at most {MAX_TAPPED_BYTES:,} fit a request: lower n or max_tokens"
            )

    def _nothing_left(
        self, sampling_params: SamplingParams, bad_word_ids: Iterable[tuple[int, ...]]
    ) -> Iterator[str]:
        """Of an explicit choice, something must be left while nothing else has been sampled."""
        if sampling_params.allowed_token_ids is None:
            return
        banned = {ids[0] for ids in bad_word_ids if len(ids) == 1}
        reasons = ["bad_words"] if banned & set(sampling_params.allowed_token_ids) else []
        if sampling_params.min_tokens:
            ends = set(sampling_params.stop_token_ids or ())
            ends |= set() if sampling_params.ignore_eos else set(self.eos_token_ids)
            banned |= ends
            reasons.append(f"min_tokens={sampling_params.min_tokens}")
        if banned.issuperset(sampling_params.allowed_token_ids):
            yield (
                f"allowed_token_ids is {list(sampling_params.allowed_token_ids)!r}, and "
                f"{' and '.join(reasons)} leave none of them: allow more, or ban less"
            )

    def _encode_bad_words(
        self, sampling_params: SamplingParams, problems: list[str]
    ) -> tuple[tuple[int, ...], ...]:
        """Each word with a leading space and without: at the start of a word, and inside one.

        And both as a whole text and inside of one, which differ where a tokenizer begins texts
        with a space of its own.
        """
        words = tuple(sampling_params.bad_words or ())
        if words and self.tokenizer is None:
            problems.append(
                f"bad_words is {list(words)!r}, but the engine has no tokenizer: pass tokenizer=, "
                "or use logit_bias"
            )
        if not words or self.tokenizer is None:
            return ()
        alone = functools.partial(self.tokenizer.encode, add_special_tokens=False)
        encodings: dict[tuple[int, ...], None] = {}
        for word in words:
            bare = word.lstrip() or word
            forms = [
                tuple(encode(text))
                for text in (bare, " " + bare)
                for encode in (alone, self.tokenizer.encode_inside)
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
        return tuple(encodings)

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
    sampling_params: SamplingParams, num_outputs: int, num_logprobs: int | None
) -> Iterator[str]:
    if num_outputs > MAX_OUTPUT_TOKENS:
        yield (
            f"n is {sampling_params.n}: the samples may have {num_outputs:,} tokens together; "
            f"at most {MAX_OUTPUT_TOKENS:,} fit a request: lower n or max_tokens"
        )
    if num_logprobs is not None and num_outputs * (num_logprobs + 1) > MAX_REPORTED:
        yield (
            f"logprobs is {sampling_params.logprobs}: {num_outputs:,} output tokens would have "
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
