"""Several engines as one: what holds of them whichever devices they have."""

import threading
import time
from typing import Any

import pytest

from folojax import LLM
from folojax.engine import replicas
from folojax.engine.replicas import Replicas
from tests.letters import make_letters_tokenizer
from tests.reference import MORE_LIMITS


def test_an_interruption_waits_until_nobody_plans(
    tiny_model: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that is reset, or steps anew, while a thread steps it mixes its calls up."""
    llms = [LLM(tiny_model, make_letters_tokenizer(), **MORE_LIMITS) for _ in range(2)]
    both = Replicas([llm.engine for llm in llms])
    is_interrupted, events, wait = threading.Event(), list[str](), replicas.wait

    def step(is_read: bool = True) -> list[Any]:
        assert is_interrupted.wait(30)
        time.sleep(0.05)
        events.append("planned")
        return []

    def interrupted(plans: Any) -> Any:
        if not is_interrupted.is_set():
            is_interrupted.set()
            raise KeyboardInterrupt
        return wait(plans)

    monkeypatch.setattr(both.engines[1], "step", step)
    monkeypatch.setattr(replicas, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        both.step()
    assert events == ["planned"]
