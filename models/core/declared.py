"""Parameters as modules declare them."""

from typing import Any

import jax
from flax import linen as nn

from folojax.models.core.adapted import AdaptedKernel
from folojax.models.core.config import ModelConfig
from folojax.models.core.moe import RoutedKernel
from folojax.models.quantized.quantize import is_quantized

KERNEL_INIT = nn.initializers.normal(0.02)
"""As transformers initialises: a fresh model is only ever a stand-in of the right shapes."""
ONES, ZEROS = nn.initializers.ones, nn.initializers.zeros


def norm_init(config: ModelConfig) -> Any:
    """Fresh norms change nothing."""
    return ZEROS if config.norm.endswith("_offset") else ONES


def kernel_of(module: nn.Module, name: str, *shape: int, init: Any = KERNEL_INIT) -> Any:
    """A module's kernel of that name and shape; it may be one of parts, or more than an array."""
    if module.has_variable("params", name):
        given: Any = module.get_variable("params", name)
        around = given if isinstance(given, AdaptedKernel | RoutedKernel) else None
        kernel = given if around is None else around.kernel
        if kernel.shape == (1, *shape):
            kernel = jax.tree.map(lambda part: part[0], kernel)
        if around is not None or is_quantized(kernel) or kernel is not given:
            if kernel.shape != shape:
                raise ValueError(f"{name} is {kernel.shape}, the model needs {shape}")
            return kernel if around is None else around._replace(kernel=kernel)
    return module.param(name, init, shape, module.dtype)
