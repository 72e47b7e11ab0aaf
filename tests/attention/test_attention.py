"""Which kernel of attention a layer gets."""

import jax.numpy as jnp
import pytest

from folojax.attention import KERNELS, AttentionSpec, choose_kernel
from folojax.attention.interface import Kernel
from folojax.backend.backend import CPU, GPU
from folojax.kv import PageFormat
from folojax.models.core.interface import PLAIN, Scoring

FLOAT32 = jnp.dtype(jnp.float32)


def make_spec(*kernels: str, scoring: Scoring = PLAIN) -> AttentionSpec:
    return AttentionSpec(FLOAT32, FLOAT32, 64, PageFormat(16, "tokens", kernels), scoring)


def test_every_kernel_has_the_interface_and_backends_name_no_other() -> None:
    assert all(isinstance(kernel, Kernel) for kernel in KERNELS.values())
    for backend in (CPU, GPU):
        assert set(backend.kernels) | set(backend.exact_kernels) <= KERNELS.keys()


def test_a_layer_gets_the_first_kernel_that_takes_it() -> None:
    assert choose_kernel(make_spec("alike", "reference")) == ("alike", KERNELS["alike"])
    assert choose_kernel(make_spec("native", "cudnn", "reference"))[0] == "reference"
    assert choose_kernel(make_spec("reference", scoring=Scoring(softcap=9.0)))[0] == "reference"


def test_a_layer_that_none_takes_is_told_why() -> None:
    with pytest.raises(ValueError, match=r"native reads .* in the order of heads; cudnn takes"):
        choose_kernel(make_spec("native", "cudnn"))


def test_backends_have_a_kernel_for_everything() -> None:
    """Whatever the layer: the last one of each list refuses nothing."""
    for backend in (CPU, GPU):
        for kernels in (backend.kernels, backend.exact_kernels):
            page_format = PageFormat(5, backend.page_order, kernels)
            float16 = jnp.dtype(jnp.float16)
            spec = AttentionSpec(float16, float16, 7, page_format, Scoring(softcap=3.0))
            assert choose_kernel(spec)[0] == kernels[-1]
