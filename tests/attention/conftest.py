"""What tests of all kernels of attention have."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from folojax.attention import KERNELS, AttentionSpec
from folojax.backend import choose_backend
from folojax.kv import PageFormat
from folojax.models.core.interface import PLAIN
from tests.attention.kernel_cases import HEADS, PAGE_SIZE
from tests.paged_sequences import WAYS, Way


@pytest.fixture(
    params=[pytest.param(way, marks=[pytest.mark.slow] * way.is_twin) for way in WAYS], ids=str
)
def way(request: pytest.FixtureRequest) -> Way:
    """A kernel that runs on this machine."""
    found: Way = request.param
    dtype = jnp.dtype(found.dtype)
    page_format = PageFormat(PAGE_SIZE, found.order, (found.kernel,), choose_backend().capability)
    spec = AttentionSpec(dtype, dtype, HEADS.dim, page_format, PLAIN)
    reason = KERNELS[found.kernel].refusal(spec)
    if found.kernel == "native" and choose_backend().name != "cpu":
        reason = "runs on a CPU"
    if reason is not None:
        pytest.skip(f"{found.kernel} {reason}")
    return found


@pytest.fixture
def precise() -> Iterator[None]:
    """A GPU multiplies float32 with ten bits of each number, unless it is told not to."""
    with jax.default_matmul_precision("highest"):
        yield
