"""What requests hold of the KV pool: where they start, how they grow, what they leave behind.

A request that is admitted starts behind the K/V that it finds, the longer of two beginnings::

    in the prefix cache     |page|page|page|          full pages, shared where they lie
    with another request    |page|page|page|pa..|     full pages shared, the last part copied
    in host memory          |page|page|page|pa..|     what is not shared is loaded

and computes the rest into pages of its own: a page with several owners is never written. What it
finds with another request is the prompt of its group, or what it was forked from.

Where requests have states beside pages, a beginning ends where a state is kept, and is found in the
prefix cache alone (`folojax.sched.states`).
"""

from collections.abc import Hashable, Iterable, Iterator
from typing import NamedTuple

from folojax.sched.config import SchedulerConfig
from folojax.sched.host_pages import HostPages, SavedPages
from folojax.sched.pages import PageAllocator, pages_for
from folojax.sched.prefix_cache import PrefixCache, PrefixNode
from folojax.sched.request import Request, RequestStatus
from folojax.sched.states import KeptStates
from folojax.sched.step_plan import PageMoves, PlanDraft


class Start(NamedTuple):
    """What a request finds computed."""

    num_tokens: int  # from the first on; fewer than the request has
    page_ids: list[int]  # the full pages that hold them
    node: PrefixNode  # of the last full page in the prefix cache; its root when caching is off
    partial_page: int | None = None  # holds those behind the last full page
    saved: SavedPages | None = None  # host memory's, of which those behind `page_ids` are loaded
    state: int | None = None  # place of the state that belongs to it


