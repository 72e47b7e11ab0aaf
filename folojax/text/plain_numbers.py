"""Python's own numbers for those of NumPy, JAX and PyTorch."""

import numbers
from typing import Any


def plain(value: Any) -> Any:
    """Python's own number for another one, or for an array of no axis; anything else as it is."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return value.item() if is_array(value, 0) else value


def is_array(value: Any, ndim: int) -> bool:
    """Whether it is an array of NumPy, JAX or PyTorch with so many axes."""
    return hasattr(value, "__array__") and getattr(value, "ndim", None) == ndim
