"""A process of an engine over several: DIRECTORY PORT COUNT NUMBER.

It writes what its calls gave to a file; with another word behind, it generates until it is stopped.
`tests/laws/test_several_processes.py` starts them.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from folojax import LLM, SamplingParams, run_for
from tests import dense
from tests.reference import MORE_LIMITS, TIGHT

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPTS = [[5, 17, 99, 3], list(range(5, 40)), [7, 8], [5, 17, 99, 3, 8]]


def results(directory: Path, mesh: Mesh | None) -> list[Any]:
    """What calls of every kind give; in every process the same."""
    from tests import mixed_requests  # which asks JAX for its devices: these are to be connected

    module, params = dense.load(directory / "model")
    host = jax.tree.map(np.asarray, params)
    options = TIGHT | {"num_host_pages": 20, "min_swap_tokens": 1}
    found: list[Any] = []

    def note(outputs: list[Any]) -> None:
        for output in outputs:
            for one in output.outputs:
                found.append([one.token_ids, round(one.cumulative_logprob, 3), one.seed])

    # Every kind of sampling; preempted, swapped to the host, with cached prefixes.
    note(mixed_requests.run(mixed_requests.make_llm((module, host), **options, mesh=mesh)))
    llm = LLM((module, params), **MORE_LIMITS, mesh=mesh)
    scores = llm.score(PROMPTS, PROMPTS, use_tqdm=False)
    found.append([round(one.cumulative_logprob, 3) for one in scores])
    llm.add_request("parent", PROMPTS[1], GREEDY)
    for _ in range(4):
        llm.step()
    taken = llm.snapshot("parent")
    assert taken.kv is not None
    llm.abort_request("parent")
    llm.resume(taken, "child")
    note([one for _ in range(12) for one in llm.step() if one.finished])
    llm.update_params(jax.tree.map(lambda leaf: leaf * np.float32(1.25), host))
    llm.sleep()
    llm.wake_up()
    note(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    found.append(llm.engine.weights)
    if mesh is not None:
        with pytest.raises(ValueError, match="whose clocks differ"):
            run_for(llm, seconds=1)
    llm.save_pretrained(directory / f"saved {jax.process_index()} of {jax.process_count()}")
    return found


def serve(directory: Path, mesh: Mesh) -> None:
    """Generates until somebody stops it; tells when it has begun."""
    llm = LLM(dense.load(directory / "model"), **MORE_LIMITS, mesh=mesh)
    while True:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        print("served", flush=True)


def main(directory: Path, port: str, count: int, number: int, *serves: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        count,
        number,
        heartbeat_timeout_seconds=10,
        shutdown_timeout_seconds=10,
        initialization_timeout=60,
    )
    mesh = Mesh(np.array(jax.devices()), ("x",))
    if serves:
        serve(directory, mesh)
    found = results(directory, mesh)
    (directory / f"{number}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
