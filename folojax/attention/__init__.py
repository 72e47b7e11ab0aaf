"""Attention of rows of tokens to the pages of their requests, where these lie.

    attend ──> the first kernel of the cache's format that takes the layer
                 cudnn        NVIDIA GPUs, half precision; single tokens by a kernel of our own
                 latent       the same for latents, all by kernels of our own
                 native       x86-64 CPUs with a compiler: C++
                 reference    everywhere, everything: a loop over pages in plain XLA
                 alike        the same, rounded alike in any batch

Every kernel has the signature of `Kernel.attend`, which stores the new keys and values too, and
says by `Kernel.refusal` what it is not for.
"""

from folojax.attention.attend import KERNELS, PagedAttend, attend, choose_kernel, kernels_of
from folojax.attention.interface import AttentionSpec, Kernel

__all__ = [
    "KERNELS",
    "AttentionSpec",
    "Kernel",
    "PagedAttend",
    "attend",
    "choose_kernel",
    "kernels_of",
]
