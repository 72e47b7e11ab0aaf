"""Programs as they are written for vLLM: they run here with the import changed, and are right.

Where a program states nothing itself, what it leaves behind is compared with transformers.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import reference

LIMITS = "max_model_len=128, max_num_seqs=4, max_num_batched_tokens=32"

BASIC = """
from vllm import LLM, SamplingParams

prompts = ["Hello, my name is", "The president of the United States is", "The future of AI is"]
sampling_params = SamplingParams(temperature=0.0, top_p=0.95, max_tokens=8, ignore_eos=True)
llm = LLM(model=MODEL, LIMITS, dtype="float", gpu_memory_utilization=0.9, swap_space=4,
          enforce_eager=True, tensor_parallel_size=1, trust_remote_code=False, seed=None)
outputs = llm.generate(prompts, sampling_params)
for output in outputs:
    prompt = output.prompt
    generated_text = output.outputs[0].text
    print(f"Prompt: {prompt!r}, Generated text: {generated_text!r}")
"""

CHAT = """
from vllm import LLM, SamplingParams

llm = LLM(MODEL, LIMITS, disable_log_stats=True, tokenizer_mode="auto")
sampling_params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
conversation = [
    {"role": "system", "content": "You are a helpful assistant"},
    {"role": "user", "content": "Hello"},
]
outputs = llm.chat(conversation, sampling_params, use_tqdm=False, lora_request=None)
conversations = [conversation for _ in range(3)]
more = llm.chat(conversations, sampling_params, use_tqdm=True, priority=[0, 0, 0],
                chat_template_content_format="auto", add_generation_prompt=True)
assert [o.outputs[0].token_ids for o in more] == [outputs[0].outputs[0].token_ids] * 3
"""

PREFIXES = """
from vllm import LLM, SamplingParams

prefix = "You are an expert school principal, skilled in managing faculty and staff. " * 3
prompts = [prefix + p for p in ("Hello, my name is", "The capital of France is")]
sampling_params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
regular_llm = LLM(model=MODEL, LIMITS, enable_prefix_caching=False, block_size=16)
regular = regular_llm.generate(prompts, sampling_params)
del regular_llm
prefix_cached_llm = LLM(model=MODEL, LIMITS, enable_prefix_caching=True, block_size=16)
prefix_cached_llm.generate(prompts[0], sampling_params)
outputs = prefix_cached_llm.generate(prompts, sampling_params)
assert all(a.outputs[0].text == b.outputs[0].text for a, b in zip(regular, outputs))
assert [o.num_cached_tokens for o in regular] == [0, 0]
assert min(o.num_cached_tokens for o in outputs) >= 32
assert prefix_cached_llm.reset_prefix_cache()
(cold,) = prefix_cached_llm.generate(prompts[:1], sampling_params)
assert cold.num_cached_tokens == 0
"""

SAMPLES = """
from vllm import LLM, SamplingParams

llm = LLM(model=MODEL, LIMITS, max_logprobs=5, logprobs_mode="raw_logprobs")
sampling_params = SamplingParams(n=3, seed=7, temperature=0.8, top_k=50, max_tokens=5, logprobs=2)
(request_output,) = llm.generate(["The sea is"], sampling_params)
assert len(request_output.outputs) == 3
for i, output in enumerate(request_output.outputs):
    assert output.index == i
    assert len(output.logprobs) == len(output.token_ids)
    for token_id, step in zip(output.token_ids, output.logprobs):
        assert len(step) in (2, 3)
        assert step[token_id].logprob <= max(l.logprob for l in step.values())
        assert min(l.rank for l in step.values()) == 1
        assert step[token_id].decoded_token == llm.get_tokenizer().decode([token_id])
    total = sum(s[t].logprob for s, t in zip(output.logprobs, output.token_ids))
    assert abs(total - output.cumulative_logprob) < 1e-4
(one,) = llm.generate("The sea is", SamplingParams(temperature=0, max_tokens=1, logprobs=True))
assert len(one.outputs[0].logprobs[0]) == 1
"""

PERPLEXITY = """
import math
from vllm import LLM, SamplingParams

llm = LLM(model=MODEL, LIMITS)
text = "The quick brown fox jumps over the lazy dog"
(output,) = llm.generate(text, SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0))
assert output.prompt_logprobs[0] is None
logprobs = [d[t].logprob for d, t in zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:])]
perplexity = math.exp(-sum(logprobs) / len(logprobs))
"""

PRIORITIES = """
from vllm import LLM, SamplingParams

llm = LLM(model=MODEL, LIMITS, scheduling_policy="priority")
prompts = [f"Number {i} is" for i in range(6)]
sampling_params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
outputs = llm.generate(prompts, sampling_params, priority=[5, 4, 3, 2, 1, 0])
assert [o.prompt for o in outputs] == prompts
begun = [o.metrics.first_scheduled_time for o in outputs]
assert max(begun[2:]) < min(begun[:2])
"""

SLEEP = """
from vllm import LLM, SamplingParams

