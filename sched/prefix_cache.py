r"""Which pages hold K/V that another request can use, and which go first when room is short.

Full pages are remembered by the tokens that led to them, as a tree::

    root --- (7, 1, 9, 4) --- (3, 3, 8, 2)          page 0 --- page 5
                          \-- (0, 2, 2, 1)                 \-- page 2

A page is found under its parent by the hash of its own tokens, so the hashes form a chain; and
the lookup compares the tokens too. By induction a hit has the same tokens from the first on: two
prefixes whose hashes collide can't be taken for each other.

K/V of an adapter are those of no other: each has a root of its own.

A cached page is active while requests own it, and idle when its last owner has gone. Idle pages
are evicted in the order in which they were left; owners leave a page before the page ahead of it,
so that what many prompts have in common stays longest.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator


class PrefixNode:
    """A page-long piece of tokens after all pieces above it.

    Attributes:
        parent: the piece before; None for the root, which stands for no tokens at all.
        tokens: the piece.
        depth: pieces from the root to here, this one included.
        page: the page that holds its K/V; None while none does.
        children: the pieces seen after it.
        num_pins: requests that will add their next piece here.
    """

    __slots__ = ("children", "depth", "num_pins", "page", "parent", "tokens")

    def __init__(self, parent: "PrefixNode | None", tokens: tuple[int, ...]) -> None:
        self.parent = parent
        self.tokens = tokens
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.page: int | None = None
        self.children: dict[tuple[int, ...], PrefixNode] = {}
        self.num_pins = 0

    @property
    def is_needed(self) -> bool:
        """Whether it holds a page, or leads to something."""
        return self.page is not None or bool(self.children) or self.num_pins > 0

    def ancestor(self, depth: int) -> "PrefixNode":
        """Returns the node at a depth on the way from the root to this one; O(distance)."""
        node = self
        while node.depth > depth:
            assert node.parent is not None, "only the root has no parent, and its depth is 0"
            node = node.parent
        return node


class PrefixCache:
    """Pages by prefix. It knows nothing of owners: the allocator says which pages are idle."""

    def __init__(self) -> None:
        self.root = PrefixNode(None, ())  # of the model alone
        self._roots: dict[str | None, PrefixNode] = {None: self.root}
        self._nodes: dict[int, PrefixNode] = {}  # by page
        self._idle: OrderedDict[PrefixNode, None] = OrderedDict()

    @property
    def num_pages(self) -> int:
        """Pages that can be hit, active and idle."""
        return len(self._nodes)

    @property
    def num_idle(self) -> int:
        """Pages that can be hit and that nobody owns."""
        return len(self._idle)

    def holds(self, page: int) -> bool:
        """Whether a page can be hit."""
        return page in self._nodes

    def root_of(self, adapter: str | None) -> PrefixNode:
        """Where the prefixes of an adapter begin, or of the model alone."""
        node = self._roots.get(adapter)
        if node is None:
            node = self._roots[adapter] = PrefixNode(None, ())
        return node

    def match(
        self, pieces: Iterable[tuple[int, ...]], adapter: str | None = None
    ) -> tuple[list[int], PrefixNode]:
        """Returns the pages of the longest known beginning of `pieces`, and its last node.

        No piece is read behind the first that is not known.
        """
        pages: list[int] = []
        node = self.root_of(adapter)
        for tokens in pieces:
            child = node.children.get(tokens)
            if child is None or child.page is None:
                break
            pages.append(child.page)
            node = child
        return pages, node

    def insert(self, parent: PrefixNode, tokens: tuple[int, ...], page: int) -> PrefixNode:
        """Remembers that an owned page holds `tokens` after `parent`; returns their node.

        If another page holds the same already, that one stays and `page` is not cached.
        """
        node = parent.children.get(tokens)
        if node is None:
            node = parent.children[tokens] = PrefixNode(parent, tokens)
        if node.page is None:
            assert page not in self._nodes, f"page {page} holds the tokens of another prefix"
            node.page = page
            self._nodes[page] = node
        return node

    def discard(self, page: int) -> None:
        """Forgets a page, if it is known; it must not be idle any more."""
        node = self._nodes.pop(page, None)
        if node is not None:
            assert node not in self._idle, f"page {page} is idle: it can only be evicted"
            node.page = None
            _prune(node)

    def pin(self, node: PrefixNode) -> None:
        """Keeps a node in the tree, whatever becomes of its page."""
        node.num_pins += 1

    def unpin(self, node: PrefixNode) -> None:
        """Takes back a `pin`."""
        assert node.num_pins > 0, "unpinned once too often"
        node.num_pins -= 1
        _prune(node)

    def set_idle(self, page: int) -> None:
        """Says that a page has lost its last owner; it is the last in line to be evicted."""
        self._idle[self._nodes[page]] = None

    def set_active(self, page: int) -> None:
        """Says that an idle page has an owner again."""
        del self._idle[self._nodes[page]]

    def evict(self) -> int:
        """Forgets the page that has been idle longest, and returns it."""
        node, _ = self._idle.popitem(last=False)
        page = node.page
        assert page is not None, "an idle node without a page"
        self.discard(page)
        return page

    def forget(self, adapter: str | None) -> list[int]:
        """Drops all prefixes of an adapter; returns their pages that nobody owns."""
        root, idle = self._roots.pop(adapter, None), []
        nodes = [] if root is None else [root]
        for node in nodes:
            nodes += node.children.values()
            if node.page is not None:
                page, node.page = node.page, None
                del self._nodes[page]
                if node in self._idle:
                    del self._idle[node]
                    idle.append(page)
        for node in reversed(nodes):
            if node.parent is not None and node.parent.children.get(node.tokens) is node:
                _prune(node)
        return idle

    def prefix_of(self, page: int) -> tuple[int, ...]:
        """Returns the tokens that led to a cached page, its own last; O(their number)."""
        node = self._nodes[page]
        pieces = []
        while node.parent is not None:
            pieces.append(node.tokens)
            node = node.parent
        assert node in self._roots.values(), f"page {page} is cached, and can't be reached"
        return tuple(token for piece in reversed(pieces) for token in piece)

    def prefixes(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Goes through all cached pages with the tokens that led to them."""
        return ((page, self.prefix_of(page)) for page in self._nodes)

    def check(self, idle_pages: Iterable[int]) -> None:
        """Raises AssertionError unless the tree is whole and exactly these pages are idle."""
        assert {node.page for node in self._idle} == set(idle_pages), "other pages are idle"
        seen = {}
        roots = set(self._roots.values())
        stack = list(roots)
        while stack:
            node = stack.pop()
            assert node in roots or node.is_needed, f"a dead end of the tree: {node.tokens}"
            if node.page is not None:
                seen[node.page] = node
            for tokens, child in node.children.items():
                assert (child.parent, child.tokens) == (node, tokens), "a child of somebody else"
                stack.append(child)
        assert seen == self._nodes, "the pages of the tree are not those remembered"


def _prune(node: PrefixNode) -> None:
    """Takes a node out of the tree if nothing needs it, and then those that led to it alone."""
    while node.parent is not None and not node.is_needed:
        del node.parent.children[node.tokens]
        node = node.parent
