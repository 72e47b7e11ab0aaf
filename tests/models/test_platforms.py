"""Programs for a platform that this machine does not have are traced as for that one."""

import jax
import pytest

from folojax.models.machine.platforms import platform, tracing_for


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