llm = LLM(model=MODEL, LIMITS, enable_sleep_mode=True)
sampling_params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
before = llm.generate("How are you?", sampling_params)
llm.sleep(level=1)
llm.wake_up()
after = llm.generate("How are you?", sampling_params)
llm.sleep()
llm.wake_up(tags=["weights"])
try:
    llm.generate("How are you?", sampling_params)
except RuntimeError as error:
    assert "sleeps" in str(error)
else:
    raise AssertionError("the cache is not there yet")
llm.wake_up(tags=["kv_cache"])
outputs = llm.generate("How are you?", sampling_params)
assert before[0].outputs[0].text == after[0].outputs[0].text == outputs[0].outputs[0].text
"""

TOKENS = """
from vllm import LLM, SamplingParams, TextPrompt, TokensPrompt
from vllm.inputs import TokensPrompt as SamePrompt

llm = LLM(model=MODEL, LIMITS)
tokenizer = llm.get_tokenizer()
ids = tokenizer.encode("The sea is")
sampling_params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
outputs = llm.generate([TokensPrompt(prompt_token_ids=ids), SamePrompt(prompt_token_ids=ids),
                        TextPrompt(prompt="The sea is"), {"prompt_token_ids": ids},
                        {"prompt": "The sea is", "multi_modal_data": None}], sampling_params)
outputs += llm.generate(prompt_token_ids=[ids, ids], sampling_params=sampling_params)
outputs += llm.generate(prompt_token_ids=ids, sampling_params=sampling_params, use_tqdm=False)
assert [o.prompt_token_ids for o in outputs] == [ids] * 8
assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 1
"""

METRICS = """
from vllm import LLM, SamplingParams

llm = LLM(model=MODEL, LIMITS, disable_log_stats=False)
outputs = llm.generate(["One", "Two"], SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))
for output in outputs:
    metrics = output.metrics
    assert metrics.num_generation_tokens == 6
    assert metrics.queued_ts <= metrics.scheduled_ts < metrics.first_token_ts
    assert metrics.first_token_ts < metrics.last_token_ts
    assert metrics.first_token_latency > 0
    assert metrics.arrival_time < metrics.first_token_time < metrics.finished_time
    assert not hasattr(metrics, "no_such_time")
"""

STOPS = """
from vllm import LLM, SamplingParams

