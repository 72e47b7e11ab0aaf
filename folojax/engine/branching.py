"""Requests that go on from where others stand: beside them, later, or in another engine.

::

    fork       shares the pages of a request that goes on, from one step to the next
    snapshot   copies a request out of the engine, K/V included, as a value
    resume     queues what a snapshot holds; its K/V are loaded when it is admitted
"""

import dataclasses

from folojax.engine.engine import Engine
from folojax.engine.live_request import LiveGeneration, Sample
from folojax.engine.replicas import Replicas
from folojax.engine.snapshot import Snapshot
from folojax.requests.prompts import ParsedPrompt
from folojax.requests.sampling_params import SamplingParams
from folojax.runner.host_store import TokenKV
from folojax.sched.request import Request


def fork(
    replicas: Engine | Replicas,
    parent_id: str,
    request_id: str,
    sampling_params: SamplingParams | None,
    *,
    index: int = 0,
    num_output_tokens: int | None = None,
    priority: int = 0,
) -> None:
    """Queues a request that begins with what a sample of another has; see `LLM.fork`."""
    engine = replicas.engine_of(parent_id)
    live, sample = _find_sample(engine, parent_id, index)
    if sampling_params is None:
        sampling_params = dataclasses.replace(sample.sampling_params, n=1, seed=sample.seed)
    forked = engine.make_request(
        request_id,
        ParsedPrompt(live.asked.prompt, live.asked.prompt_token_ids),
        sampling_params,
        priority,
        sample.adapter,
        progress=sample.progress().take(num_output_tokens),
        forked_from=None if sample.is_finished else sample,
    )
    replicas.queue([forked])


def take_snapshot(replicas: Engine | Replicas, request_id: str, index: int = 0) -> Snapshot:
    """Copies a sample; see `LLM.snapshot`. What is under way is taken in first."""
    engine = replicas.engine_of(request_id)
    _find_sample(engine, request_id, index)
    engine.drain()
    live, sample = _find_sample(engine, request_id, index)
    return Snapshot(
        prompt=live.asked.prompt,
        prompt_token_ids=sample.prompt_token_ids,
        sampling_params=dataclasses.replace(sample.sampling_params, n=1),
        seed=sample.seed,
        progress=sample.progress(),
        kv=_read_kv(engine, sample),
        weights=_weights(engine, sample.adapter),
        adapter=sample.adapter,
        kv_bits=_kv_bits(engine),
    )


def resume(
    replicas: Engine | Replicas,
    snapshot: Snapshot,
    request_id: str,
    sampling_params: SamplingParams | None,
    priority: int = 0,
) -> None:
    """Queues a request that begins with what a snapshot holds; see `LLM.resume`."""
    engine, adapter = replicas.engine_of(request_id), snapshot.adapter
    if snapshot.kv is not None and snapshot.weights != _weights(engine, adapter):
        raise ValueError(
            "the snapshot's K/V were computed with other weights: use those, or "
            "snapshot.without_kv(), which is computed again"
        )
    wanted = _kv_bits(engine)
    if snapshot.kv is not None and wanted is not None and snapshot.kv_bits != wanted:
        raise ValueError(
            f"the snapshot's K/V are those of {snapshot.kv_bits or 'default mode'}, whose bits are "
            f"not those of {wanted}: resume snapshot.without_kv(), which is computed again"
        )
    if sampling_params is None:
        sampling_params = dataclasses.replace(snapshot.sampling_params, seed=snapshot.seed)
    prompt = ParsedPrompt(snapshot.prompt, snapshot.prompt_token_ids)
    live = engine.make_request(
        request_id, prompt, sampling_params, priority, adapter, progress=snapshot.progress
    )
    replicas.queue([live])
    engine = replicas.engine_of(request_id)
    first = live.samples[0]  # one of several would share its K/V with the others
    if snapshot.kv is not None and not first.skip_prefix_cache:
        kv = snapshot.kv.take(min(snapshot.kv.num_tokens, first.num_tokens - 1))
        first.saved = engine.scheduler.memory.host.adopt(kv.num_tokens)
        engine.runner.host.put(first.saved.key, kv)


def _find_sample(engine: Engine, request_id: str, index: int) -> tuple[LiveGeneration, Sample]:
    """An unfinished request and one of its samples; ValueError if there is no such."""
    live = engine.live.get(request_id)
    if not isinstance(live, LiveGeneration):
        raise ValueError(f"there is no unfinished request {request_id!r} that generates")
    if isinstance(index, bool) or not 0 <= index < len(live.samples):
        most = len(live.samples) - 1
        raise ValueError(f"index is {index!r}; request {request_id!r} has samples 0 to {most}")
    return live, live.samples[index]


def _weights(engine: Engine, adapter: str | None) -> str:
    """Tells the weights of a request from others; ValueError if there is no such adapter."""
    if adapter is None:
        return engine.weights
    return f"{engine.weights} {engine.adapters[adapter].fingerprint()}"


def _kv_bits(engine: Engine) -> str | None:
    """What the bits of K/V depend on besides tokens and weights; None: on the batch."""
    kind, count = engine.runner.steps.kind, engine.runner.backend.devices.count
    if kind == "ordered":
        return "deterministic mode with sums in order"
    if kind != "rows":
        return None
    told = f"deterministic mode with pages of {engine.scheduler.config.page_size}"
    return told if count == 1 else f"{told} on {count} devices"


def _read_kv(engine: Engine, request: Request) -> TokenKV | None:
    """What is computed of a request; nothing is under way.

    None of a private one: whoever resumes it may have other edits, and other weights. None of a
    model with recurrent layers, whose states are not read.
    """
    if request.is_private or engine.scheduler.config.has_states:
        return None
    if request.saved is not None:
        return engine.runner.host.read(request.saved.key, request.saved.num_tokens)
    if not request.num_computed_tokens:
        return None
    runner, num_tokens = engine.runner, request.num_computed_tokens
    return runner.host.read_pages(runner.state.cache, request.page_ids, num_tokens)
