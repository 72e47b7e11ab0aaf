"""Rows that follow grammars: who makes their masks, and when.

A program that samples such rows is called like any other, and waits for its masks by itself
(`folojax.steps.mail`). They are made by a thread, in the order of the calls: it fills in those of a
call, waits for the tokens that are sampled with them once it is made, and has the grammars follow
these. Meanwhile the caller's thread calls the next program, hands out tokens and schedules.

Where programs cannot be told anything while they run, masks are inputs: the call is made when the
tokens before it have come. A thread makes them here, too: llguidance asks our tokenizer at times,
and an interruption that reached the main thread there would end as the error of a grammar.
"""

import functools
import logging
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from folojax.backend.devices import Devices
from folojax.requests.grammars import Matcher, fill_masks
from folojax.runner.results import Pending, follow
from folojax.steps.mail import Box, no_mail

_LOG = logging.getLogger("folojax")
_Matchers: TypeAlias = Sequence[Matcher | None]

_PATIENCE_S = 0.1  # until the thread looks whether its tokens are still awaited
# Two boxes in turn: of several devices one may still read a mask when another has told the tokens.
_NUM_BOXES = 2
_Key: TypeAlias = tuple[int, int, tuple[Any, ...]]  # rows, words of a mask, devices
# Whom nobody asks any more, by the key; what was called last may still read them.
_LEFT: dict[_Key, list[Box]] = defaultdict(list)
_LOCK = threading.Lock()
_APART = "in deterministic mode a device samples without the others"


class Masks(NamedTuple):
    """What a call is given of grammars: one of both."""

    mask: Any = None  # of `SampleInputs`
    mail: Any = None  # of `CallInputs`


class GrammarMasks:
    """The masks of one engine."""

    def __init__(
        self, num_tokens: int, most_rows: int, devices: Devices, are_apart: bool = False
    ) -> None:
        """Allocates nothing.

        Args:
            num_tokens: That a mask has bits for.
            most_rows: Of a call.
            devices: That programs run on.
            are_apart: Whether one of several devices may be any number of samplers ahead.
        """
        self._sizes = most_rows, -(-num_tokens // 32)
        self._devices, self._are_apart = devices, are_apart
        self._service: _Service | None = None
        self._unfollowed: list[Pending] = []

    @functools.cached_property
    def is_told(self) -> bool:
        """Whether programs are told masks while they run."""
        problem = _APART if self._are_apart else self._devices.open_mail()
        if problem is not None:
            _LOG.warning("rows that follow grammars wait for each token, slower: %s", problem)
        return problem is None

    def ask(self, matchers: _Matchers) -> Masks:
        """Has masks made for a call, one for each of its rows; the call is made next."""
        if not self.is_told:
            unfollowed, self._unfollowed = self._unfollowed, []
            masks = np.empty((len(matchers), self._sizes[1]), np.uint32)
            self._pool.submit(_catch_up, unfollowed, matchers, masks).result()
            return Masks(mask=masks)
        if self._service is None:
            given = self._devices.given or (self._devices.first,)
            self._service = _Service((*self._sizes, given), self._devices.first_gpu)
        return Masks(mail=self._service.ask(matchers))

    def note(self, called: Pending) -> None:
        """Takes in what a call gives that has been given masks."""
        if not self.is_told:
            self._unfollowed.append(called)
        elif self._service is not None:
            self._service.follow()

    def check(self) -> None:
        """Raises what has gone wrong where masks are made, as soon as somebody may know."""
        if self._service is not None:
            self._service.check()

    def on_padding(self, num_rows: int) -> Masks:
        """As `ask` for rows of padding, which nobody waits for."""
        if self.is_told:
            return Masks(mail=no_mail(num_rows))
        return Masks(mask=np.full((num_rows, self._sizes[1]), 0xFFFFFFFF, np.uint32))

    def clear(self) -> None:
        """Forgets everything; whoever waits for masks or tokens does so no longer."""
        self._unfollowed = []
        service, self._service = self._service, None
        if service is not None:
            service.is_given_up.set()

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "folojax-grammars")


class _Service:
    """A thread, and the boxes that it tells masks in.

    It is given up as a whole, because nobody knows what the interrupted have left half done: what
    is asked next has a thread and boxes of its own, whatever the others still wait for.
    """

    def __init__(self, key: _Key, gpu: int | None) -> None:
        self.is_given_up = threading.Event()
        self._boxes = deque(_take_box(key, gpu) for _ in range(_NUM_BOXES))
        self._pool = ThreadPoolExecutor(1, "folojax-grammars")
        self._jobs: deque[Future[None]] = deque()
        self._turn = 0
        self._matchers: _Matchers = ()
        # The jobs do not know of this object, so it is let go of with its engine.
        weakref.finalize(self, _leave, self.is_given_up, key, self._boxes)

    def ask(self, matchers: _Matchers) -> Any:
        """Has masks made for a call; returns its mail."""
        self.check()
        self._boxes.append(self._boxes.popleft())
        box, self._matchers = self._boxes[-1], matchers
        self._turn, mail = box.next_turn(len(matchers))
        self._jobs.append(self._pool.submit(_fill, box, self._turn, matchers))
        return mail

    def check(self) -> None:
        """Raises what the thread has raised."""
        while self._jobs and self._jobs[0].done():
            self._jobs.popleft().result()

    def follow(self) -> None:
        """Has the grammars follow the tokens of the call that has asked last: it is made."""
        args = self._boxes[-1], self._turn, self._matchers, self.is_given_up
        self._jobs.append(self._pool.submit(_follow, *args))


def _take_box(key: _Key, gpu: int | None) -> Box:
    """One that no program reads any more, or a new one."""
    left = _LEFT[key]
    with _LOCK:
        box = next((one for one in left if one.is_idle), None)
        if box is not None:
            left.remove(box)
            return box
    return Box(*key[:2], gpu)


def _leave(is_given_up: threading.Event, key: _Key, boxes: deque[Box]) -> None:
    is_given_up.set()
    _LEFT[key].extend(boxes)


def _catch_up(calls: Sequence[Pending], matchers: _Matchers, masks: Any) -> None:
    """Has grammars follow the tokens of calls, and makes the masks behind these."""
    for call in calls:
        follow(call)
    fill_masks(matchers, masks)


def _fill(box: Box, turn: int, matchers: _Matchers) -> None:
    """Gives a call its masks."""
    try:
        fill_masks(matchers, box.masks[: len(matchers)])
    except BaseException:
        box.masks[:] = 0  # no token is allowed, and the rows fail
        raise
    finally:
        box.tell(turn)


def _follow(box: Box, turn: int, matchers: _Matchers, is_given_up: threading.Event) -> None:
    """Has the grammars follow the tokens of a call."""
    tokens = None
    while tokens is None and not is_given_up.is_set():
        tokens = box.await_tokens(turn, _PATIENCE_S)
    if tokens is None:
        return
    for matcher, token in zip(matchers, tokens.tolist(), strict=False):
        if matcher is not None and token >= 0:
            matcher.consume_token(token)
