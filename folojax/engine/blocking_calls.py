"""Several calls on one engine: who steps it, and who gets what comes out.

`generate`, `score` and open streams each wait for requests of their own; whoever steps the engine
steps it for all. An output goes to the box of the call that waits for it, or else, as a request of
the caller's own loop, to the next `step`.

Calls may come from several threads. A thread holds the lock while it changes or steps the engine,
and gives it away after each step: so those that wait take turns, and one batch serves them all.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

from tqdm.auto import tqdm

from folojax.engine.engine import Engine, Output
from folojax.engine.fair_lock import FairLock, exclusive
from folojax.requests.outputs import RequestOutput, ScoreOutput
from folojax.requests.validation import CheckedRequest

_Output = TypeVar("_Output", RequestOutput, ScoreOutput)


class Calls:
    """The calls that wait for an engine, and the outputs that wait for a call."""

    def __init__(self, engine: Engine) -> None:
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
        """Runs one step; returns what has changed since the last one, of nobody's requests."""
        changed = self._advance()
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
        ids: list[str],
        queue: Callable[[], None],
        use_tqdm: bool | Callable[..., Any],
        kind: type[_Output],
    ) -> list[_Output]:
        """Steps until all requests are done; whatever interrupts it leaves none of them queued.

        Args:
            ids: Of the requests.
            queue: Queues them, all or none.
            use_tqdm: Whether there is a progress bar, or what makes it.
            kind: Of the outputs.
        """
        make_bar = use_tqdm if callable(use_tqdm) else tqdm
        box = self._open(ids)
        try:
            with self.lock:
                queue()
            bar = make_bar(total=len(ids), desc="requests", disable=None if use_tqdm else True)
            with bar:
                num_told = 0
                while num_told < len(ids):
                    with self.lock:
                        if len(box) < len(ids):
                            self._advance_for_box()
                        num_done = len(box)
                    if num_done > num_told:
                        bar.update(num_done - num_told)
                    num_told = num_done
        finally:
            self._close(ids)
        return [cast(_Output, box[request_id]) for request_id in ids]

    def stream(self, checked: list[CheckedRequest]) -> Iterator[RequestOutput]:
        """Queues requests when it is first asked, and yields what each step gives them."""
        ids = [one.request_id for one in checked]
        self._engine.check_is_awake()
        box = self._open(ids)
        num_left = len(ids)
        try:
            with self.lock:
                self._engine.add(checked, is_streamed=True)
            while num_left:
                with self.lock:
                    if not box:
                        self._advance_for_box()
                    outputs = [cast(RequestOutput, box.pop(one)) for one in list(box)]
                for output in outputs:
                    num_left -= output.finished
                    yield output
        finally:
            self._close(ids)

    def _advance_for_box(self) -> None:
        self._early += [output for output in self._advance() if output.finished]

    def _advance(self) -> list[RequestOutput]:
        """Runs one step; returns the outputs of requests that no call here waits for."""
        self._engine.check_is_awake()
        try:
            outputs = self._engine.step()
        except BaseException:
            # The step may have consumed the state of all requests.
            self._early += self._deliver(self._engine.reset())
            raise
        return self._deliver(outputs)

    @exclusive
    def _open(self, ids: list[str]) -> dict[str, Output]:
        box: dict[str, Output] = {}
        self._boxes |= dict.fromkeys(ids, box)
        return box

    @exclusive
    def _close(self, ids: list[str]) -> None:
        for request_id in ids:
            self._boxes.pop(request_id, None)
        self._engine.discard(ids)

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
