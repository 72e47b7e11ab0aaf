"""Compiled programs, without what they were compiled from.

`jax.jit` keeps what it has traced and lowered for as long as the function lives: 5 MB for each
shape of a decode step, a third of what the shape takes, and none of it is needed to run. A
`Program` has every shape traced from a function that is made for that and forgotten afterwards.

Programs are shared: engines of equal models and shapes in one process find the same ones.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding

IN_GRAPH: dict[str, Any] = {
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
    ),
    "xla_gpu_experimental_enable_fusion_autotuner": False,
}
"""`compiler_options` of programs with loops, which XLA on a GPU then keeps in the CUDA graph.

By default a loop ends the graph, and the host waits for the device to learn whether to go on.
Autotuning of fusions takes longer than it gains. Other platforms pass over both.
"""

_LOCK = threading.Lock()
_ALL: list["Programs"] = []


class Programs:
    """Those of one function, by its static arguments."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        donate: tuple[int, ...] = (),
        compiler_options: dict[str, Any] | None = None,
    ) -> None:
        """Compiles nothing.

        Args:
            function: Its static arguments are those by keyword alone. Of a jitted one that which
                is jitted.
            donate: Places of the arguments that are DONATED.
            compiler_options: As of `jax.jit`.
        """
        jitted: Any = function if hasattr(function, "lower") else None
        self._function = function if jitted is None else jitted.__wrapped__
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
                    key, Program(functools.partial(self._function, **static), self._options)
                )
        return program

    def clear(self) -> None:
        """Forgets what is compiled."""
        for program in self._found.values():
            program.clear()


class Program:
    """A function that is compiled for every set of shapes that it is called with."""

    def __init__(self, function: functools.partial[Any], options: dict[str, Any]) -> None:
        """`options` are of `jax.jit`."""
        self.options = options
        self._function = function
        self._compiled: dict[Hashable, jax.stages.Compiled] = {}

    def __call__(self, *args: Any) -> Any:
        """What the function gives; compiled first if it was not yet."""
        return self.compile(*args)(*args)

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """What there is to be compiled; nothing of it is kept. Arrays may be shapes."""
        return jax.jit(self._anew(), **self.options).lower(*args)

    def result_shapes(self, *args: Any) -> Any:
        """See the function of that name."""
        return result_shapes(self._anew(), *args)

    def _anew(self) -> Callable[..., Any]:
        """A function of its own: JAX's caches forget with it what was traced."""

        def call(*args: Any) -> Any:
            return self._function(*args)

        named: Any = call
        # JAX names arguments by these: in what it tells of errors, and in the compiled program.
        named.__name__ = self._function.func.__name__
        parameters = inspect.signature(self._function).parameters.values()
        kept = [one for one in parameters if one.kind is not one.KEYWORD_ONLY]
        named.__signature__ = inspect.Signature(kept)
        return call

    def compile(self, *args: Any) -> jax.stages.Compiled:
        """What a call with such arguments runs; arrays may be shapes, and nothing is donated."""
        leaves, tree = jax.tree.flatten(args)
        key = tree, tuple([(leaf.shape, leaf.dtype) for leaf in leaves])
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compiled[key] = self.lower(*args).compile()
        return compiled

    def clear(self) -> None:
        """Forgets what is compiled."""
        self._compiled.clear()


class Call(NamedTuple):
    """A program and the arguments of a call that is to come; arrays may be shapes."""

    program: Program
    args: tuple[Any, ...]

    def lower(self) -> jax.stages.Lowered:
        """See `Program.lower`."""
        return self.program.lower(*self.args)

    def run(self) -> Any:
        """See `Program.__call__`."""
        return self.program(*self.args)

    def compile(self) -> jax.stages.Compiled:
        """See `Program.compile`."""
        return self.program.compile(*self.args)

    def result_shapes(self) -> Any:
        """See the function of that name."""
        return self.program.result_shapes(*self.args)


def clear_programs() -> None:
    """Forgets all that is compiled, JAX's own caches too; what is used again comes from disk."""
    for programs in _ALL:
        programs.clear()
    jax.clear_caches()


def result_shapes(function: Callable[..., Any], *args: Any) -> Any:
    """What a compiled function gives, as shapes of arrays that are committed to the device."""
    sharding = SingleDeviceSharding(jax.devices()[0])

    def result(leaf: Any) -> jax.ShapeDtypeStruct:
        # A weak type is another type to the next program.
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding, weak_type=leaf.weak_type
        )

    return jax.tree.map(result, jax.eval_shape(function, *args))
