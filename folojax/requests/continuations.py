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

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from folojax.requests.prompts import ParsedPrompt, Prompt, as_list, parse_prompts
from folojax.text.tokenizer import Tokenizer


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
        if tokenizer is None or are_ids[index] or not continuation.text:
            pairs.append((prompt, continuation))
        elif has_ids[index]:
            token_ids = _after_tokens(tokenizer, prompt, continuation.text)
            pairs.append((prompt, continuation._replace(token_ids=token_ids)))
        else:
            pairs.append(_Joiner(tokenizer, index).join(prompt, continuation))
    return pairs


def _has_ids(prompt: Any) -> bool:
    """Whether a prompt's token ids were given, rather than made of its text."""
    if isinstance(prompt, Mapping):
        return prompt.get("prompt_token_ids") is not None
    return not isinstance(prompt, str)


class _Joiner(NamedTuple):
    """Encodes a prompt and a continuation as one text."""

    tokenizer: Tokenizer
    place: int

    def join(
        self, prompt: ParsedPrompt, continuation: ParsedPrompt
    ) -> tuple[ParsedPrompt, ParsedPrompt]:
        before, after = self._move_spaces(prompt.text or "", continuation.text or "")
        head, num_before = self._encode(before)
        whole = self.tokenizer.encode(before + after, add_special_tokens=False)
        if len(whole) <= num_before:
            raise ValueError(
                f"continuation {self.place} is {continuation.text!r}, which has no token behind "
                f"the {num_before} of the prompt: the border lies inside a token, which counts to "
                "the prompt. End the prompt between two words, or give token ids"
            )
        return (
            prompt._replace(token_ids=[*head, *whole[:num_before]]),
            continuation._replace(token_ids=whole[num_before:]),
        )

    def _move_spaces(self, before: str, after: str) -> tuple[str, str]:
        bare = before.rstrip()
        # Of a prompt that is nothing else, something must be left to begin from.
        if not self.tokenizer.encode(bare):
            return before, after
        return bare, before[len(bare) :] + after

    def _encode(self, text: str) -> tuple[list[int], int]:
        """The special tokens that stand before a text, and how many tokens the text itself has.

        Those that a tokenizer puts behind a text do not belong between prompt and continuation.
        """
        plain = self.tokenizer.encode(text, add_special_tokens=False)
        full = self.tokenizer.encode(text)
        if not plain:
            return full, 0
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start], len(plain)
        return [], len(plain)


def _after_tokens(tokenizer: Tokenizer, prompt: ParsedPrompt, text: str) -> Sequence[int]:
    """Tokens of a text that follows tokens: with their own text, if they came with it."""
    given = list(prompt.token_ids)
    if prompt.text and tokenizer.encode(prompt.text, add_special_tokens=False) == given:
        whole = tokenizer.encode(prompt.text + text, add_special_tokens=False)
        if whole[: len(given)] == given and len(whole) > len(given):
            return whole[len(given) :]
    return tokenizer.encode_inside(text)
