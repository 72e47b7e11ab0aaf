"""Numbers for tests that need any. From NumPy: JAX compiles a program for each shape of its own."""

from typing import Any

import jax.numpy as jnp
import numpy as np


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> Any:
    """Standard normal numbers, as an array of JAX."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)
