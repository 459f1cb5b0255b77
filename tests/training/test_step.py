import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models import clip, dalle
from dalle_jax.models.losses import Term
from dalle_jax.training import precision
from dalle_jax.training import step as lib
from dalle_jax.training.compression import CompressionConfig
from dalle_jax.training.optimizer import OptimizerConfig

B = 8


def linear_loss(params, model_state, batch, ctx):
    """Weighted squared error whose count depends on the batch, with a second, constant term."""
    error = (batch['x'] @ params['w'] - batch['y']) ** 2 * batch['mask']
    terms = {'fit': Term(error.sum(), batch['mask'].sum(), 0.75),
             'size': Term((params['w'] ** 2).sum() * len(error), float(len(error)), 0.25)}
    metrics = {'seen': (batch['mask'].sum(), 1.0)}
    if ctx.train:
        metrics['noise'] = (jax.random.uniform(ctx.key), 1.0)
    return terms, metrics, model_state


MODEL = SimpleNamespace(
    loss=linear_loss, init=lambda config, key: ({'w': jax.random.normal(key, (3,))}, {}))


def task(**changes):
    base = lib.Task(MODEL, None, OptimizerConfig(peak_lr=0.1, schedule='constant',
                                                 average_decay=0.9), B)
    return base._replace(**changes)


def batch(seed):
    rng = np.random.default_rng(seed)
    return {'x': rng.normal(size=(B, 3)).astype(np.float32),
            'y': rng.normal(size=B).astype(np.float32),
            'mask': (np.arange(B) % 3 > 0).astype(np.float32)}


def stack(*batches):
    return jax.tree.map(lambda *a: np.stack(a), *batches)


def run(t, batches, state=None):
    state = lib.init_state(t, 0) if state is None else state
    return lib.make_train(t, state, group=2)(state, batches, {}, ())


def test_gradient_is_that_of_the_weighted_means():
    t = task(optimizer=OptimizerConfig(peak_lr=0.1, schedule='constant', clip=0.0))
    w = np.asarray(lib.init_state(t, 0).params['w'], np.float64)
    b = batch(0)
    error = b['x'] @ w - b['y']
    expected = (0.75 * 2 * (b['mask'] * error) @ b['x'] / b['mask'].sum() + 0.25 * 2 * w)
    _, metrics = run(t, stack(b))
    np.testing.assert_allclose(metrics['gradient_norm'][0], np.linalg.norm(expected), rtol=1e-5)
    np.testing.assert_allclose(
        metrics['loss'][0],
        0.75 * (b['mask'] * error ** 2).sum() / b['mask'].sum() + 0.25 * (w ** 2).sum(), rtol=1e-5)


def test_microbatches_add_up_with_uneven_counts():
    whole, metrics = run(task(), stack(batch(0), batch(1)))
    parts, part_metrics = run(task(microbatches=4), stack(batch(0), batch(1)))
    np.testing.assert_allclose(whole.params['w'], parts.params['w'], rtol=1e-5)
    for name in ('loss', 'fit', 'size', 'gradient_norm'):
        np.testing.assert_allclose(metrics[name], part_metrics[name], rtol=1e-5)


def test_a_group_of_steps_equals_single_steps():
    batches = [batch(i) for i in range(4)]
    together, metrics = run(task(), stack(*batches))
    losses = []
    state = lib.init_state(task(), 0)
    train = lib.make_train(task(), state)
    for b in batches:
        state, one = train(state, b, {}, ())
        losses.append(one['loss'])
    np.testing.assert_allclose(metrics['loss'], losses, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), together, state)
    assert int(together.step) == int(together.updates) == 4


def test_noise_differs_by_step_and_repeats_by_seed():
    _, first = run(task(), stack(batch(0), batch(0)))
    _, again = run(task(), stack(batch(0), batch(0)))
    assert first['noise'][0] != first['noise'][1]
    np.testing.assert_array_equal(first['noise'], again['noise'])


def test_non_finite_batch_changes_nothing_but_the_step():
    bad = batch(1)
    bad['y'][0], bad['mask'][0] = np.inf, 1
    start = lib.init_state(task(), 0)
    state, metrics = run(task(), stack(bad))
    assert metrics['skipped'][0] == 1
    assert int(state.step) == 1 and int(state.updates) == 0
    jax.tree.map(np.testing.assert_array_equal, start._replace(step=state.step), state)
    state, metrics = run(task(), stack(batch(0)), state)
    assert metrics['skipped'][0] == 0 and int(state.updates) == 1
    assert np.isfinite(state.params['w']).all()


def test_average_follows_the_parameters():
    state, _ = run(task(), stack(batch(0)))
    start = lib.init_state(task(), 0).params['w']
    np.testing.assert_allclose(state.averages['w'], 0.9 * start + 0.1 * state.params['w'],
                               rtol=1e-5)
    assert lib.best_params(state)['w'] is state.averages['w']
    plain = task(optimizer=dataclasses.replace(task().optimizer, average_decay=0.0))
    state, _ = run(plain, stack(batch(0)))
    assert lib.best_params(state) is state.params