class KVMemory:
    """The pages of all requests.

    Attributes:
        page_size: tokens in a page.
        allocator: the pages.
        cache: the prefixes that can be hit; stays empty when caching is off.
        host: what is in host memory.
        states: those that are kept, where requests have states; else None.
        num_query_tokens: tokens looked up in the cache, of each request when it was first admitted.
        num_hit_tokens: those of them that were found, in the cache or with another request.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.page_size = config.page_size
        self.cache = PrefixCache()
        self.allocator = PageAllocator(config.num_pages, self.cache)
        self.host = HostPages(config.num_host_pages)
        self.states = KeptStates(config.num_prefix_states) if config.has_states else None
        self.num_query_tokens = 0
        self.num_hit_tokens = 0
        self._max_model_len = config.max_model_len
        self._is_caching = config.enable_prefix_caching
        self._is_chunked = config.enable_chunked_prefill
        self._most_tokens = config.long_prefill_token_threshold
        self._least_saved = max(config.min_swap_tokens, 1)
        self._num_kept_free = int(config.watermark * config.num_pages)
        # Per running request the node of its last full page: its next one belongs under it.
        self._tails: dict[Request, PrefixNode] = {}
        # What requests that are admitted by the plan being made are to find in host memory.
        self._loading: dict[Request, SavedPages] = {}
        # The requests of each group that have pages for others to share. Dicts for their order:
        # what is planned must not depend on the addresses of objects.
        self._sharing: dict[Hashable, dict[Request, None]] = {}

    def publish_moves(self) -> PageMoves:
        """Returns what is to happen to pages before the step that has been planned."""
        host = self.host
        if not (host.saves or host.loads or host.dropped):  # in most steps
            return PageMoves(copies=self.allocator.page_copies)
        saves, loads, dropped = host.publish()
        return PageMoves(saves, self.allocator.page_copies, loads, dropped)

    def plan_again(self) -> None:
        """Begins to plan the published step anew: its moves were not done, and are still to be."""
        self.host.is_published = False
        if self.states is not None:
            self.states.plan_again()

    def plan_next(self) -> None:
        """Begins to plan the next step: the moves published so far are done before it."""
        self.allocator.forget_copies()
        if self.host.is_published:
            self.host.plan_next()
        self._loading.clear()
        if self.states is not None:
            self.states.plan_next()

    def must_wait(self, request: Request) -> bool:
        """Whether the prompt is being computed for one of its group, and nobody has it yet."""
        if request.group not in self._sharing or request.skip_prefix_cache:
            return False
        if self.states is None:
            return self._find_holder(request) is None
        # States are found once they are taken in.
        least = request.num_common_tokens // self.page_size * self.page_size
        siblings = self._sharing[request.group]
        return self._is_caching and all(one.num_computed_tokens < least for one in siblings)

    def find_start(self, request: Request) -> Start:
        """Looks for the K/V of a request of no pages, which is to be admitted.

        The last token stays to be computed in any case: what follows it is to be sampled.
        """
        start = Start(0, [], self.cache.root_of(request.adapter))
        if self.states is not None:
            return self._find_state(request, start, self.states)
        if not request.skip_prefix_cache:
            if self._is_caching:
                page_ids, node = self.cache.match(self._pieces(request), request.adapter)
                start = Start(len(page_ids) * self.page_size, page_ids, node)
            start = self._find_with_others(request, start)
        saved = request.saved
        # What host memory holds beyond that is loaded if that is cheaper than to compute it.
        if saved is None or saved.num_tokens - start.num_tokens < self._least_saved:
            return start
        num_tokens = min(saved.num_tokens, request.num_tokens - 1)
        return start._replace(num_tokens=num_tokens, partial_page=None, saved=saved)

    def admit(
        self, request: Request, start: Start, num_tokens: int, has_company: bool = False
    ) -> bool:
        """Gives a request its start and pages for `num_tokens` more; False if they are too few.

        With company, others that run, some pages are to stay free for their growth.
        """
        num_shared = len(start.page_ids)
        num_pages = pages_for(start.num_tokens + num_tokens, self.page_size) - num_shared
        num_idle = sum(self.allocator.ref_count(page) == 0 for page in start.page_ids)
        num_kept_free = self._num_kept_free if has_company else 0
        if num_pages > self.allocator.num_available - num_idle - num_kept_free:
            return False
        self.allocator.share(start.page_ids)  # first, so that none of them is evicted
        page_ids = self.allocator.allocate(num_pages)
        assert page_ids is not None, "pages were counted, and are not there"
        if start.partial_page is not None:
            self.allocator.copy(start.partial_page, page_ids[0])
        if start.saved is not None:
            num_loaded = pages_for(start.num_tokens, self.page_size) - num_shared
            self.host.load(start.saved, num_shared, tuple(page_ids[:num_loaded]))
            self._loading[request] = start.saved
            request.saved = None
        self.drop_saved(request)  # it is computed again instead
        if self.states is not None:
            if start.state is not None:
                self.states.load(request, start.state)
            self.states.promise(request, start.num_tokens + num_tokens)
        request.page_ids = start.page_ids + page_ids
        request.num_computed_tokens = request.num_planned_tokens = start.num_tokens
        request.forked_from = None
        self._tails[request] = start.node
        self.cache.pin(start.node)
        if request.group is not None and not request.is_private:
            self._sharing.setdefault(request.group, {})[request] = None
        return True

    def save(self, request: Request) -> None:
        """Has the K/V of a request kept in host memory, if that is cheaper and there is room.

        All that is planned counts: a save runs after the plans under way.
        """
        num_tokens = request.num_planned_tokens
        # One that reports on its prompt has to compute it; one that is to be loaded stays saved.
        is_reported = request.skip_prefix_cache or request.most_found_tokens is not None
        is_kept = is_reported or request in self._loading
        if not is_kept and num_tokens >= self._least_saved:
            num_pages = pages_for(num_tokens, self.page_size)
            request.saved = self.host.save(tuple(request.page_ids[:num_pages]), num_tokens)

    def drop_saved(self, request: Request) -> None:
        """Gives up what host memory holds of a request, if anything."""
        if request.saved is not None:
            self.host.drop(request.saved)
            request.saved = None

    def count_start(self, request: Request) -> None:
        """Takes the start of a request that was admitted for the first time into the counts."""
        request.num_cached_tokens = request.num_computed_tokens
        if self._is_caching and not request.skip_prefix_cache:
            self.num_query_tokens += request.num_tokens
            self.num_hit_tokens += request.num_cached_tokens

    def num_missing_pages(self, request: Request, num_tokens: int) -> int:
        """How many pages a running request needs for its next tokens."""
        num_tokens += request.num_planned_tokens
        return pages_for(num_tokens, self.page_size) - len(request.page_ids)

    def chunk_size(self, request: Request, num_left: int, draft: PlanDraft) -> int:
        """How many of the tokens that a request has left to compute in the plan being made."""
        num_tokens = min(num_left, draft.budget_left, self._most_tokens or draft.budget_left)
        if self.states is None or not self._is_chunked:
            return num_tokens
        num_planned = request.num_expected_tokens - num_left
        num_cut = self.states.cut(request, num_planned, num_tokens)
        # The rest counts against the budget, too: it is computed in the next step, in which those
        # behind the request are to find no less.
        draft.budget_left -= num_tokens - num_cut
        return num_cut

    def extend(self, request: Request, num_tokens: int) -> list[int] | None:
        """Gives a request pages for its next tokens, and returns those; None if too few."""
        num_tokens += request.num_planned_tokens
        page_ids: list[int] | None = []
        if num_tokens > len(request.page_ids) * self.page_size:  # few rows in most steps
            num_missing = pages_for(num_tokens, self.page_size) - len(request.page_ids)
            page_ids = self.allocator.allocate(num_missing)
            if page_ids is None:
                return None
            request.page_ids.extend(page_ids)
        if self.states is not None:
            self.states.promise(request, num_tokens)
        return page_ids

    def advance(self, request: Request, num_tokens: int) -> None:
        """Notes that the K/V of the next tokens are computed; full pages enter the cache.

        They were planned until now.
        """
        request.num_computed_tokens += num_tokens
        if request.num_computed_tokens % self.page_size >= num_tokens or not self._is_caching:
            return  # no page was filled
        if request.is_private:
            return
        old_tail = tail = self._tails[request]
        for index in range(tail.depth, request.num_computed_tokens // self.page_size):
            tail = self.cache.insert(tail, self._piece(request, index), request.page_ids[index])
        self._tails[request] = tail
        self.cache.pin(tail)
        self.cache.unpin(old_tail)
        if self.states is not None:
            self.states.land(request, tail, self.page_size)

    def plans_evenly_until(self, request: Request) -> int:
        """Up to how many planned tokens its pages last, where it computes one after another."""
        if self.states is not None and self.states.has_stops(request):
            return 0
        # The last token that it may get is never computed.
        return min(len(request.page_ids) * self.page_size, self._most_tokens_of(request) - 1)

    def lands_evenly_until(self, request: Request) -> int:
        """Up to how many computed tokens it goes on, and nothing enters the cache."""
        last_of_page = request.num_computed_tokens // self.page_size * self.page_size
        last_of_page += self.page_size - 1
        return min(last_of_page, self._most_tokens_of(request) - 2)

    def discard(self, request: Request) -> None:
        """Takes all pages of a request out of the cache, also those that it found there.

        Its row went wrong, and whatever it has read may be the reason: nobody is to hit that again.
        """
        for page in request.page_ids:
            self.cache.discard(page)
        if self.states is not None:
            self.states.release(request)
            self.states.discard(self._tails[request])

    def drop_all(self, kept: Iterable[Request], requests: Iterable[Request]) -> None:
        """Drops what can be hit or loaded; the pages of running, kept requests are theirs alone."""
        for request in kept:
            self._isolate(request)
        self.allocator.drop_idle()
        if self.states is not None:
            self.states.clear()
        for request in requests:
            self.drop_saved(request)

    def drop_adapter(
        self, adapter: str | None, kept: Iterable[Request], requests: Iterable[Request]
    ) -> None:
        """The same for what was computed with an adapter; all of these requests have it."""
        for request in kept:
            self._isolate(request)
        self.allocator.forget(adapter)
        if self.states is not None:
            self.states.clear()
        for request in requests:
            self.drop_saved(request)

    def release(self, request: Request) -> None:
        """Frees the pages of a request; cached ones stay as long as there is room."""
        # The last first: the beginning is what others have in common, and is to stay longest.
        self.allocator.free(reversed(request.page_ids))
        request.page_ids = []
        request.num_computed_tokens = request.num_planned_tokens = 0
        request.plans_evenly_until = request.lands_evenly_until = 0
        self._stop_sharing(request)
        if self.states is not None:
            self.states.release(request)
        saved = self._loading.pop(request, None)
        if saved is not None and self.host.cancel_load(saved):
            request.saved = saved
        if request in self._tails:  # it was admitted
            self.cache.unpin(self._tails.pop(request))

    def _most_tokens_of(self, request: Request) -> int:
        return min(request.num_prompt_tokens + request.stop.max_tokens, self._max_model_len)

    def _find_holder(self, request: Request) -> tuple[Request, int] | None:
        """A running request that has K/V of the same first tokens, and of how many.

        Or will have them, when the plans under way have run: a later plan runs after them.
        """
        parent = request.forked_from
        if parent is not None and parent.status is RequestStatus.RUNNING and not parent.is_private:
            return parent, request.num_tokens
        for sibling in self._sharing.get(request.group, ()):
            if sibling.num_planned_tokens >= request.num_common_tokens:
                return sibling, request.num_common_tokens
        return None

    def _find_with_others(self, request: Request, start: Start) -> Start:
        """What another request offers, if that is more than `start`."""
        found = self._find_holder(request)
        # What is only loaded before this step comes too late to be copied.
        if found is None or found[0] in self._loading:
            return start
        holder, num_common = found
        num_shared = min(num_common, request.num_tokens - 1, holder.num_planned_tokens)
        if num_shared <= start.num_tokens:
            return start
        num_full, num_left = divmod(num_shared, self.page_size)
        partial_page = holder.page_ids[num_full] if num_left else None
        # Pages that a plan under way computes are not in the cache, and come behind its last node.
        node = self._tails[holder].ancestor(num_full)
        return Start(num_shared, holder.page_ids[:num_full], node, partial_page)

    def _isolate(self, request: Request) -> None:
        """Makes the pages of a running request its own."""
        self.discard(request)
        self._stop_sharing(request)
        request.is_private = request.skip_prefix_cache = True

    def _find_state(self, request: Request, start: Start, states: KeptStates) -> Start:
        """The longest beginning in the cache that has a state; notes where others are wanted."""
        if not self._is_caching or request.is_private:
            return start
        size, num_tokens, num_found = self.page_size, request.num_tokens, 0
        if not request.skip_prefix_cache:
            page_ids, node = self.cache.match(self._pieces(request), request.adapter)
            num_found = len(page_ids)
            found = states.find(node)
            if found is not None:
                node, place = found
                page_ids = page_ids[: node.depth]
                start = Start(node.depth * size, page_ids, node, state=place)
        ends = {num_tokens // size, (num_tokens - 1) // size, num_found}
        if request.group is not None:
            ends.add(request.num_common_tokens // size)
        states.stop_at(request, (end * size for end in ends))
        return start

    def _stop_sharing(self, request: Request) -> None:
        members = self._sharing.get(request.group)
        if members is not None:
            members.pop(request, None)
            if not members:
                del self._sharing[request.group]

    def _pieces(self, request: Request) -> Iterator[tuple[int, ...]]:
        """The full pages of a request's tokens, without those that it is to compute."""
        most = request.num_tokens - 1  # the last token, in any case
        if request.most_found_tokens is not None:
            most = min(most, request.most_found_tokens)
        for index in range(most // self.page_size):
            yield self._piece(request, index)

    def _piece(self, request: Request, index: int) -> tuple[int, ...]:
        return request.tokens_between(index * self.page_size, (index + 1) * self.page_size)
