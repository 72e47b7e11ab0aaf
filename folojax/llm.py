"""`LLM`: the user's door, with the names that code written for vLLM knows."""

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from tqdm.auto import tqdm

from folojax.buckets import make_buckets
from folojax.compilation_cache import enable_compilation_cache
from folojax.config import EngineConfig, ResolvedConfig
from folojax.engine import Engine, EngineMetrics
from folojax.kv_cache import KVLayout
from folojax.models.checkpoint import Checkpoint, build_module, load_params, open_checkpoint
from folojax.outputs import RequestOutput
from folojax.prompts import Prompt, params_per_prompt, parse_prompt, parse_prompts
from folojax.runner import Runner
from folojax.sampling import SamplingClass
from folojax.sampling_params import SamplingParams
from folojax.sched.scheduler import Scheduler
from folojax.tokenizer import Tokenizer, load_tokenizer

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


class LLM:
    """A model, its tokenizer and an engine.

    Args:
        model: A directory (config.json and safetensors), a .gguf file, a Hub name, or a pair
            (module, params) that is already in memory; None is the embedded default,
            SmolLM2-135M-Instruct.
        tokenizer: A directory or a transformers tokenizer; None takes the model's own. A pair in
            memory has none: without one, prompts are token ids and there is no text.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on CPU, bfloat16 elsewhere.
            A pair in memory keeps its own.
        config: Limits and sizes; or give its fields as keywords.
        revision: Branch, tag or commit of a Hub model.
        trust_remote_code: Only False: code that ships with a model is never run.
        **fields: Fields of EngineConfig.

    Raises:
        ValueError: an option is unknown or out of range, or the model cannot be loaded.
        FileNotFoundError: no such model.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | tuple[nn.Module, Any] | None = None,
        tokenizer: str | os.PathLike[str] | Any | None = None,
        *,
        dtype: str = "auto",
        config: EngineConfig | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        **fields: Any,
    ) -> None:
        if trust_remote_code is not False:
            raise ValueError("trust_remote_code: code that ships with a model is never run here")
        config = _engine_config(config, fields)
        enable_compilation_cache()
        backend = jax.default_backend()
        checkpoint: Checkpoint | None = None
        if isinstance(model, tuple):
            module, params = model
        else:
            compute_dtype = _resolve_dtype(dtype)
            checkpoint = open_checkpoint(model, revision)
            config.resolve(
                checkpoint.config.max_position, backend
            )  # before the weights are paid for
            module = build_module(checkpoint.config, compute_dtype)
            params = load_params(checkpoint, compute_dtype)
        self.config = config.resolve(module.config.max_position, backend)
        self.default_params = _default_params(checkpoint)
        self._next_id = itertools.count()
        self._early: list[RequestOutput] = []  # finished while generate() waited for others
        self.engine = _make_engine(
            module,
            params,
            self.config,
            _find_tokenizer(tokenizer, checkpoint),
            checkpoint.eos_token_ids if checkpoint else (),
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continues prompts, all in one continuous batch.

        All or nothing: if one prompt is refused, none is queued. Requests that were added before
        go on meanwhile, and their outputs come with the next `step`.

        Args:
            prompts: One prompt or a list: text, token ids, {"prompt": ...} or
                {"prompt_token_ids": ...}.
            sampling_params: One for all, one for each, or None for the model's own defaults.
            use_tqdm: Shows a progress bar on a terminal.

        Returns:
            One output for each prompt, in order.

        Raises:
            ValueError: a prompt or its parameters are refused.
        """
        parsed = parse_prompts(prompts, self.engine.tokenizer)
        params = params_per_prompt(sampling_params or self.default_params, len(parsed))
        ids = [self._draw_id() for _ in parsed]
        queued: list[str] = []
        try:
            for request_id, (text, token_ids), one in zip(ids, parsed, params, strict=True):
                self.engine.add_request(request_id, token_ids, one, prompt=text)
                queued.append(request_id)
        except BaseException:
            self.engine.abort(queued)
            raise
        with tqdm(total=len(ids), desc="requests", disable=None if use_tqdm else True) as bar:
            return self._finish(ids, bar)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        chat_template: str | None = None,
    ) -> list[RequestOutput]:
        """Answers conversations: renders the chat template, then generates.

        Args:
            messages: One conversation, or a list of them; a message has "role" and "content".
            sampling_params: As in `generate`.
            use_tqdm: As in `generate`.
            chat_template: Jinja text in place of the tokenizer's own.

        Raises:
            ValueError: there is no template, or as in `generate`.
        """
        is_one = bool(messages) and all(isinstance(message, Mapping) for message in messages)
        conversations: Any = [messages] if is_one else messages
        prompts = [self.render_chat(one, chat_template) for one in conversations]
        return self.generate(prompts, sampling_params, use_tqdm)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], chat_template: str | None = None
    ) -> Prompt:
        """The prompt of one conversation, as `generate` takes it: what `chat` would continue."""
        if self.engine.tokenizer is None:
            raise ValueError("chat needs a tokenizer: pass tokenizer=, or generate from token ids")
        token_ids = self.engine.tokenizer.apply_chat_template(
            messages, chat_template, add_generation_prompt=True
        )
        return {"prompt_token_ids": token_ids}

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        priority: int = 0,
    ) -> None:
        """Queues one request, for callers that own the loop.

        Args:
            request_id: Not that of an unfinished request.
            prompt: As in `generate`.
            sampling_params: None for the model's own defaults.
            priority: Smaller is more urgent; only read under scheduling_policy="priority".

        Raises:
            ValueError: the request is refused; nothing was queued.
        """
        text, token_ids = parse_prompt(prompt, self.engine.tokenizer)
        (params,) = params_per_prompt(sampling_params or self.default_params, 1)
        self.engine.add_request(request_id, token_ids, params, prompt=text, priority=priority)

    def step(self) -> list[RequestOutput]:
        """Runs one step of the batch; returns the requests that have finished since the last."""
        early, self._early = self._early, []
        return early + self.engine.step()

    def abort_request(self, request_ids: str | Sequence[str]) -> list[RequestOutput]:
        """Ends requests where they stand, and returns them; unknown ids are passed over."""
        return self.engine.abort(request_ids)

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to do or to return."""
        return bool(self._early) or self.engine.has_unfinished_requests()

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer; None if there is none."""
        return self.engine.tokenizer.hf if self.engine.tokenizer else None

    def metrics(self) -> EngineMetrics:
        """Counts as they stand now."""
        return self.engine.metrics()

    def warm_up(self, sampling: Sequence[SamplingClass] = tuple(SamplingClass)) -> int:
        """Compiles every executable of the plan now, so that no step waits for a compiler.

        Args:
            sampling: Classes of sampling parameters that will be used.

        Returns:
            How many executables there are.
        """
        return self.engine.runner.warm_up(sampling)

    def _finish(self, ids: list[str], bar: Any) -> list[RequestOutput]:
        """Steps until all of `ids` are done; whatever interrupts it leaves the engine empty."""
        outputs: dict[str, RequestOutput] = {}
        wanted = set(ids)
        try:
            while len(outputs) < len(ids):
                for output in self.engine.step():
                    if output.request_id in wanted:
                        outputs[output.request_id] = output
                        bar.update()
                    else:
                        self._early.append(output)
        except BaseException:
            aborted = self.engine.reset()
            self._early += [output for output in aborted if output.request_id not in wanted]
            raise
        return [outputs[request_id] for request_id in ids]

    def _draw_id(self) -> str:
        return f"generate-{next(self._next_id)}"


