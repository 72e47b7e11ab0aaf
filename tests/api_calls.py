"""Prompts, parameters and loops that the tests of `LLM` share."""

import dataclasses
from typing import Any

from folojax import LLM, RequestOutput, SamplingParams

PROMPT = "The sea is"
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SEEDED = dataclasses.replace(GREEDY, temperature=1.0, seed=7)
CHAT = [{"role": "user", "content": "Hi"}]


def change(params: SamplingParams, **fields: Any) -> SamplingParams:
    return dataclasses.replace(params, **fields)


def run(llm: LLM, prompts: Any, params: Any = GREEDY) -> list[list[int]]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def finish(llm: LLM) -> dict[str, RequestOutput]:
    """Steps until nothing is left; the last output of each request."""
    last: dict[str, RequestOutput] = {}
    while llm.has_unfinished_requests():
        last |= {output.request_id: output for output in llm.step()}
    return last
