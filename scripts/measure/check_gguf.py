"""What llama.cpp makes of the GGUF files that the tests write, against transformers.

    python scripts/measure/check_gguf.py [CASE ...]

Needs what the tests need, and llama.cpp: `pip install xllamacpp`. Writes the files of
tests/models/test_gguf_families.py, compares all log-probabilities behind prompts of 1, 7 and 48
tokens, and prints a table. So it is the files that are checked: that what tests/gguf_writer.py
writes is what llama.cpp reads.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from needs import need

_LENGTHS = (1, 7, 48)
_SEED, _VOCAB = 0, 128

_SPACES = ("nemotron_h", "nemotron_h_moe", "nemotron_h_moe/latent")
_HEADS = {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
_STILL = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 20.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.0,
}
ADAPTED: dict[str, dict[str, Any]] = {
    "qwen3next": _HEADS,
    "qwen3next/fused": _HEADS,
    "qwen35": {**_HEADS, "linear_num_value_heads": 6},
    "qwen35moe": _HEADS,
    # Without a cap stated, llama.cpp has this one.
    "gemma4/moe": {"final_logit_softcapping": 30.0},
    "gemma4/apart": {"final_logit_softcapping": 30.0},
    # transformers bounds steps of a state space from below, llama.cpp does not.
    **{case: {"time_step_min": 1e-9} for case in _SPACES},
    # It has no windows for these.
    "llama/mistral": {"sliding_window": None},
    "llama/mixtral": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    # Groups of experts are taken by the two best of each, in transformers by the best.
    "deepseek2/v2": {"topk_method": "greedy", "n_group": 1, "topk_group": 1},
    # Files do not say how much queries grow, and llama.cpp takes it that they do not.
    "mistral4": {"rope_parameters": _STILL},
    "mistral4/apart": {"rope_parameters": _STILL},
}
"""What llama.cpp has fixed otherwise than the cases of the tests."""

LEFT_OUT = {
    "deepseek2/lite": "not compared: llama.cpp knows it by its 27 layers",
    "deepseek2/flash": "not compared: it knows it by its 47 layers",
    "exaone4": "not compared: it knows it by its 64 layers",
    "olmo2/olmo3": "not compared: every fourth layer has no window and all have one base there",
    "gemma3n": "not compared: it has sizes of its own",
    "ernie4_5-moe": "not compared: it has experts in all but the first layers",
    "granitehybrid/bamba": "not compared: other dimensions turn there where half of a head does",
    "granitehybrid/dense": "not compared: its converter makes a granite of it",
    "gpt-oss": "not compared: the ramp of its rates has whole steps there",
}
"""Cases that llama.cpp computes otherwise, or that no file of its converter is like."""


def main() -> None:
    """Compares case by case, each in a process of its own, since llama.cpp ends it on errors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="of the tests; all by default")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        read(args.read)
        return
    need("torch")
    need("xllamacpp")
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.models.test_gguf_families import CASES

    print("| case | largest difference of a log-probability |")
    print("|---|---|")
    for case in args.cases or CASES:
        print(f"| {case} | {LEFT_OUT.get(case) or compare(case)} |", flush=True)


def compare(case: str) -> str:
    """The largest difference from transformers, or what kept llama.cpp from reading a file."""
    from tests import gguf_writer, reference
    from tests.families import save_family
    from tests.models.test_gguf_families import CASES

    family, changes = CASES[case]
    architecture, _, variant = case.partition("/")
    prompt = _prompt()
    with tempfile.TemporaryDirectory() as name:
        directory, path = Path(name) / "hf", Path(name) / "tiny.gguf"
        model = save_family(family, directory, changes | ADAPTED.get(case, {}))
        gguf_writer.convert(model, directory, architecture, path, variant)
        logits = reference.logits(model, prompt).astype(np.float64)
        command = [sys.executable, __file__, "--read", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        result = path.with_suffix(".npy")
        if not result.is_file():
            return f"NOT READ: {done.stderr.strip().rpartition(chr(10))[2]}"
        theirs = np.load(result)
    ours = logits[[length - 1 for length in _LENGTHS]]
    ours -= np.log(np.exp(ours).sum(axis=1, keepdims=True))
    return f"{np.abs(theirs - ours).max():.1e}"


def read(path: Path) -> None:
    """Has llama.cpp compute log-probabilities behind the prompts, in float32."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = 256, 1, 0, -1
    params.warmup = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    found = np.full((len(_LENGTHS), _VOCAB), np.nan)
    for row, length in zip(found, _LENGTHS, strict=True):
        request = {
            "prompt": _prompt()[:length],
            "n_predict": 1,
            "n_probs": _VOCAB,
            "temperature": 1.0,
            "cache_prompt": False,
        }
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[token["id"]] = token["logprob"]
    np.save(path.with_suffix(".npy"), found)


def _prompt() -> list[int]:
    return np.random.default_rng(_SEED).integers(3, _VOCAB, _LENGTHS[-1]).tolist()


if __name__ == "__main__":
    main()