def _engine_config(config: EngineConfig | None, fields: dict[str, Any]) -> EngineConfig:
    known = {field.name for field in dataclasses.fields(EngineConfig)}
    unknown = sorted(fields.keys() - known)
    if unknown:
        raise ValueError(f"unknown options {unknown}; there are {sorted(known)}")
    return dataclasses.replace(config or EngineConfig(), **fields)


def _resolve_dtype(dtype: str) -> Any:
    if dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be 'auto' or one of {sorted(_DTYPES)}")
    return _DTYPES[dtype]


def _default_params(checkpoint: Checkpoint | None) -> SamplingParams:
    """The sampling parameters that a model's generation_config.json recommends."""
    recommended = checkpoint.generation_config if checkpoint else {}
    if recommended.get("do_sample") is False:
        return SamplingParams(temperature=0.0)
    names = ("temperature", "top_p", "top_k", "min_p")
    return SamplingParams(**{name: recommended[name] for name in names if recommended.get(name)})


def _find_tokenizer(tokenizer: Any, checkpoint: Checkpoint | None) -> Tokenizer | None:
    if isinstance(tokenizer, str | os.PathLike):
        return load_tokenizer(tokenizer)
    if tokenizer is not None:
        return Tokenizer(tokenizer)
    return load_tokenizer(checkpoint.directory) if checkpoint else None


def _make_engine(
    module: nn.Module,
    params: Any,
    config: ResolvedConfig,
    tokenizer: Tokenizer | None,
    eos_token_ids: tuple[int, ...],
) -> Engine:
    is_half_on_cpu = module.dtype != jnp.float32 and jax.default_backend() == "cpu"
    # A product with a single row converts all weights to float32 there, in every call.
    buckets = make_buckets(config, jax.default_backend(), 2 if is_half_on_cpu else 1)
    layout = KVLayout.of(module.config, module.dtype, buckets.segments, config.page_size)
    runner = Runner(module, params, layout, buckets, config.max_num_seqs)
    return Engine(Scheduler(config.scheduler()), runner, tokenizer, eos_token_ids, config.seed)
