import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dalle_jax.training import optimizer as lib

PARAMS = {'tail': {'0': {'mlp': {'up': jnp.linspace(-1, 1, 12).reshape(3, 4),
                                 'up_bias': jnp.ones(4)}}},
          'norm': jnp.full(3, 2.0)}


def gradients(i):
    leaves, tree = jax.tree.flatten(PARAMS)
    keys = jax.random.split(jax.random.key(i), len(leaves))
    return tree.unflatten([jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])


def test_adamw_equals_optax():
    config = lib.OptimizerConfig(peak_lr=3e-2, warmup=3, decay_updates=10, end_lr=1e-3, b2=0.96,
                                 weight_decay=0.1, decay=r'up$')
    ours = lib.make_optimizer(config, PARAMS)
    theirs = optax.adamw(lib.learning_rate(config), b1=0.9, b2=0.96, eps=1e-8, weight_decay=0.1,
                         mask=lib.matching(r'up$', PARAMS))
    p, m, q, s = PARAMS, ours.init(PARAMS), PARAMS, theirs.init(PARAMS)
    for i in range(12):
        p, m = ours.update(p, gradients(i), m, jnp.int32(i), 0.0)
        step, s = theirs.update(gradients(i), s, q)
        q = optax.apply_updates(q, step)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), p, q)


def test_only_matching_parameters_decay():
    config = lib.OptimizerConfig(peak_lr=1.0, schedule='constant', weight_decay=0.5, decay=r'up$')
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    new, _ = lib.make_optimizer(config, PARAMS).update(
        PARAMS, zeros, lib.make_optimizer(config, PARAMS).init(PARAMS), jnp.int32(0), 0.0)
    mlp, old = new['tail']['0']['mlp'], PARAMS['tail']['0']['mlp']
    np.testing.assert_allclose(mlp['up'], 0.5 * old['up'], rtol=1e-6)
    np.testing.assert_array_equal(mlp['up_bias'], old['up_bias'])
    np.testing.assert_array_equal(new['norm'], PARAMS['norm'])


def test_running_variance_is_clipped():
    config = lib.OptimizerConfig(peak_lr=1.0, schedule='constant', b2=0.5, variance_clip=5.0)
    opt = lib.make_optimizer(config, {'w': jnp.zeros(2)})
    grads = {'w': jnp.array([100.0, 1.0])}
    new, moments = opt.update({'w': jnp.zeros(2)}, grads, opt.init({'w': jnp.zeros(2)}),
                              jnp.int32(0), 0.0)
    np.testing.assert_allclose(moments['variance']['w'], [5.0, 0.5])
    # mean / unbias = gradient; variance / unbias = 5 / 0.5 where clipped.
    np.testing.assert_allclose(new['w'], [-100 / np.sqrt(10.0), -1.0], rtol=1e-6)


def test_paper_schedule():
    config = lib.OptimizerConfig(peak_lr=4.5e-4, schedule='halving', warmup=5_000,
                                 halve_at=(150_000, 220_000, 290_000, 350_000,
                                           400_000))
    rate = lib.learning_rate(config)
    for update, expected in ((0, 4.5e-4 / 5_000), (2_499, 2.25e-4), (4_999, 4.5e-4),
                             (149_999, 4.5e-4), (150_000, 2.25e-4), (220_000, 1.125e-4),
                             (429_999, 1.40625e-5)):
        np.testing.assert_allclose(rate(jnp.int32(update)), expected, rtol=2e-4)


def test_cosine_schedule_of_the_dvae():
    rate = lib.learning_rate(lib.OptimizerConfig(
        peak_lr=1e-4, schedule='cosine', decay_updates=1_200_000, end_lr=1.25e-6))
    for update, expected in ((0, 1e-4), (600_000, (1e-4 + 1.25e-6) / 2), (1_200_000, 1.25e-6),
                             (3_000_000, 1.25e-6)):
        np.testing.assert_allclose(rate(jnp.int32(update)), expected, rtol=2e-4)


def test_clipping_by_global_norm():
    grads = {'a': jnp.array([3.0]), 'b': jnp.array([4.0])}
    norm = optax.tree.norm(grads)
    clipped = lib.clip_by_norm(grads, norm, 1.0)
    np.testing.assert_allclose(optax.tree.norm(clipped), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(lib.clip_by_norm(grads, norm, 6.0)['a'], grads['a'])
    np.testing.assert_array_equal(lib.clip_by_norm(grads, norm, 0.0)['a'], grads['a'])


def test_average_every_25_updates():
    config = lib.OptimizerConfig(peak_lr=1.0, schedule='constant', average_decay=0.9,
                                 average_every=25)
    average = {'w': jnp.zeros(1)}
    for update in range(1, 76):
        average = lib.average(average, {'w': jnp.array([float(update)])}, jnp.int32(update), config)
    expected = 0.0
    for seen in (25, 50, 75):
        expected = 0.9 * expected + 0.1 * seen
    np.testing.assert_allclose(average['w'], [expected], rtol=1e-6)


def test_muon_moves_along_orthogonal_matrices():
    config = lib.OptimizerConfig(peak_lr=1.0, schedule='constant', name='muon', muon=r'up$',
                                 decay='none')
    opt = lib.make_optimizer(config, PARAMS)
    new, _ = opt.update(PARAMS, gradients(0), opt.init(PARAMS), jnp.int32(0), 0.0)
    step = new['tail']['0']['mlp']['up'] - PARAMS['tail']['0']['mlp']['up']
    singular = np.linalg.svd(np.asarray(step), compute_uv=False)
    # Newton-Schulz brings singular values near 1 (0.7 to 1.2), times 0.2 sqrt(max(3, 4)).
    assert np.all((singular > 0.6 * 0.4) & (singular < 1.3 * 0.4))


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="optimizer.name is 'sgd'"):
        lib.OptimizerConfig(peak_lr=1.0, name='sgd')
    with pytest.raises(ValueError, match='decay_updates=5 must exceed optimizer.warmup=10'):
        lib.OptimizerConfig(peak_lr=1.0, warmup=10, decay_updates=5)
