"""Whether contenders run the same model: their first greedy tokens against each other's.

Rounding may turn a close call between two tokens, so agreement is a share. A peer that reads the
weights, the prompt or the positions wrongly shares next to nothing: its speed means nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

TEXTS = (
    "The capital of France is",
    "1, 2, 3, 4, 5, 6, 7, 8,",
    "Monday, Tuesday, Wednesday, Thursday,",
    "def add(a, b):\n    return",
    "Water boils at 100 degrees",
    "Once upon a time, there was a",
)

NUM_TOKENS = 8

_LEAST = 0.25


class Greedy(Protocol):
    """A contender that can be asked for tokens."""

    def greedy(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """The likeliest tokens after each prompt."""


def find_agreements(
    contenders: Mapping[str, Any], encode: Callable[[str], list[int]]
) -> dict[str, float]:
    """By contender, the share of tokens that are the first contender's, up to the first other one.

    Args:
        contenders: By name.
        encode: From text to token ids.

    Raises:
        RuntimeError: a contender's tokens are not those of the same model.
    """
    if not contenders:
        return {}
    prompts = [encode(text) for text in TEXTS]
    tokens = {name: contender.greedy(prompts, NUM_TOKENS) for name, contender in contenders.items()}
    first = next(iter(tokens.values()))
    shares = {name: agreement(first, theirs) for name, theirs in tokens.items()}
    for name, share in shares.items():
        if share < _LEAST:
            raise RuntimeError(
                f"{name} does not run the same model: of {NUM_TOKENS} tokens after each of "
                f"{len(TEXTS)} prompts it shares {share:.0%}; its first are {tokens[name][0]}, "
                f"not {first[0]}"
            )
    return shares


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Tokens before the first that differs, as a share of all."""
    common = 0
    for left, right in zip(ours, theirs, strict=True):
        is_same = [a == b for a, b in zip(left, right, strict=True)]
        common += (*is_same, False).index(False)
    return common / sum(map(len, ours))
