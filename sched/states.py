"""States of recurrent layers that are kept beside the prefix cache, so that its pages can be hit.

A state is that of all tokens so far, in one piece: behind cached pages a request can only begin
where somebody has kept the state, at the end of a page::

    prompt     |page|page|page|page|pa..       pages can be hit up to the last state
    states               ^         ^

There is room for few, so they are kept where another request is likely to begin:

- at the last full page of what a request has to compute: its prompt may come again, with more
  behind it, as in a chat; and it may be preempted;
- where the prompt of a group ends, for the other samples and scores;
- where its tokens part from cached ones: two that begin alike will be followed by a third.

Chunks of prompts are cut there. The least recently used state goes first.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from folojax.sched.prefix_cache import PrefixNode
from folojax.sched.request import Request


class KeptStates:
    """Places for states, numbered from 0; which end of a page each is of, and which are promised.

    A state is promised when the plan is made that computes it, and can be found when that plan is
    taken in. A place may be given on before that: later plans run after it.

    Attributes:
        loads: (request id, place) of the plan that is being made: what a request begins with.
        saves: Likewise, what a request has when the plan has run.
    """

    def __init__(self, num_places: int) -> None:
        self.num_places = num_places
        self.loads: list[tuple[str, int]] = []
        self._saves: dict[Request, tuple[int, int]] = {}
        self._free = list(range(num_places))[::-1]
        self._places: OrderedDict[PrefixNode, int] = OrderedDict()  # the least recently used first
        self._promised: dict[Request, dict[int, int]] = {}  # place by number of tokens
        self._stops: dict[Request, list[int]] = {}  # in descending order

    @property
    def saves(self) -> tuple[tuple[str, int], ...]:
        """(request id, place) of the plan that is being made: kept when it has run."""
        return tuple((one.request_id, place) for one, (_, place) in self._saves.items())

    def plan_next(self) -> None:
        """Begins to plan the next step."""
        self.loads, self._saves = [], {}

    def plan_again(self) -> None:
        """Begins to plan the published step anew; nothing of it was done."""
        for request, (num_tokens, _) in self._saves.items():
            self._take_back(request, num_tokens)
        self._saves = {}

    def find(self, node: PrefixNode) -> tuple[PrefixNode, int] | None:
        """The deepest node with a state on the way to one, and its place."""
        while node.parent is not None:
            if node in self._places:
                self._places.move_to_end(node)
                return node, self._places[node]
            node = node.parent
        return None

    def load(self, request: Request, place: int) -> None:
        """Has a request begin with a state."""
        self.loads.append((request.request_id, place))

    def stop_at(self, request: Request, num_tokens: Iterable[int]) -> None:
        """Says behind how many tokens of a request states are wanted."""
        self._stops[request] = sorted(set(num_tokens), reverse=True)

    def has_stops(self, request: Request) -> bool:
        """Whether states of a request are wanted further on."""
        return bool(self._stops.get(request))

    def cut(self, request: Request, num_planned: int, num_tokens: int) -> int:
        """How many of the next tokens to compute, so as to stop where a state is wanted."""
        stops = self._stops.get(request, [])
        while stops and stops[-1] <= num_planned:
            stops.pop()
        return min(num_tokens, stops[-1] - num_planned) if stops else num_tokens

    def promise(self, request: Request, num_tokens: int) -> None:
        """Has the state of a request kept, if it will be that of as many tokens as is wanted."""
        stops = self._stops.get(request)
        if not stops or stops[-1] != num_tokens:
            return
        if not self._free and self._places:
            _, place = self._places.popitem(last=False)
            self._free.append(place)
        if self._free:
            place = self._free.pop()
            self._promised.setdefault(request, {})[num_tokens] = place
            self._saves[request] = num_tokens, place

    def land(self, request: Request, tail: PrefixNode, page_size: int) -> None:
        """Notes that the tokens up to a node are computed, and the states among them kept."""
        promised = self._promised.get(request, {})
        for num_tokens in [one for one in promised if one <= tail.depth * page_size]:
            place = promised.pop(num_tokens)
            node = tail.ancestor(num_tokens // page_size)
            if node in self._places:
                self._free.append(place)
            else:
                self._places[node] = place
        if not promised:
            self._promised.pop(request, None)

    def release(self, request: Request) -> None:
        """Gives up what is promised to a request."""
        self._stops.pop(request, None)
        self._saves.pop(request, None)
        self._free += self._promised.pop(request, {}).values()

    def discard(self, node: PrefixNode) -> None:
        """Forgets the states on the way to a node: whatever was there may be wrong."""
        while node.parent is not None:
            if node in self._places:
                self._free.append(self._places.pop(node))
            node = node.parent

    def clear(self) -> None:
        """Forgets every state that could be found."""
        self._free += self._places.values()
        self._places.clear()

    def check(self, running: Iterable[Request]) -> None:
        """Raises AssertionError unless each place is free, kept or promised to one who runs."""
        promised = [place for one in self._promised.values() for place in one.values()]
        places = [*self._free, *self._places.values(), *promised]
        assert sorted(places) == list(range(self.num_places)), f"places of states: {places}"
        idle = self._promised.keys() - set(running)
        assert not idle, f"states are promised to {idle}"

    def _take_back(self, request: Request, num_tokens: int) -> None:
        self._free.append(self._promised[request].pop(num_tokens))


def state_options(fields: Mapping[str, Any], has_states: bool) -> dict[str, Any]:
    """What becomes of an engine's options, by whether the model's layers keep states.

    Raises:
        ValueError: an option is not for such a model.
    """
    num_states, num_host_pages = fields["num_prefix_states"], fields["num_host_pages"]
    if num_states and not has_states:
        raise ValueError(
            f"num_prefix_states is {num_states}, and the model has no recurrent layers: leave it "
            "out"
        )
    if num_host_pages and has_states:
        raise ValueError(
            f"num_host_pages is {num_host_pages}; the model has recurrent layers, whose states are "
            "not kept in host memory: leave it out, and preempted requests are computed again"
        )
    is_caching = fields["enable_prefix_caching"]
    if not (has_states and is_caching):
        num_states = 0
    elif num_states is None:
        num_states = min(fields["max_num_seqs"], 32)
    return {
        "has_states": has_states,
        "num_prefix_states": num_states,
        "enable_prefix_caching": is_caching and (num_states > 0 or not has_states),
    }
