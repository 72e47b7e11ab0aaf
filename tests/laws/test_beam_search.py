"""Beam search finds what transformers finds: beams, their order, their log-probabilities."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from folojax import LLM, BeamSearchOutput, BeamSearchParams, BeamSearchSequence, SamplingParams
from folojax.requests.vllm_names import BEAM_FIELDS
from tests import reference
from tests.conftest import check_is_empty
from tests.letters import decode
from tests.reference import MORE_LIMITS

ENDS = [28, 84, 47]
"""Tokens that a tiny random model is likely to write."""

PROMPTS = [
    "The capital of France is",
    "Once upon a time there was",
    "2 + 2 =",
    "The sea is",
]
QUESTIONS = [
    "What is the capital of France? Answer in one word.",
    "Is water wet? Answer yes or no.",
    "Say hello.",
    "What is two plus two?",
]


def theirs(
    model: Any, prompt: Sequence[int], width: int, power: float, length: int, eos: list[int] | None
) -> list[tuple[list[int], float]]:
    """Beams of transformers with their scores, the best first."""
    import torch
    from transformers import GenerationConfig

    model.generation_config.eos_token_id = None  # or it would stand in for one that is left out
    config = GenerationConfig(
        do_sample=False,
        num_beams=width,
        num_return_sequences=width,
        length_penalty=power,
        max_new_tokens=length,
        eos_token_id=eos,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    found = []
    for row, score in zip(out.sequences.tolist(), out.sequences_scores.tolist(), strict=True):
        tokens = row[len(prompt) :]
        ends = [tokens.index(one) for one in eos or () if one in tokens]
        found.append((tokens[: min(ends) + 1] if ends else tokens, score))
    return found


def check(
    ours: BeamSearchOutput, expected: list[tuple[list[int], float]], prompt: list[int], power: float
) -> None:
    assert len(ours.sequences) == len(expected)
    for one, (tokens, score) in zip(ours.sequences, expected, strict=True):
        assert one.tokens[: len(prompt)] == prompt
        output = one.tokens[len(prompt) :]
        assert output == tokens
        assert one.cum_logprob / len(output) ** power == pytest.approx(score, rel=1e-3, abs=1e-3)
        pairs = zip(output, one.logprobs, strict=True)
        assert sum(row[token].logprob for token, row in pairs) == pytest.approx(one.cum_logprob)


@pytest.fixture(scope="module")
def ids_llm(tiny_model: tuple) -> LLM:
    """Without a tokenizer, which would know less than all ids."""
    return LLM(tiny_model, **MORE_LIMITS, eos_token_id=ENDS)


@pytest.mark.parametrize("power", [-0.5, 0.0, 1.0, 2.0])
def test_beams_of_a_random_model(tiny_directory: Path, ids_llm: LLM, power: float) -> None:
    model, width, length = reference.load_model(tiny_directory), 4, 12
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 98, 3 + 2 * i).tolist() for i in range(8)]
    num_ended = num_whole = 0
    for is_endless in (False, True)[: 1 + (power == 1)]:
        params = BeamSearchParams(
            beam_width=width, max_tokens=length, length_penalty=power, ignore_eos=is_endless
        )
        outputs = ids_llm.beam_search(prompts, params)
        for output, prompt in zip(outputs, prompts, strict=True):
            ends = None if is_endless else ENDS
            check(output, theirs(model, prompt, width, power, length, ends), prompt, power)
            for one in output.sequences:
                is_ended = one.tokens[-1] in ENDS and not is_endless
                assert one.finish_reason == ("stop" if is_ended else "length")
                assert one.stop_reason == (one.tokens[-1] if is_ended else None)
                assert one.text is None
                num_ended += is_ended
                num_whole += not is_ended
    assert min(num_ended, num_whole) > 0
    check_is_empty(ids_llm)


@pytest.mark.slow
@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_beams_of_the_embedded_model(real_llm: LLM, power: float) -> None:
    model, width, length = reference.embedded_model(), 4, 16
    prompts: list[Any] = list(PROMPTS)
    prompts += [real_llm.render_chat([{"role": "user", "content": one}]) for one in QUESTIONS]
    params = BeamSearchParams(beam_width=width, max_tokens=length, length_penalty=power)
    outputs = real_llm.beam_search(prompts, params)
    tokenizer, num_ended = real_llm.get_tokenizer(), 0
    for output, given in zip(outputs, prompts, strict=True):
        is_text = isinstance(given, str)
        prompt = tokenizer.encode(given) if is_text else given["prompt_token_ids"]
        check(output, theirs(model, prompt, width, power, length, [2]), prompt, power)
        num_ended += sum(one.finish_reason == "stop" for one in output.sequences)
    assert num_ended > 0 or power > 1, "some end, unless the longest are wanted"


def test_one_beam_is_greedy(letters_llm: LLM) -> None:
    params = BeamSearchParams(beam_width=1, max_tokens=8, ignore_eos=True)
    (found,) = letters_llm.beam_search("The sea", params, use_tqdm=True, concurrency_limit=1)
    (one,) = found.sequences
    assert isinstance(one, BeamSearchSequence)
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    (output,) = letters_llm.generate("The sea", greedy, use_tqdm=False)
    assert one.tokens == output.prompt_token_ids + output.outputs[0].token_ids
    assert one.text == decode(one.tokens)


def test_a_beam_ends_where_the_context_does(letters_llm: LLM) -> None:
    prompt = [5] * 125
    params = BeamSearchParams(beam_width=2, max_tokens=50, ignore_eos=True)
    (found,) = letters_llm.beam_search(prompt, params)
    assert [len(one.tokens) for one in found.sequences] == [128, 128]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"beam_width": 0}, "beam_width is 0"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"length_penalty": float("nan")}, "length_penalty is nan"),
        ({"temperature": 0.5}, "model's own log-probabilities"),
        ({"include_stop_str_in_output": True}, "no stop strings"),
    ],
)
def test_fields_are_checked(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 3} | fields)
    same: dict[str, Any] = {name: row.same_at[0] for name, row in BEAM_FIELDS.items()}
    plain = BeamSearchParams(beam_width=2, max_tokens=3)
    wide: Any = np.int64(2)
    assert BeamSearchParams(beam_width=wide, max_tokens=3, **same) == plain


def test_what_cannot_be_searched_is_refused(tiny_model: tuple, letters_llm: LLM) -> None:
    params = BeamSearchParams(beam_width=70, max_tokens=3)
    with pytest.raises(ValueError, match="beam_width is 70, which takes 140"):
        letters_llm.beam_search("The sea", params)
    params = BeamSearchParams(beam_width=2, max_tokens=3)
    with pytest.raises(ValueError, match="prompt 1: the prompt is empty"):
        letters_llm.beam_search([[5], []], params)
    with pytest.raises(ValueError, match="concurrency_limit is 0"):
        letters_llm.beam_search("The sea", params, concurrency_limit=0)
    with pytest.raises(ValueError, match="lora_request is 'x'; it must be a LoRARequest"):
        letters_llm.beam_search("The sea", params, lora_request="x")  # type: ignore[arg-type]
    assert letters_llm.beam_search([], params) == []
