"""Which experts a token gets, against loops over tokens; what devices do not share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folojax.models.core.moe import choose_experts
from tests.models.test_decoder import TINY

SIGMOID = dataclasses.replace(
    TINY, num_experts=12, num_experts_per_token=3, expert_size=8, router="sigmoid", expert_scale=2.5
)
GROUPED = dataclasses.replace(SIGMOID, num_expert_groups=4, num_groups_per_token=2)


@pytest.mark.parametrize("config", [SIGMOID, GROUPED], ids=["all", "groups"])
def test_corrections_choose_and_do_not_weigh(config):
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((20, 12)).astype(np.float32)
    correction = rng.standard_normal(12).astype(np.float32)
    weight, expert = choose_experts(
        jnp.asarray(scores), jnp.float32, config, jnp.asarray(correction)
    )
    for row, (own_weight, own_expert) in enumerate(zip(weight, expert, strict=True)):
        plain = np.asarray(jax.nn.sigmoid(scores[row]))
        wanted = (plain + correction).reshape(config.num_expert_groups, -1)
        of_group = np.sort(wanted, axis=1)[:, -2:].sum(axis=1)
        best = set(np.argsort(-of_group)[: config.num_groups_per_token])
        wanted = np.stack([one if i in best else one - 1e9 for i, one in enumerate(wanted)])
        chosen = np.argsort(-wanted.reshape(-1))[:3]
        assert own_expert.tolist() == chosen.tolist()
        np.testing.assert_allclose(own_weight, 2.5 * plain[chosen] / plain[chosen].sum(), rtol=1e-6)


def test_groups_that_cannot_be_are_named():
    for groups in (5, 12):
        with pytest.raises(ValueError, match="12 experts in"):
            dataclasses.replace(GROUPED, num_expert_groups=groups)
