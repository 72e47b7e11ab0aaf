"""Programs for a platform that this machine does not have are traced as for that one."""

import jax
import jax.numpy as jnp
import pytest
from folojax.kv_cache import KVLayout

from folojax import kv_cache
from folojax.models.platforms import platform, tracing_for

LAYOUT = KVLayout(
    segments=(2,), page_size=4, num_layers=1, num_kv_heads=3, head_dim=8, dtype=jnp.bfloat16
)


def test_it_is_the_default_backend_unless_something_else_is_said() -> None:
    assert platform() == jax.default_backend()
    with tracing_for("gpu"):
        assert platform() == "gpu"
        with tracing_for("cpu"):
            assert platform() == "cpu"
        assert platform() == "gpu"
    with pytest.raises(KeyError), tracing_for("gpu"):
        raise KeyError
    assert platform() == jax.default_backend()


@pytest.mark.parametrize(
    ("name", "keys", "values", "dtype"),
    [("cpu", (4, 8), (4, 8), jnp.float32), ("gpu", (8, 4), (4, 8), jnp.bfloat16)],
)
def test_pages_lie_as_the_platform_multiplies_with_them(
    name: str, keys: tuple, values: tuple, dtype: jnp.dtype
) -> None:
    with tracing_for(name):
        cache = kv_cache.init_cache(LAYOUT)
        assert kv_cache.page_size(cache) == 4
    assert cache.keys[0][0].shape == (2, 3, *keys)
    assert cache.values[0][0].shape == (2, 3, *values)
    assert cache.keys[0][0].dtype == cache.values[0][0].dtype == dtype
