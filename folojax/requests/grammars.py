"""Grammars of what may be sampled: compiled once, followed token by token on the host.

    StructuredOutputsParams ──> Grammars.compile ──> Grammar ──start──> a matcher for each sample
                                                                           │ token   ^
                                                            `fill_masks` <─┘ mask ───┘

llguidance does the work; what it takes of time and memory is bounded, for a grammar and for each
token of one.
"""

import functools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import UInt32

from folojax.requests.structured_outputs import StructuredOutputsParams
from folojax.text.token_bytes import token_bytes
from folojax.text.tokenizer import Tokenizer

_MOST_KEPT = 64
_MOST_LEXER_STATES = 50_000  # up to 2 kB each
_MOST_TOLD = 400  # letters of an error
_MISSHAPEN = ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError

Matcher: TypeAlias = Any
"""How far a text has come in its grammar: a `llguidance.LLMatcher`."""


class Grammar:
    """A grammar that can be followed any number of times.

    Args:
        first: Where all texts begin; never moved.
    """

    def __init__(self, first: Matcher) -> None:
        self._first = first

    def start(self, token_ids: Sequence[int] = ()) -> Matcher:
        """Stands behind the tokens that there are; in error if these are none of its texts."""
        matcher = self._first.deep_copy()
        matcher.consume_tokens(list(token_ids))
        return matcher

    def num_accepted(self, token_ids: Sequence[int]) -> int:
        """How many of the tokens, from the first on, may begin a text."""
        return self._first.deep_copy().validate_tokens(list(token_ids))


class Grammars:
    """The grammars of one engine; the latest ones stay compiled.

    Args:
        tokenizer: Of the texts.
        vocab_size: Of the model.
        eos_token_ids: What can end a text; at least one.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._source, self._vocab_size = tokenizer, vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._kept: OrderedDict[StructuredOutputsParams, Grammar] = OrderedDict()

    def compile(self, params: StructuredOutputsParams, given: Sequence[int] = ()) -> Grammar:
        """What a text must be, ready to be followed.

        Args:
            params: As the user says it.
            given: The tokens that a text begins with.

        Raises:
            ValueError: it is no grammar, one with no text, or too large; or it has no text that
                begins so.
        """
        if params not in self._kept:
            self._kept[params] = self._compile(params)
            if len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(params)
        grammar = self._kept[params]
        num_accepted = grammar.num_accepted(given)
        if num_accepted < len(given):
            raise ValueError(
                f"structured_outputs: the request has {len(given)} output tokens, and behind "
                f"{num_accepted} of them they leave the grammar: begin with those at most"
            )
        return grammar

    def _compile(self, params: StructuredOutputsParams) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        try:
            source = params.source(self._special_tokens)
        # What is misshapen inside of a structural tag fails somewhere, in some way.
        except _MISSHAPEN as error:
            raise ValueError(f"structured_outputs: {params.kind}: {error}") from error
        limits = LLParserLimits(max_lexer_states=_MOST_LEXER_STATES, verbose_errors=False)
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=limits)
        if problem := _problem(matcher):
            raise ValueError(f"structured_outputs: {params.kind}: {problem[:_MOST_TOLD]}")
        return Grammar(matcher)

    @property
    def _special_tokens(self) -> list[str]:
        special = self._source.special_ids
        return [name for name, id_ in self._source.ids_by_name.items() if id_ in special]

    @functools.cached_property
    def _tokenizer(self) -> Any:
        from llguidance import LLTokenizer

        return LLTokenizer(
            _Vocabulary(self._source, self._vocab_size, self._eos_token_ids),  # type: ignore[arg-type]
            eos_token=self._eos_token_ids,
        )


def _problem(first: Matcher) -> str:
    """Why nobody can write a text of a grammar; empty if the first token can be, and the next."""
    probe = first.deep_copy()
    allowed: Any = [] if probe.is_error() else _bits(probe.compute_bitmask())
    told = " ".join(probe.get_error().split())
    if not told and len(allowed):
        probe.consume_token(int(allowed[0]))
        probe.compute_bitmask()
        told = " ".join(probe.get_error().split())
        # Another token may lead further; but what is too large for one is so for all.
        return told if "too" in told else ""
    if not told or "NoExtension" in told:
        return "no text is one, or none that the tokenizer can write"
    return told.removesuffix(" <non-verbose/>")


def _bits(mask: bytes) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))


class _Vocabulary:
    """A tokenizer as llguidance wants it (`llguidance.TokenizerWrapper`)."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.eos_token_id = eos_token_ids[0]
        self.tokens = token_bytes(tokenizer, vocab_size)
        special = {*tokenizer.special_ids, *eos_token_ids}
        self.special_token_ids = sorted(id_ for id_ in special if id_ < vocab_size)
        self._encode = tokenizer.encode_inside

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


@functools.cache
def _executor() -> Any:
    from llguidance import LLExecutor

    return LLExecutor()


def fill_masks(matchers: Sequence[Matcher | None], masks: UInt32[np.ndarray, "B _"]) -> None:
    """Writes which tokens may come next, a bit each: all where there is no grammar.

    Where a grammar takes more than its share of time or memory, none.
    """
    followed: Any = [(one, i) for i, one in enumerate(matchers) if one is not None]
    if len(followed) < len(matchers):
        masks[:] = 0xFFFFFFFF
    size = masks.shape[1] * masks.itemsize
    if followed:
        _executor().unsafe_compute_mask_ptr(followed, masks.ctypes.data, size, len(masks))
    for matcher, i in followed:
        if matcher.is_error():
            masks[i] = 0
