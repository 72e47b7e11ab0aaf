"""What several laws are compared with."""

import pytest

from folojax import RequestOutput
from tests.mixed_requests import make_llm, run


@pytest.fixture(scope="session")
def mixed_outputs(tiny_model: tuple) -> list[RequestOutput]:
    """Of `tests.mixed_requests`, where every step is read before the next one is planned."""
    llm = make_llm(tiny_model, async_scheduling=False)
    outputs = run(llm)
    assert llm.metrics().num_discarded_tokens == 0
    return outputs
