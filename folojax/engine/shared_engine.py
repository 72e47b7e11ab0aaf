"""An engine that several calls and threads share: who steps it, and who gets what comes out.

`generate`, `score` and open streams each wait for requests of their own; whoever steps the engine
steps it for all. An output goes to the box of the call that waits for it, or else, as a request of
the caller's own loop, to the next `step`.

Calls may come from several threads. A thread holds the lock while it changes or steps the engine,
and gives it away after each step: so those that wait take turns, and one batch serves them all.
"""

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

from tqdm.auto import tqdm

from folojax.compile.programs import own_settings
from folojax.engine.engine import Engine, Output
from folojax.engine.live_request import LiveGeneration, LiveRequest
from folojax.engine.replicas import Replicas
from folojax.requests.outputs import RequestOutput, ScoreOutput

_Output = TypeVar("_Output", RequestOutput, ScoreOutput)
_P = ParamSpec("_P")
_Result = TypeVar("_Result")


class FairLock:
    """A reentrant lock that goes to whoever has waited longest.

    Python's own may go to the thread that has just given it back, any number of times: a thread
    that steps an engine until its requests are done would keep all others from adding theirs.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[tuple[int, threading.Lock]] = deque()
        self._owner: int | None = None
        self._depth = 0
        self._process = os.getpid()

    def __enter__(self) -> None:
        """Waits for the lock.

        Raises:
            RuntimeError: this is a fork of the process that has made it.
        """
        if os.getpid() != self._process:
            raise RuntimeError(
                "this process is a fork of the one that has made the engine, and JAX does not "
                'survive that: make the engine in the new process, or start it with the "spawn" '
                "method of multiprocessing"
            )
        me, turn = threading.get_ident(), threading.Lock()
        with self._mutex:
            if self._owner in (None, me):
                self._owner = me
                self._depth += 1
                return
            turn.acquire()
            self._waiting.append((me, turn))
        try:
            turn.acquire()  # until `__exit__` releases it: the lock is ours then
        except BaseException:  # Ctrl-C
            with self._mutex:
                is_mine = (me, turn) not in self._waiting
                if not is_mine:
                    self._waiting.remove((me, turn))
            if is_mine:
                self.__exit__(None, None, None)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Gives the lock to the next thread."""
        with self._mutex:
            self._depth -= 1
            if self._depth:
                return
            self._owner = None
            if self._waiting:
                self._owner, turn = self._waiting.popleft()
                self._depth = 1
                turn.release()


class HasLock(Protocol):
    """An object whose methods may be `exclusive`."""

    @property
    def lock(self) -> FairLock:
        """That is held while the engine is changed or steps."""
        ...


_Self = TypeVar("_Self", bound=HasLock)


def exclusive(
    method: Callable[Concatenate[_Self, _P], _Result],
) -> Callable[Concatenate[_Self, _P], _Result]:
    """A method that holds the lock of its object while it runs, under JAX settings of its own."""

    @functools.wraps(method)
    def run(self: Any, *args: _P.args, **kwargs: _P.kwargs) -> _Result:
        with self.lock, own_settings():
            return method(self, *args, **kwargs)

    return run


class SharedEngine:
    """The calls that wait for an engine, and the outputs that wait for a call."""

    def __init__(self, engine: Engine | Replicas) -> None:
        self._engine = engine
        self.lock = FairLock()
        # By request id, the latest output of each; the requests of a call share one box.
        self._boxes: dict[str, dict[str, Output]] = {}
        # Of the caller's own requests, those that finished while another call was stepping.
        self._early: list[RequestOutput] = []

    def has_outputs(self) -> bool:
        """Whether `step` has something to return already."""
        return bool(self._early)

    @exclusive
    def step(self) -> list[RequestOutput]:
        """Runs one step; returns what has changed since the last, of requests no call waits for."""
        changed = self._deliver(self._engine.step())
        early, self._early = self._early, []
        return early + changed

    @exclusive
    def abort(self, request_ids: str | Iterable[str]) -> list[RequestOutput]:
        """Ends requests and returns them; a call that waits for one learns of its end."""
        outputs = self._engine.abort(request_ids)
        self._deliver(outputs)
        return [output for output in outputs if isinstance(output, RequestOutput)]

    def wait(
        self,
        requests: Sequence[LiveRequest[_Output]],
        use_tqdm: bool | Callable[..., Any],
    ) -> list[_Output]:
        """Queues requests, all or none, and steps until all are done.

        Whatever interrupts it leaves none of them queued.

        Args:
            requests: Not queued yet.
            use_tqdm: Whether there is a progress bar, or what makes it.
        """
        make_bar = use_tqdm if callable(use_tqdm) else tqdm
        num_done = 0
        box: dict[str, Output] = {}
        try:
            self._open(requests, box)
            bar = make_bar(total=len(requests), desc="requests", disable=None if use_tqdm else True)
            with bar:
                while num_done < len(requests):
                    num_told = num_done
                    with self.lock, own_settings():
                        if len(box) < len(requests):
                            self._early += _ended(self._deliver(self._engine.step()))
                        num_done = len(box)
                    if num_done > num_told:
                        bar.update(num_done - num_told)
        finally:
            self._close(requests, box)
        return [cast(_Output, box[one.request_id]) for one in requests]

    def stream(self, requests: Sequence[LiveGeneration]) -> Iterator[RequestOutput]:
        """Queues requests when it is first asked, and yields what each step gives them."""
        box: dict[str, Output] = {}
        num_left = len(requests)
        try:
            self._open(requests, box)
            while num_left:
                with self.lock, own_settings():
                    if not box:
                        self._early += _ended(self._deliver(self._engine.step()))
                    outputs = [cast(RequestOutput, box.pop(one)) for one in list(box)]
                for output in outputs:
                    num_left -= output.finished
                    yield output
        finally:
            self._close(requests, box)

    @exclusive
    def _open(self, requests: Sequence[Any], box: dict[str, Output]) -> None:
        """Queues the requests of a call; what comes of them goes to its box."""
        self._engine.check_is_awake()
        self._engine.queue(requests)
        self._boxes |= dict.fromkeys((one.request_id for one in requests), box)

    @exclusive
    def _close(self, requests: Sequence[Any], box: dict[str, Output]) -> None:
        self._boxes = {id_: other for id_, other in self._boxes.items() if other is not box}
        self._engine.discard(requests)

    def _deliver(self, outputs: list[Output]) -> list[RequestOutput]:
        """Puts outputs into their calls' boxes; returns the others."""
        others = []
        for output in outputs:
            box = self._boxes.get(output.request_id)
            if box is not None:
                box[output.request_id] = output
            elif isinstance(output, RequestOutput):
                others.append(output)
        return others


def _ended(outputs: list[RequestOutput]) -> list[RequestOutput]:
    return [output for output in outputs if output.finished]
