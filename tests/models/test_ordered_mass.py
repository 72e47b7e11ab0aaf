"""The logarithm of a row's mass in blocks, interpreted, against that of all at once."""

import functools
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from folojax.models.core import ordered_mass
from folojax.sampling.sampler import log_sum_exp
from tests.random_numbers import normal


def test_it_is_the_logarithm_of_the_mass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not finite where no logit is, or where one is NaN; a row has its bits in any company."""
    monkeypatch.setattr(ordered_mass, "_BLOCK", 64)
    logits = 5 * normal(0, 6, 300)
    logits = logits.at[1, :64].set(-jnp.inf)  # a block of nothing
    logits = logits.at[2].set(-jnp.inf)
    logits = logits.at[3, 70].set(jnp.nan)
    logits = logits.at[4].add(1000.0)
    with mock.patch.object(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True)):
        found = ordered_mass.log_mass_in_order(logits)
        alone = ordered_mass.log_mass_in_order(logits[4:5])
    expected = log_sum_exp(logits)
    assert jnp.isfinite(found).tolist() == [True, True, False, False, True, True]
    is_told = np.isfinite(found)
    np.testing.assert_allclose(found[is_told], expected[is_told], rtol=1e-6)
    assert alone[0] == found[4]
