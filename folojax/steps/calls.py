"""From an executable to its calls: one function, however the calls are made.

    Executable ──> Steps.call ──> program, arguments ──> run        a step
    parameters, state, inputs                       └──> Compiling  a warm-up, memory, a listing

A backend chooses one of four ways to run steps (`StepKind`). Each is a class with this `call`,
which hands programs and arguments to a function: `run` computes, `Compiling` compiles and goes on
with shapes, and whoever wants to see a program before it is compiled brings a function of his own.
What a step computes is in `folojax.steps.step`.

    whole    WholeSteps     each executable is one program                     accelerators
    layers   LayeredSteps   groups of layers, their sampler apart              CPU
    rows     RowSteps       rows of one shape, logits, their sampler apart     deterministic mode
    ordered  OrderedSteps   as whole, sums in an order of their own            the same on a GPU
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from folojax.compile.programs import Run, run
from folojax.steps.executables import Executable, StepKind
from folojax.steps.state import CallInputs, CallResults, EngineState


@runtime_checkable
class Steps(Protocol):
    """The device calls of one model.

    Attributes:
        kind: How they are made.
    """

    kind: StepKind

    def call(
        self,
        one: Executable,
        params: Any,
        state: EngineState,
        inputs: CallInputs,
        run: Run = run,
    ) -> tuple[EngineState, CallResults]:
        """Makes the calls of an executable, in order.

        DONATES what of `state` the executable changes, and gives the rest back with the new.

        Args:
            one: What is called.
            params: The module's parameters.
            state: Cache and slots; arrays may be shapes, where `run` takes these.
            inputs: What the kind of executable takes; likewise.
            run: From a program, its arguments and perhaps a key to what the program gives.
        """
        ...


def hidden_shapes(one: Executable, model: Any, kind: StepKind) -> Any:
    """What a sampler or scorer is handed by the model's call, as shapes; None for other kinds."""
    if one.kind not in ("sample", "score"):
        return None
    if kind == "rows":
        logits = jax.ShapeDtypeStruct((one.rows, model.config.vocab_size), jnp.float32)
        return logits, jax.ShapeDtypeStruct((one.rows,), jnp.float32)
    rows = (one.rows,) if one.kind == "sample" else (one.rows, one.tokens)
    return jax.ShapeDtypeStruct((*rows, model.config.hidden_size), model.dtype)
