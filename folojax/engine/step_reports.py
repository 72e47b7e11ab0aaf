"""What a step tells of requests beside their tokens, handed to whom it belongs."""

from collections.abc import Collection, Mapping

from folojax.engine.live_request import Job, Sample
from folojax.engine.live_score import ScoreJob, has_nan
from folojax.runner.results import StepResult

NO_DISTRIBUTION = "a NaN, or nothing finite, in the logits or in what bans and processors leave"


def take_reports(
    result: StepResult,
    awaited: Collection[str],
    owner: Mapping[str, tuple[Job, Sample] | tuple[ScoreJob, None]],
) -> dict[str, str]:
    """Hands out log-probabilities of prompts and residual streams.

    Args:
        result: Loses the samples of requests whose prompt's log-probabilities hold a NaN.
        awaited: Ids of the requests that still await results of the step.
        owner: By the scheduler's id of a request.

    Returns:
        Requests for which the model gave no usable distribution, and what they are told.
    """
    failed = dict.fromkeys(result.failed, NO_DISTRIBUTION)
    for request_id, chunk in result.prompt_logprobs.items():
        if has_nan(chunk):
            failed[request_id] = NO_DISTRIBUTION
            result.sampled.pop(request_id, None)
        elif request_id in awaited:
            owner[request_id][0].add_prompt_logprobs(chunk)
    for request_id in result.streams.keys() & awaited:
        sample = owner[request_id][1]
        assert sample is not None, "scores are not tapped"
        for piece in result.streams[request_id]:
            sample.streams.add(piece)
    return failed
