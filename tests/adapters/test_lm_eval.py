"""Metrics and every single answer, against lm-eval's own `hf` model on the same weights."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from folojax import LLM

pytestmark = [
    pytest.mark.adapters,
    pytest.mark.filterwarnings("default"),  # lm-eval's own are not ours to mend
]

MAX_LENGTH = 48
FACTS = [
    {"text": "The capital of France is", "choices": ["Paris", "London", "a fish"], "answer": 0},
    {"text": "Two plus two equals", "choices": ["seven", "four", "four hundred"], "answer": 1},
    {"text": "The opposite of hot is", "choices": ["warm", "blue", "cold"], "answer": 2},
    {"text": "Water is made of hydrogen and", "choices": ["gold", "oxygen", "salt"], "answer": 1},
    {"text": "A dog is an", "choices": ["animal", "idea", "opera in three acts"], "answer": 0},
]
LONG = (
    "The sea covers most of the earth, and most of it has never been seen by anyone. Rivers carry "
    "salt to it, grain by grain, and the sun takes the water back. What is left is bitter, and "
    "older than the hills. Sailors said that it was the same sea everywhere, as the wind is the "
    "same wind; but they feared some parts of it, and sang when they had left them behind."
)
TASKS: list[dict[str, Any]] = [
    {
        "task": "choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    {
        "task": "rolling",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": "word_perplexity"},
            {"metric": "byte_perplexity"},
            {"metric": "bits_per_byte"},
        ],
    },
    {
        "task": "generation",
        "output_type": "generate_until",
        "num_fewshot": 0,
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": [".", ",", "\n", " and"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match", "regexes_to_ignore": [r"\s"]}],
    },
]
DOCS = {
    "choice": FACTS,
    # Of one window, of several, and of none.
    "rolling": [{"text": text} for text in (FACTS[0]["text"], LONG, LONG[:200], "")],
    # The last one must be cut from the left.
    "generation": [*FACTS, FACTS[0] | {"text": f"{LONG} {FACTS[0]['text']}"}],
}


def make_task(config: dict[str, Any]) -> Any:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    documents = Dataset.from_list(DOCS[config["task"]])
    return ConfigurableTask(
        config=config | {"custom_dataset": lambda **_: {"test": documents}, "test_split": "test"}
    )


def run(model: Any, config: dict[str, Any]) -> tuple[dict[str, float], list[Any]]:
    """The metrics of a task, and the model's answer to each request."""
    from lm_eval.evaluator import evaluate

    name = config["task"]
    found = evaluate(model, {name: make_task(config)}, bootstrap_iters=0, log_samples=True)
    metrics = {
        key.removesuffix(",none"): value
        for key, value in found["results"][name].items()
        if key.endswith(",none") and "stderr" not in key
    }
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return metrics, [answer for sample in samples for (answer,) in sample["resps"]]


@pytest.fixture(scope="module", params=["tiny", "real"])
def pair(
    request: pytest.FixtureRequest,
    text_directory: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Any, Any]:
    """lm-eval's own model and ours, of the same weights in float32."""
    from lm_eval.models.huggingface import HFLM

    from folojax.adapters.lm_eval import FolojaxLM

    limits: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 32}
    directory = text_directory
    if request.param == "real":
        directory = tmp_path_factory.mktemp("real")
        LLM(dtype="float32", **limits).save_pretrained(directory)
    theirs = HFLM(
        str(directory), dtype="float32", device="cpu", batch_size=3, max_length=MAX_LENGTH
    )
    return theirs, FolojaxLM(str(directory), dtype="float32", max_length=MAX_LENGTH, **limits)


@pytest.mark.parametrize("config", TASKS, ids=lambda config: config["task"])
def test_metrics_and_answers_are_those_of_hf(pair: tuple, config: dict[str, Any]) -> None:
    (expected, theirs), (found, ours) = (run(model, config) for model in pair)
    print(config["task"], {"hf": expected, "folojax": found})
    assert found.keys() == expected.keys()
    assert set(found) >= {metric["metric"] for metric in config["metric_list"]}
    for name, value in expected.items():
        # Accuracies and matches are the same number, sums of logarithms but for rounding.
        rounding = 1e-4 if config["task"] == "rolling" else 0
        assert found[name] == pytest.approx(value, rel=rounding, abs=0), name
    assert len(ours) == len(theirs) >= len(DOCS[config["task"]])
    for one, other in zip(ours, theirs, strict=True):
        check_answer(one, other)


