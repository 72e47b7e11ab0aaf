"""What the device calls of an engine are made for: one value, from which all of them follow."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax.numpy as jnp

from folojax.backend import Backend
from folojax.compile.shapes import Shapes, slots_for
from folojax.kv import KVLayout
from folojax.models.core.decoder import Llama
from folojax.requests.user_functions import NO_FUNCTIONS, UserFunctions
from folojax.runner.adapter_slots import AdapterSlots, stack_bytes, stack_shapes
from folojax.runner.batch import Batch
from folojax.runner.grammar_masks import GrammarMasks
from folojax.sampling.logits_processors import LogitsProcessor
from folojax.sampling.sampler import SamplingClass, SamplingSpec
from folojax.steps.executables import Executable, list_executables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """Model, backend, and the limits that decide which executables there are."""

    model: Llama  # of `folojax.models`
    backend: Backend
    layout: KVLayout  # of the cache
    shapes: Shapes
    max_num_seqs: int  # most requests in a plan of the scheduler
    max_logprobs: int = 20  # J, at most
    num_tokens: int | None = None  # ids from here on are padding of the vocabulary; None: none are
    is_processed: bool = False  # of sampled tokens, as in `SamplingSpec`; prompts are always raw
    max_loras: int = 0  # slots of adapters; 0: there are none
    max_lora_rank: int = 0  # of each
    max_decode_steps: int = 1  # most decode steps of a plan; their number wherever it is not 1

    @property
    def num_slots(self) -> int:
        """M, slots on the device."""
        return slots_for(self.max_num_seqs)

    def batch(self, functions: UserFunctions = NO_FUNCTIONS) -> Batch:
        """An empty batch, for the user's functions."""
        return Batch(
            self.num_slots,
            self.shapes.table_pages,
            self.layout.num_pages,
            self.model.config.vocab_size,
            functions,
            self.max_loras,
        )

    def grammar_masks(self) -> GrammarMasks:
        """Those of rows that follow grammars; nothing is allocated for them yet."""
        sizes = (*self.shapes.prefill_rows, *self.shapes.decode_rows, *self.shapes.sampled_rows)
        vocab_size = self.model.config.vocab_size
        # In rows of one shape, samplers take logits that every device has, and wait for no other.
        devices = self.backend.devices
        are_apart = self.backend.steps == "rows" and devices.count > 1
        return GrammarMasks(vocab_size, max(sizes), devices, are_apart)

    def adapter_slots(self, params: Any) -> AdapterSlots | None:
        """Room for adapters of a model with these parameters; None where there are none."""
        if not self.max_loras:
            return None
        return AdapterSlots(self.stack_shapes(params), self.backend.devices, self.model.config)

    def stack_shapes(self, params: Any) -> Any:
        """Shapes of the stacks of adapters, for parameters that may be shapes."""
        dtype = jnp.float32 if self.backend.stores_float32 else self.model.dtype
        sizes = self.max_loras, self.max_lora_rank
        return stack_shapes(params, self.model.config, *sizes, dtype, self.backend.devices)

    def stack_bytes(self, params: Any) -> int:
        """What the stacks of adapters take of each device."""
        return stack_bytes(self.stack_shapes(params)) if self.max_loras else 0

    def spec(
        self,
        needed: SamplingClass,
        wanted: int | None,
        has_record: bool = False,
        processors: tuple[LogitsProcessor, ...] = (),
        has_mask: bool = False,
    ) -> SamplingSpec:
        """The sampler of rows that need a class, and want so many alternatives or None."""
        return SamplingSpec(
            self.shapes.sampling_class(needed),
            self.shapes.num_alternatives(wanted, self._most_logprobs),
            self.is_processed,
            self.num_tokens,
            has_record,
            processors,
            has_mask,
        )

    def score_spec(self, wanted: int) -> SamplingSpec:
        """The scorer of prompts of which one wants so many alternatives."""
        count = self.shapes.num_alternatives(wanted, self._most_logprobs) or 0
        return SamplingSpec(SamplingClass.GREEDY, count, num_tokens=self.num_tokens)

    def list_executables(
        self,
        sampling: Collection[SamplingClass],
        has_logprobs: bool,
        has_grammars: bool = False,
    ) -> list[Executable]:
        """Every executable that plans may need.

        Those of records, of residuals and of the user's functions are not among them.

        Args:
            sampling: Classes of sampling parameters that will be used.
            has_logprobs: Whether log-probabilities will be asked for.
            has_grammars: Whether structured outputs will be.
        """
        most = self._most_logprobs
        wanted: Sequence[int] = (0, min(1, most), most) if has_logprobs else ()
        specs = [
            self.spec(one, count, has_mask=has_mask)
            for has_mask in (False, True)[: 1 + has_grammars]
            for one in sorted(sampling)
            for count in (None, *wanted)
        ]
        found = list_executables(
            self.backend.steps,
            self.shapes,
            list(dict.fromkeys(specs)),  # several wishes, one executable
            list(dict.fromkeys(map(self.score_spec, wanted))),
            self.max_decode_steps,
            self.max_loras > 0,
        )
        return list(found)

    @property
    def _most_logprobs(self) -> int:
        return min(self.max_logprobs, self.model.config.vocab_size)
