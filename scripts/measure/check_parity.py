"""The table of model families in docs/models.md: logits and tokens against transformers.

    python scripts/measure/check_parity.py

Needs what the tests need. Makes the tiny models of tests/families.py, compares the logits of 64
tokens and 32 greedy tokens from the engine, prints a table, and fails if one does not agree.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from needs import need

_MOST = 1e-4


def main() -> None:
    """Compares case by case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="of tests/families.py; all by default")
    args = parser.parse_args()
    need("torch")
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.families import FAMILIES

    print("| model | largest difference of a logit | 32 greedy tokens |")
    print("|---|---|---|")
    failed = []
    for case in args.cases or FAMILIES:
        difference, is_equal = compare(case)
        print(f"| {case} | {difference:.1e} | {'equal' if is_equal else 'DIFFER'} |", flush=True)
        if difference > _MOST or not is_equal:
            failed.append(case)
    if failed:
        sys.exit(f"not as transformers: {', '.join(failed)}")


def compare(case: str) -> tuple[float, bool]:
    """Largest difference of a logit, and whether all tokens are equal."""
    from folojax import LLM, SamplingParams
    from folojax.models.core.dense_attend import dense_attend
    from folojax.models.files.checkpoint import build_module, load_params, open_checkpoint
    from tests import reference
    from tests.families import PROMPT_LEN, save_family

    with tempfile.TemporaryDirectory() as name:
        theirs = save_family(case, Path(name))
        checkpoint = open_checkpoint(name)
        module = build_module(checkpoint.config, jnp.float32)
        params = load_params(checkpoint, jnp.float32)
    prompt = np.random.default_rng(0).integers(3, 128, PROMPT_LEN).tolist()
    tokens, positions = jnp.asarray(prompt, jnp.int32), jnp.arange(PROMPT_LEN)
    weights = {"params": params}
    hidden, _ = module.apply(weights, tokens, positions, None, dense_attend)
    logits = np.asarray(module.apply(weights, hidden, method="logits"))
    difference = float(np.abs(logits - reference.logits(theirs, prompt)).max())
    llm = LLM((module, params), max_num_seqs=2, max_num_batched_tokens=32, max_model_len=128)
    greedy = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    prompts = [prompt, prompt[:3], prompt[:17]]
    outputs = llm.generate(prompts, greedy, use_tqdm=False)
    return difference, all(
        list(output.outputs[0].token_ids) == reference.greedy(theirs, one, 32)[0]
        for one, output in zip(prompts, outputs, strict=True)
    )


if __name__ == "__main__":
    main()
