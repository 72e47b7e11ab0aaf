"""Rows that follow grammars: who makes their masks, and when.

A program that samples such rows is called like any other, and waits for its masks by itself
(`folojax.steps.mail`). They are made by a thread, in the order of the calls: it fills in those of a
call, waits for the tokens that are sampled with them, and has the grammars follow these. Meanwhile
the caller's thread calls the next program, hands out tokens and schedules.

Where programs cannot be told anything while they run, masks are inputs: the call is made when the
tokens before it have come.
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
_FREE: dict[tuple[int, int, int | None], list[Box]] = defaultdict(list)  # nobody's, by their sizes


class Masks(NamedTuple):
    """What a call is given of grammars: one of both."""

    mask: Any = None  # of `SampleInputs`
    mail: Any = None  # of `CallInputs`


class GrammarMasks:
    """The masks of one engine."""

    def __init__(self, num_tokens: int, most_rows: int, devices: Devices) -> None:
        """Allocates nothing.

        Args:
            num_tokens: That a mask has bits for.
            most_rows: Of a call.
            devices: That programs run on.
        """
        self._sizes = most_rows, -(-num_tokens // 32)
        self._num_tokens, self._devices = num_tokens, devices
        self._jobs: deque[Future[None]] = deque()
        self._is_given_up = threading.Event()
        self._unfollowed: list[Pending] = []

    @functools.cached_property
    def is_told(self) -> bool:
        """Whether programs are told masks while they run."""
        problem = self._devices.open_mail()
        if problem is not None:
            _LOG.warning("rows that follow grammars wait for each token, slower: %s", problem)
        return problem is None

    def ask(self, matchers: _Matchers) -> Masks:
        """Has masks made for a call, one for each of its rows; the call is made next."""
        if not self.is_told:
            unfollowed, self._unfollowed = self._unfollowed, []
            for item in unfollowed:
                follow(item)
            masks = np.empty((len(matchers), self._sizes[1]), np.uint32)
            fill_masks(matchers, masks)
            return Masks(mask=masks)
        while self._jobs and self._jobs[0].done():
            self._jobs.popleft().result()
        self._boxes.append(self._boxes.popleft())
        box = self._boxes[-1]
        turn, mail = box.next_turn(len(matchers))
        self._jobs.append(self._pool.submit(_serve, box, turn, matchers, self._is_given_up))
        return Masks(mail=mail)

    def note(self, called: Pending) -> None:
        """Takes in what a call gives that has been given masks."""
        if not self.is_told:
            self._unfollowed.append(called)

    def on_padding(self, num_rows: int) -> Masks:
        """As `ask` for rows of padding, which nobody waits for."""
        if self.is_told:
            return Masks(mail=no_mail(num_rows))
        return Masks(mask=np.full((num_rows, self._sizes[1]), 0xFFFFFFFF, np.uint32))

    def clear(self) -> None:
        """Forgets everything; whoever waits for masks or tokens does so no longer."""
        self._unfollowed = []
        if not self._jobs:
            return
        self._is_given_up.set()
        for job in self._jobs:
            job.exception()
        self._jobs.clear()
        self._is_given_up.clear()

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "folojax-grammars")

    @functools.cached_property
    def _boxes(self) -> deque[Box]:
        key = *self._sizes, self._devices.first_gpu
        free = _FREE[key]
        boxes = [free.pop() if free else Box(*key) for _ in range(_NUM_BOXES)]
        # Not freed: what was called last may still read them.
        weakref.finalize(self, free.extend, boxes)
        return deque(boxes)


def _serve(box: Box, turn: int, matchers: _Matchers, is_given_up: threading.Event) -> None:
    """Gives a call its masks, and has the grammars follow its tokens."""
    try:
        fill_masks(matchers, box.masks[: len(matchers)])
    except BaseException:
        box.masks[:] = 0  # no token is allowed, and the rows fail
        raise
    finally:
        box.tell(turn)
    tokens = None
    while tokens is None and not is_given_up.is_set():
        tokens = box.await_tokens(turn, _PATIENCE_S)
    if tokens is None:
        return
    for matcher, token in zip(matchers, tokens.tolist(), strict=False):
        if matcher is not None and token >= 0:
            matcher.consume_token(token)
