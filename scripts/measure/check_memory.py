"""How much memory it takes to load a model, against the model's own size.

    python scripts/measure/check_memory.py --gigabytes 2

Writes a Llama of random weights to a temporary directory, loads it in a process of its own, and
prints the peak of that process's resident memory. Fails above 1.25 times the model's size.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_MOST = 1.25

_CHILD = """
import pathlib, re, resource, sys, time
import jax, jax.numpy as jnp
from folojax.models.files.checkpoint import load_params, open_checkpoint
def peak():
    # Of this program alone; rusage also counts what the parent held when it started this one.
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1])
    scale = 1 if sys.platform == "darwin" else 1024
    return scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
jnp.zeros(1).block_until_ready()
before, start = peak(), time.perf_counter()
params = load_params(open_checkpoint(sys.argv[1]), jnp.dtype(sys.argv[2]))
jax.block_until_ready(params)
took = time.perf_counter() - start
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(before, peak(), size, max(leaf.nbytes for leaf in jax.tree.leaves(params)), took)
"""


def write_model(directory: Path, num_bytes: int, dtype: str) -> None:
    """A Llama of about that size, written tensor by tensor."""
    import jax
    import ml_dtypes
    import numpy as np

    from folojax.models.files.hf_config import config_from_hf
    from folojax.models.files.hf_names import parameter_sources
    from folojax.models.files.safetensors_files import ShardWriter

    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    mapping = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32_000,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    }
    layer = 1024 * (3 * 1024 + 3 * 4096)
    outer = 2 * 32_000 * 1024
    mapping["num_hidden_layers"] = max(1, (num_bytes // kind.itemsize - outer) // layer)
    (directory / "config.json").write_text(json.dumps(mapping))
    rng = np.random.default_rng(0)
    writer = ShardWriter(directory)
    for source in jax.tree.leaves(parameter_sources(config_from_hf(mapping))):
        for name, shape in source.tensors:
            writer.add(name, rng.standard_normal(shape, np.float32).astype(kind))
    writer.close()


def main() -> None:
    """Writes, loads, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--stored", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name), int(args.gigabytes * 1e9), args.stored)
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, name, args.dtype],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
    before, peak, size, largest, took = map(float, done.stdout.split())
    print(
        f"model, as loaded           {size / 1e9:7.3f} GB, largest parameter {largest / 1e9:.3f} GB"
    )
    print(f"process before loading     {before / 1e9:7.3f} GB")
    print(f"peak while loading         {peak / 1e9:7.3f} GB, {peak / size:.2f} of the model")
    print(f"above process and model    {(peak - before - size) / 1e9:7.3f} GB")
    print(f"time                       {took:7.1f} s, {size / took / 1e9:.2f} GB/s")
    if peak > _MOST * size:
        sys.exit(f"more than {_MOST} of the model's size")


if __name__ == "__main__":
    main()