llm = LLM(model=MODEL, LIMITS)
free = llm.generate("The sea is", SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
ids = free[0].outputs[0].token_ids
text = free[0].outputs[0].text
stop = text[len(text) // 2 :][:3]
end = text.index(stop)
(cut,) = llm.generate("The sea is", SamplingParams(temperature=0, max_tokens=8, stop=stop))
assert (cut.outputs[0].text, cut.outputs[0].stop_reason) == (text[:end], stop)
assert cut.outputs[0].finish_reason == "stop"
(kept,) = llm.generate("The sea is", SamplingParams(
    temperature=0, max_tokens=8, stop=[stop, "never"], include_stop_str_in_output=True))
assert kept.outputs[0].text == text[:end] + stop
(by_id,) = llm.generate("The sea is", SamplingParams(
    temperature=0, max_tokens=8, stop_token_ids=[ids[3]]))
assert by_id.outputs[0].token_ids == ids[: ids.index(ids[3]) + 1]
assert by_id.outputs[0].stop_reason == ids[3]
(late,) = llm.generate("The sea is", SamplingParams(
    temperature=0, max_tokens=8, min_tokens=5, stop_token_ids=[ids[3]]))
assert len(late.outputs[0].token_ids) >= 5
"""

CONSTRAINTS = """
from vllm import LLM, SamplingParams

llm = LLM(model=MODEL, LIMITS)
tokenizer = llm.get_tokenizer()
greedy = dict(temperature=0, max_tokens=4, ignore_eos=True)
(free,) = llm.generate("The sea is", SamplingParams(**greedy))
first = free.outputs[0].token_ids[0]
other = tokenizer.encode(" blue")[0]
(biased,) = llm.generate("The sea is", SamplingParams(**greedy, logit_bias={other: 100.0}))
assert set(biased.outputs[0].token_ids) == {other}
(banned,) = llm.generate("The sea is", SamplingParams(**greedy, logit_bias={first: -1000.0}))
assert first not in banned.outputs[0].token_ids
(allowed,) = llm.generate("The sea is", SamplingParams(**greedy, allowed_token_ids=[other, 500]))
assert set(allowed.outputs[0].token_ids) <= {other, 500}
word = tokenizer.decode([first])
(worded,) = llm.generate("The sea is", SamplingParams(**greedy, bad_words=[word]))
assert worded.outputs[0].token_ids[0] != first
(fresh,) = llm.generate("The sea is", SamplingParams(**greedy, repetition_penalty=1e6))
assert len(set(fresh.outputs[0].token_ids)) == 4
"""

ENGINE = """
from vllm import EngineArgs, LLMEngine, RequestOutput, SamplingParams

engine = LLMEngine.from_engine_args(EngineArgs(model=MODEL, LIMITS))
greedy = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
test_prompts = [("A robot may not injure", greedy), ("To be or not to be", greedy.clone()),
                ("What is the meaning of life?", SamplingParams(n=2, seed=3, max_tokens=4))]
outputs, seen, request_id = [], {}, 0
while test_prompts or engine.has_unfinished_requests():
    if test_prompts:
        prompt, sampling_params = test_prompts.pop(0)
        engine.add_request(str(request_id), prompt, sampling_params)
        request_id += 1
    request_outputs: list[RequestOutput] = engine.step()
    for request_output in request_outputs:
        text = request_output.outputs[0].text
        assert text.startswith(seen.get(request_output.request_id, ""))
        seen[request_output.request_id] = text
        if request_output.finished:
            outputs.append(request_output)
outputs.sort(key=lambda output: output.request_id)
assert [o.request_id for o in outputs] == ["0", "1", "2"]
assert [len(o.outputs) for o in outputs] == [1, 1, 2]
engine.add_request("gone", "To be", greedy)
engine.abort_request(["gone"])
assert not engine.has_unfinished_requests()
outputs = outputs[:2]
"""

OWN_PARAMS = """
from vllm import LLM, SamplingParams

llm = LLM(model=MODEL, LIMITS)
params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
longer = params.clone()
longer.max_tokens = 5
seeded = SamplingParams.from_optional(temperature=1.0, seed=5, top_p=None, max_tokens=4)
prompts = ["One", "Two", "Three"]
outputs = llm.generate(prompts, [params, longer, seeded])
assert [len(o.outputs[0].token_ids) for o in outputs][:2] == [3, 5]
llm.llm_engine.add_request("running", "One", longer)
llm.llm_engine.step()
longer.max_tokens = 1  # is for later requests
steps = []
while llm.llm_engine.has_unfinished_requests():
    steps += llm.llm_engine.step()
assert len(steps[-1].outputs[0].token_ids) == 5
default = llm.get_default_sampling_params()
default.max_tokens = 2
assert llm.get_default_sampling_params().max_tokens == 16
assert len(llm.generate("One", default)[0].outputs[0].token_ids) <= 2
outputs = outputs[:2]
"""

SEEDS = """
from vllm import LLM, SamplingParams

llm = LLM(model=MODEL, LIMITS, seed=42)
def sample(**fields):
    params = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=6, **fields)
    return [o.outputs[0].token_ids for o in llm.generate(["The sea is"] * 3, params)]
first, again, other = sample(seed=1), sample(seed=1), sample(seed=2)
assert first == again == [first[0]] * 3
assert other != first
assert len({tuple(tokens) for tokens in sample(seed=None) + sample(seed=-1)}) == 6
"""

TOOLS = """
import json
from vllm import LLM, SamplingParams

llm = LLM(model=MODEL, LIMITS)
tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
messages = [{"role": "user", "content": [{"type": "text", "text": "Sunny"},
                                         {"type": "text", "text": "today?"}]}]
template = (
    "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}"
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endif %}{% endfor %}"
    "{% if mood %}({{ mood }}){% endif %}"
)
params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
def prompt(**options):
    (output,) = llm.chat(messages, params, chat_template=template, use_tqdm=False, **options)
    return output.prompt
assert prompt(tools=tools) == "<get_weather>[Sunny][today?]"
assert prompt(chat_template_content_format="openai") == "[Sunny][today?]"
assert prompt(chat_template_content_format="string") == "Sunny\\ntoday?"
assert prompt(chat_template_kwargs={"mood": "calm"}).endswith("(calm)")
messages = [{"role": "user", "content": "One text"}]
assert prompt() == "One text"
assert prompt(chat_template_content_format="openai") == "[One text]"
messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The sea"}]
outputs = llm.chat(messages, params, add_generation_prompt=False, continue_final_message=True)
"""

TRAINER = """
import torch
from contextlib import contextmanager
from vllm import LLM, SamplingParams
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams as SameParams

assert SameParams is SamplingParams
llm = LLM(model=MODEL, LIMITS, skip_tokenizer_init=True, dtype=torch.float32, load_format="auto",
          disable_custom_all_reduce=True, enable_chunked_prefill=None, max_num_partial_prefills=1)
sampling_params = SamplingParams(n=1, logprobs=0, max_tokens=5, detokenize=False)