def check_answer(ours: Any, theirs: Any) -> None:
    """A text; a log-likelihood; or one and whether it is greedy."""
    if isinstance(theirs, str):
        assert ours == theirs
    elif isinstance(theirs, tuple | list):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-4)
        assert ours[1] is theirs[1]
    else:
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-4)


def instances(kind: str, arguments: Sequence[tuple]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


def test_contexts_of_every_kind_are_scored_alike(pair: tuple) -> None:
    """None, ending with spaces, beginning with BOS, and too long; and greedy continuations."""
    theirs, ours = pair
    bos = theirs.tokenizer.decode(theirs.prefix_token_id)
    prompt = FACTS[0]["text"]
    (greedy,) = theirs.generate_until(
        instances("generate_until", [(prompt, {"until": [], "max_gen_toks": 4})])
    )
    pairs = [
        ("", "Paris is a city."),
        ("", f"{bos}Paris"),
        (f"{prompt}  ", "Paris"),
        (f"{bos}{prompt}", " Paris"),
        (LONG, " And so they sang."),
        (prompt, f" Paris. {LONG[:150]}"),
        (prompt, greedy),
    ]
    requests = instances("loglikelihood", pairs)
    answers = ours.loglikelihood(requests)
    for found, expected in zip(answers, theirs.loglikelihood(requests), strict=True):
        check_answer(found, expected)
    # A greedy text need not have greedy tokens, if it is encoded otherwise.
    assert {is_greedy for _, is_greedy in answers} == {True, False}


def test_sampling_follows_the_task(pair: tuple) -> None:
    """A draw from the likeliest token alone is greedy; seeds tell draws apart."""
    _, ours = pair
    gen = {"until": ["\n"], "max_gen_toks": 6}
    draws = [
        gen,
        gen | {"do_sample": False, "temperature": 0.7},
        gen | {"temperature": 0.7, "top_k": 1},
        *[gen | {"do_sample": True, "temperature": 3.0, "seed": seed} for seed in (1, 1, 2)],
    ]
    prompt = FACTS[1]["text"]
    texts = ours.generate_until(instances("generate_until", [(prompt, one) for one in draws]))
    assert texts[0] == texts[1] == texts[2]
    assert texts[3] == texts[4] != texts[5]
    with pytest.raises(ValueError, match=r"holds \['num_beams'\]"):
        ours.generate_until(instances("generate_until", [(prompt, gen | {"num_beams": 4})]))
    with pytest.raises(ValueError, match="max_gen_toks is 48; it must be below max_length, 48"):
        ours.generate_until(instances("generate_until", [(prompt, {"max_gen_toks": 48})]))


def test_chats_are_rendered_alike(pair: tuple) -> None:
    theirs, ours = pair
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "He"}]
    for is_open in (True, False):
        expected = theirs.apply_chat_template(chat, add_generation_prompt=is_open)
        assert ours.apply_chat_template(chat, add_generation_prompt=is_open) == expected
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.tokenizer_name == theirs.tokenizer_name


@pytest.mark.parametrize("options", [{"add_bos_token": True}, {"prefix_token_id": 30}])
def test_options_of_tokens_mean_what_they_mean_to_hf(pair: tuple, options: dict[str, Any]) -> None:
    from lm_eval.models.huggingface import HFLM

    from folojax.adapters.lm_eval import FolojaxLM

    theirs, ours = pair
    # The tokenizer is loaded with the option.
    theirs = HFLM(
        theirs.pretrained, dtype="float32", device="cpu", max_length=MAX_LENGTH, **options
    )
    ours = FolojaxLM(ours._llm, max_length=MAX_LENGTH, **options)
    requests = instances("loglikelihood", [("", "Paris"), (FACTS[0]["text"], " Paris")])
    answers, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    for one, other in zip(answers, expected, strict=True):
        check_answer(one, other)
    assert all(math.isfinite(one[0]) for one in answers)


def test_what_cannot_be_evaluated_is_refused(pair: tuple, tiny_model: tuple) -> None:
    from folojax.adapters.lm_eval import FolojaxLM

    _, ours = pair
    with pytest.raises(ValueError, match=r"no tokenizer.*pass tokenizer="):
        FolojaxLM(LLM(tiny_model, max_model_len=32, num_pages=2))
    with pytest.raises(ValueError, match=r"\['dtype'\] come too late"):
        FolojaxLM(ours._llm, dtype="float32")
    with pytest.raises(ValueError, match="max_length is 65; it must be from 2 to max"):
        FolojaxLM(ours._llm, max_length=65)
    with pytest.raises(ValueError, match="tokens; 48 can be scored"):
        ours.loglikelihood(instances("loglikelihood", [("Once", LONG)]))
