"""`LLM`: the user's door, with the names that code written for vLLM knows."""

import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, Unpack

from flax import linen as nn
from jax.sharding import Mesh

from folojax.backend.compilation_cache import enable_compilation_cache
from folojax.compile.programs import own_settings
from folojax.config import EngineConfig, EngineOptions
from folojax.engine.build import (
    DType,
    default_sampling_params,
    find_tokenizer,
    load_model,
    make_config,
    make_engines,
)
from folojax.engine.chat_prompts import ChatPrompts
from folojax.engine.live_request import LiveGeneration
from folojax.engine.shared_engine import exclusive
from folojax.models.core.config import ModelConfig
from folojax.models.files.save import save_pretrained
from folojax.requests.call_options import ChatOptions, GenerateOptions
from folojax.requests.continuations import (
    AskedScore,
    pair_continuations,
    routing_per_continuation,
)
from folojax.requests.lora_request import LoRAs, lora_per_prompt
from folojax.requests.outputs import RequestOutput, ScoreOutput
from folojax.requests.prompts import (
    Prompt,
    conversations,
    each_named,
    parse_prompts,
    priority_per_prompt,
    sampling_params_per_prompt,
)
from folojax.requests.sampling_params import SamplingParams
from folojax.requests.user_functions import UserFunctions
from folojax.requests.vllm_names import CALL_ARGUMENTS, own_names, prompts_of
from folojax.runner.compile_plan import CompilePlan
from folojax.runner.warm_up import list_compile_plan, warm_up_each
from folojax.sampling.logits_processors import LogitsProcessor
from folojax.sampling.sampler import SamplingClass
from folojax.steps.layers import ActivationEdit

_LOG = logging.getLogger("folojax")

_USUAL_SAMPLING = (SamplingClass.GREEDY, SamplingClass.RANDOM, SamplingClass.TRUNCATED)
"""What is compiled when an engine is made, if anything is."""

Params: TypeAlias = SamplingParams | Sequence[SamplingParams] | None
Message: TypeAlias = Mapping[str, Any]


