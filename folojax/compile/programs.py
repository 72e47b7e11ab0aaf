"""Compiled programs, without what they were compiled from.

`jax.jit` keeps what it has traced and lowered for as long as the function lives: 5 MB for each
shape of a decode step, a third of what the shape takes, and none of it is needed to run. A
`Program` has every shape traced from a function that is made for that and forgotten afterwards.

Programs are shared: engines of equal models and shapes in one process find the same ones.
"""

import contextlib
import functools
import inspect
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_BUFFERS = "xla_gpu_enable_command_buffer"
_STRAIGHT = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,COLLECTIVES"
IN_GRAPH: dict[str, Any] = {
    _BUFFERS: _STRAIGHT + ",CONDITIONAL,WHILE",
    "xla_gpu_experimental_enable_fusion_autotuner": False,
}
"""`compiler_options` of programs with loops and sums over devices: XLA on a GPU then keeps these in
the CUDA graph.

By default a loop ends the graph, and the host waits for the device to learn whether to go on. Over
several devices it does so here too: with NCCL's calls in a loop CUDA refuses the graph. Autotuning
of fusions takes longer than it gains. Other platforms pass over both.
"""

_NO_MESH = Mesh(np.empty((), object), ())
_LOCK = threading.Lock()
_ALL: list["Programs"] = []


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """A context in which the caller's settings of JAX do not decide what is compiled, and where.

    Everything that an engine does on its device happens in one, in whichever thread: outside of
    the caller's mesh, in the dtypes of the model, and compiled.
    """
    with (
        jax.set_mesh(_NO_MESH),
        jax.enable_x64(False),
        jax.disable_jit(False),
        jax.numpy_dtype_promotion("standard"),
    ):
        yield


def _mesh_of(args: tuple[Any, ...]) -> Any:
    """The mesh that arguments lie over, if they do."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(args))
    return next((one.mesh for one in shardings if isinstance(one, NamedSharding)), None)


class Spent:
    """What this process has spent on making programs so far, of all threads together.

    Attributes:
        seconds: Of tracing and compiling, or of loading what an earlier process has compiled.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        """Counts one program."""
        with _LOCK:
            self.seconds += seconds


SPENT = Spent()


