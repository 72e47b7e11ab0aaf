"""Prompts with what follows them, for scoring: encoded as one text, and cut where lm-eval cuts.

What a text is encoded to depends on what stands before it, so prompt and continuation are encoded
together, and the continuation's tokens are those behind as many as the prompt alone has. Spaces
and line breaks at the end of a prompt count to the continuation, as words begin with them. Where a
token lies over the border it counts to the prompt::

    "The sea is" + " blue"    The| sea| is || blue
    "The sea is " + "blue"    The| sea| is || blue     the space has moved
    "The sea is bl" + "ue."   The| sea| is| blue || .  as "The sea is bl" alone has four tokens, too

Source: `TemplateLM._encode_pair` in lm-evaluation-harness, for what the cut is.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from folojax.requests.prompts import ParsedPrompt, Prompt, as_list, parse_prompts
from folojax.text.tokenizer import Tokenizer


class AskedScore(NamedTuple):
    """A continuation to be scored."""

    prompt: ParsedPrompt  # what comes before
    continuation: ParsedPrompt
    adapter: str | None = None
    # The experts of all tokens but the last, [N, L, M]; None: those that the routers choose.
    routing: np.ndarray | None = None

    def routing_problems(self, num_experts: tuple[int, int, int], is_strict: bool) -> Iterator[str]:
        """Says why the experts that are asked for do not fit the model, or the engine.

        Args:
            num_experts: Layers that have any, those of a token, those to choose from.
            is_strict: Whether steps that no compile plan lists are refused.
        """
        if self.routing is None:
            return
        *sizes, count = num_experts
        shape = [len(self.prompt.token_ids) + len(self.continuation.token_ids) - 1, *sizes]
        if not count:
            yield "routed_experts is given; the model has no experts: leave it out"
        elif list(self.routing.shape) != shape:
            given = list(self.routing.shape)
            yield f"routed_experts is {given}; it must be {shape}, of all tokens but the last"
        elif self.routing.max() >= count:
            highest = self.routing.max()
            yield f"routed_experts holds {highest}; the model has experts 0 to {count - 1}"
        if is_strict:
            yield "routed_experts is given, which no compile plan lists: set strict to False"


def routing_per_continuation(routed_experts: Any, count: int) -> list[np.ndarray | None]:
    """The experts of each continuation; None is those that the routers choose.

    Raises:
        ValueError: there are not as many as continuations, or one is no array of integers.
    """
    if routed_experts is None:
        return [None] * count
    given = list(routed_experts)
    if len(given) != count:
        raise ValueError(
            f"routed_experts has {len(given)} entries for {count} continuations: give an array or "
            "None for each"
        )
    found = [None if one is None else np.asarray(one) for one in given]
    for index, one in enumerate(found):
        if one is not None and one.dtype.kind not in "iu":
            raise ValueError(
                f"routed_experts[{index}] holds {one.dtype}; it must be an array of integers, as "
                "CompletionOutput.routed_experts is, or None"
            )
    return [None if one is None else one.astype(np.int32) for one in found]


def pair_continuations(
    prompts: Prompt | Sequence[Prompt],
    continuations: Prompt | Sequence[Prompt],
    tokenizer: Tokenizer | None,
) -> list[tuple[ParsedPrompt, ParsedPrompt]]:
    """Prompts with what follows them.

    Text that follows text is encoded with it, and has no special tokens of its own. Text that
    follows given token ids is encoded as it stands inside of a text; ids are never changed.

    Raises:
        ValueError: as in `parse_prompts`; or there are neither as many prompts as continuations
            nor one prompt; or a continuation ends inside a token that begins in its prompt.
    """
    before = parse_prompts(prompts, tokenizer)
    after = parse_prompts(continuations, tokenizer, "continuation", add_special_tokens=False)
    has_ids = list(map(_has_ids, as_list(prompts)))
    if len(before) == 1:
        before, has_ids = before * len(after), has_ids * len(after)
    if len(before) != len(after):
        raise ValueError(
            f"continuations has {len(after)} entries for {len(before)} prompts: give one for each "
            "prompt, or one prompt for all"
        )
    are_ids = list(map(_has_ids, as_list(continuations, "continuation")))
    pairs = []
    for index, (prompt, continuation) in enumerate(zip(before, after, strict=True)):
        text = continuation.text
        if tokenizer is None or are_ids[index] or not text:
            pairs.append((prompt, continuation))
        elif has_ids[index]:
            token_ids = _after_tokens(tokenizer, prompt, text)
            pairs.append((prompt, ParsedPrompt(text, token_ids)))
        else:
            head, tail = _cut_apart(tokenizer, prompt.text or "", text, index)
            pairs.append((ParsedPrompt(prompt.text, head), ParsedPrompt(text, tail)))
    return pairs


def _has_ids(prompt: Any) -> bool:
    """Whether a prompt's token ids were given, rather than made of its text."""
    if isinstance(prompt, Mapping):
        return prompt.get("prompt_token_ids") is not None
    return not isinstance(prompt, str)


def _cut_apart(
    tokenizer: Tokenizer, before: str, after: str, index: int
) -> tuple[list[int], list[int]]:
    """Tokens of two texts that are encoded as one: those of the first, and those behind them."""
    whole = tokenizer.encode(before + after, add_special_tokens=False)
    # Of a prompt that is nothing else than spaces, something must be left to begin from.
    before = before.rstrip() if tokenizer.encode(before.rstrip()) else before
    plain = tokenizer.encode(before, add_special_tokens=False)
    num_before = len(plain)
    if len(whole) <= num_before:
        raise ValueError(
            f"continuation {index} is {after!r}, which has no token behind the {num_before} of the "
            "prompt: the border lies inside a token, which counts to the prompt. End the prompt "
            "between two words, or give token ids"
        )
    special = _special_tokens_before(tokenizer.encode(before), plain)
    return [*special, *whole[:num_before]], whole[num_before:]


def _special_tokens_before(full: list[int], plain: list[int]) -> list[int]:
    """What stands before a text's own tokens; what stands behind belongs to no pair."""
    starts = range(len(full) - len(plain) + 1) if plain else ()
    found = (start for start in starts if full[start : start + len(plain)] == plain)
    return full[: next(found, 0)] if plain else full


def _after_tokens(tokenizer: Tokenizer, prompt: ParsedPrompt, text: str) -> Sequence[int]:
    """Tokens of a text that follows tokens: with their own text, if they came with it."""
    given = list(prompt.token_ids)
    if prompt.text and tokenizer.encode(prompt.text, add_special_tokens=False) == given:
        whole = tokenizer.encode(prompt.text + text, add_special_tokens=False)
        if whole[: len(given)] == given and len(whole) > len(given):
            return whole[len(given) :]
    return tokenizer.encode_inside(text)
