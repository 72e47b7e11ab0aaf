"""For callers that own the loop: requests in, steps, and what each step has changed."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self

from folojax.engine import branching
from folojax.engine.engine import Engine
from folojax.engine.metrics import EngineMetrics
from folojax.engine.replicas import Replicas
from folojax.engine.shared_engine import FairLock, SharedEngine, exclusive
from folojax.engine.snapshot import Snapshot
from folojax.requests.lora_request import LoRARequest, lora_per_prompt
from folojax.requests.outputs import RequestOutput
from folojax.requests.prompts import Prompt, parse_prompt, sampling_params_per_prompt
from folojax.requests.sampling_params import SamplingParams
from folojax.requests.vllm_names import missing_method


class RequestLoop:
    """The part of `LLM` that adds requests one by one, steps, and acts between two steps.

    Args:
        engines: What runs the steps.
        default_sampling_params: Sampling parameters of requests that come without any.

    Attributes:
        engines: As given.
        engine: The only one, or the first.
        replicas: What all requests go to: the only engine, or all of them as one.
        default_sampling_params: As given.
        lock: Held by a thread while it changes or steps the engine. Every method takes it by
            itself; whoever wants several calls to be one holds it around them.
    """

    def __init__(self, engines: Sequence[Engine], default_sampling_params: SamplingParams) -> None:
        self.engines = tuple(engines)
        self.engine = engines[0]
        self.replicas = Replicas(engines) if len(engines) > 1 else self.engine
        self.default_sampling_params = default_sampling_params
        self._shared = SharedEngine(self.replicas)
        self.lock: FairLock = self._shared.lock

    if not TYPE_CHECKING:  # which finds wrong names by itself

        def __getattr__(self, name: str) -> Any:
            return missing_method(name)

    @property
    def llm_engine(self) -> Self:
        """What has `add_request` and `step`: under that name too, as in vLLM."""
        return self

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer; None if there is none."""
        return self.engine.tokenizer.hf if self.engine.tokenizer else None

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters of requests that come without any, to be changed and passed."""
        return self.default_sampling_params.clone()

    @exclusive
    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        priority: int = 0,
        lora_request: LoRARequest | None = None,
    ) -> None:
        """Queues one request, for callers that own the loop; also while the engine sleeps.

        Args:
            request_id: Not that of an unfinished request.
            prompt: As in `generate`.
            sampling_params: None for the model's own defaults.
            priority: Smaller is more urgent; only read under scheduling_policy="priority".
            lora_request: Its adapter.

        Raises:
            ValueError: the request is refused; nothing was queued.
        """
        parsed = parse_prompt(prompt, self.engine.tokenizer)
        (params,) = sampling_params_per_prompt(sampling_params, 1, self.default_sampling_params)
        (lora,) = lora_per_prompt(lora_request, 1)
        adapter = self.engine.adapters.name_of(lora)
        live = self.engine.make_request(request_id, parsed, params, priority, adapter)
        self.replicas.queue([live])

    @exclusive
    def fork(
        self,
        parent_id: str,
        request_id: str,
        sampling_params: SamplingParams | None = None,
        *,
        index: int = 0,
        num_output_tokens: int | None = None,
        priority: int = 0,
    ) -> None:
        """Queues a request that goes on from where another stands; that one goes on too.

        They share the K/V of what they have in common. The new one's outputs begin with those of
        the other, and count as its own: for `max_tokens`, penalties and log-probabilities. With
        the parameters and the seed of the other it gives the same tokens; but logits processors
        begin with a new state.

        Args:
            parent_id: Of an unfinished request of `add_request`, `fork` or `resume`.
            request_id: Of the new one.
            sampling_params: None for those of the other. With `n` above 1 all samples begin there.
            index: Which sample of the other.
            num_output_tokens: How many of its outputs to begin with; None is all that are known.
            priority: As in `add_request`.

        Raises:
            ValueError: there is no such request or sample, or the new one is refused.
        """
        branching.fork(
            self.replicas,
            parent_id,
            request_id,
            sampling_params,
            index=index,
            num_output_tokens=num_output_tokens,
            priority=priority,
        )

    @exclusive
    def snapshot(self, request_id: str, index: int = 0) -> Snapshot:
        """Copies a sample of an unfinished request, K/V included, as a value.

        The request goes on; `abort_request` drops it. `Snapshot.save` writes it to disk. States of
        logits processors are not in it, nor K/V that its tokens alone would not give.

        Raises:
            ValueError: there is no such request or sample, or the steps under way have ended it.
        """
        return branching.take_snapshot(self.replicas, request_id, index)

    @exclusive
    def resume(
        self,
        snapshot: Snapshot,
        request_id: str,
        sampling_params: SamplingParams | None = None,
        priority: int = 0,
    ) -> None:
        """Queues a request that goes on from a snapshot of this or another engine.

        Args:
            snapshot: Of `snapshot` or `load_snapshot`; may be resumed any number of times.
            request_id: Of the new request.
            sampling_params: None for those of the snapshot, with its seed.
            priority: As in `add_request`.

        Raises:
            ValueError: the request is refused, or the K/V are of another model or other weights, or
                have other bits than deterministic mode would give them.
        """
        branching.resume(self.replicas, snapshot, request_id, sampling_params, priority)

    def step(self) -> list[RequestOutput]:
        """Runs one step of the batch.

        Returns:
            What has changed: an output with all that there is so far, for every request of
            `add_request` that got a token; and those that finished since the last `step`.

        Raises:
            RuntimeError: the engine sleeps.
        """
        return self._shared.step()

    def abort_request(self, request_ids: str | Iterable[str]) -> list[RequestOutput]:
        """Ends requests where they stand, and returns them; unknown ids are passed over."""
        return self._shared.abort(request_ids)

    @exclusive
    def metrics(self) -> EngineMetrics:
        """Counts as they stand now."""
        return self.replicas.metrics()

    @exclusive
    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to do or to return."""
        return self._shared.has_outputs() or self.replicas.has_unfinished_requests()

    @exclusive
    def sleep(self, level: int = 1) -> None:
        """Gives the memory of the KV cache back, until `wake_up`.

        Unfinished requests keep their output and are computed again later; new ones may be added.

        Args:
            level: Only 1: the parameters stay where they are.
        """
        if level != 1:
            raise ValueError(
                f"level is {level!r}; it must be 1, which keeps the parameters: update_params "
                "replaces them, and what was theirs goes with the caller's last reference"
            )
        self.replicas.sleep()

    @exclusive
    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Allocates the KV cache again, empty.

        Args:
            tags: What to wake of "weights", which never slept, and "kv_cache"; None is both.
        """
        if unknown := [tag for tag in tags or () if tag not in ("weights", "kv_cache")]:
            raise ValueError(f'tags holds {unknown}; it may hold "weights" and "kv_cache"')
        if tags is None or "kv_cache" in tags:
            self.replicas.wake_up()

    @exclusive
    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forgets the keys and values of earlier prompts.

        Args:
            reset_running_requests: Whether running requests are computed again for it.

        Returns:
            Whether it was done: not while requests run, unless these are reset.
        """
        return self.replicas.reset_prefix_cache(preempt_running=reset_running_requests)

    @exclusive
    def update_params(self, params: Any, running: str = "recompute") -> None:
        """Goes on with other parameters of the same model, such as after a step of training.

        No step is compiled anew and nothing is copied: the caller's arrays are used as they are.
        They must be alive whenever the engine steps; so a training step may take them as a donated
        argument, if its result is handed over before the next step of the engine. The prefix cache
        is dropped. `CompletionOutput.weights_versions` tells which tokens came before and after.

        Args:
            params: A pytree with the names, shapes and dtypes of the parameters now in use. Where
                these are quantised, float kernels become so: copies, beside the old ones. On
                several devices (docs/several_devices.md) arrays that lie otherwise than the
                engine's are copied, too.
            running: What becomes of unfinished requests. "recompute": their output is kept, and
                keys and values are computed again with the new parameters. "keep": they go on with
                the keys and values that they have, which nobody else will share. A score under
                way goes on too, so it mixes both. "restart": they begin again from the prompt,
                with the same seed; a stream takes its text back.

        Raises:
            ValueError: it differs from them; every difference is named, nothing has changed. Or
                `running` is none of these.
        """
        self.replicas.update_params(params, running)

    @property
    def weights_version(self) -> int:
        """How often the parameters have been updated."""
        return self.engine.weights_version