class Programs:
    """The programs of one function: one for each set of static arguments."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        donate: tuple[int, ...] = (),
        lies_as: tuple[int | None, ...] | None = None,
        compiler_options: dict[str, Any] | None = None,
    ) -> None:
        """Compiles nothing.

        Args:
            function: Its static arguments are those by keyword alone.
            donate: Places of the arguments that are DONATED.
            lies_as: Over a mesh, of each result the place of the argument whose arrays lie as its
                own do; None: every device has the same. None in place of all: that of all of them.
            compiler_options: As of `jax.jit`.
        """
        self._function, self._lies_as = function, lies_as
        self._options: dict[str, Any] = {
            "donate_argnums": donate,
            "compiler_options": compiler_options,
        }
        self._found: dict[Hashable, Program] = {}
        _ALL.append(self)

    def of(self, **static: Any) -> "Program":
        """The program for these static arguments, which are hashable."""
        key = tuple(static.items())
        program = self._found.get(key)
        if program is None:
            with _LOCK:
                program = self._found.setdefault(
                    key,
                    Program(
                        functools.partial(self._function, **static), self._options, self._lies_as
                    ),
                )
        return program

    def clear(self) -> None:
        """Forgets what is compiled."""
        for program in self._found.values():
            program.clear()


class Program:
    """A function that is compiled for every set of shapes that it is called with.

    Where arguments lie over a mesh, each of its devices calls the function with its own parts.
    """

    def __init__(
        self,
        function: functools.partial[Any],
        options: dict[str, Any],
        lies_as: tuple[int | None, ...] | None = None,
    ) -> None:
        """`options` are of `jax.jit`, `lies_as` as in `Programs`."""
        self.options = options
        self._function, self._lies_as = function, lies_as
        self._compiled: dict[Hashable, jax.stages.Compiled] = {}
        self._by_key: dict[Hashable, jax.stages.Compiled] = {}

    def __call__(self, *args: Any, key: Hashable = None) -> Any:
        """What the function gives; compiled first if it was not yet.

        With a key that comes with the same shapes every time, none of them is looked at again.
        """
        compiled = self._by_key.get(key)
        if compiled is None:
            compiled = self.compile(*args)
            if key is not None:
                self._by_key[key] = compiled
        return compiled(*args)

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """What there is to be compiled; nothing of it is kept. Arrays may be shapes."""
        options, given = self.options, self.options["compiler_options"]
        if given is not None and _BUFFERS in given and _mesh_of(args) is not None:
            options = options | {"compiler_options": given | {_BUFFERS: _STRAIGHT}}
        with own_settings():
            return jax.jit(self._anew(args), **options).lower(*args)

    def _anew(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        """A function of its own: JAX's caches forget with it what was traced."""
        function = self._over_mesh(args)

        def call(*args: Any) -> Any:
            return function(*args)

        named: Any = call
        # JAX names arguments by these: in what it tells of errors, and in the compiled program.
        named.__name__ = self._function.func.__name__
        parameters = inspect.signature(self._function).parameters.values()
        kept = [one for one in parameters if one.kind is not one.KEYWORD_ONLY]
        named.__signature__ = inspect.Signature(kept)
        return call

    def _over_mesh(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        """The function, on each device of the mesh that arguments lie over, if they do."""
        mesh = _mesh_of(args)
        if mesh is None:
            return self._function
        shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(args)]
        specs = [PartitionSpec() if one is None else one.spec for one in shardings]
        in_specs = jax.tree.unflatten(jax.tree.structure(args), specs)

        def out_spec(place: int | None) -> Any:
            is_empty = place is None or not jax.tree.leaves(in_specs[place])
            return PartitionSpec() if is_empty else in_specs[place]

        return jax.shard_map(
            self._function,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=out_spec(None)
            if self._lies_as is None
            else tuple(map(out_spec, self._lies_as)),
            check_vma=False,  # what loops and other people's kernels give, it cannot see through
        )

    def compile(self, *args: Any) -> jax.stages.Compiled:
        """What a call with such arguments runs; arrays may be shapes, and nothing is donated."""
        leaves, tree = jax.tree.flatten(args)
        # All lie where the first does, but for those that come from the host.
        where = next((leaf.sharding for leaf in leaves if hasattr(leaf, "sharding")), None)
        key = tree, where, tuple([(leaf.shape, leaf.dtype) for leaf in leaves])
        compiled = self._compiled.get(key)
        if compiled is None:
            start_s = time.perf_counter()
            compiled = self._compiled[key] = self.lower(*args).compile()
            SPENT.add(time.perf_counter() - start_s)
        return compiled

    def clear(self) -> None:
        """Forgets what is compiled."""
        self._compiled.clear()
        self._by_key.clear()


Run: TypeAlias = Callable[..., Any]
"""Makes a call: (program, arguments, key=None) to what the program gives; see `run`."""


def run(program: Program, args: tuple[Any, ...], key: Hashable = None) -> Any:
    """Computes; DONATES what the program says.

    `key`, where there is one, always comes with arguments of the same shapes.
    """
    return program(*args, key=key)


class Compiling:
    """Calls that are compiled and not run: they give shapes, and nothing is donated.

    Attributes:
        compiled: What the calls would run, each once.
    """

    def __init__(self) -> None:
        """Has compiled nothing yet."""
        self.compiled: list[Any] = []

    def __call__(self, program: Program, args: tuple[Any, ...], key: Hashable = None) -> Any:
        """As `run`; arrays may be shapes."""
        compiled = program.compile(*args)
        if compiled not in self.compiled:
            self.compiled.append(compiled)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            compiled.out_info,
        )


def clear_programs() -> None:
    """Forgets all that is compiled, JAX's own caches too; what is used again comes from disk."""
    for programs in _ALL:
        programs.clear()
    jax.clear_caches()
