"""A trace of one run, for https://ui.perfetto.dev: phases of the host, and what XLA does beside.

The phases are those of `bench_profile`, with "step" around them; their slices lie in the row of the
thread that steps. XLA's own threads, or the device, have rows of their own.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from bench_profile import wrap_phases

NAMES = {"other": "step"}
"""Phases that are called differently here: what is left of a step is the step without the rest."""


def trace_run(path: Path, run: Callable[[], Any]) -> Path:
    """Runs something under JAX's profiler.

    Args:
        path: Becomes the trace, JSON in gzip. The profiler's own files, which XProf reads, go into
            the directory of the same name without a suffix.
        run: Steps engines; it takes a few times as long as without.

    Returns:
        The path.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # a slice for each call of Python would hide the phases
    directory = path.with_name(path.name.partition(".")[0])
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    with (
        jax.profiler.trace(directory, create_perfetto_trace=True, profiler_options=options),
        wrap_phases(_annotate),
    ):
        run()
    (found,) = directory.glob("plugins/profile/*/perfetto_trace.json.gz")
    shutil.copyfile(found, path)
    return path


def _annotate(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
    return jax.profiler.annotate_function(function, name=NAMES.get(phase, phase))
