"""Which pages of the KV pool are in use, and by how many owners."""

import heapq
from collections.abc import Iterable


def pages_for(num_tokens: int, page_size: int) -> int:
    """Returns how many pages of `page_size` tokens hold `num_tokens` tokens.

    >>> [pages_for(n, 16) for n in (0, 1, 16, 17)]
    [0, 1, 1, 2]
    """
    return -(-num_tokens // page_size)


class PageAllocator:
    """Hands out pages 0 … num_pages - 1 and counts their owners.

    The lowest free page always goes first: a decode step costs what the highest page in use
    makes it cost, so pages in use are kept in the low part of the pool.

    Invariant: a page is free or has one owner or more, and `num_free + num_used == num_pages`.
    Breaking a contract here (a page freed once too often) is a fault of the engine, hence an
    AssertionError.
    """

    def __init__(self, num_pages: int) -> None:
        """Starts with every page free; `num_pages` is at least 1."""
        assert num_pages >= 1, f"a pool of {num_pages} pages"
        self.num_pages = num_pages
        self._free = list(range(num_pages))  # a heap; a sorted list is one
        self._ref_counts = [0] * num_pages
        # A heap of -page with every page in use, and pages freed since they were on top: those
        # are dropped when they come up. A page is here at most once, so it can't outgrow the pool.
        self._maybe_used: list[int] = []
        self._is_maybe_used = [False] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages that have an owner; a shared page counts once."""
        return self.num_pages - len(self._free)

    @property
    def extent(self) -> int:
        """One more than the highest page in use, 0 when none is; amortised O(log num_pages)."""
        while self._maybe_used:
            page = -self._maybe_used[0]
            if self._ref_counts[page] > 0:
                return page + 1
            heapq.heappop(self._maybe_used)
            self._is_maybe_used[page] = False
        return 0

    def ref_count(self, page: int) -> int:
        """Returns how many owners a page has."""
        return self._ref_counts[page]

    def allocate(self, num_pages: int) -> list[int] | None:
        """Takes the lowest free pages, in rising order, with one owner each.

        Returns:
            The pages; or None, with nothing taken, when fewer than `num_pages` are free.
        """
        assert num_pages >= 0, f"{num_pages} pages asked for"
        if num_pages > len(self._free):
            return None
        pages = [heapq.heappop(self._free) for _ in range(num_pages)]
        for page in pages:
            self._ref_counts[page] = 1
            if not self._is_maybe_used[page]:
                self._is_maybe_used[page] = True
                heapq.heappush(self._maybe_used, -page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Adds one owner to each page; all must be in use."""
        for page in pages:
            assert self._ref_counts[page] > 0, f"page {page} is free: it can't be shared"
            self._ref_counts[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """Takes one owner from each page; a page without owners is free again."""
        for page in pages:
            assert self._ref_counts[page] > 0, f"page {page} is free already"
            self._ref_counts[page] -= 1
            if self._ref_counts[page] == 0:
                heapq.heappush(self._free, page)

    def check(self) -> None:
        """Raises AssertionError unless every page is either free, once, or in use."""
        free = set(self._free)
        assert len(free) == len(self._free), f"pages are free twice: {sorted(self._free)}"
        used = {page for page, count in enumerate(self._ref_counts) if count > 0}
        negative = [page for page, count in enumerate(self._ref_counts) if count < 0]
        assert not negative, f"pages with a negative count: {negative}"
        assert not free & used, f"pages both free and in use: {sorted(free & used)}"
        lost = set(range(self.num_pages)) - free - used
        assert not lost, f"pages neither free nor in use: {sorted(lost)}"
        assert len(free) + len(used) == self.num_pages, (
            f"{len(free)} free + {len(used)} used pages, but the pool has {self.num_pages}"
        )
        assert len(self._maybe_used) == sum(self._is_maybe_used), "a page is twice in the heap"
        assert self.extent == max(used, default=-1) + 1, (
            f"extent is {self.extent}, but the highest page in use is {max(used, default=None)}"
        )
