"""How a device's memory is divided: weights, pages of the KV pool, temporaries.

    device  = used by others | weights | slots | pages ................ | temporaries | left free
              |<------------------ memory_fraction of the device ------------------->|

The arithmetic alone, in bytes and without a device; what steps need comes from
`folojax.runner.temporaries`.
"""

import dataclasses
from collections.abc import Callable

from folojax.sched.pages import pages_for


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """A device's memory."""

    limit_bytes: int  # all that a program may have of it
    used_bytes: int = 0  # of other arrays than the engine's


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What an engine takes of its device."""

    weights_bytes: int  # the model's parameters
    slots_bytes: int
    """What is kept of each running request: by the sampler, most of which is only allocated once a
    request has penalties, biases or banned words; and the states of recurrent layers."""
    bytes_per_page: int  # keys and values of a page, all layers
    num_pages: int  # of the pool
    page_size: int  # tokens of a page
    max_model_len: int  # most tokens of a request
    temporaries_bytes: int  # what the largest step needs beside all that
    is_measured: bool
    """Whether the temporaries are those of compiled steps. Otherwise they are a generous bound,
    which was enough to see that all fits."""
    device: DeviceMemory | None  # None: its memory is unknown, and nothing was checked
    is_capped: bool = False  # whether there was memory for more pages than requests can use

    @property
    def pages_bytes(self) -> int:
        """Bytes of the pool."""
        return self.num_pages * self.bytes_per_page

    @property
    def needed_bytes(self) -> int:
        """Everything together."""
        return self.weights_bytes + self.slots_bytes + self.pages_bytes + self.temporaries_bytes

    @property
    def num_tokens(self) -> int:
        """Tokens that the pool holds."""
        return self.num_pages * self.page_size

    @property
    def num_longest_requests(self) -> int:
        """Requests of `max_model_len` that the pool holds at once."""
        return self.num_pages // pages_for(self.max_model_len, self.page_size)

    def __str__(self) -> str:
        bound = "" if self.is_measured else "at most "
        limit = "unknown" if self.device is None else show_bytes(self.device.limit_bytes)
        capped = ", all that max_num_seqs can use of memory_fraction" if self.is_capped else ""
        return (
            f"memory: weights {show_bytes(self.weights_bytes)}; {self.num_pages:,} pages of "
            f"{show_bytes(self.bytes_per_page)} {show_bytes(self.pages_bytes)}, room for "
            f"{self.num_tokens:,} tokens or {self.num_longest_requests:,} requests of "
            f"{self.max_model_len:,}{capped}; slots {show_bytes(self.slots_bytes)}; temporaries "
            f"{bound}{show_bytes(self.temporaries_bytes)}; device {limit}"
        )


def plan_pages(
    wanted: MemoryPlan, measure: Callable[[int], int], lower: str = "num_pages"
) -> MemoryPlan:
    """Checks that a pool of a given size fits.

    Args:
        wanted: With that size, and a bound on the temporaries.
        measure: Temporaries by number of pages, from compiled steps; asked only if the bound says
            that it may not fit.
        lower: The field that has sized the pool, for the error.

    Raises:
        ValueError: It does not fit.
    """
    device = wanted.device
    if device is None:
        return wanted
    available = device.limit_bytes - device.used_bytes
    if wanted.needed_bytes > available:
        # Without the temporaries already, there is nothing to compile for.
        if wanted.needed_bytes - wanted.temporaries_bytes <= available:
            found = measure(wanted.num_pages)
            wanted = dataclasses.replace(wanted, temporaries_bytes=found, is_measured=True)
        if wanted.needed_bytes > available:
            raise ValueError(_too_little(wanted, available, f"lower {lower}"))
    return wanted


def plan_fraction(
    least: MemoryPlan,
    measure: Callable[[int], int] | None,
    fraction: float,
    most_pages: int | None = None,
) -> MemoryPlan:
    """Takes as many pages as a share of the device holds beside all else that is in it.

    The temporaries of a step grow with the pool, if slowly. They are measured for a pool that
    leaves them no room at all, so they are a bound for the one that does.

    Args:
        least: With the smallest pool that will do, a request of `max_model_len`, and a bound on
            the temporaries.
        measure: Temporaries by number of pages, from compiled steps; None: the bound will do.
        fraction: Of the device's memory, that may be in use in all: by others, and by weights,
            pages and temporaries.
        most_pages: That are of any use; None: all are.

    Raises:
        ValueError: Not even the smallest pool fits, or the device's memory is unknown.
    """
    device = least.device
    if device is None:
        raise ValueError(
            f"memory_fraction is {fraction}, but this device does not tell how much memory it "
            "has: give num_pages instead"
        )
    available = int(fraction * device.limit_bytes) - device.used_bytes
    fixed = least.weights_bytes + least.slots_bytes

    def pages_beside(temporaries: int) -> int:
        return (available - fixed - temporaries) // least.bytes_per_page

    most = pages_beside(0)
    bounded = pages_beside(least.temporaries_bytes)
    if most_pages is not None and bounded > most_pages:
        return dataclasses.replace(least, num_pages=most_pages, is_capped=True)
    if measure is None:
        least = dataclasses.replace(least, num_pages=max(bounded, least.num_pages))
    elif most >= least.num_pages:
        most = most if most_pages is None else min(most, most_pages)
        temporaries = measure(most)
        num_pages = min(most, pages_beside(temporaries))
        if num_pages < least.num_pages:
            num_pages, temporaries = least.num_pages, measure(least.num_pages)
        least = dataclasses.replace(
            least,
            num_pages=num_pages,
            temporaries_bytes=temporaries,
            is_measured=True,
            is_capped=num_pages == most_pages,
        )
    if least.needed_bytes > available:
        text = f"raise memory_fraction, which is {fraction}; lower max_model_len"
        raise ValueError(_too_little(least, available, text))
    return least


def _too_little(plan: MemoryPlan, available: int, remedy: str) -> str:
    """The error of a plan that does not fit into the bytes that are there."""
    assert plan.device is not None
    others = ""
    if plan.device.used_bytes:
        others = f", {show_bytes(plan.device.used_bytes)} of it in use by others"
    bound = "" if plan.is_measured else "up to "
    return (
        f"not enough memory: {show_bytes(plan.needed_bytes)} are needed, "
        f"{show_bytes(max(available, 0))} are available (device: "
        f"{show_bytes(plan.device.limit_bytes)}{others}). Needed are "
        f"{show_bytes(plan.weights_bytes)} for weights, {show_bytes(plan.pages_bytes)} for "
        f"{plan.num_pages:,} pages of {plan.page_size:,} tokens, {show_bytes(plan.slots_bytes)} "
        f"for slots, {bound}{show_bytes(plan.temporaries_bytes)} for temporaries: {remedy}; "
        f"temporaries shrink with max_num_batched_tokens and max_model_len, slots with max_num_seqs"
    )


def show_bytes(count: int) -> str:
    """A size to be read.

    >>> [show_bytes(n) for n in (0, 2_000, 3 * 2**20, 5 * 2**30)]
    ['0.0 KiB', '2.0 KiB', '3.0 MiB', '5.0 GiB']
    """
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count / 2**10:.1f} KiB"