@contextmanager
def update_sampling_params(**kwargs):
    old = {key: getattr(sampling_params, key) for key in kwargs if hasattr(sampling_params, key)}
    for key in old:
        setattr(sampling_params, key, kwargs[key])
    yield
    for key, value in old.items():
        setattr(sampling_params, key, value)

with update_sampling_params(temperature=0, ignore_eos=True, no_such_field=1):
    outputs = llm.generate(prompt_token_ids=[[504, 3575, 282], [100, 200]],
                           sampling_params=sampling_params, use_tqdm=False)
assert sampling_params.temperature == 1.0
assert all(isinstance(output, RequestOutput) for output in outputs)
assert all(len(output.outputs[0].logprobs) == 5 for output in outputs)
assert llm.get_tokenizer() is None
"""

BEAMS = """
from vllm import LLM
from vllm.sampling_params import BeamSearchParams

llm = LLM(model=MODEL, LIMITS)
params = BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True, temperature=0.0)
found = llm.beam_search([{"prompt": "Hello, my name is"}, {"prompt": "The sea"}], params)
for output in found:
    assert len(output.sequences) == 3
    scores = [sequence.cum_logprob for sequence in output.sequences]
    assert scores == sorted(scores, reverse=True)
    for sequence in output.sequences:
        assert sequence.text == llm.get_tokenizer().decode(sequence.tokens)
        assert len(sequence.logprobs) == 5
assert found[0].sequences[0].text.startswith("Hello, my name is")
"""

STRUCTURED = """
import json
import re
from enum import Enum
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

llm = LLM(model=MODEL, LIMITS, structured_outputs_config={"backend": "guidance"})
class CarType(str, Enum):
    sedan = "Sedan"
    suv = "SUV"
json_schema = {"type": "object", "properties": {
    "brand": {"type": "string", "maxLength": 5},
    "car_type": {"enum": [one.value for one in CarType]}}, "required": ["brand", "car_type"]}
structured = [
    StructuredOutputsParams(choice=["Positive", "Negative"]),
    StructuredOutputsParams(regex=r"\\w{2,5}@\\w{2,5}\\.com\\n"),
    StructuredOutputsParams(json=json_schema, disable_any_whitespace=True,
                            disable_additional_properties=True),
    StructuredOutputsParams(grammar='root ::= "SELECT " ("col_1" | "col_2") " from table_1"'),
]
prompts = ["Classify this sentiment: vLLM is wonderful!", "An email address of Alan Turing:",
           "The most iconic car of the 90s as JSON:", "An SQL query:"]
params = [SamplingParams(structured_outputs=one, max_tokens=80, seed=i)
          for i, one in enumerate(structured)]
texts = [o.outputs[0].text for o in llm.generate(prompts, params)]
assert texts[0] in ("Positive", "Negative")
assert re.fullmatch(r"\\w{2,5}@\\w{2,5}\\.com\\n", texts[1])
assert CarType(json.loads(texts[2])["car_type"])
assert texts[3] in ("SELECT col_1 from table_1", "SELECT col_2 from table_1")
old = SamplingParams(guided_decoding=structured[0], seed=0, max_tokens=80)
assert llm.generate(prompts[0], old)[0].outputs[0].text == texts[0]
"""

PROGRAMS = {
    name.lower(): text
    for name, text in sorted(globals().items())
    if name.isupper() and isinstance(text, str) and "from vllm import" in text
}


@pytest.fixture(scope="module")
def theirs(text_directory: Path) -> Callable[[list[int], int], list[int]]:
    """The tokens with which transformers continues a prompt."""
    model = reference.load_model(text_directory)
    return lambda prompt, count: reference.greedy(model, prompt, count)[0]


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_runs_with_the_import_changed(
    name: str, text_directory: Path, theirs: Callable[[list[int], int], list[int]]
) -> None:
    text = re.sub(r"^from vllm\b", "from folojax", PROGRAMS[name], flags=re.MULTILINE)
    names: dict[str, Any] = {"MODEL": str(text_directory)}
    exec(compile(text.replace("LIMITS", LIMITS), name, "exec"), names)
    for output in names.get("outputs", ()):
        (completion,) = output.outputs
        count = len(completion.token_ids)
        assert count >= 3
        assert completion.token_ids == theirs(output.prompt_token_ids, count)
    if "perplexity" in names:
        ids = names["output"].prompt_token_ids
        logits = reference.logits(reference.load_model(text_directory), ids)[:-1]
        logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        expected = np.exp(-logprobs[np.arange(len(ids) - 1), ids[1:]].mean())
        assert names["perplexity"] == pytest.approx(expected, rel=1e-3)


def test_there_are_fifteen() -> None:
    assert len(PROGRAMS) >= 15
