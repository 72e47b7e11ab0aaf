"""An LLM whose tokens are a hash of prompt, seed and position: for tests of what surrounds one.

As a program it runs a JSON Lines job against itself: `stub_llm.py INPUT OUTPUT STEP_S`.
"""

import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from folojax import CompletionOutput, Logprob, RequestMetrics, RequestOutput, SamplingParams
from folojax.jsonl.file_job import JsonlJob
from folojax.jsonl.output_file import open_output
from folojax.requests.prompts import Prompt

MAX_NUM_SEQS = 8
MAX_PROMPT_LEN = 100
FAILING_PROMPT = [13]


class StubLLM:
    """Runs up to MAX_NUM_SEQS requests at once, a token of each a step.

    Attributes:
        num_queued: Samples in the engine now.
        most_queued: The most there ever were.
    """

    def __init__(self, step_s: float = 0.0) -> None:
        self.num_queued = 0
        self.most_queued = 0
        self._step_s = step_s
        self._requests: dict[str, tuple[list[int], SamplingParams, list[int]]] = {}

    def add_request(
        self, request_id: str, prompt: Prompt, sampling_params: SamplingParams, priority: int = 0
    ) -> None:
        assert isinstance(prompt, Mapping)
        ids = prompt.get("prompt_token_ids") or list(str(prompt.get("prompt", "")).encode())
        if not 0 < len(ids) <= MAX_PROMPT_LEN:
            raise ValueError(f"prompt has {len(ids)} tokens; it must have 1 to {MAX_PROMPT_LEN}")
        self._requests[request_id] = (ids, sampling_params, [])
        self.num_queued += sampling_params.n
        self.most_queued = max(self.most_queued, self.num_queued)

    def step(self) -> list[RequestOutput]:
        time.sleep(self._step_s)
        outputs = []
        for request_id in list(self._requests)[:MAX_NUM_SEQS]:
            ids, params, positions = self._requests[request_id]
            positions.append(len(positions))
            is_finished = ids == FAILING_PROMPT or len(positions) == params.max_tokens
            outputs.append(_output(request_id, ids, params, len(positions), is_finished))
            if is_finished:
                self.abort_request([request_id])
        return outputs

    def abort_request(self, request_ids: str | Sequence[str]) -> None:
        for request_id in [request_ids] if isinstance(request_ids, str) else request_ids:
            self.num_queued -= self._requests.pop(request_id)[1].n

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def metrics(self) -> Any:
        return SimpleNamespace(compile_s=0.0)

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        if messages[0]["role"] == "nobody":
            raise ValueError("the template knows no role 'nobody'")
        return {"prompt": "".join(f"<{m['role']}>{m['content']}" for m in messages)}


def _output(
    request_id: str, ids: list[int], params: SamplingParams, length: int, is_finished: bool
) -> RequestOutput:
    reason = "length" if is_finished else None
    completions = []
    for index in range(params.n):
        seed = None if params.seed is None else params.seed + index
        tokens = [zlib.crc32(repr((ids, seed, i)).encode()) % 1000 for i in range(length)]
        logprobs = [{t: Logprob(-float("inf"), 1, str(t))} for t in tokens]
        completions.append(
            CompletionOutput(
                index=index,
                text=" ".join(map(str, tokens)),
                token_ids=tokens,
                cumulative_logprob=-1.0,
                logprobs=None if params.logprobs is None else logprobs,
                finish_reason="error" if ids == FAILING_PROMPT else reason,
                stop_reason="no distribution" if ids == FAILING_PROMPT else None,
                seed=seed,
            )
        )
    metrics = RequestMetrics(0.0, 0.0, 0.0, 0.0, length, 0)
    return RequestOutput(
        request_id=request_id,
        prompt=None,
        prompt_token_ids=ids,
        prompt_logprobs=None if params.prompt_logprobs is None else [None],
        outputs=completions,
        finished=is_finished,
        metrics=metrics,
    )


def main(source: str, target: str, step_s: str) -> None:
    """Runs or resumes a job."""
    stub: Any = StubLLM(float(step_s))
    with open(source, "rb") as lines, open_output(Path(target), resume=True) as output:
        JsonlJob(stub, output, SamplingParams(max_tokens=4)).run(lines)


if __name__ == "__main__":
    main(*sys.argv[1:])
