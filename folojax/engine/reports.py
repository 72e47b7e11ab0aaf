"""Who is told what a step has found out, beside its tokens."""

import math
from collections.abc import Mapping
from typing import TypeAlias

from folojax.engine.adapters import KnownAdapters
from folojax.engine.live_request import LiveGeneration, Sample
from folojax.engine.live_score import LiveScore
from folojax.requests.sampling_params import SamplingRequest
from folojax.runner.results import StepResult
from folojax.sched.request import Request

NO_DISTRIBUTION = (
    "a NaN, or nothing finite, in the logits or in what bans, processors and grammars leave"
)

Live: TypeAlias = LiveGeneration | LiveScore


def owner_of(request: Request) -> Live:
    """Whose part a request of the scheduler is."""
    assert isinstance(request, SamplingRequest), f"{request.request_id} is not the engine's"
    owner: Live = request.owner
    return owner


def take_reports(result: StepResult, awaited: Mapping[str, Request]) -> dict[str, str]:
    """Hands out log-probabilities of prompts and residual streams to those that await them.

    Returns:
        Requests for which the model gave no usable distribution, and what they are told. They
        have lost their samples if it was in the prompt.
    """
    failed = dict.fromkeys(result.failed, NO_DISTRIBUTION)
    for request_id, chunk in result.prompt_logprobs.items():
        if any(math.isnan(entry.logprob) for entry in chunk.entries):
            failed[request_id] = NO_DISTRIBUTION
            result.tokens.pop(request_id, None)
        elif request_id in awaited:
            owner_of(awaited[request_id]).add_prompt_logprobs(chunk)
    for request_id, pieces in result.residuals.items():
        sample = awaited.get(request_id)
        if isinstance(sample, Sample):
            for piece in pieces:
                sample.add_activations(piece)
    return failed


def take_asked(
    sample: Sample, num_new: int, result: StepResult, adapters: KnownAdapters
) -> tuple[int, str] | None:
    """Gives a sample what it has asked for of its new tokens; returns as `Sample.take`."""
    entries = result.reports.get(sample.request_id, ())[:num_new]
    version = 0 if sample.adapter is None else adapters[sample.adapter].version
    return sample.take(entries, num_new, version)
