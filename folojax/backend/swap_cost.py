"""Whether a preempted request's K/V are better moved to host memory and back, or computed again."""

import dataclasses
import sys


@dataclasses.dataclass(frozen=True)
class SwapRates:
    """What a machine does, roughly: an estimate that is off by two still decides right mostly."""

    flops_per_s: float  # of the products of a prompt chunk
    bytes_per_s: float  # of a copy of pages to host memory, or back
    overhead_s: float  # of moving a request there and back, however few pages it has


NEVER = sys.maxsize


def min_swap_tokens(num_params: int, bytes_per_token: int, rates: SwapRates) -> int:
    """From how many tokens on moving K/V is cheaper than computing them again; NEVER if it is not.

    Args:
        num_params: Of the model; a token takes two operations for each.
        bytes_per_token: Of K/V, all layers.
        rates: Of the machine.
    """
    computing_s = 2 * num_params / rates.flops_per_s
    moving_s = 2 * bytes_per_token / rates.bytes_per_s
    if computing_s <= moving_s:
        return NEVER
    return 1 + int(rates.overhead_s / (computing_s - moving_s))
