"""Prompts that a tiny model of a family continues greedily: what its laws start from."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from folojax import LLM, SamplingParams
from tests import dense, reference
from tests.conftest import check_is_empty
from tests.families import save_family
from tests.reference import TIGHT

PARAMS = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
ORDERS = ([3, 0, 5, 1, 4, 2], [1, 2, 3, 4, 5, 0])
"""In which prompts come; either preempts some in a tight pool."""


class Work(NamedTuple):
    """A model, prompts of one token to some pages, and what follows each of them."""

    model: Any
    prompts: list[list[int]]
    expected: list[list[int]]


def make_work(case: str, directory: Path, limits: dict[str, Any]) -> Work:
    """Of a key of `FAMILIES`; the tokens are those that transformers finds likeliest.

    Two prompts begin alike, over a page and some.
    """
    theirs = save_family(case, directory)
    model = dense.load(directory)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 128, n).tolist() for n in (1, 84, 17, 70, 33, 5)]
    prompts[4][:20] = prompts[3][:20]
    expected = generate(LLM(model, **limits | TIGHT), prompts)
    for prompt, tokens in zip(prompts, expected, strict=True):
        logits = reference.logits(theirs, prompt + tokens)[len(prompt) - 1 : -1]
        assert tokens == logits.argmax(axis=-1).tolist()
    return Work(model, prompts, expected)


def generate(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    """Greedily, all at once; nothing is left behind."""
    outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
    check_is_empty(llm)
    return [list(output.outputs[0].token_ids) for output in outputs]


def check_orders(llm: LLM, work: Work) -> None:
    """Whatever order they come in, and preempted, each has its tokens."""
    for order in ORDERS:
        found = generate(llm, [work.prompts[i] for i in order])
        assert found == [work.expected[i] for i in order]
        assert llm.metrics().num_preemptions > 0


def begin(llm: LLM, work: Work) -> None:
    """A request "a" with a dozen tokens, and its fork "b"."""
    llm.add_request("a", work.prompts[2], PARAMS)
    for _ in range(12):
        llm.step()
    llm.fork("a", "b")


def check_ends(llm: LLM, work: Work) -> None:
    """Of "a", "b" and a third, resumed from a snapshot; and of samples that leave no choice."""
    found = []
    while llm.has_unfinished_requests():
        found += [list(one.outputs[0].token_ids) for one in llm.step() if one.finished]
    assert found == [work.expected[2]] * 3
    sampled = SamplingParams(n=3, temperature=1, top_k=1, max_tokens=30, ignore_eos=True)
    (output,) = llm.generate([work.prompts[4]], sampled, use_tqdm=False)
    assert [list(one.token_ids) for one in output.outputs] == [work.expected[4]] * 3
    check_is_empty(llm)
