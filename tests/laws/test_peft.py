"""Adapters that peft itself has made and saved, against models that it has merged."""

import copy
from pathlib import Path
from typing import Any

import pytest

from folojax import LLM, LoRARequest, SamplingParams
from tests.families import save_family
from tests.laws.test_lora import ROOM, check_rows
from tests.lora_adapters import Adapted, linear_names
from tests.reference import TINY_LIMITS, embedded_model

pytestmark = [pytest.mark.adapters, pytest.mark.filterwarnings("default")]

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=0)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 8, "lora_alpha": 4, "use_rslora": True},
    "patterns": {
        "r": 2,
        "lora_alpha": 3,
        "rank_pattern": {"q_proj": 4, r"layers\.1\..*down_proj": 8, "c_fc": 5},
        "alpha_pattern": {"self_attn.o_proj": 9, r"layers\.0\..*down_proj": 1, "c_proj": 7},
    },
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora is True"),
    "biases": ({"bias": "lora_only"}, "bias is 'lora_only'"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
    "an embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "updates of embeddings"),
    "a changed base": ({"init_lora_weights": "pissa"}, "'pissa', which changes the base's"),
}


def save(base: Any, directory: Path, **config: Any) -> Adapted:
    """An adapter of random numbers, saved; and the model that peft merges it to."""
    import peft
    import torch

    names = [
        name for name, _ in base.named_modules() if name.rpartition(".")[2] in linear_names(base)
    ]
    if any(name.endswith(".experts") for name, _ in base.named_modules()):
        # peft would take experts, which are no modules, for modules of such names.
        names = [name for name in names if ".mlp." not in name]
    options: dict[str, Any] = {"target_modules": names, "init_lora_weights": False}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options | config))
    adapted.save_pretrained(str(directory))
    return Adapted(directory, adapted.merge_and_unload().eval())


@pytest.mark.parametrize(
    "case", ["llama", "gpt2", "phi3", "qwen3-moe", "gemma2", "deepseek-v3", "qwen3.5"]
)
def test_tokens_are_those_of_models_that_peft_has_merged(case: str, tmp_path: Path) -> None:
    base = save_family(case, tmp_path / "base")
    adapters = {name: save(base, tmp_path / name, **config) for name, config in KINDS.items()}
    limits = TINY_LIMITS | {"max_num_batched_tokens": 64}
    llm = LLM(tmp_path / "base", dtype="float32", skip_tokenizer_init=True, **limits, **ROOM)
    check(llm, base, adapters, [list(range(5, 45)), [70, 3, 9]])


def test_tokens_of_the_packaged_model(tmp_path: Path) -> None:
    """SmolLM2 from its GGUF file, with updates that change what it says and leave it a language."""
    base = embedded_model()
    sizes = {"r": 16, "lora_alpha": 4}
    adapters = {
        "all": save(base, tmp_path / "all", **sizes),
        "few": save(base, tmp_path / "few", **sizes, target_modules=["q_proj", "v_proj"]),
    }
    limits = TINY_LIMITS | {"max_num_batched_tokens": 64}
    llm = LLM(dtype="float32", **limits, **ROOM | {"max_lora_rank": 16})
    tokenizer = llm.get_tokenizer()
    texts = ["The capital of France is", "Once upon a time, in a land far away, there was"]
    check(llm, base, adapters, [list(tokenizer.encode(text)) for text in texts])


def check(llm: LLM, base: Any, adapters: dict[str, Adapted], prompts: list[list[int]]) -> None:
    requests = {
        name: LoRARequest(name, number, str(one.directory))
        for number, (name, one) in enumerate(adapters.items(), start=1)
    }
    wanted = [(prompt, name) for prompt in prompts for name in (None, *adapters)]
    several = [None if name is None else requests[name] for _, name in wanted]
    outputs = llm.generate([prompt for prompt, _ in wanted], GREEDY, False, several)
    check_rows(base, adapters, outputs, wanted)
    said = {round(output.outputs[0].cumulative_logprob, 2) for output in outputs}
    assert len(said) == len(wanted), "an adapter changes nothing"


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_are_refused(kind: str, tmp_path: Path) -> None:
    config, told = REFUSED[kind]
    base = save_family("llama", tmp_path / "base")
    adapter = save(base, tmp_path / "adapter", r=4, **config)
    limits = TINY_LIMITS | {"max_num_batched_tokens": 64}
    llm = LLM(tmp_path / "base", dtype="float32", skip_tokenizer_init=True, **limits, **ROOM)
    with pytest.raises(ValueError, match=told):
        llm.generate([[5, 6]], GREEDY, False, LoRARequest("a", 1, str(adapter.directory)))
