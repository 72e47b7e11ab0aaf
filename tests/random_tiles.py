"""Random kernels of four bits, as NVIDIA GPUs have them."""

import jax.numpy as jnp
import numpy as np

from folojax.models.quantized.tiled_kernels import TiledKernel, pack_tiles


def random_tiles(group: int, outputs: int, inputs: int) -> TiledKernel:
    """With groups of so many inputs, all of which share a scale and an offset."""
    rng = np.random.default_rng(group)
    codes = rng.integers(0, 16, (outputs, inputs), np.uint8)
    scale, offset = (
        jnp.asarray(rng.normal(0, 0.05, (outputs, inputs // group)), jnp.bfloat16) for _ in "so"
    )
    return pack_tiles(jnp.asarray(codes), scale, offset)
