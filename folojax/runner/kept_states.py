"""States of requests to and from where they are kept for the prefix cache, as plans have it."""

from collections.abc import Mapping, Sequence

from folojax.kv.state_copies import copy_states
from folojax.runner.batch import Row
from folojax.runner.compile_plan import Gate
from folojax.steps.executables import COPIES
from folojax.steps.state import EngineState


class KeptStates:
    """Copies between slots and kept states, which lie behind the slots; DONATES what it is given.

    Moves are (request id, place of a kept state).
    """

    def __init__(self, num_slots: int, gate: Gate) -> None:
        self._num_slots, self._gate = num_slots, gate

    def load(
        self, state: EngineState, moves: Sequence[tuple[str, int]], rows: Mapping[str, Row]
    ) -> EngineState:
        """Has requests that join begin with kept states; those that are gone do not."""
        pairs = [(self._num_slots + one, rows[name].slot) for name, one in moves if name in rows]
        return self._copy(state, pairs)

    def save(
        self, state: EngineState, moves: Sequence[tuple[str, int]], rows: Mapping[str, Row]
    ) -> EngineState:
        """Keeps the states of requests as they are now."""
        return self._copy(state, [(rows[name].slot, self._num_slots + one) for name, one in moves])

    def _copy(self, state: EngineState, pairs: Sequence[tuple[int, int]]) -> EngineState:
        if not pairs:
            return state
        self._gate.check(COPIES)
        return state._replace(cache=copy_states(state.cache, pairs))
