"""The rule of the gradient scales against the paper's constants and a plain simulation."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_jax.models import transformer
from dalle_jax.training import precision
from tests.models.test_transformer import blocks

M = 16
update = jax.jit(precision.updated, static_argnums=2)


def test_one_scale_a_branch():
    scales = precision.init(transformer.branches(blocks(9), lambda shape: shape), M)
    sizes = [x.size for x in jax.tree.leaves(scales.value)]
    assert sum(sizes) == 2 * 9 and max(sizes) == 2
    assert {float(x) for leaf in jax.tree.leaves(scales.value) for x in leaf.ravel()} == {M * 8192}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([0, 0, 0, 1, 130]), min_size=1, max_size=12), st.booleans())
def test_equals_a_simulation(gaps, large):
    """Overflows after `gaps` clean steps each, beside a branch that has none."""
    steps = [count for gap in gaps for count in [0] * gap + [3]]
    start = M * (2.0**24 if large else 2.0**7) * 1.0001
    scales = precision.Scales({'a': jnp.float32([start, start])}, {'a': jnp.int32([125, 125])})
    scale, last = start, -1000
    for step, count in enumerate(steps):
        scales = update(scales, {'a': jnp.float32([count, 0])}, M)
        if not count:
            scale *= 2**0.001
        elif step - last >= 125:
            scale, last = scale / np.sqrt(2), step
        scale = min(max(scale, M * 2.0**7), M * 2.0**24)
        np.testing.assert_allclose(scales.value['a'][0], scale, rtol=1e-4)
    other = min(max(start, M * 2.0**7) * 2**(len(steps) / 1000), M * 2.0**24)
    np.testing.assert_allclose(scales.value['a'][1], other, rtol=1e-4)


def test_a_thousand_clean_steps_double():
    scales = precision.init({'a': ()}, M)
    for _ in range(1000):
        scales = update(scales, {'a': jnp.float32(0)}, M)
    np.testing.assert_allclose(scales.value['a'], 2 * M * 8192, rtol=1e-4)
