"""K/V that wait in host memory, and what is to be moved there and back before the next step.

::

    preempted  ---save--->  host memory  ---load--->  resumed, in other pages
                                 |    ^
                   dropped <-----'    '--- adopt: brought from outside, such as a snapshot

Saving instead of computing again is worth it from some number of tokens on; the scheduler's config
says from how many. What moves is collected for the step that is being planned, as page copies are:
saves come first, loads last. So a page can be handed on and written in the step that saves it.
"""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, eq=False)
class SavedPages:
    """What host memory holds of one request."""

    key: int  # of the runner's store; never used twice
    num_tokens: int  # from the first on, whose K/V are there
    num_counted_pages: int  # that it takes of the room; none when it was brought from outside


class PageSave(NamedTuple):
    """Pages, in token order, whose content the store is to keep under a key."""

    key: int
    page_ids: tuple[int, ...]


class PageLoad(NamedTuple):
    """Pages to be filled with the stored ones from `first` on; the store then forgets the key."""

    key: int
    first: int
    page_ids: tuple[int, ...]


class HostPages:
    """Who has K/V in host memory, and how much room is left there.

    A plan that has been published was run, or will be replaced by another before it is: until the
    next one is begun nobody knows. So what was published is neither done nor undone meanwhile.

    Attributes:
        num_pages: room for saves; what is adopted comes on top.
        num_used: pages of it that are taken.
        saves, loads, dropped: of the step that is being planned, the first two by key.
        is_published: whether they are in a plan; False begins to plan that anew.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_used = 0
        self.is_published = False
        self._num_keys = 0
        self.saves: dict[int, PageSave] = {}
        self.loads: dict[int, PageLoad] = {}
        self.dropped: list[int] = []
        self._num_published_drops = 0

    def publish(self) -> tuple[tuple[PageSave, ...], tuple[PageLoad, ...], tuple[int, ...]]:
        """Returns what is to be saved, loaded and forgotten by the step that has been planned."""
        self.is_published = True
        self._num_published_drops = len(self.dropped)
        return tuple(self.saves.values()), tuple(self.loads.values()), tuple(self.dropped)

    def plan_next(self) -> None:
        """Begins to plan a step behind the published one."""
        self.is_published = False
        self.saves.clear()
        self.loads.clear()
        del self.dropped[: self._num_published_drops]

    def save(self, page_ids: tuple[int, ...], num_tokens: int) -> SavedPages | None:
        """Has pages saved before they are used again; None if there is no room."""
        if self.num_used + len(page_ids) > self.num_pages:
            return None
        self.num_used += len(page_ids)
        saved = SavedPages(self._draw_key(), num_tokens, len(page_ids))
        self.saves[saved.key] = PageSave(saved.key, page_ids)
        return saved

    def adopt(self, num_tokens: int) -> SavedPages:
        """Takes in K/V that somebody puts in the store under the key of the answer."""
        return SavedPages(self._draw_key(), num_tokens, 0)

    def load(self, saved: SavedPages, first: int, page_ids: tuple[int, ...]) -> None:
        """Has pages filled with the saved ones from `first` on; the save is used up by it."""
        self.loads[saved.key] = PageLoad(saved.key, first, page_ids)
        self.num_used -= saved.num_counted_pages

    def cancel_load(self, saved: SavedPages) -> bool:
        """Fills no pages after all; returns whether host memory still holds what is saved."""
        del self.loads[saved.key]
        if self.is_published:  # and perhaps done
            self.dropped.append(saved.key)
            return False
        self.num_used += saved.num_counted_pages
        return True

    def drop(self, saved: SavedPages) -> None:
        """Gives up what is saved."""
        self.num_used -= saved.num_counted_pages
        if saved.key in self.saves and not self.is_published:
            del self.saves[saved.key]
        else:
            self.dropped.append(saved.key)

    def check(self, saved: list[SavedPages]) -> None:
        """Raises AssertionError unless these are all that is saved, and counted."""
        keys = [one.key for one in saved]
        assert len(keys) == len(set(keys)), "two requests have one save"
        counted = sum(one.num_counted_pages for one in saved)
        assert counted == self.num_used <= self.num_pages, (
            f"{counted} host pages are saved, {self.num_used} counted, of {self.num_pages}"
        )
        assert not self.loads.keys() & set(keys), "loaded, and still saved"
        needed = {*keys, *self.loads, *self.dropped}
        assert self.saves.keys() <= needed, "a save that nobody needs"

    def _draw_key(self) -> int:
        self._num_keys += 1
        return self._num_keys
