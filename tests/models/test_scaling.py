"""Gradient scales of the branches: exact where 16 bits alone are dead, and overflows stay where
they happen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models import scaling, transformer
from dalle_jax.models.transformer import BlockConfig, dalle_patterns
from dalle_jax.training import precision
from tests.models.test_transformer import LAYOUT, inputs

CONFIG = BlockConfig(9, 32, 2, dalle_patterns(9), LAYOUT, std=0.1)


def parameters():
    rng = np.random.default_rng(0)
    declared = transformer.declare(CONFIG)
    return jax.tree.map(
        lambda p: (p.mean + 0.05 * rng.normal(size=p.shape)).astype(np.float32), declared,
        is_leaf=lambda p: isinstance(p, transformer.Param))


PARAMS, X = parameters(), np.asarray(inputs(CONFIG))
COTANGENT = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)


def scales_of(value):
    values = transformer.branches(CONFIG, lambda shape: jnp.full(shape, value, jnp.float32))
    return values, jax.tree.map(jnp.zeros_like, values)


@functools.cache
def program(dtype, scaled, remat):
    def loss(params, x, flags, cotangent, values):
        scales = jax.tree.map(scaling.Scale, values, flags) if scaled else None
        out = transformer.forward(params, CONFIG, x, dtype=dtype, remat=remat, scales=scales)
        return (out * cotangent * COTANGENT).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2)))


def gradients(dtype, cotangent, values=None, remat='none'):
    """Of the parameters and of x, and the counts of what is not finite."""
    ones, flags = scales_of(1.0)
    of_params, *rest = program(dtype, bool(values), remat)(
        PARAMS, X, flags, jnp.float32(cotangent), values or ones)
    return precision.unscaled(of_params, values or {}), *rest


def relative_error(got, expected):
    """Of the whole gradient, and the largest of a leaf's."""
    pairs = [(np.ravel(g - e), np.ravel(e)) for g, e in
             zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)]
    norm = np.linalg.norm
    whole = norm(np.concatenate([d for d, _ in pairs])) / norm(np.concatenate([e for _, e in pairs]))
    return whole, max(norm(d) / norm(e) for d, e in pairs)


@pytest.mark.parametrize('cotangent,remat', [(1e-7, 'none'), (1e-3, 'dots')])
def test_float16_gradients(cotangent, remat):
    expected = gradients(jnp.float32, cotangent)[:2]
    values, _ = scales_of(0.1 / cotangent)
    *got, counts = gradients(jnp.float16, cotangent, values, remat)
    whole, worst = relative_error(got, expected)
    assert whole < 1e-3 and worst < 4e-3
    assert not any(np.any(c) for c in jax.tree.leaves(counts))
    if cotangent == 1e-7:  # dead with scales of 1
        plain = gradients(jnp.float16, cotangent, scales_of(1.0)[0])[0]
        assert relative_error(plain, expected[0])[0] > 0.3


def flagged(place, values=None):
    """Branches with non-finite gradients when the scale at `place` is far too large."""
    values, _ = scales_of(1.0)
    part, name, group, branch = place
    old = values[part][name][branch]
    values[part][name][branch] = (old.at[group].set(2.0**60) if part == 'body'
                                  else jnp.float32(2.0**60))
    *got, counts = gradients(jnp.float16, 1.0, values)
    found = {(part, name, i, branch) for part, names in counts.items()
             for name, entry in names.items() for branch, count in entry.items()
             for i, n in enumerate(np.ravel(count)) if n}
    return found, got


@pytest.mark.parametrize('place', [('body', '2', 1, 'mlp'), ('body', '0', 0, 'attention'),
                                   ('tail', '0', 0, 'mlp')])
def test_an_overflow_flags_its_own_branch_only(place):
    found, (_, of_x) = flagged(place)
    assert found == {place}
    assert np.isfinite(of_x).all()


def test_without_the_filter_it_flags_all_before(monkeypatch):
    monkeypatch.setattr(scaling, '_finite', lambda gradient: gradient)
    program.cache_clear()
    found, _ = flagged(('tail', '0', 0, 'mlp'))
    program.cache_clear()
    assert len(found) == 2 * 9


def test_bfloat16_scales_change_nothing():
    """Powers of two in a format with the exponents of float32: the same bits."""
    got, expected = (gradients(jnp.bfloat16, 1.0, scales_of(value)[0])[:2]
                     for value in (2.0**10, 1.0))
    for g, e in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_array_equal(g, e)
