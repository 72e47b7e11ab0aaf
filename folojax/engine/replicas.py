"""Several engines with the same parameters behind one `LLM`: data parallelism in one process.

    requests ──> the engine that has computed the most of them, unless it has too much to do
                    engine 0 on its devices ─┐
                    engine 1 on its devices ─┴──> outputs of those whose step is done

Where a request runs decides nothing but time: its tokens and its seed are those of one engine. None
waits for another's device: what a step returns comes from those that are ready, and only where none
is does it wait for the first.

Handing a program over takes a device's driver up to a millisecond, and Python's lock is free
meanwhile. So engines that have room for a plan plan and hand over in threads, at the same time, and
all else of a step is done in the caller's thread, while no other thread is at work:

    caller    ──┬── engine 0: plan, hand over ──┬── look which are ready, read, hand out
    threads     └── engine 1: plan, hand over ──┘
"""

import collections
import dataclasses
import time
from collections.abc import Collection, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from folojax.compile.programs import own_settings
from folojax.engine.adapters import KnownAdapters
from folojax.engine.engine import Engine, Output
from folojax.engine.metrics import EngineMetrics
from folojax.engine.reports import Live, owner_of
from folojax.runner.results import arrays_of

_FOUND_WEIGHT = 4
"""Tokens of backlog that a token is worth which is found computed. With 1 the second request behind
a prompt would go to an idle engine, which computes the prompt once more: it would be idle no longer
than until other requests come."""

_LOOK_S = 5e-5
"""From one look at devices that are all at work to the next: no longer than a thread wakes up."""


class _Placed(NamedTuple):
    """A request, and where it is."""

    live: Live
    number: int  # of the engine
    num_tokens: int  # that it adds to the engine's backlog
    group: Hashable