class LLM(ChatPrompts):
    """A model, its tokenizer and an engine.

    Args:
        model: A directory (config.json and safetensors), a .gguf file, a Hub name, or a pair
            (module, params) that is already in memory, where the engine then runs
            (docs/weights.md); None is the embedded default, SmolLM2-135M-Instruct.
        tokenizer: A directory or a transformers tokenizer; None takes the model's own, if it has
            one. Without, prompts are token ids and there is no text.
        dtype: "float32", "bfloat16", "float16" or such a dtype of NumPy, JAX or PyTorch; "auto" is
            float32 on CPU, bfloat16 elsewhere. A pair in memory has its own, and no other.
        config: Limits and sizes; or give its fields as keywords.
        revision: Branch, tag or commit of a Hub model.
        trust_remote_code: Only False: code that ships with a model is never run.
        skip_tokenizer_init: Leaves the model's tokenizer alone; its end tokens still count.
        eos_token_id: Tokens that end a text, one or several, in place of those of the model's
            files and the tokenizer; the first is no `stop_reason`.
        logits_processors: Functions that requests may name, compiled into the sampler.
        activation_edits: Functions of the residual stream that requests may name, compiled into
            the model's step.
        activation_taps: Layers, from 0, behind which the residual stream is returned to requests
            that ask for `activations`; one or several, as of the functions.
        mesh: Its devices share each layer, as with `tensor_parallel_size`.
        **fields: Fields of EngineConfig, or vLLM's arguments (docs/coming_from_vllm.md).

    Attributes:
        config: The limits and sizes, nothing left open.
        memory_plan: What weights, pages and temporaries take of the device, and what fits.
        default_sampling_params: The model's own sampling parameters.
        engine: What runs the steps; of several, the first.

    Raises:
        ValueError: an option is unknown or out of range, the model cannot be loaded, or there is
            too little memory: known before anything is allocated.
        FileNotFoundError: no such model.
    """

    @own_settings()
    def __init__(
        self,
        model: str | os.PathLike[str] | tuple[nn.Module, Any] | None = None,
        tokenizer: str | os.PathLike[str] | Any | None = None,
        *,
        dtype: DType = "auto",
        config: EngineConfig | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        skip_tokenizer_init: bool = False,
        eos_token_id: int | Sequence[int] | None = None,
        logits_processors: LogitsProcessor | Sequence[LogitsProcessor] = (),
        activation_edits: ActivationEdit | Sequence[ActivationEdit] = (),
        activation_taps: int | Sequence[int] = (),
        mesh: Mesh | None = None,
        **fields: Unpack[EngineOptions],
    ) -> None:
        if trust_remote_code is not False:
            raise ValueError("trust_remote_code: code that ships with a model is never run here")
        config = make_config(config, dict(fields))
        several: tuple[Any, Any, Any] = logits_processors, activation_edits, activation_taps
        functions = UserFunctions(*several)
        functions.check_strict(config.strict)
        enable_compilation_cache()
        loaded = load_model(model, dtype, revision, config, mesh)
        self.config, self.memory_plan = loaded.config, loaded.memory_plan
        _LOG.info("%s", self.memory_plan)
        found = None if skip_tokenizer_init else find_tokenizer(tokenizer, loaded.checkpoint)
        engines = make_engines(loaded, found, functions, eos_token_id)
        if self.config.warm_up:
            warm_up_each([one.runner for one in engines], _USUAL_SAMPLING, has_logprobs=False)
        super().__init__(engines, default_sampling_params(loaded.checkpoint))
        self._generation_config = loaded.checkpoint.generation_config if loaded.checkpoint else {}
        self._numbers = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: Params = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: LoRAs = None,
        *,
        priority: Sequence[int] | None = None,
        **others: Unpack[GenerateOptions],
    ) -> list[RequestOutput]:
        """Continues prompts, all in one continuous batch.

        All or nothing: if one prompt is refused, none is queued. Requests that were added before
        go on meanwhile, and their outputs come with the next `step`.

        Args:
            prompts: One prompt or a list: text, token ids, {"prompt": ...} or
                {"prompt_token_ids": ...}.
            sampling_params: One for all, one for each, or None for the model's own defaults.
            use_tqdm: Shows a progress bar on a terminal; or what makes the bar, called as tqdm is.
            lora_request: The adapter of all prompts, or one or None for each.
            priority: One for each prompt, as in `add_request`.
            **others: What vLLM's method takes; prompt_token_ids may stand in place of prompts.

        Returns:
            One output for each prompt, in order.

        Raises:
            ValueError: a prompt, its parameters or its adapter are refused.
            RuntimeError: the engine sleeps.
        """
        if others:
            prompts = prompts_of(prompts, others)
        several = priority, lora_request
        requests = self._make_requests("generate", prompts, sampling_params, *several)
        return self._shared.wait(requests, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: LoRAs = None,
        *,
        priority: Sequence[int] | None = None,
        **template: Unpack[ChatOptions],
    ) -> list[RequestOutput]:
        """Answers conversations: renders the chat template, then generates.

        Args:
            messages: One conversation, or a list of them; a message has "role" and "content".
            sampling_params: As in `generate`.
            use_tqdm: As in `generate`.
            lora_request: As in `generate`.
            priority: As in `generate`, one for each conversation.
            **template: As in `render_chat`; and what vLLM's method takes.

        Raises:
            ValueError: as in `render_chat` or `generate`.
            RuntimeError: the engine sleeps.
        """
        options: Any = own_names(template, CALL_ARGUMENTS)
        prompts = each_named(
            "conversation", conversations(messages), lambda one: self.render_chat(one, **options)
        )
        return self.generate(prompts, sampling_params, use_tqdm, lora_request, priority=priority)

    def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        continuations: Prompt | Sequence[Prompt],
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: LoRAs = None,
        routed_experts: Sequence[Any] | None = None,
    ) -> list[ScoreOutput]:
        """Log-probabilities of given continuations; no token is generated.

        A prompt is computed once for all of its continuations.

        Args:
            prompts: As in `generate`; one for all continuations, or one for each.
            continuations: In the same forms. Text that follows text is encoded together with it,
                and cut as lm-eval cuts it: behind as many tokens as the prompt alone has, where
                spaces at the prompt's end count to the continuation. A token over the border
                counts to the prompt. Token ids are taken as they are.
            use_tqdm: As in `generate`.
            lora_request: The adapter of all continuations, or one or None for each.
            routed_experts: An array or None for each continuation: which experts all tokens but
                the last are sent to, prompt included, as `CompletionOutput.routed_experts` has
                them. Entries of -1 are left to the router. Such a prompt is computed by itself.

        Returns:
            One output for each continuation, in order.

        Raises:
            ValueError: a prompt or continuation is refused; none was queued.
            RuntimeError: the engine sleeps.
        """
        with self.lock:
            pairs = pair_continuations(prompts, continuations, self.engine.tokenizer)
            adapters = self._adapters_of(lora_request, len(pairs))
            routing = routing_per_continuation(routed_experts, len(pairs))
            each = zip(pairs, adapters, routing, strict=True)
            scores = each_named(
                "continuation",
                [AskedScore(*pair, adapter, experts) for pair, adapter, experts in each],
                lambda one: self.engine.make_score(self._draw_id("score"), one),
            )
        return self._shared.wait(scores, use_tqdm)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        lora_request: LoRAs = None,
    ) -> Iterator[RequestOutput]:
        """Continues prompts and reports every step of each.

        Outputs hold all that there is so far, and text once shown is never taken back (unless
        `update_params` restarts the request). The requests are queued when the iterator is first
        asked; to close it early aborts them.

        Args:
            prompts: As in `generate`.
            sampling_params: As in `generate`.
            lora_request: As in `generate`.

        Returns:
            An iterator of outputs; the last one of each prompt is finished. Their request ids are
            stream-<number>, numbered in the order of the prompts.

        Raises:
            ValueError: a prompt or its parameters are refused.
            RuntimeError: the engine sleeps.
        """
        requests = self._make_requests("stream", prompts, sampling_params, None, lora_request)
        self.engine.check_is_awake()
        return self._shared.stream(requests)

    @property
    def params(self) -> Any:
        """The parameters in use: the arrays themselves, not copies.

        On several devices they lie as docs/several_devices.md says: `join_params` gives them as
        the module has them.
        """
        return self.engine.runner.params

    @property
    def model(self) -> nn.Module:
        """The Flax module, whose `apply` takes `params`."""
        return self.engine.runner.model

    @property
    def model_config(self) -> ModelConfig:
        """What kind of model it is: its sizes, its layers."""
        return self.engine.runner.model.config

    @exclusive
    def save_pretrained(
        self, path: str | os.PathLike[str], hf_config: Mapping[str, Any] | None = None
    ) -> None:
        """Writes the parameters now in use and the tokenizer as transformers' own method does.

        Args:
            path: A directory, which transformers and `LLM` load afterwards.
            hf_config: The dict of config.json; needed if the model came as a pair whose config
                was made by hand.

        Raises:
            ValueError: the config is not that of a config.json.
        """
        save_pretrained(
            self.engine.runner.backend.devices.to_host(self.params, self.model_config),
            path,
            self.model_config,
            hf_config=hf_config,
            generation_config=self._generation_config,
            tokenizer=self.get_tokenizer(),
        )

    @exclusive
    def plan(
        self,
        sampling: Sequence[SamplingClass] = tuple(SamplingClass),
        logprobs: bool = True,
        structured_outputs: bool = False,
    ) -> CompilePlan:
        """Lists every executable that may be needed; as text, a line for each.

        Memory and compile times are those of `warm_up`, and unknown before.

        Args:
            sampling: Classes of sampling parameters that will be used.
            logprobs: Whether log-probabilities will be, of samples, prompts or continuations.
            structured_outputs: Whether these will be.
        """
        return list_compile_plan(self.engine.runner, sampling, logprobs, structured_outputs)

    @exclusive
    def warm_up(
        self,
        sampling: Sequence[SamplingClass] = tuple(SamplingClass),
        logprobs: bool = True,
        structured_outputs: bool = False,
    ) -> int:
        """Compiles every executable of the plan now, so that no step waits for a compiler.

        On CPU each takes some of the memory areas that Linux grants a process. Where those would
        not do, the rest of the plan is left until needed, with a warning. Arguments: as of `plan`.

        Returns:
            How many executables there are.

        Raises:
            RuntimeError: the engine sleeps, or is strict and there is no room for the whole plan.
        """
        self.engine.check_is_awake()
        wanted = sampling, logprobs, structured_outputs
        return warm_up_each([one.runner for one in self.engines], *wanted)

    @exclusive
    def _make_requests(
        self,
        kind: str,
        prompts: Any,
        sampling_params: Params,
        priority: Any = None,
        lora_request: LoRAs = None,
    ) -> list[LiveGeneration]:
        """Parses and checks the prompts of a call; nothing is queued yet."""
        parsed = parse_prompts(prompts, self.engine.tokenizer)
        default = self.default_sampling_params
        each = sampling_params_per_prompt(sampling_params, len(parsed), default)
        priorities = priority_per_prompt(priority, len(parsed))
        adapters = self._adapters_of(lora_request, len(parsed))
        is_streamed = kind == "stream"
        return each_named(
            "prompt",
            list(zip(parsed, each, priorities, adapters, strict=True)),
            lambda one: self.engine.make_request(
                self._draw_id(kind), *one, is_streamed=is_streamed
            ),
        )

    def _adapters_of(self, lora_request: LoRAs, num_prompts: int) -> list[str | None]:
        if lora_request is None:
            return [None] * num_prompts
        return list(map(self.engine.adapters.name_of, lora_per_prompt(lora_request, num_prompts)))

    def _draw_id(self, kind: str) -> str:
        ids = (f"{kind}-{number}" for number in self._numbers)
        return next(id_ for id_ in ids if id_ not in self.replicas.live)
