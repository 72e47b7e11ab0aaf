"""Batches of rows through an engine, by hand and in a local Ray."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from folojax import LLM, SamplingParams
from folojax.adapters.ray_data import Generator
from tests.letters import encode, make_letters_tokenizer
from tests.reference import TINY_LIMITS

PROMPTS = ["The sea is", "Rivers", "A", "Once upon a time", "No", "Seven swans"]


def column(entries: list[Any]) -> np.ndarray:
    """Entries as Ray hands them over."""
    found = np.empty(len(entries), object)
    for row, entry in enumerate(entries):
        found[row] = entry
    return found


@pytest.fixture(scope="module")
def options(tiny_model: tuple) -> dict[str, Any]:
    return {"model": tiny_model, "tokenizer": make_letters_tokenizer(), **TINY_LIMITS}


def test_columns_are_what_the_engine_generates(options: dict[str, Any]) -> None:
    params = SamplingParams(temperature=0, max_tokens=8)
    batch = {"prompt": column(PROMPTS), "number": np.arange(len(PROMPTS))}
    found = Generator(params, **options)(batch)
    outputs = LLM(**options).generate(PROMPTS, params, use_tqdm=False)
    assert list(found) == [
        "prompt",
        "number",
        "output_text",
        "output_token_ids",
        "output_finish_reason",
        "output_error",
    ]
    assert list(found["prompt"]) == PROMPTS
    assert list(found["output_text"]) == [one.outputs[0].text for one in outputs]
    assert list(found["output_token_ids"]) == [one.outputs[0].token_ids for one in outputs]
    assert list(found["output_finish_reason"]) == [one.outputs[0].finish_reason for one in outputs]
    assert list(found["output_error"]) == [""] * len(PROMPTS)


def test_every_form_of_a_prompt(options: dict[str, Any]) -> None:
    """Lists come out of Arrow as arrays, lists of objects as arrays of dicts."""
    generate = Generator({"temperature": 0, "max_tokens": 8}, prompt_column="question", **options)
    message = {"role": "user", "content": "Hi"}
    chat = column([message])
    forms = ["[user]Hi|[assistant]", encode("[user]Hi|[assistant]"), chat, [message]]
    forms.append(np.array(forms[1], np.int64))
    texts = generate({"question": column(forms)})["output_text"]
    assert len(set(texts)) == 1
    assert texts[0]


def test_a_bad_row_harms_no_other(options: dict[str, Any]) -> None:
    generate = Generator({"temperature": 0, "max_tokens": 8}, **options)
    alone = generate({"prompt": column(PROMPTS[:2])})
    bad = ["x" * 200, "", None, [5, 1000], column([{"content": "no role"}])]
    found = generate({"prompt": column([PROMPTS[0], *bad, PROMPTS[1]])})
    errors = list(found["output_error"])
    assert errors[0] == errors[-1] == ""
    reasons = ("200 tokens", "empty", "NoneType", "id 1000", "role")
    for error, reason in zip(errors[1:-1], reasons, strict=True):
        assert reason in error
    assert list(found["output_text"]) == [
        alone["output_text"][0], *[""] * len(bad), alone["output_text"][1]
    ]  # fmt: skip
    assert list(found["output_finish_reason"][1:-1]) == ["error"] * len(bad)
    assert not generate({"prompt": column(bad)})["output_text"].any()


def test_a_row_samples_the_same_in_any_batch(options: dict[str, Any]) -> None:
    generate = Generator({"n": 2, "max_tokens": 8}, id_column="id", **options)
    ids = np.arange(len(PROMPTS))
    whole = generate({"prompt": column(PROMPTS), "id": ids})["output_text"]
    halves = [
        text
        for half in (slice(3, 6), slice(0, 3))
        for text in generate({"prompt": column(PROMPTS[half]), "id": ids[half]})["output_text"]
    ]
    assert list(whole) == halves[3:] + halves[:3]
    assert all(len(set(texts)) == 2 for texts in whole)  # a list for the samples of each
    same = generate({"prompt": column(["A", "A"]), "id": np.array([1, 2])})["output_text"]
    assert same[0] != same[1]


def test_equal_prompts_without_ids_get_equal_samples(options: dict[str, Any]) -> None:
    texts = Generator({"max_tokens": 8}, **options)({"prompt": column(["A", "B", "A"])})[
        "output_text"
    ]
    assert texts[0] == texts[2] != texts[1]


def test_columns_that_are_missing_or_taken_are_named(options: dict[str, Any]) -> None:
    generate = Generator({"max_tokens": 1}, id_column="key", output_prefix="my_", **options)
    with pytest.raises(ValueError, match=r"no column \['prompt', 'key'\].*\['text'\]"):
        generate({"text": column(["A"])})
    batch = {"prompt": column(["A"]), "key": np.arange(1), "my_text": column(["A"])}
    with pytest.raises(ValueError, match=r"has \['my_text'\] already"):
        generate(batch)


@pytest.mark.adapters
@pytest.mark.filterwarnings("default")  # Ray's own are not ours to mend
def test_two_actors_of_a_local_ray(text_directory: Path) -> None:
    """Rows come back as the engine gives them, bad ones with their reason, whatever actor ran."""
    import ray

    params: dict[str, Any] = {"temperature": 0.0, "max_tokens": 6}
    limits: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": 4, "num_pages": 8}
    prompts = [f"The number {number} is" for number in range(23)]
    rows = [{"key": key, "prompt": prompt} for key, prompt in enumerate([*prompts, "x" * 1000])]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        dataset = ray.data.from_items(rows).map_batches(
            Generator,
            fn_constructor_kwargs={
                "model": str(text_directory),
                "sampling_params": params,
                **limits,
            },
            compute=ray.data.ActorPoolStrategy(size=2),
            num_cpus=1,
            batch_size=6,
        )
        found = sorted(dataset.take_all(), key=lambda row: row["key"])
    finally:
        ray.shutdown()
    outputs = LLM(text_directory, **limits).generate(
        prompts, SamplingParams(**params), use_tqdm=False
    )
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows]
    for row, output in zip(found, outputs, strict=False):
        assert row["output_text"] == output.outputs[0].text
        assert list(row["output_token_ids"]) == output.outputs[0].token_ids
        assert row["output_error"] == ""
    assert "max_model_len" in found[-1]["output_error"]
    assert found[-1]["output_text"] == ""