class Replicas:
    """The engines as one; its methods are those of `Engine`.

    Attributes:
        engines: Each with limits, pages and a prefix cache of its own.
        live: The unfinished requests of all by id; for reading.
        adapters: What requests may name; all engines know the same.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        """Takes engines without requests, which draw seeds from one generator."""
        self.engines = tuple(engines)
        self.live = collections.ChainMap(*(engine.live for engine in engines))
        self.adapters = KnownAdapters([engine.runner for engine in engines])
        for engine in engines:
            engine.adapters = self.adapters
        self._placed: dict[str, _Placed] = {}
        # Of each engine, the tokens that its requests had to be computed when they came.
        self._backlog = [0] * len(engines)
        # Of each group, how many unfinished requests each engine has.
        self._groups: dict[Hashable, list[int]] = {}
        self._pool = ThreadPoolExecutor(len(engines), "folojax-replica")

    def engine_of(self, request_id: str) -> Engine:
        """The engine that has an unfinished request; the first, if none has."""
        return next((one for one in self.engines if request_id in one.live), self.engines[0])

    def queue(self, requests: Sequence[Live]) -> None:
        """Queues requests, each in an engine; those without a seed are given one.

        Raises:
            ValueError: the id of one is in use; none was queued.
        """
        for engine in self.engines:
            engine.check_ids(requests)
        for live in requests:
            placed = self._place(live)
            self.engines[placed.number].queue([live])
            self._forget(live.request_id)  # who had it before has ended, and not been told
            self._placed[live.request_id] = placed
            self._backlog[placed.number] += placed.num_tokens
            if placed.group is not None:
                counts = self._groups.setdefault(placed.group, [0] * len(self.engines))
                counts[placed.number] += 1

    def step(self) -> list[Output]:
        """Keeps all devices busy, and reads a step of each that is done with one; one at least.

        Raises:
            RuntimeError: the engines sleep.
            BaseException: whatever interrupts the step of an engine. It may have consumed the state
                of that engine's requests, so these are aborted; the next step returns them.
        """
        self.check_is_awake()
        busy = [one for one in self.engines if one.has_unfinished_requests()] or self.engines
        self._plan([engine for engine in busy if engine.has_room])
        told: list[tuple[Engine, list[Output]]] = []
        try:
            for engine in self._ready(busy):
                told.append((engine, engine.collect()))
        except BaseException:
            for engine, outputs in told:
                engine.put_back(outputs)
            raise
        outputs = [output for _, outputs in told for output in outputs]
        self._forget(*(output.request_id for output in outputs))
        return outputs

    def abort(self, request_ids: str | Iterable[str]) -> list[Output]:
        """Ends requests where they stand and returns them; unknown ids are passed over."""
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        outputs = [output for id_ in ids for output in self.engine_of(id_).abort(id_)]
        self._forget(*ids)
        return outputs

    def discard(self, requests: Collection[Live]) -> None:
        """Ends requests, and forgets what no step has told of them yet."""
        for engine in self.engines:
            engine.discard(requests)
        self._forget(*(live.request_id for live in requests))

    def has_unfinished_requests(self) -> bool:
        """Whether a step has anything to do or to return."""
        return any(engine.has_unfinished_requests() for engine in self.engines)

    def metrics(self) -> EngineMetrics:
        """Counts as they stand now, of all engines together."""
        each = [dataclasses.asdict(engine.metrics()) for engine in self.engines]
        total = {name: sum(one[name] for one in each) for name in each[0]}
        return EngineMetrics(**{**total, "compile_s": each[0]["compile_s"]})  # the process's

    def check_is_awake(self) -> None:
        """Raises the RuntimeError of engines that sleep."""
        self.engines[0].check_is_awake()

    def sleep(self) -> None:
        """Gives the memory of the KV caches back; unfinished requests are computed again later."""
        for engine in self.engines:
            engine.sleep()

    def wake_up(self) -> None:
        """Allocates the KV caches again."""
        for engine in self.engines:
            engine.wake_up()

    def reset_prefix_cache(self, *, preempt_running: bool = False) -> bool:
        """Drops all cached K/V; False, and nothing has changed, while requests run.

        Unless these are to be computed again for it; then what is under way is taken in first.
        """
        if not preempt_running and any(one.scheduler.num_running for one in self.engines):
            return False
        done = [one.reset_prefix_cache(preempt_running=preempt_running) for one in self.engines]
        return all(done)

    def update_params(self, params: Any, running: str = "recompute") -> None:
        """Replaces the parameters of all engines; see `LLM.update_params`.

        Engines whose devices do not have them get copies.
        """
        for engine in self.engines:
            backend, config = engine.runner.backend, engine.runner.model.config
            engine.update_params(backend.devices.adopt(params, config), running)

    def _plan(self, engines: Sequence[Engine]) -> None:
        """Has engines plan as far ahead as they may; they are done with it when it returns."""

        def plan(engine: Engine) -> None:
            with own_settings():  # they are a thread's
                engine.step(is_read=False)

        others: list[Future[None]] = []
        try:
            for engine in engines[1:]:
                others.append(self._pool.submit(plan, engine))
            for engine in engines[:1]:
                engine.step(is_read=False)
        finally:
            _wait_out(others)
        for other in others:
            other.result()

    def _ready(self, engines: Sequence[Engine]) -> list[Engine]:
        """Those whose earliest step is done; waits until there is one."""
        if len(engines) == 1:
            return list(engines)  # reading waits
        awaited = {engine: arrays_of(engine.awaited) for engine in engines}
        while True:
            done = [one for one in engines if all(array.is_ready() for array in awaited[one])]
            if done:
                return done
            time.sleep(_LOOK_S)

    def _place(self, live: Live) -> _Placed:
        """Where a request goes: to what it was forked from, or where there is least in its way."""
        first = live.parts[0]
        found = [0] * len(self.engines)
        index = None
        if first.forked_from is not None:
            index = self.engines.index(self.engine_of(owner_of(first.forked_from).request_id))
        elif not first.skip_prefix_cache:
            counts = self._groups.get(first.group) or [0] * len(self.engines)
            for number, engine in enumerate(self.engines):
                found[number] = engine.scheduler.memory.find_start(first).num_tokens
                if counts[number]:  # it is computed there, or is to be
                    found[number] = max(found[number], first.num_common_tokens)
        if index is None:
            pairs = zip(self._backlog, found, strict=True)
            costs = [backlog - _FOUND_WEIGHT * num_found for backlog, num_found in pairs]
            index = costs.index(min(costs))
        num_outputs = sum(part.stop.max_tokens - part.num_output_tokens for part in live.parts)
        num_tokens = first.num_tokens - found[index] + num_outputs
        return _Placed(live, index, num_tokens, first.group)

    def _forget(self, *request_ids: str) -> None:
        """Takes what has ended out of the backlogs."""
        for request_id in request_ids:
            placed = self._placed.get(request_id)
            if placed is None or not placed.live.is_finished:
                continue
            del self._placed[request_id]
            self._backlog[placed.number] -= placed.num_tokens
            if placed.group is not None:
                self._groups[placed.group][placed.number] -= 1
                if not any(self._groups[placed.group]):
                    del self._groups[placed.group]


def _wait_out(plans: Sequence[Future[None]]) -> None:
    """Waits for all, and raises what has interrupted it only then.

    No engine may be touched while a thread plans for it, not even to be reset.
    """
    interruption = None
    while not all(plan.done() for plan in plans):
        try:
            wait(plans)
        except BaseException as error:  # Ctrl-C
            interruption = error
    if interruption is not None:
        raise interruption
