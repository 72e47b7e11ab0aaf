"""Sums over devices by a kernel of their own: what decides for it. A card is needed to run it."""

import ctypes
import logging

import jax
import jax.numpy as jnp
import pytest

from folojax.models.core import peer_sum
from folojax.models.machine import compiler


def test_the_source_compiles_without_a_card() -> None:
    library = compiler.load(peer_sum._SOURCE)
    why = ctypes.create_string_buffer(256)
    assert library.open_peers(ctypes.c_uint32(3), b"libnvrtc.so", why, len(why)) == 1
    assert b"libcuda.so.1" in why.value
    assert library.most_bytes() >= peer_sum._MOST_BYTES


def test_devices_without_the_driver_sum_by_nccl(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert peer_sum.open_peers(jax.devices()) == 0
    assert "devices sum by NCCL, slower: " in caplog.text


def test_what_the_kernel_sums() -> None:
    few = jax.ShapeDtypeStruct((64, 4096), jnp.bfloat16)
    assert peer_sum.is_taken(few, 3)
    assert not peer_sum.is_taken(few, 0)
    for other in (
        jax.ShapeDtypeStruct((64, 4096), jnp.float32),
        jax.ShapeDtypeStruct((8192, 4096), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, 12), jnp.bfloat16),
    ):
        assert not peer_sum.is_taken(other, 3)
