"""Pallas' way to Triton, or None: JAX deprecates it from 0.11 on, and has it up to 0.12 at least.

Without it every kernel that is written in it gives way to plain XLA, or to cuDNN.
"""

from typing import Any

triton: Any
try:
    from jax.experimental.pallas import triton as triton
except ImportError:
    triton = None
