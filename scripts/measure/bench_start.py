"""Time from the start of a process to its first token, cold and warm, against transformers.

    python scripts/measure/bench_start.py --rounds 3

Every run is a process of its own with the embedded model. Cold: nothing is in folojax's cache, so
the GGUF file is converted and every program compiled; transformers reads the same file. Warm: both
are in the cache; transformers reads safetensors. Runs take turns, medians are printed.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from needs import need

_PROMPT = "The capital of France is"

_OURS = f"""
from folojax import LLM, SamplingParams
llm = LLM(dtype="float32")
(out,) = llm.generate({_PROMPT!r}, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
print("first token:", out.outputs[0].text, flush=True)
"""

_OPTIONS = ["--dtype", "float32", "--max-tokens", "1", "--stream", "--prompts", _PROMPT]

_COMMAND = f"""
import sys
from folojax.cli.main import main
print("first token:", end="", flush=True)
sys.exit(main(["generate", "--no-chat", *{_OPTIONS!r}]))
"""

_THEIRS = f"""
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
options = {{"gguf_file": sys.argv[2]}} if len(sys.argv) > 2 else {{}}
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], **options)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, **options)
ids = tokenizer({_PROMPT!r}, return_tensors="pt")
out = model.generate(**ids, max_new_tokens=1, do_sample=False)
print("first token:", tokenizer.decode(out[0, -1:]), flush=True)
"""


def seconds_to_first_token(code: str, cache: Path, *args: str) -> float:
    """Runs a program until it has printed its first token."""
    environment = os.environ | {"FOLOJAX_CACHE_DIR": str(cache), "PYTHONPATH": os.getcwd()}
    start = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            [sys.executable, "-c", code, *args],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("first token: "):
                took = time.perf_counter() - start
                process.wait()
                if line.split() != ["first", "token:", "Paris"]:
                    sys.exit(f"wrong token: {line}")
                return took
        log.seek(0)
        sys.exit(f"no token came:\n{log.read()[-2000:]}")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="of the warm runs")
    parser.add_argument("--cold-rounds", type=int, default=1)
    args = parser.parse_args()
    need("torch")

    # Here, so that the children do not share what this has imported.
    from folojax import LLM
    from folojax.models.files.checkpoint import embedded_model

    gguf = embedded_model()
    times: dict[str, list[float]] = {}

    def run(name: str, code: str, cache: Path, *arguments: str) -> None:
        times.setdefault(name, []).append(seconds_to_first_token(code, cache, *arguments))

    with tempfile.TemporaryDirectory() as root:
        for number in range(args.cold_rounds):
            cold = Path(root) / f"cold-{number}"
            run("folojax, cold", _OURS, cold)
            run("transformers, GGUF", _THEIRS, cold, str(gguf.parent), gguf.name)
        warm = Path(root) / "cold-0"
        os.environ["FOLOJAX_CACHE_DIR"] = str(warm)
        directory = str(Path(root) / "floats")
        # What folojax keeps of the file has its codes, which transformers alone does not read.
        LLM(dtype="float32", max_model_len=64, max_num_seqs=1).save_pretrained(directory)
        for _ in range(args.rounds):
            run("folojax, warm", _OURS, warm)
            run("folojax generate --stream, warm", _COMMAND, warm)
            run("transformers, safetensors", _THEIRS, warm, directory)
    for name, values in times.items():
        spread = f"{min(values):.1f} to {max(values):.1f}"
        print(f"{name:32s} {statistics.median(values):6.1f} s ({len(values)} runs, {spread})")
    ours = statistics.median(times["folojax, warm"])
    command = statistics.median(times["folojax generate --stream, warm"])
    print(f"{'folojax generate --stream / folojax':40s} {command / ours:6.2f}")
    for kind in ("safetensors", "GGUF"):
        ratio = statistics.median(times[f"transformers, {kind}"]) / ours
        print(f"{f'transformers, {kind} / folojax, warm':40s} {ratio:6.2f}")


if __name__ == "__main__":
    main()