def test_validation_sums_equal_the_mean_over_all_batches():
    t = task()
    state = lib.init_state(t, 0)
    validate = lib.make_validate(t)
    parts = [validate(state.params, {}, batch(i), state.updates, {}, ()) for i in range(3)]
    found = lib.means(*lib.added(jax.device_get(parts)))
    w = np.asarray(state.params['w'], np.float64)
    errors = np.concatenate([b['mask'] * (b['x'] @ w - b['y']) ** 2
                             for b in map(batch, range(3))])
    count = sum(batch(i)['mask'].sum() for i in range(3))
    np.testing.assert_allclose(found['fit'], errors.sum() / count, rtol=1e-5)
    np.testing.assert_allclose(found['loss'], 0.75 * found['fit'] + 0.25 * (w ** 2).sum(),
                               rtol=1e-5)


DALLE = dalle.Config(depth=9, width=16, heads=2, text_length=4, text_vocab=8, grid=(2, 3),
                     image_vocab=8, kernel=3, remat='none', std=0.1)


def tokens(seed):
    """Captions that tell the image."""
    text = np.random.default_rng(seed).integers(1, 8, (B, 3)).astype(np.int32)
    return {'text': text, 'codes': np.repeat(text[:, None], 2, axis=1)}


def test_an_overflow_skips_the_update_and_lowers_its_own_scale():
    t = lib.Task(dalle, DALLE, OptimizerConfig(peak_lr=1e-3, schedule='constant'), B,
                 dtype=jnp.dtype('float16'))
    state = lib.init_state(t, 0)
    names = precision.names(state.scales.value)
    assert sorted(names) == [f'{i:02d}/{kind}' for i in range(9) for kind in ('attention', 'mlp')]
    values = jax.tree.map(lambda x: jnp.full_like(x, B * 2.0**8), state.scales.value)
    # Group 1 of the body's third layer: layer 6 of the stack.
    of_layer = values['transformer']['body']['2']
    of_layer['mlp'] = of_layer['mlp'].at[1].set(2.0**60)
    state = state._replace(scales=state.scales._replace(value=values))
    params = jax.device_get(state.params)
    train = lib.make_train(t, state)
    before = dict(zip(names, np.asarray(precision.vector(state.scales.value))))
    state, metrics = train(state, tokens(0), {}, ())
    flagged = {name for name, n in zip(names, np.asarray(metrics['overflow'])) if n}
    assert flagged == {'06/mlp'} and metrics['skipped'] == 1
    assert int(state.step) == 1 and int(state.updates) == 0
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(state.params))
    np.testing.assert_allclose(metrics['log2_scale'], np.log2([*before.values()]), rtol=1e-6)
    after = dict(zip(names, np.asarray(precision.vector(state.scales.value))))
    assert after.pop('06/mlp') == B * 2.0**24  # clamped
    for name, value in after.items():
        np.testing.assert_allclose(value, before[name] * 2**(1 / 1000), rtol=1e-6)
    state, metrics = train(state, tokens(1), {}, ())
    assert int(state.updates) == 1 - int(metrics['skipped'])


def test_16_bit_storage_learns_like_float32():
    """Loss over the last of 150 updates within 0.5 % of float32 Adam's."""
    config = dataclasses.replace(DALLE, depth=1)

    def losses(**kinds):
        adam = OptimizerConfig(peak_lr=2e-3, schedule='constant', b2=0.96, variance_clip=5.0,
                               **kinds)
        t = lib.Task(dalle, config, adam, B)
        state, found = lib.init_state(t, 0), []
        train = lib.make_train(t, state)
        for i in range(150):
            state, metrics = train(state, tokens(i), {}, ())
            found.append(float(metrics['loss']))
        return np.mean(found[:5]), np.mean(found[-30:])

    first, plain = losses()
    assert plain < 0.8 * first
    kinds = dict(mean_format='1-6-9', variance_format='0-6-10', params_format='bfloat16')
    np.testing.assert_allclose(losses(**kinds)[1], plain, rtol=5e-3)


@pytest.mark.parametrize('changes,message', [
    (dict(dtype=jnp.dtype('float16')), "'float16' needs gradient scales, which clip has not"),
    (dict(microbatches=2), 'clip compares the examples .* loop.microbatches=2'),
    (dict(compression=CompressionConfig(rank=4)), 'compression.rank to 0'),
    (dict(model=dalle, compression=CompressionConfig(rank=4)),
     'compression.rank=4 compresses what replicas send each other, and there is one'),
])
def test_parts_that_do_not_go_together(changes, message):
    t = lib.Task(clip, clip.Config(), OptimizerConfig(peak_lr=1.0, schedule='constant'), B)
    with pytest.raises(ValueError, match=message):
        lib.check(t._replace(**changes))
