import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dalle_jax.planning import hardware
from dalle_jax.training import formats
from dalle_jax.training import optimizer as lib
from dalle_jax.training.compression import averaging

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


SMALL = dict(params_format='bfloat16', mean_format='1-6-9', variance_format='0-6-10')


def test_16_bit_moments_follow_those_of_32():
    """Within the formats' precision, over many updates; the exceptions are the same bits."""
    def run(**kinds):
        config = lib.OptimizerConfig(peak_lr=1e-2, schedule='constant', b2=0.96, variance_clip=5.0,
                                     exceptions='norm|bias', **kinds)
        opt = lib.make_optimizer(config, PARAMS)
        update = jax.jit(opt.update)
        p = lib.stored(PARAMS, config)
        m = opt.init(p)
        for i in range(50):
            p, m = update(p, gradients(i % 7), m, jnp.int32(i), jnp.float32(0))
        return p, m

    plain, (p, m) = run(), run(mean_format='1-6-9', variance_format='0-6-10')
    mlp, exact = p['tail']['0']['mlp'], plain[0]['tail']['0']['mlp']
    np.testing.assert_allclose(mlp['up'], exact['up'], rtol=0, atol=2e-3)
    assert np.abs(mlp['up'] - PARAMS['tail']['0']['mlp']['up']).max() > 0.05
    np.testing.assert_array_equal(mlp['up_bias'], exact['up_bias'])
    np.testing.assert_array_equal(p['norm'], plain[0]['norm'])
    kinds = {name: jax.tree.map(lambda x: x.dtype.name, tree) for name, tree in m.items()}
    assert kinds['mean']['tail']['0']['mlp'] == {'up': 'uint16', 'up_bias': 'float32'}
    assert kinds['variance'] == kinds['mean'] and kinds['mean']['norm'] == 'float32'
    for name, bits in (('mean', 2**-10), ('variance', 2**-11)):
        format = {'mean': '1-6-9', 'variance': '0-6-10'}[name]
        found = formats.decode(m[name]['tail']['0']['mlp']['up'], format)
        # Roundings of all steps that are remembered add up.
        np.testing.assert_allclose(found, plain[1][name]['tail']['0']['mlp']['up'],
                                   rtol=30 * bits, atol=1e-3)


@pytest.mark.parametrize('format,moves', [('bfloat16', True), ('float16', True)])
def test_small_updates_of_16_bit_parameters_are_not_lost(format, moves):
    """200 updates of 5e-6 at 0.02, of which the nearest bfloat16 never moves."""
    config = lib.OptimizerConfig(peak_lr=5e-6, schedule='constant', params_format=format,
                                 exceptions='^$')
    params = lib.stored({'w': jnp.full((64, 64), 0.02)}, config)
    grads, opt = {'w': jnp.ones((64, 64))}, lib.make_optimizer(config, params)
    start = float(params['w'].astype(jnp.float32).mean())
    step = jax.jit(opt.update)
    p, m = params, opt.init(params)
    for i in range(200):
        p, m = step(p, grads, m, jnp.int32(i), jnp.float32(0))
    moved = start - float(p['w'].astype(jnp.float32).mean())
    np.testing.assert_allclose(moved, 200 * 5e-6, rtol=0.02)
    assert p['w'].dtype == jnp.dtype(format)
    nearest = params['w'] - (5e-6 * grads['w']).astype(params['w'].dtype)
    assert format == 'float16' or np.array_equal(nearest, params['w'])


def update_program(shape, sharding=None):
    """A whole update of a leaf of 16-bit parameters: norm, clipping, AdamW, skipping."""
    config = lib.OptimizerConfig(peak_lr=1e-3, schedule='constant', weight_decay=0.1, clip=1.0,
                                 variance_clip=5.0, **SMALL)
    params = jax.eval_shape(lambda: lib.stored({'up': jnp.zeros(shape)}, config))
    opt = lib.make_optimizer(config, params)

    def update(params, moments, grads, updates):
        norm = averaging().reduce(grads, {}).norm
        new = opt.update(params, lib.clip_by_norm(grads, norm, 1.0), moments, updates, 0.0)
        return jax.tree.map(lambda n, o: jnp.where(jnp.isfinite(norm), n, o), new,
                            (params, moments))

    given = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        (params, jax.eval_shape(opt.init, params), params, jax.ShapeDtypeStruct((), jnp.int32)))
    return jax.jit(update, donate_argnums=(0, 1)).trace(*given)


