"""Rows that follow grammars are sampled late.

What a grammar allows depends on the token before, so a mask can only be made when the device has
given that one; by then it computes what the masked token is sampled from. The sampler is called as
late as can be, right before something else is to be done behind it. Until then the host has time
for other things: to hand out the tokens before, to schedule the next plan, to make the masks.

    device   model n ──────────> sample n, model n + 1 ──────────> sample n + 1
    host        outputs of n - 1, plan n + 1, masks n │  outputs of n, plan n + 2, masks n + 1 │
"""

from folojax.runner.results import Pending, follow


class LateSamples:
    """What is put off.

    Attributes:
        pending: Results of the latest plan, if some of them are yet to be sampled; else empty.
    """

    def __init__(self) -> None:
        """Of no plan."""
        self.pending: list[Pending] = []
        # Of the plan that was sampled last: its tokens, which no grammar has followed.
        self._unfollowed: list[Pending] = []

    def sample(self) -> None:
        """Samples what was put off, in place; waits for the tokens before."""
        pending, self.pending = self.pending, []
        if not pending:
            return
        for item in self._unfollowed:
            follow(item)
        self._unfollowed = pending
        for number, one in enumerate(pending):
            if one.draw is not None:
                pending[number] = one._replace(report=one.draw(), draw=None)

    def clear(self) -> None:
        """Forgets everything."""
        self.pending, self._unfollowed = [], []
