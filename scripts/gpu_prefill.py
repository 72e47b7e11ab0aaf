"""The prefill part of gpu_check.py: whole calls with each way of attending to gathered pages."""

import functools
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from folojax.gathered_attention import Way, choose_way
from gpu_common import Report, make_model, seconds

from folojax import KVLayout, gathered_attention, kv_cache, prefill
from folojax.models.interface import PLAIN
from folojax.state import PrefillInputs


def check_prefill(small: bool, name: str, page_size: int, report: Report) -> None:
    """Calls of 32 rows of 128 tokens, the last ones of prompts of so many pages."""
    module, params = make_model(name, small)
    rows, columns = (4, 16) if small else (32, 128)
    chosen = choose_way(module.dtype, module.config.head_dim, PLAIN)
    ways: tuple[Way, ...] = ("plain", "xla" if chosen == "plain" else chosen)
    for pages in (1, 2) if small else (1, 4, 8):
        layout = KVLayout.of(module.config, module.dtype, (rows * pages,), page_size)
        tokens = np.random.default_rng(0).integers(module.config.vocab_size, size=(rows, columns))
        arrays: list[Any] = [
            tokens.astype(np.int32),
            np.full(rows, pages * page_size - columns, np.int32),  # start
            np.full(rows, columns, np.int32),  # length
            np.arange(rows * pages, dtype=np.int32).reshape(rows, pages),
        ]
        inputs = PrefillInputs(*arrays)
        reference = None
        for way in ways:
            jax.clear_caches()  # the other way's trace has the same arguments
            with mock.patch.object(gathered_attention, "choose_way", lambda *_, way=way: way):
                start = time.perf_counter()
                args = params, kv_cache.init_cache(layout), inputs, None
                run = prefill.lower(*args, model=module, edits=()).compile()
                compile_s = time.perf_counter() - start
            call = _threaded(run, params, kv_cache.init_cache(layout), inputs)
            hidden = np.asarray(call().astype(jnp.float32))
            reference = hidden if reference is None else reference
            difference = np.abs(hidden - reference)
            analysis = run.memory_analysis()
            report.add(
                model=name,
                pages=pages,
                way=way,
                ms=seconds(call) * 1e3,
                temp_mb=(analysis.temp_size_in_bytes if analysis else 0) / 1e6,
                compile_s=compile_s,
                mean_difference=float(difference.mean()),
                most_difference=float(difference.max()),
            )


def _threaded(run: Any, params: Any, cache: Any, inputs: Any) -> Callable[[], Any]:
    """A call that hands its cache on, as the engine does."""
    held = [cache]

    def call(donated: list[Any]) -> Any:
        donated[0], hidden, _ = run(params, donated[0], inputs, None)
        return hidden

    return functools.partial(call, held)
