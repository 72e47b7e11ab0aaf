"""Rows that follow grammars are sampled late.

What a grammar allows depends on the token before, so a mask can only be made when the device has
given that one; by then it computes what the masked token is sampled from. The sampler is called as
late as can be, right before something else is to be done behind it. Then a thread waits for the
tokens, has the grammars follow them and makes the masks behind them, while this one calls the next
model, hands out the tokens and schedules the next plan.

    device   model n ────────────────────────> sample n, model n + 1 ────────────────> sample n + 1
    host       outputs of n - 1, plan n + 1     call n + 1, outputs of n, plan n + 2
    thread   follow n - 1, masks n              follow n, masks n + 1
"""

import functools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from folojax.backend.devices import Devices
from folojax.requests.grammars import Matcher, fill_masks
from folojax.runner.results import Pending, follow

_Matchers: TypeAlias = Sequence[Matcher | None]


class _Allowed(NamedTuple):
    """What grammars allow next, [B, ceil(V / 32)]."""

    matchers: _Matchers  # of each row
    masks: np.ndarray
    on_device: Any  # the same, to be sampled with


class LateSamples:
    """What is put off.

    Attributes:
        pending: Results of the latest plan, if some of them are yet to be sampled; else empty.
    """

    def __init__(self, num_tokens: int, devices: Devices) -> None:
        """Of no plan; masks are of so many tokens, and go to these devices."""
        self.pending: list[Pending] = []
        self._num_tokens = num_tokens
        self._put = functools.partial(devices.put, sharding=devices.whole)
        # Of the rows that were sampled last, what is allowed behind their tokens.
        self._ahead: Future[list[_Allowed]] | None = None

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "folojax-grammars")

    def sample(self) -> None:
        """Samples what was put off, in place; waits for the tokens before, and for masks."""
        pending, self.pending = self.pending, []
        known = [] if self._ahead is None else self._ahead.result()
        followed = []
        for number, one in enumerate(pending):
            if one.late is not None:
                report = one.late.draw(self._masks_of(one.late.matchers, known))
                pending[number] = one._replace(report=report, late=None)
                followed.append((pending[number], one.late.matchers))
        self._ahead = self._pool.submit(self._follow, followed)

    def clear(self) -> None:
        """Forgets everything."""
        self.pending, self._ahead = [], None

    def _follow(self, sampled: Sequence[tuple[Pending, _Matchers]]) -> list[_Allowed]:
        """Has grammars follow what was sampled, and sends the masks behind it on their way."""
        for item, _ in sampled:
            follow(item)
        made = [(matchers, fill_masks(matchers, self._num_tokens)) for _, matchers in sampled]
        return [_Allowed(matchers, masks, self._put(masks)) for matchers, masks in made]

    def _masks_of(self, matchers: _Matchers, known: Sequence[_Allowed]) -> Any:
        """What these allow, by what is known of some; on the device."""
        if len(known) == 1 and known[0].matchers == matchers:  # most steps
            return known[0].on_device
        found = {
            id(one): mask
            for own in known
            for one, mask in zip(own.matchers, own.masks, strict=True)
            if one is not None
        }
        masks = fill_masks(
            [None if id(one) in found else one for one in matchers], self._num_tokens
        )
        for row, one in enumerate(matchers):
            if id(one) in found:
                masks[row] = found[id(one)]
        return self._put(masks)
