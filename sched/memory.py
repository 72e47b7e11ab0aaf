"""What requests hold of the KV pool: where they start, how they grow, what they leave behind.

A request that is admitted starts behind the K/V that it finds, the longer of two beginnings::

    in the prefix cache     |page|page|page|          full pages, shared where they lie
    with a sibling          |page|page|page|pa..|     full pages shared, the last part copied

and computes the rest into pages of its own: a page with several owners is never written.
"""

from collections.abc import Iterator
from typing import NamedTuple

from folojax.sched.pages import PageAllocator, pages_for
from folojax.sched.prefix_cache import PrefixCache, PrefixNode
from folojax.sched.request import Request


class Start(NamedTuple):
    """What a request finds computed.

    Attributes:
        num_tokens: tokens, from the first on; fewer than the request has.
        page_ids: the full pages that hold them.
        node: of the last full page in the prefix cache; its root when caching is off.
        partial_page: the page that holds those behind the last full page; None without any.
    """

    num_tokens: int
    page_ids: list[int]
    node: PrefixNode
    partial_page: int | None = None


class KVMemory:
    """The pages of all requests.

    Attributes:
        page_size: tokens in a page.
        allocator: the pages.
        cache: the prefixes that can be hit; stays empty when caching is off.
        num_query_tokens: tokens looked up in the cache, of each request when it was first admitted.
        num_hit_tokens: those of them that were found, in the cache or with a sibling.
    """

    def __init__(self, num_pages: int, page_size: int, enable_prefix_caching: bool) -> None:
        self.page_size = page_size
        self.cache = PrefixCache()
        self.allocator = PageAllocator(num_pages, self.cache)
        self.num_query_tokens = 0
        self.num_hit_tokens = 0
        self._is_caching = enable_prefix_caching
        # Per running request the node of its last full page: its next one belongs under it.
        self._tails: dict[Request, PrefixNode] = {}

    def find_start(self, request: Request, sibling: Request | None) -> Start:
        """Looks for the K/V of a request that is to be admitted; at least one token stays to do.

        Args:
            request: of no pages so far.
            sibling: one that holds the K/V of the same prompt, except its last token perhaps; at
                the latest when the plans under way have run.
        """
        if request.skip_prefix_cache:
            return Start(0, [], self.cache.root)
        pieces = self._pieces(request) if self._is_caching else ()
        page_ids, node = self.cache.match(pieces)
        num_cached = len(page_ids) * self.page_size
        # The prompt's last token is computed again: what follows it is to be sampled.
        num_shared = request.num_prompt_tokens - 1
        if sibling is None or num_shared <= num_cached:
            return Start(num_cached, page_ids, node)
        num_full, num_left = divmod(num_shared, self.page_size)
        partial_page = sibling.page_ids[num_full] if num_left else None
        # Pages that a plan under way computes are not in the cache, and come behind its last node.
        node = self._tails[sibling].ancestor(num_full)
        return Start(num_shared, sibling.page_ids[:num_full], node, partial_page)

    def admit(self, request: Request, start: Start, num_tokens: int) -> bool:
        """Gives a request its start and pages for `num_tokens` more; False if they are too few."""
        num_pages = pages_for(start.num_tokens + num_tokens, self.page_size) - len(start.page_ids)
        num_idle = sum(self.allocator.ref_count(page) == 0 for page in start.page_ids)
        if num_pages > self.allocator.num_available - num_idle:
            return False
        self.allocator.share(start.page_ids)  # first, so that none of them is evicted
        page_ids = self.allocator.allocate(num_pages)
        assert page_ids is not None, "pages were counted, and are not there"
        if start.partial_page is not None:
            self.allocator.copy(start.partial_page, page_ids[0])
        request.page_ids = start.page_ids + page_ids
        request.num_computed_tokens = start.num_tokens
        self._tails[request] = start.node
        self.cache.pin(start.node)
        return True

    def count_start(self, request: Request) -> None:
        """Takes the start of a request that was admitted for the first time into the counts."""
        request.num_cached_tokens = request.num_computed_tokens
        if self._is_caching and not request.skip_prefix_cache:
            self.num_query_tokens += request.num_tokens
            self.num_hit_tokens += request.num_cached_tokens

    def extend(self, request: Request, num_tokens: int) -> list[int] | None:
        """Gives a request pages for its next tokens, and returns those; None if too few."""
        num_tokens += request.num_computed_tokens + request.num_tokens_in_flight
        if num_tokens <= len(request.page_ids) * self.page_size:  # most rows in most steps
            return []
        num_missing = pages_for(num_tokens, self.page_size) - len(request.page_ids)
        page_ids = self.allocator.allocate(num_missing)
        if page_ids is not None:
            request.page_ids.extend(page_ids)
        return page_ids

    def advance(self, request: Request, num_tokens: int) -> None:
        """Notes that the K/V of the next tokens are computed; full pages enter the cache.

        They were in flight until now.
        """
        request.num_tokens_in_flight -= num_tokens
        request.num_computed_tokens += num_tokens
        if request.num_computed_tokens % self.page_size >= num_tokens or not self._is_caching:
            return  # no page was filled
        old_tail = tail = self._tails[request]
        for index in range(tail.depth, request.num_computed_tokens // self.page_size):
            tail = self.cache.insert(tail, self._piece(request, index), request.page_ids[index])
        self._tails[request] = tail
        self.cache.pin(tail)
        self.cache.unpin(old_tail)

    def discard(self, request: Request) -> None:
        """Takes all pages of a request out of the cache, also those that it found there.

        Its row went wrong, and whatever it has read may be the reason: nobody is to hit that again.
        """
        for page in request.page_ids:
            self.cache.discard(page)

    def release(self, request: Request) -> None:
        """Frees the pages of a request; cached ones stay as long as there is room."""
        # The last first: the beginning is what others have in common, and is to stay longest.
        self.allocator.free(reversed(request.page_ids))
        request.page_ids = []
        request.num_computed_tokens = request.num_tokens_in_flight = 0
        if request in self._tails:  # it was admitted
            self.cache.unpin(self._tails.pop(request))

    def _pieces(self, request: Request) -> Iterator[tuple[int, ...]]:
        """The full pages of a request's tokens, without the last token: that is to be computed."""
        for index in range((request.num_tokens - 1) // self.page_size):
            yield self._piece(request, index)

    def _piece(self, request: Request, index: int) -> tuple[int, ...]:
        return request.tokens_between(index * self.page_size, (index + 1) * self.page_size)
