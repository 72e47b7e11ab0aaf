"""Which pages of the KV pool are in use, by how many owners, and what the others still hold.

::

              allocate                    free, page cached
     free  --------------->  active  --------------------------> idle
       ^                      |  ^                                |
       |   free, not cached   |  |      share (a prefix hit)      |
       |<---------------------'  `--------------------------------|
       |                    evicted, least recently used first    |
       `----------------------------------------------------------'
"""

from collections.abc import Iterable

from folojax.sched.prefix_cache import PrefixCache


def pages_for(num_tokens: int, page_size: int) -> int:
    """Returns how many pages of `page_size` tokens hold `num_tokens` tokens.

    >>> [pages_for(n, 16) for n in (0, 1, 16, 17)]
    [0, 1, 1, 2]
    """
    return -(-num_tokens // page_size)


class PageAllocator:
    """Hands out pages 0 … num_pages - 1, counts their owners, and keeps cached ones meanwhile.

    Pages are read where they lie, so one is as good as another: the one freed last goes first.

    Copies are collected for the step that is being planned, as one parallel copy: every source is
    read before any target is written, and no page is a target twice. So a page may be handed out,
    and written in that step, although it is a source.

    Invariant: a page is free, idle (no owner, in the cache) or active (an owner or more), and
    `num_free + num_idle + num_used == num_pages`. Breaking a contract here (a page freed once too
    often) is a fault of the engine, hence an AssertionError.
    """

    def __init__(self, num_pages: int, cache: PrefixCache | None = None) -> None:
        """Starts with every page free; `num_pages` is at least 1."""
        assert num_pages >= 1, f"a pool of {num_pages} pages"
        self.num_pages = num_pages
        self._cache = PrefixCache() if cache is None else cache
        self._ref_counts = [0] * num_pages
        self._num_used = 0
        self._copies: dict[int, int] = {}  # target -> source, as of before the step
        self._free = list(range(num_pages))[::-1]

    @property
    def num_free(self) -> int:
        """Pages that hold nothing anyone could use."""
        return len(self._free)

    @property
    def num_idle(self) -> int:
        """Cached pages that nobody owns: what they hold is kept until the room is needed."""
        return self._cache.num_idle

    @property
    def num_used(self) -> int:
        """Active pages, those that have an owner; a shared page counts once."""
        return self._num_used

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give: free and idle ones."""
        return self.num_pages - self._num_used

    @property
    def page_copies(self) -> tuple[tuple[int, int], ...]:
        """The parallel copy to be done before the step being planned: (source, target) pairs."""
        return tuple((source, target) for target, source in self._copies.items())

    def ref_count(self, page: int) -> int:
        """Returns how many owners a page has."""
        return self._ref_counts[page]

    def allocate(self, num_pages: int) -> list[int] | None:
        """Takes pages that nobody owns, with one owner each.

        Where too few are free, the least recently used idle pages are evicted.

        Returns:
            The pages; or None, with nothing changed, when fewer than `num_pages` are available.
        """
        assert num_pages >= 0, f"{num_pages} pages asked for"
        if num_pages > self.num_available:
            return None
        for _ in range(num_pages - self.num_free):
            self._set_free(self._cache.evict())
        pages = [self._free.pop() for _ in range(num_pages)]
        for page in pages:
            self._set_active(page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Adds one owner to each page; all must be active or idle."""
        for page in pages:
            if self._ref_counts[page] > 0:
                self._ref_counts[page] += 1
            else:
                assert self._cache.holds(page), f"page {page} is free: it can't be shared"
                self._cache.set_active(page)
                self._set_active(page)

    def free(self, pages: Iterable[int]) -> None:
        """Takes one owner from each page; without owners it is idle if it is cached, else free.

        Of the pages that become idle, the first given is the first to be evicted.
        """
        for page in pages:
            assert self._ref_counts[page] > 0, f"page {page} is free already"
            self._ref_counts[page] -= 1
            if self._ref_counts[page] == 0:
                self._num_used -= 1
                if self._cache.holds(page):
                    self._cache.set_idle(page)
                else:
                    self._set_free(page)

    def copy(self, source: int, target: int) -> None:
        """Has an active page copied to another, before the step that is being planned."""
        for page in (source, target):
            assert self._ref_counts[page] > 0, f"page {page} is not active: it can't be copied"
        self._add_copy(source, target)

    def drop_idle(self) -> None:
        """Frees every idle page."""
        while self._cache.num_idle:
            self._set_free(self._cache.evict())

    def forget(self, adapter: str | None) -> None:
        """Takes all pages of an adapter out of the cache, and frees the idle ones."""
        for page in self._cache.forget(adapter):
            self._set_free(page)

    def forget_copies(self) -> None:
        """Says that the copies so far have been done."""
        self._copies.clear()

    def check(self) -> None:
        """Raises AssertionError unless every page is free, idle or active, and known as such."""
        negative = [page for page, count in enumerate(self._ref_counts) if count < 0]
        assert not negative, f"pages with a negative count: {negative}"
        inactive = {page for page, count in enumerate(self._ref_counts) if count == 0}
        active = set(range(self.num_pages)) - inactive
        free = {page for page in inactive if self._is_free(page)}
        self._cache.check(idle_pages=inactive - free)
        counts = (self.num_free, self.num_idle, self.num_used)
        assert counts == (len(free), len(inactive) - len(free), len(active)), (
            f"{len(free)} pages are free, {len(inactive) - len(free)} idle and {len(active)} "
            f"active of {self.num_pages}, but counted as {counts}"
        )
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        assert set(self._free) == free, f"pages missing or surplus: {sorted(free ^ {*self._free})}"
        assert not self._copies.keys() & free, "a copy is planned that nobody needs"

    def _is_free(self, page: int) -> bool:
        return self._ref_counts[page] == 0 and not self._cache.holds(page)

    def _set_active(self, page: int) -> None:
        self._ref_counts[page] = 1
        self._num_used += 1

    def _set_free(self, page: int) -> None:
        """Notes a page that holds nothing any more; it is inactive already."""
        self._free.append(page)
        self._copies.pop(page, None)

    def _add_copy(self, source: int, target: int) -> None:
        # The source may itself be the target of a copy of this step.
        source = self._copies.get(source, source)
        if source != target:  # else it has been copied away and back again
            self._copies[target] = source
