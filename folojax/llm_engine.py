"""The user's door under the names that vLLM has for it in programs that own the loop."""

import types
from typing import Self

from folojax.llm import LLM


class EngineArgs(types.SimpleNamespace):
    """Keywords of `LLM`, kept until an engine is made of them."""


class LLMEngine(LLM):
    """An `LLM`, whose `add_request` and `step` are what is called."""

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> Self:
        """Makes the engine."""
        return cls(**vars(engine_args))
