"""The calls of deterministic mode: every token is a row of one fixed shape.

    prompt chunks, single tokens ──> T rows ──> the model ──> hidden ──> logits ──> sampler
                                                                            └────> scorer

What changes the last bits of a row is the shape of the call that computes it, and how many terms a
sum has. Here neither depends on the batch. All calls have T rows, a row is a token of any request,
in prefill, decode and scoring alike; several rows may be tokens of one request, in order. A row
reads its own pages one after the other, in the order of its table. The kernels of such an engine
(`PageFormat.kernels`) are those whose sums depend on nothing but the row: C++ on CPU, or products
of one shape a page. No program may add floats in another order (`REORDERED`).

The raw log-probability is made of two numbers, a logit and the logarithm of the row's mass. Both
come from one program, whoever asks: samplers and scorers are handed them in place of hidden states.
"""

from typing import Any

from jax import lax
from jaxtyping import Array, Float

from folojax.compile.programs import Programs, Run, run
from folojax.models.core.decoder import Llama
from folojax.sampling.rows import SlotState, TokenScores
from folojax.sampling.sampler import log_sum_exp, token_logprobs
from folojax.steps import step
from folojax.steps.executables import Executable, StepKind
from folojax.steps.fused import WholeSteps, packed, run_model
from folojax.steps.layers import head_params
from folojax.steps.mail import receive, send
from folojax.steps.packing import pack_report
from folojax.steps.state import CallInputs, CallResults, EngineState


class RowSteps:
    """Calls whose rows do not depend on each other's company; see `folojax.steps.calls.Steps`."""

    kind: StepKind = "rows"

    def __init__(self, model: Llama) -> None:
        """Compiles nothing."""
        self._calls = WholeSteps(model, _PROGRAMS)
        self._logits = _LOGITS.of(model=model)

    def call(
        self,
        one: Executable,
        params: Any,
        state: EngineState,
        inputs: CallInputs,
        run: Run = run,
    ) -> tuple[EngineState, CallResults]:
        """As `Steps.call`; the hidden states of "rows" are logits and their mass."""
        state, results = self._calls.call(one, params, state, inputs, run)
        if one.kind == "rows":
            both = run(self._logits, (head_params(params), results.hidden))
            results = results._replace(hidden=both, every=both)
        return state, results


def _row_logits(
    params: Any, hidden: Float[Array, "B E"], *, model: Llama
) -> tuple[Float[Array, "B V"], Float[Array, " B"]]:
    """Logits of rows, and the logarithms of the sums of their exponentials."""
    logits: Any = model.apply({"params": params}, hidden, method="logits")
    logits = lax.optimization_barrier(logits)
    return logits, log_sum_exp(logits)


def _sample(
    params: Any, cache: None, slots: SlotState, inputs: CallInputs, one: Executable, model: Any
) -> Any:
    logits, log_mass = inputs.hidden
    sampling = receive(inputs.sampling, inputs.mail, logits, model.config.vocab_size)
    slots, out = step.draw_and_note(slots, logits, sampling, one.sampler, log_mass)
    return cache, slots, CallResults(report=pack_report(send(out, inputs.mail)))


def _score(
    params: Any, cache: None, slots: None, inputs: CallInputs, one: Executable, model: Any
) -> Any:
    logits, log_mass = inputs.hidden
    count, num_tokens = one.sampler.num_logprobs or 0, one.sampler.num_tokens
    found = token_logprobs(logits, inputs.targets[:, 0], count, log_mass, num_tokens)
    return cache, slots, CallResults(scores=TokenScores(*(field[:, None] for field in found)))


_LOGITS = Programs(_row_logits)
_PROGRAMS = {
    "rows": packed(run_model, "rows"),
    "sample": packed(_sample, "sample_rows"),
    "score": packed(_score, "score_rows"),
}
