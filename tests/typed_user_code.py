"""Code as a user writes it. It is never run: a strict type checker must accept all of it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from folojax import (
    LLM,
    BatchMetrics,
    EngineArgs,
    EngineConfig,
    LLMEngine,
    RequestOutput,
    SamplingParams,
    TextPrompt,
    TokensPrompt,
    batch_metrics,
)
from folojax.jsonl.file_job import JsonlJob, Summary
from folojax.jsonl.output_file import open_output
from folojax.requests.prompts import Prompt


def build(directory: Path) -> list[LLM]:
    config = EngineConfig(max_num_seqs=8, max_model_len=None)
    return [
        LLM(),
        LLM("HuggingFaceTB/SmolLM2-135M-Instruct", revision="main", trust_remote_code=False),
        LLM(directory, tokenizer=directory / "tokenizer", dtype="bfloat16", max_num_seqs=4),
        LLM(model=str(directory), config=config, enable_prefix_caching=False),
    ]


def parameters() -> list[SamplingParams]:
    return [
        SamplingParams(),
        SamplingParams(temperature=0, max_tokens=None, stop="\n", seed=None),
        SamplingParams(n=2, temperature=0.7, top_p=0.9, top_k=-1, min_p=0.1, stop=["a", "b"]),
        SamplingParams(repetition_penalty=1.1, presence_penalty=1, frequency_penalty=-0.5),
        SamplingParams(logit_bias={5: -100.0}, allowed_token_ids=[5, 6], bad_words=["no"]),
        SamplingParams(logprobs=5, prompt_logprobs=0, min_tokens=2, stop_token_ids={2}),
    ]


def as_with_vllm(llm: LLM) -> None:
    params = llm.get_default_sampling_params().clone()
    params.max_tokens = 5
    params.stop = "a"
    prompts = [TokensPrompt(prompt_token_ids=[1, 2]), TokensPrompt(prompt_token_ids=[3])]
    llm.generate(prompts, params, priority=[1, 0], lora_request=None)
    llm.generate(TextPrompt(prompt="text"), SamplingParams.from_optional(n=None))
    llm.generate(prompt_token_ids=[[1, 2]], sampling_params=params)
    messages = [{"role": "user", "content": "Hi"}]
    llm.chat(messages, params, priority=[0], chat_template_content_format="string")
    llm.wake_up(tags=["kv_cache"])
    LLM(dtype=np.float32, skip_tokenizer_init=True, gpu_memory_utilization=0.5)
    LLMEngine.from_engine_args(EngineArgs(model="gpt2")).add_request("a", "text", params)


def texts(llm: LLM, prompts: Sequence[str], params: SamplingParams) -> list[str]:
    outputs: list[RequestOutput] = llm.generate(prompts, params)
    llm.generate("one prompt")
    llm.generate([1, 2, 3], use_tqdm=False)
    llm.generate([[1, 2], [3]], [params, params])
    llm.generate({"prompt": "text"}, sampling_params=params)
    mixed: list[Prompt] = [{"prompt_token_ids": [1, 2]}, "text", [1, 2]]
    llm.generate(mixed, params)
    metrics: BatchMetrics = batch_metrics(outputs)
    print(f"{metrics.output_throughput:.1f}")
    return [completion.text for output in outputs for completion in output.outputs]


def conversation(llm: LLM, question: str) -> str:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    (answer,) = llm.chat(messages, SamplingParams(max_tokens=20), add_generation_prompt=True)
    llm.chat([messages, messages])
    return answer.outputs[0].text


def best_token(output: RequestOutput) -> tuple[int, float, int, str | None]:
    completion = output.outputs[0]
    assert completion.logprobs is not None
    token: int = completion.token_ids[0]
    logprob = completion.logprobs[0][token]
    reason: str | None = completion.finish_reason
    stopped_by: int | str | None = completion.stop_reason
    print(reason, stopped_by, completion.cumulative_logprob + 1.0, completion.index + 1)
    if output.prompt_logprobs is not None:
        for position in output.prompt_logprobs:
            if position is not None:
                print([one.logprob for one in position.values()])
    first_s: float | None = output.metrics.ttft_s
    print(first_s, output.num_cached_tokens + 1, len(output.prompt_token_ids), output.prompt)
    return token, logprob.logprob, logprob.rank, logprob.decoded_token


def stream(llm: LLM, prompt: str) -> Iterator[str]:
    num_shown = 0
    for output in llm.stream(prompt, SamplingParams(max_tokens=None)):
        text = output.outputs[0].text
        yield text[num_shown:]
        num_shown = len(text)


def score(llm: LLM, prompt: str, continuations: Sequence[str]) -> list[float]:
    scores = llm.score([prompt] * len(continuations), continuations)
    ranks: list[list[int]] = [one.ranks for one in scores]
    print(ranks)
    return [one.cumulative_logprob for one in scores]


def own_loop(llm: LLM, prompts: Sequence[str]) -> dict[str, RequestOutput]:
    finished: dict[str, RequestOutput] = {}
    for index, prompt in enumerate(prompts):
        llm.add_request(str(index), prompt, SamplingParams(), priority=index)
    llm.abort_request("0")
    llm.abort_request(["1", "2"])
    while llm.has_unfinished_requests():
        for output in llm.step():
            if output.finished:
                finished[output.request_id] = output
    print(llm.metrics().num_used_pages + 1)
    return finished


def weights_and_memory(llm: LLM, params: object) -> None:
    llm.update_params(params)
    llm.reset_prefix_cache()
    llm.sleep()
    llm.wake_up()


def json_lines(llm: LLM, source: Path, target: Path) -> Summary:
    with source.open("rb") as lines, open_output(target, resume=True) as output:
        job = JsonlJob(llm, output, SamplingParams(max_tokens=100), seed=1)
        return job.run(lines)
