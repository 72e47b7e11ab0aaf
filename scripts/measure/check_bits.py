"""The table of bits in docs/models.md: how far log-probabilities move with fewer of them.

    python scripts/measure/check_bits.py [TEXT ...]

Needs what the tests need. Compares the packaged model in float32 with its kernels in few bits, and
with files that tests/quantized_writer.py writes of it, kernels rounded to the nearest code: mean
divergence in nats a token over 50 paragraphs of the given text files, of docs/ by default.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from needs import need

_ROOT = Path(__file__).parents[2]
_PARAGRAPHS, _LEAST_LETTERS, _MOST_TOKENS = 50, 300, 256


def main() -> None:
    """Prints a row for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="*", type=Path, help="docs/*.md by default")
    args = parser.parse_args()
    need("torch")
    sys.path.insert(0, str(_ROOT))
    from folojax.models.files.checkpoint import load_params, open_checkpoint
    from folojax.text.tokenizer_files import load_tokenizer
    from tests import quantized_writer as writer

    checkpoint = open_checkpoint(None)
    tokenizer = load_tokenizer(checkpoint.directory)
    paragraphs = _paragraphs(args.texts or sorted((_ROOT / "docs").glob("*.md")))
    texts = [tokenizer.encode(text)[:_MOST_TOKENS] for text in paragraphs]
    files = {
        "GPTQ, 4 bits, groups of 64": writer.Case(
            {"quant_method": "gptq", "bits": 4, "group_size": 64}, writer.gptq(group=64)
        ),
        "FP8, blocks of 64 by 64": writer.Case(
            {"quant_method": "fp8", "weight_block_size": [64, 64]},
            writer.float8((64, 64), "weight_scale_inv"),
        ),
    }
    plain = list(_log_probabilities(load_params(checkpoint, jnp.float32), checkpoint, texts))
    print("| weights | against | nats a token | same likeliest token |\n|---|---|---|---|")

    def tell(name: str, against: str, params: Any, expected: list[np.ndarray]) -> list[np.ndarray]:
        found = list(_log_probabilities(params, checkpoint, texts))
        print(f"| {name} | {against} | {_compare(expected, found)} |", flush=True)
        return found

    for quantization in ("int8", "int4", "fp8"):
        params = load_params(checkpoint, jnp.float32, quantization)
        tell(f"`{quantization}`", "float32", params, plain)
    for name, case in files.items():
        with tempfile.TemporaryDirectory() as root:
            writer.write(case, checkpoint.directory, Path(root, "model"))
            stored = open_checkpoint(Path(root, "model"))
            floats = tell(name, "float32", load_params(stored, jnp.float32), plain)
            small = load_params(stored, jnp.float32, "int4")
            tell(f"{name}, `int4`", "the file as floats", small, floats)


def _paragraphs(files: list[Path]) -> list[str]:
    texts = (text for file in files for text in file.read_text(encoding="utf-8").split("\n\n"))
    return [text for text in texts if len(text) > _LEAST_LETTERS][:_PARAGRAPHS]


def _log_probabilities(
    params: Any, checkpoint: Any, texts: list[list[int]]
) -> Iterator[np.ndarray]:
    from folojax.models.files.checkpoint import build_module
    from tests.dense import logits

    module = build_module(checkpoint.config, jnp.float32)
    for tokens in texts:
        yield np.asarray(jax.nn.log_softmax(logits(module, params, tokens)))


def _compare(plain: list[np.ndarray], small: list[np.ndarray]) -> str:
    pairs = list(zip(plain, small, strict=True))
    divergence = np.concatenate([(np.exp(p) * (p - q)).sum(axis=1) for p, q in pairs]).mean()
    is_same = np.concatenate([p.argmax(axis=1) == q.argmax(axis=1) for p, q in pairs]).mean()
    return f"{divergence:.4f} | {is_same:.0%}"


if __name__ == "__main__":
    main()
