"""An engine without a device: all that the host does in a step, and nothing that it waits for.

What a plan is, which shapes it is packed into and what is counted are those of any engine with the
same limits; tokens are always the same one.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from folojax import LLM, SamplingParams, StepOutput
from folojax.models.core.config import ModelConfig
from folojax.models.core.decoder import Llama, init_params
from folojax.requests.prompts import ParsedPrompt
from folojax.sampling.sampler import SamplingSpec
from folojax.steps.executables import Executable
from folojax.steps.packing import PackedReport, pack_report, report_packing
from folojax.steps.state import CallInputs, CallResults

_TOKEN = 7


def make_stub_llm(vocab_size: int = 128, max_position: int = 256, **options: Any) -> LLM:
    """An engine with a model of a thousand parameters; options as of `LLM`."""
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        max_position=max_position,
        rope_theta=1e4,
        rope_scaling=None,
        rms_norm_eps=1e-5,
        tie_embeddings=True,
        qkv_bias=False,
        qk_norm=False,
    )
    module = Llama(config, jnp.float32)
    return LLM((module, init_params(module, jax.random.key(0))), **options)


@contextlib.contextmanager
def without_device(llm: LLM) -> Iterator[None]:
    """While it lasts nothing is computed, and every sample is the same token."""

    def call(one: Executable, inputs: CallInputs) -> CallResults:
        return CallResults(report=None if one.spec is None else _report(one.spec, one.rows))

    nothing: dict[str, Any] = {"call": call, "_move_pages": lambda moves: None}
    with (
        mock.patch.multiple(llm.engine.runner, **nothing),
        mock.patch.object(jax, "device_get", lambda arrays: arrays),
    ):
        yield


@functools.cache
def _report(spec: SamplingSpec, count: int) -> PackedReport:
    """The same token in every row."""
    fields: tuple[Any, ...] = (
        np.full(count, _TOKEN, np.int32),
        np.full(count, -1.0, np.float32),
        np.zeros(count, np.int32),
        np.ones(count, bool),
        np.zeros((count, 0), np.int32),
        np.zeros((count, 0), np.float32),
    )
    out = StepOutput(*fields)
    return PackedReport(np.asarray(pack_report(out)), report_packing(out))


def start_rows(llm: LLM, prompts: list[list[int]], num_tokens: int) -> None:
    """Adds a request for each prompt, and steps until all decode.

    Args:
        llm: An engine without requests.
        prompts: Token ids.
        num_tokens: Of each output; greedy, whatever tokens come.
    """
    ask = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        parsed = ParsedPrompt(None, prompt)
        llm.engine.queue([llm.engine.make_request(str(number), parsed, ask, is_streamed=False)])
    while llm.metrics().num_waiting:
        llm.engine.step()
    for _ in range(4):  # what is left of the last prompts, and what is under way
        llm.engine.step()
