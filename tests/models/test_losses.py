"""Losses against closed forms and quadrature, in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special

from dalle_jax.models import losses
from dalle_jax.models.schedules import half_cosine


@pytest.fixture(autouse=True, scope='module')
def float64():
    with jax.enable_x64(True):
        yield


def test_cross_entropy_is_minus_log_softmax():
    logits = np.random.default_rng(0).normal(size=(3, 4, 7))
    targets = np.random.default_rng(1).integers(0, 7, (3, 4))
    expected = -np.take_along_axis(special.log_softmax(logits, -1), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses.cross_entropy(logits, targets), expected, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.02, 0.98), st.floats(-3, 3), st.floats(-3, 1))
def test_logit_laplace_closed_form(x, mu, log_scale):
    scale = np.exp(log_scale)
    density = np.exp(-abs(special.logit(x) - mu) / scale) / (2 * scale * x * (1 - x))
    value = losses.logit_laplace(jnp.float64(x), jnp.float64(mu), jnp.float64(log_scale))
    np.testing.assert_allclose(value, -np.log(density), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('mu,log_scale', [(0.0, 0.0), (1.3, -1.0), (-2.0, 0.4), (0.5, -2.5)])
def test_logit_laplace_integrates_to_one(mu, log_scale):
    density = jax.jit(lambda x: jnp.exp(-losses.logit_laplace(x, mu, log_scale)))
    kink = special.expit(mu)
    total = sum(integrate.quad(lambda x: float(density(x)), a, b, limit=200)[0]
                for a, b in ((0, kink), (kink, 1)))
    assert total == pytest.approx(1, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.1, 0.9), st.floats(-3, 3), st.floats(-3, 1))
def test_logit_laplace_gradients(x, mu, log_scale):
    distance = special.logit(x) - mu
    if abs(distance) < 1e-6:
        return
    of_mu, of_scale = jax.grad(losses.logit_laplace, (1, 2))(x, mu, log_scale)
    np.testing.assert_allclose(of_mu, -np.sign(distance) * np.exp(-log_scale), rtol=1e-9)
    np.testing.assert_allclose(of_scale, 1 - abs(distance) * np.exp(-log_scale), rtol=1e-9)


@pytest.mark.parametrize('k', [2, 512, 8192])
def test_kl_to_uniform_at_its_ends(k):
    assert losses.kl_to_uniform(jnp.full((3, k), 1.7)) == pytest.approx(np.zeros(3), abs=2e-6)
    one_hot = 1e4 * jax.nn.one_hot(jnp.array([0, k - 1]), k)
    assert losses.kl_to_uniform(one_hot) == pytest.approx(np.full(2, np.log(k)), rel=1e-6)


def test_kl_to_uniform_is_the_sum():
    logits = 3 * np.random.default_rng(0).normal(size=(5, 40))
    q = special.softmax(logits, -1)
    expected = np.sum(q * np.log(q * 40), axis=-1)
    np.testing.assert_allclose(losses.kl_to_uniform(logits), expected, rtol=1e-5)


@pytest.mark.parametrize('step,expected', [
    (0, 1.0), (50_000, 1 / 16 + 15 / 16 * 0.75), (75_000, 17 / 32), (150_000, 1 / 16),
    (10**7, 1 / 16)])
def test_half_cosine_at_given_steps(step, expected):
    assert half_cosine(step, 1.0, 1 / 16, 150_000) == pytest.approx(expected, rel=1e-6)


def test_half_cosine_rises_and_may_be_absent():
    assert half_cosine(2_500, 0.0, 6.6, 5_000) == pytest.approx(3.3, rel=1e-6)
    assert half_cosine(0, 0.0, 6.6, 0) == pytest.approx(6.6)
    values = half_cosine(jnp.arange(20), 0.0, 1.0, 10)
    assert bool(jnp.all(jnp.diff(values) >= 0))


@pytest.mark.parametrize('length,chunk', [(7, 3), (6, 3), (4, 8)])
def test_vocabulary_loss_is_that_of_the_whole_logits(length, chunk):
    """Values and gradients in float64, for chunks that divide the length, do not, and exceed it."""
    rng = np.random.default_rng(length)
    x, kernel = rng.normal(size=(2, length, 5)), rng.normal(size=(5, 11))
    targets = rng.integers(0, 11, (2, length))
    weights = rng.uniform(size=(2, length)).astype(np.float32)
    logits = x @ kernel
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nats = -np.log(np.take_along_axis(p, targets[..., None], -1))[..., 0]
    by_logits = 3 * weights[..., None] * (p - np.eye(11)[targets])

    def run(x, kernel):
        loss, correct = losses.vocabulary_loss(x, kernel, targets, weights, jnp.float32, chunk)
        return 3 * loss, correct

    (loss, correct), grads = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(
        *map(jnp.float32, (x, kernel)))
    assert loss == pytest.approx(3 * (weights * nats).sum(), rel=1e-5)
    assert correct == pytest.approx((weights * (p.argmax(-1) == targets)).sum(), rel=1e-5)
    np.testing.assert_allclose(grads[0], by_logits @ kernel.T, atol=1e-5)
    np.testing.assert_allclose(grads[1], np.einsum('bld,blv->dv', x, by_logits), atol=1e-5)
    undifferentiated = jax.jit(run)(*map(jnp.float32, (x, kernel)))
    np.testing.assert_allclose(undifferentiated, (loss, correct), rtol=1e-6)
    np.testing.assert_allclose(losses.vocabulary_cross_entropy(
        jnp.float32(x), jnp.float32(kernel), jnp.asarray(targets), jnp.float32, chunk), nats,
        rtol=1e-4)


def test_the_whole_logits_never_exist():
    """Not in the program, forward or backward; and products of bfloat16 have such operands."""
    def run(x, kernel):
        return losses.vocabulary_loss(x, kernel, jnp.zeros((2, 512), jnp.int32),
                                      jnp.ones((2, 512), jnp.float32),
                                      jnp.bfloat16)[0]

    arguments = jnp.zeros((2, 512, 8), jnp.float32), jnp.zeros((8, 300), jnp.float32)
    program = jax.jit(jax.grad(run, (0, 1))).lower(*arguments).as_text()
    sizes = [np.prod([int(n) for n in dims.split('x')])
             for dims in re.findall(r'tensor<((?:\d+x)*\d+)x[a-z]+\d+>', program)]
    assert max(sizes) == 2 * losses.CHUNK * 300
    products = [line for line in program.splitlines() if 'dot_general' in line]
    assert len(products) == 3 and all(line.count('bf16>') >= 2 for line in products)