def check_bytes(program, size, temporary):
    """8 bytes a parameter with its gradient: 2 each for parameter, gradient, mean, variance."""
    found = program.memory_analysis()
    assert found.argument_size_in_bytes == pytest.approx(8 * size, rel=1e-3)
    assert found.alias_size_in_bytes == pytest.approx(6 * size, rel=1e-3)
    assert found.temp_size_in_bytes <= temporary * size


def test_state_takes_eight_bytes_a_parameter():
    """CPUs read 16-bit moments from copies, and the gradient for its norm from a float32 one."""
    shape = (16, 64, 128)
    check_bytes(update_program(shape).lower().compile(), np.prod(shape), 8.01)


@pytest.mark.aot
@pytest.mark.parametrize('topology', ['v5e:2x2', 'h200:1'])
def test_an_update_makes_no_array(topology):
    """Where memory is short, the temporaries of an update are nothing beside a float32 copy."""
    try:
        chip, device = hardware.topology(topology).chip, hardware.devices(
            hardware.topology(topology))[0]
    except hardware.NoCompiler as error:
        pytest.skip(str(error))
    shape = (16, 1024, 4096)
    traced = update_program(shape, jax.sharding.SingleDeviceSharding(device))
    program = traced.lower(lowering_platforms=(chip.platform,)).compile()
    check_bytes(program, np.prod(shape), 0.01)


def test_plateau_halves_when_the_loss_no_longer_falls():
    """Means of 3 updates, 2 of them without a fall; against a plain simulation."""
    config = lib.OptimizerConfig(
        peak_lr=1.0, schedule='plateau', warmup=4, plateau_window=3, plateau_patience=2,
        plateau_tolerance=0.01, halvings=2)
    opt = lib.make_optimizer(config, {'w': jnp.zeros(2)})
    losses = np.concatenate([np.full(4, 0.1), np.linspace(9, 3, 12), np.full(30, 3.0)])
    update = jax.jit(opt.update)
    p, m = {'w': jnp.zeros(2)}, opt.init({'w': jnp.zeros(2)})
    best, bad, rate, window, found, expected = np.inf, 0, 1.0, [], [], []
    for i, loss in enumerate(losses):
        found.append(float(lib.step_size(config, m, jnp.int32(i))))
        expected.append(min(1.0, (i + 1) / 4) * rate)
        p, m = update(p, {'w': jnp.ones(2)}, m, jnp.int32(i), jnp.float32(loss))
        if i >= 4:
            window.append(loss)
        if len(window) == 3:
            mean, window = np.mean(window), []
            best, bad = (mean, 0) if mean < 0.99 * best else (best, bad + 1)
            if bad == 2:
                bad, rate = 0, max(rate / 2, 0.25)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[-1] == 0.25 and 0.5 in found


def test_averages_on_the_host_equal_those_on_the_device():
    config = lib.OptimizerConfig(peak_lr=1.0, schedule='constant', average_decay=0.9)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind='pinned_host')
    held = jax.device_put(PARAMS, sharding)
    params = jax.tree.map(lambda p: (p + 1).astype(jnp.bfloat16), PARAMS)
    found = lib.average_on_host(held, params, config)
    expected = lib.average(PARAMS, params, jnp.int32(1), config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(found)} == {'pinned_host'}


@pytest.mark.parametrize('wrong,message', [
    (dict(params_format='1-6-9'), 'params_format .*which the model can read'),
    (dict(mean_format='0-6-10'), 'mean_format'), (dict(variance_format='half'), 'choose one of'),
    (dict(average_memory='disk'), "'device' or 'host'"),
    (dict(name='muon', muon='up$', mean_format='1-6-9'), "mean_format .*only 'adamw'"),
    (dict(name='muon', muon='up$', schedule='plateau'), "schedule .*only 'adamw'"),
])
def test_wrong_formats_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        lib.OptimizerConfig(**{'peak_lr': 1.0, 'schedule': 'constant', **wrong})
