"""Executables on rows of padding: how they are compiled before there are requests."""

from typing import Any

from folojax.compile.programs import Compiling
from folojax.runner.batch import Batch, ints
from folojax.runner.grammar_masks import GrammarMasks, Masks
from folojax.runner.setup import Setup
from folojax.steps.calls import Steps, hidden_shapes
from folojax.steps.executables import Executable
from folojax.steps.state import CallInputs, EngineState


def padding(
    one: Executable, batch: Batch, grammars: GrammarMasks, hidden: Any = None
) -> CallInputs:
    """What an executable is called with, in which no row is of a request.

    Args:
        one: Neither of copies nor of edits.
        batch: Of the engine, or an empty one.
        grammars: Whose masks wait for nobody.
        hidden: For a sampler or scorer, see `hidden_shapes`.
    """
    rows: Any = None
    if one.kind == "prefill":
        rows = batch.prefill_inputs(one.rows, one.tokens, [])
    elif one.kind in ("decode", "decode_steps", "rows"):
        rows = batch.decode_inputs(one.rows, [])
    is_steps, is_score = one.kind == "decode_steps", one.kind == "score"
    sampling, masks = None, Masks()
    if one.spec is not None and not is_score:
        positions = ints((one.tokens, one.rows) if is_steps else one.rows)
        slot = batch.pad([], one.rows)
        sampling = batch.row_table.sample_inputs(slot, positions, one.spec)
        if one.spec.has_mask:
            masks = grammars.on_padding(one.rows)
            sampling = sampling._replace(mask=masks.mask)
    return CallInputs(
        rows,
        adapters=batch.adapters[batch.pad([], one.rows)] if one.is_adapted else None,
        sampling=sampling,
        mail=masks.mail,
        num_steps=ints(one.rows) if is_steps else None,
        hidden=hidden,
        targets=ints((one.rows, one.tokens)) if is_score else None,
    )


def compile_on_padding(
    one: Executable, setup: Setup, steps: Steps, batch: Batch, params: Any, state: EngineState
) -> list[Any]:
    """What an executable runs, program by program; parameters and state may be shapes."""
    shapes = setup.backend.devices.shapes
    hidden = shapes(hidden_shapes(one, setup.model, steps.kind))
    compiling = Compiling()
    given = padding(one, batch, setup.grammar_masks(), hidden)
    steps.call(one, params, state, given, compiling)
    return compiling.compiled
