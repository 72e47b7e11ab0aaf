"""Requests with one prompt: who holds its K/V, and who waits for them."""

from folojax.sched.memory import Source
from folojax.sched.request import Request, RequestStatus


class Groups:
    """The unfinished requests of each group, and those of them that run."""

    def __init__(self) -> None:
        # Dicts for their order: what is planned must not depend on the addresses of objects.
        self._members: dict[str | None, dict[Request, None]] = {}
        self._running: dict[str | None, dict[Request, None]] = {}

    def add(self, request: Request) -> None:
        """Takes in a new request, which has the prompt of its group."""
        if request.group is not None:
            members = self._members.setdefault(request.group, {})
            for member in members:
                # The samples of a request carry the same tuple: comparing others would be slow.
                is_same = member.prompt_token_ids is request.prompt_token_ids
                is_same = is_same or member.prompt_token_ids == request.prompt_token_ids
                assert is_same, f"group {request.group!r} has another prompt"
                break
            members[request] = None

    def remove(self, request: Request) -> None:
        """Forgets a finished request."""
        self.set_waiting(request)
        _remove(self._members, request)

    def set_running(self, request: Request) -> None:
        """Notes that a request has pages; private ones are for no sibling."""
        if request.group is not None and not request.is_private:
            self._running.setdefault(request.group, {})[request] = None

    def set_waiting(self, request: Request) -> None:
        """Notes that a request has lost its pages, or keeps them to itself."""
        _remove(self._running, request)

    def find_sibling(self, request: Request) -> Request | None:
        """Returns a running request that has the K/V of the prompt, its last token aside.

        Or will have them, when the plans under way have run: a later plan runs after them.
        """
        for sibling in self._running.get(request.group, ()):
            if sibling.num_planned_tokens >= request.num_prompt_tokens - 1:
                return sibling
        return None

    def find_source(self, request: Request) -> Source | None:
        """A running request that has the K/V of the same first tokens: its parent or a sibling."""
        parent = request.forked_from
        is_running = parent is not None and parent.status is RequestStatus.RUNNING
        if parent is not None and is_running and not parent.is_private:
            return Source(parent, request.num_tokens)
        sibling = self.find_sibling(request)
        # Of the prompt's last token the K/V may be missing.
        return None if sibling is None else Source(sibling, request.num_prompt_tokens - 1)

    def must_wait(self, request: Request) -> bool:
        """Whether the prompt is being computed for a sibling, and nobody has it yet."""
        return (
            request.group in self._running
            and not request.skip_prefix_cache
            and self.find_sibling(request) is None
        )


def _remove(groups: dict[str | None, dict[Request, None]], request: Request) -> None:
    members = groups.get(request.group)
    if members is not None:
        members.pop(request, None)
        if not members:
            del groups[request.group]
