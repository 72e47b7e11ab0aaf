"""Sizes of layers that keep a state of each sequence."""

import dataclasses
import math
from typing import Literal

Recurrence = Literal["delta", "space", "convolution"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recurrent:
    """Layers that keep a state of each sequence, instead of keys and values or beside them.

    Raises:
        ValueError: a number is out of range; all are listed.
    """

    layers: tuple[int, ...]  # which of the model's
    num_key_heads: int
    num_value_heads: int  # a multiple of it
    key_dim: int
    value_dim: int
    conv_width: int  # inputs of the convolution before it, the token's own included
    kind: Recurrence = "delta"
    """"delta": the gated delta rule; "space": the state space of Mamba-2; "convolution": no more
    than the one that the others begin with, of values alone."""
    is_by_key_head: bool = False  # input projections lie key head by key head
    has_conv_bias: bool = False
    has_bias: bool = False  # of the projections into it and out of it
    step_limits: tuple[float, float] = (0.0, math.inf)  # of a state space's steps
    is_beside: bool = False  # the layers have attention too, which reads the same
    in_scales: tuple[float, ...] = ()
    """What gate, values, keys, queries and steps of a state space are multiplied by; () is 1."""
    out_scale: float = 1.0  # and what it returns
    has_norm: bool = True  # what a state space reads of its state is normed
    is_normed_first: bool = False  # before the gate multiplies it, not afterwards
    key_copies: int = 1
    """Devices that have the same heads of keys, and some of their values each."""

    @property
    def num_keys(self) -> int:
        """Width of the keys of all heads."""
        return self.num_key_heads * self.key_dim

    @property
    def num_values(self) -> int:
        """Width of the values of all heads."""
        return self.num_value_heads * self.value_dim

    @property
    def num_channels(self) -> int:
        """X, of the convolution: queries, keys and values."""
        return self.num_values + (2 * self.num_keys if self.has_memory else 0)

    @property
    def has_memory(self) -> bool:
        """Whether the state is more than the last inputs of the convolution."""
        return self.kind != "convolution"

    def __post_init__(self) -> None:
        sizes = {
            one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.type is int
        }
        found = [
            f"{name} of recurrent layers is {size!r}; it must be an integer from 1 to {2**16:,}"
            for name, size in sizes.items()
            if type(size) is not int or not 1 <= size <= 2**16
        ]
        if not found and self.num_value_heads % self.num_key_heads:
            found.append(
                f"num_value_heads of recurrent layers is {self.num_value_heads}, not a multiple of "
                f"num_key_heads {self.num_key_heads}"
            )
        least, most = self.step_limits
        if not 0 <= least <= most:
            found.append(
                f"step_limits are {self.step_limits}; they must not be below 0, and in order"
            )
        if found:
            raise ValueError("model config: " + "; ".join(found))
