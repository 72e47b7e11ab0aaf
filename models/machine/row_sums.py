"""Products of a few rows with a large array, as loops that read the array once.

XLA on CPU hands products of matrices to a library that is at its best with many rows. Few rows are
bound by reading the other operand, and what they need is a loop that reads each of its numbers
once and keeps a sum for every row. XLA compiles one, for all cores and in vector instructions, for
a reduction of several operands at once; it converts what is read on the way, too. Of floats it has
to be told that it may add in another order (`REORDERED`), or it goes number by number.
"""

import itertools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Num

REORDERED: dict[str, Any] = {
    "xla_cpu_enable_fast_math": True,
    "xla_cpu_fast_math_honor_nans": True,
    "xla_cpu_fast_math_honor_infs": True,
    "xla_cpu_fast_math_honor_division": True,
    "xla_cpu_fast_math_honor_functions": True,
}
"""`compiler_options` of programs in which XLA on CPU may add floats in another order.

Of what is called fast math they leave out approximations, and that NaN or infinity be forgotten;
what is left may also fuse a product into a sum and lose the sign of a zero. Sums that are
compensated by hand do not survive it. The options are for whole programs: JAX refuses them for a
function within another.
"""

MOST_AT_ONCE = 8
"""Rows that a loop keeps sums of; more would not fit into its registers."""


def sum_products(
    rows: Num[Array, "*batch G A"], array: Num[Array, "*batch Z A"]
) -> Num[Array, "*batch G Z"]:
    """Every row times `array`, summed along the last axis, in the dtype of the rows.

    It has no derivative of its own.

    Args:
        rows: G > 0. They are read from a cache once for every Z, so nothing is to be converted.
        array: Of any dtype that converts exactly; each number is read once for eight rows.
    """
    num_rows = rows.shape[-2]
    if num_rows == 1:
        # A reduction of one operand is another thing to XLA, and one whose result nobody wants is
        # dropped: so the row goes in twice, and both sums are asked for.
        pair = sum_products(jnp.concatenate((rows, -rows), axis=-2), array)
        return jnp.maximum(pair[..., :1, :], -pair[..., 1:, :])
    num_loops = -(-num_rows // MOST_AT_ONCE)
    cuts = [num_rows * part // num_loops for part in range(num_loops + 1)]
    if array.dtype != rows.dtype:
        # Within a loop over steps XLA would convert all of it beforehand: it may not be known yet.
        rows, array = lax.optimization_barrier((rows, array))
        array = array.astype(rows.dtype)
    sums: list[Array] = []
    for low, high in itertools.pairwise(cuts):
        products = [array * rows[..., row, None, :] for row in range(low, high)]
        zeros = [jnp.zeros((), rows.dtype)] * len(products)
        sums += lax.reduce(products, zeros, _add, (array.ndim - 1,))
    return jnp.stack(sums, axis=-2)


def _add(left: list[Array], right: list[Array]) -> list[Array]:
    return [a + b for a, b in zip(left, right, strict=True)]
