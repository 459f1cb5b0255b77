"""The dVAE against an independent float64 implementation, enumeration, and the paper's numbers."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from dalle_jax.models import codebook, dvae
from dalle_jax.models.context import Context

SMALL = dvae.Config(image_size=16, vocab=24, widths=(8, 12, 16), n_init=8, groups=3,
                    blocks_per_group=(1, 2, 1))
PATCHED = dvae.Config(image_size=12, vocab=16, widths=(8, 16), n_init=8, groups=2, patch=3,
                      blocks_per_group=1, bottleneck=4, likelihood='mse', codebook_init='kmeans')


encode = jax.jit(dvae.encode, static_argnums=1)
decode = jax.jit(dvae.decode, static_argnums=(1, 3))
latent_and_logits = jax.jit(dvae._encode, static_argnums=(1, 3))


def random_params(config, seed=0, scale=1.0):
    """Parameters as by init, biases included, without compiling thirty random generators."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        std = scale / np.sqrt(np.prod(leaf.shape[:-1])) if leaf.ndim == 4 else 0.1
        return jnp.asarray(rng.normal(size=leaf.shape) * std, jnp.float32)

    return jax.tree.map(draw, jax.eval_shape(lambda: dvae.init(config, jax.random.key(0))[0]))


def random_images(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@functools.partial(jax.jit, static_argnames=('config', 'train'))
def run_loss(config, params, images, step, key, train):
    ctx = Context(config=config, step=step, key=key, train=train)
    return dvae.loss(params, {}, {'image': images}, ctx)


def evaluate(config, params, images, step=0, key=None, train=False):
    """Objective, terms and metrics as floats."""
    terms, metrics, state = run_loss(config, params, images, step, key, train)
    assert state == {}
    objective = sum(t.weight * t.sum / t.count for t in terms.values())
    return float(objective), terms, {name: float(s / n) for name, (s, n) in metrics.items()}


# --- sizes ------------------------------------------------------------------------------------


def sizes(config):
    params = jax.eval_shape(lambda: dvae.init(config, jax.random.key(0))[0])
    return params, {name: sum(leaf.size for leaf in jax.tree.leaves(part))
                    for name, part in params.items()}


def test_parameter_counts_of_the_released_model():
    params, count = sizes(dvae.PRESETS['paper'])
    assert count['encoder'] == 53_786_240
    assert count['codebook'] + count['decoder'] == 43_829_766
    groups = {'encoder': [476_032, 1_739_008, 6_951_424, 27_796_480],
              'decoder': [29_697_024, 9_966_080, 2_492_672, 623_744]}
    for part, expected in groups.items():
        for g, number in enumerate(expected, start=1):
            leaves = [leaf.size for name, module in params[part].items()
                      if name.startswith(f'group_{g}_') for leaf in jax.tree.leaves(module)]
            assert sum(leaves) == number, (part, g)


@pytest.mark.parametrize('preset,millions', [
    ('medium', (17.66, 11.83)), ('small', (11.36, 11.04)), ('tiny', (2.59, 2.80))])
def test_parameter_counts_of_presets(preset, millions):
    _, count = sizes(dvae.PRESETS[preset])
    found = count['encoder'] / 1e6, (count['codebook'] + count['decoder']) / 1e6
    assert found == pytest.approx(millions, abs=0.005)


def test_paper_constants():
    config = dvae.PRESETS['paper']
    assert (config.factor, config.grid, config.vocab) == (8, (32, 32), 8192)
    assert (config.gain, config.values_per_position) == (1 / 64, 192)
    assert config.group_widths == (256, 512, 1024, 2048)


@pytest.mark.parametrize('config', [SMALL, PATCHED])
def test_axes_fit_the_parameters(config):
    params, _ = sizes(config)
    axes = dvae.axes(config)
    jax.tree.map(lambda leaf, names: pytest.fail(f'{names}') if leaf.ndim != len(names) else None,
                 params, axes, is_leaf=lambda x: isinstance(x, tuple))
    assert axes['encoder']['logits']['kernel'][3] == 'vocab' == axes['codebook']['kernel'][2]
    assert axes['encoder']['group_1_block_1']['conv_1'] == {
        'kernel': (None, None, 'conv_in', 'conv_out'), 'bias': ('conv_out',)}


def test_init_follows_the_released_code():
    config = dvae.Config(image_size=4, vocab=600, widths=(64,), n_init=64, groups=1, patch=4,
                         blocks_per_group=1)
    params, state = jax.jit(dvae.init, static_argnums=0)(
        config, jax.random.key(0, impl='unsafe_rbg'))  # compiles fastest
    assert state == {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert type(leaf) is not dict and leaf.dtype == jnp.float32
        if leaf.ndim == 1:
            assert not leaf.any(), path
        elif leaf.size > 4000:
            assert leaf.std() * np.sqrt(np.prod(leaf.shape[:-1])) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize('change,message', [
    ({'image_size': 100}, 'image_size=100.*factor 8'),
    ({'widths': (8, 16)}, r'widths=\(8, 16\).*groups=4'),
    ({'blocks_per_group': (1, 2)}, 'blocks_per_group.*groups=4'),
    ({'blocks_per_group': (1, 2, 0, 1)}, 'needs a block'),
    ({'hidden': 6}, 'multiples of 4'),
    ({'likelihood': 'l2'}, "likelihood='l2'.*logit_laplace"),
    ({'warmup_steps': 5}, 'set bottleneck'),
    ({'codebook_init': 'kmeans'}, 'set bottleneck'),
    ({'temperature': 0.0}, 'temperature=0.0'),
    ({'mse_scale': 0.0}, 'mse_scale'),
    ({'kl_steps': -1}, 'kl_steps'),
    ({'groups': 0}, 'groups=0'),
])
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dvae.Config(**change)


def test_config_survives_json():
    stored = json.loads(json.dumps(dataclasses.asdict(SMALL)))
    assert dvae.Config(**stored) == SMALL and hash(dvae.Config(**stored)) == hash(SMALL)


# --- networks, against loops in float64 ---------------------------------------------------------


def conv(p, x):
    kernel, bias = np.float64(p['kernel']), np.float64(p['bias'])
    k = len(kernel)
    padded = np.pad(x, ((0, 0), (k // 2,) * 2, (k // 2,) * 2, (0, 0)))
    out = np.zeros((*x.shape[:3], kernel.shape[-1])) + bias
    for i in range(k):
        for j in range(k):
            out += padded[:, i:i + x.shape[1], j:j + x.shape[2]] @ kernel[i, j]
    return out


def block(p, x, gain):
    y = x
    for i in range(1, 5):
        y = conv(p[f'conv_{i}'], np.maximum(y, 0))
    return (conv(p['id_path'], x) if 'id_path' in p else x) + gain * y


def squares(x, p):
    """Lists of p x p squares as channels, by loops."""
    b, h, w, c = x.shape
    out = np.zeros((b, h // p, w // p, p * p * c))
    for i in range(h):
        for j in range(w):
            at = (i % p * p + j % p) * c
            out[:, i // p, j // p, at:at + c] = x[:, i, j]
    return out


def reference_encoder(config, p, images):
    x = squares(np.float64(images) / 255 * 0.8 + 0.1, config.patch)
    x = conv(p['input'], x)
    for g, blocks in enumerate(config.group_blocks, start=1):
        for b in range(1, blocks + 1):
            x = block(p[f'group_{g}_block_{b}'], x, config.gain)
        if g < config.groups:
            b_, h, w, c = x.shape
            x = x.reshape(b_, h // 2, 2, w // 2, 2, c).max((2, 4))
    x = np.maximum(x, 0)
    if config.bottleneck:
        x = np.tanh(conv(p['bottleneck'], x))
    return conv(p['logits'], x)


def reference_decoder(config, params, weights):
    p = params['decoder']
    x = conv(params['codebook'], weights)
    if config.bottleneck:
        x = conv(p['input'], x)
    for g, blocks in enumerate(config.group_blocks[::-1], start=1):
        for b in range(1, blocks + 1):
            x = block(p[f'group_{g}_block_{b}'], x, config.gain)
        if g < config.groups:
            x = x.repeat(2, 1).repeat(2, 2)
    x = conv(p['output'], np.maximum(x, 0))
    b, h, w, c = x.shape
    q = config.patch
    out = np.zeros((b, h * q, w * q, c // q ** 2))
    for i in range(h * q):
        for j in range(w * q):
            at = (i % q * q + j % q) * out.shape[-1]
            out[:, i, j] = x[:, i // q, j // q, at:at + out.shape[-1]]
    return out


@pytest.mark.parametrize('config', [SMALL, PATCHED])
def test_networks_are_the_released_ones(config):
    # Large weights, so that a branch counts in spite of its gain.
    params = random_params(config, scale=2.0)
    images = random_images((2, config.image_size, config.image_size, 3))
    kernels = [params['encoder']['group_1_block_1'][f'conv_{i}']['kernel'] for i in range(1, 5)]
    assert [len(k) for k in kernels] == [3, 3, 3, 1]
    kernels = [params['decoder']['group_1_block_1'][f'conv_{i}']['kernel'] for i in range(1, 5)]
    assert [len(k) for k in kernels] == [1, 3, 3, 3]

    logits = reference_encoder(config, params['encoder'], images)
    kl = np.sum(special.softmax(logits, -1) * np.log(config.vocab * special.softmax(logits, -1)))
    # Without noise and at tau = 1 the relaxed codes are the softmax itself.
    objective, terms, metrics = evaluate(config, params, images, step=0)
    assert float(terms['kl'].sum) == pytest.approx(kl, rel=1e-4)
    maps = reference_decoder(config, params, special.softmax(logits, -1))
    x = np.float64(images) / 255
    if config.likelihood == 'mse':
        nll = 100 * ((maps + 1) / 2 - x) ** 2
        output = np.clip((maps + 1) / 2, 0, 1)
    else:
        x, mu, s = 0.8 * x + 0.1, maps[..., :3], maps[..., 3:]
        nll = np.log(2) + s + np.log(x * (1 - x)) + abs(special.logit(x) - mu) / np.exp(s)
        output = np.clip((special.expit(mu) - 0.1) / 0.8, 0, 1)
        x = np.float64(images) / 255
    assert objective == pytest.approx(nll.mean(), rel=1e-4)  # beta is 0 at step 0
    assert metrics['mse'] == pytest.approx(((output - x) ** 2).mean(), rel=1e-4)

    ids = logits.argmax(-1)
    np.testing.assert_array_equal(encode(params, config, images), ids)
    maps = reference_decoder(config, params, np.eye(config.vocab)[ids])
    output = np.clip((maps + 1) / 2 if config.likelihood == 'mse'
                     else (special.expit(maps[..., :3]) - 0.1) / 0.8, 0, 1)
    np.testing.assert_allclose(decode(params, config, jnp.asarray(ids)), output, atol=2e-5)


def test_bfloat16_is_close_and_codes_stay_float32():
    config = PATCHED
    params = random_params(config)
    images = random_images((2, config.image_size, config.image_size, 3))
    exact = latent_and_logits(params, config, images, jnp.float32)
    rounded = latent_and_logits(params, config, images, jnp.bfloat16)
    for a, b in zip(exact, rounded):
        assert b.dtype == jnp.float32
        assert 0 < float(jnp.abs(a - b).max()) < 0.05 * float(jnp.abs(a).max())
    ids = exact[1].argmax(-1)
    difference = decode(params, config, ids) - decode(params, config, ids, jnp.bfloat16)
    assert 0 < float(jnp.abs(difference).max()) < 0.05


# --- codes --------------------------------------------------------------------------------------


def test_pixels_map_into_the_open_interval_and_back():
    levels = jnp.arange(256, dtype=jnp.uint8)
    mapped = dvae.map_pixels(levels)
    assert float(mapped[0]) == pytest.approx(0.1) and float(mapped[-1]) == pytest.approx(0.9)
    np.testing.assert_allclose(dvae.unmap_pixels(mapped), np.arange(256) / 255, atol=1e-6)
    assert float(dvae.unmap_pixels(jnp.float32(0.95))) == 1 and float(dvae.unmap_pixels(0.0)) == 0


def test_lookup_is_the_product_with_one_hot_codes():
    params = random_params(SMALL)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 24, (2, 4, 4)), jnp.int32)
    product = dvae._codebook(SMALL).apply({'params': params['codebook']}, jax.nn.one_hot(ids, 24))
    np.testing.assert_allclose(dvae.lookup(params, ids), product, atol=1e-6)


def test_encode_does_not_depend_on_the_batch():
    params = random_params(SMALL)
    images = random_images((2, 16, 16, 3))
    ids = encode(params, SMALL, images)
    assert ids.shape == (2, *SMALL.grid) and ids.dtype == jnp.int32
    for i in range(2):
        np.testing.assert_array_equal(encode(params, SMALL, images[i:i + 1])[0], ids[i])


@pytest.mark.parametrize('config', [SMALL, PATCHED])
def test_windows_of_another_size(config):
    params = random_params(config)
    f = config.factor
    images = random_images((2, 2 * f, 3 * f, 3))
    ids = encode(params, config, images)
    assert ids.shape == (2, 2, 3)
    assert decode(params, config, ids).shape == images.shape
    counts = jax.jit(lambda: {  # computes nothing else
        name: term.count
        for name, term in run_loss(config, params, images, 0, None, False)[0].items()})()
    assert counts == {'reconstruction': images.size, 'kl': ids.size}
    with pytest.raises(ValueError, match=f'factor {f}'):
        encode(params, config, images[:, 1:])


def test_batch_spec_is_what_loss_takes():
    spec = dvae.batch_spec(SMALL, {})['image']
    assert (spec.shape, spec.dtype) == ((16, 16, 3), jnp.uint8)


# --- loss ---------------------------------------------------------------------------------------


def test_kl_weight_of_the_paper():
    config = dvae.Config(image_size=16, vocab=16, hidden=4, n_init=4, blocks_per_group=1)
    assert config.values_per_position == 192
    params = random_params(config)
    for shape in ((1, 16, 16, 3), (3, 16, 16, 3), (2, 32, 24, 3)):
        images = random_images(shape)
        # Only the weight is computed and compiled.
        weight = jax.jit(lambda x: run_loss(config, params, x, 5_000, None, False)[0]['kl'].weight)
        assert float(weight(images)) == pytest.approx(6.6 / 192) == pytest.approx(0.034375)
    objective, terms, metrics = evaluate(config, params, images, step=5_000)
    # Both joint terms, divided by the number of values once.
    joint = terms['reconstruction'].sum + 6.6 * terms['kl'].sum
    assert objective == pytest.approx(float(joint) / images.size, rel=1e-5)
    assert metrics['beta'] == pytest.approx(6.6)
    assert metrics['elb_relaxed'] == pytest.approx(
        -float(terms['reconstruction'].sum + terms['kl'].sum) / images.size, rel=1e-5)


def test_schedules_follow_the_step():
    params, images = random_params(SMALL), random_images((2, 16, 16, 3))
    _, _, metrics = evaluate(SMALL, params, images, step=2_500)
    assert metrics['beta'] == pytest.approx(3.3, rel=1e-5)
    _, _, metrics = evaluate(SMALL, params, images, step=75_000)
    assert metrics['temperature'] == pytest.approx(17 / 32, rel=1e-5)


def test_gumbel_softmax_samples_the_categorical():
    logits = jnp.asarray([0.3, -1.2, 2.0, 0.0, -4.0])
    many = jnp.broadcast_to(logits, (40_000, 5))
    relaxed = codebook.gumbel_softmax(many, 1e-3, jax.random.key(0))
    np.testing.assert_allclose(relaxed.sum(-1), 1, rtol=1e-5)
    p = np.asarray(jax.nn.softmax(logits))
    error = np.asarray(relaxed.mean(0)) - p
    assert np.all(abs(error) < 5 * np.sqrt(p * (1 - p) / 40_000))
    np.testing.assert_allclose(codebook.gumbel_softmax(logits, 1.0, None), p, rtol=1e-6)


def test_gumbel_softmax_is_finite_and_has_gradients_at_the_lowest_temperature():
    logits = 30 * jax.random.normal(jax.random.key(0), (1000, 512))
    tangent = jax.random.normal(jax.random.key(1), logits.shape)

    def projected(logits):
        return jnp.sum(tangent * codebook.gumbel_softmax(logits, 1 / 16, jax.random.key(2)))

    value, gradient = jax.value_and_grad(projected)(logits)
    assert bool(jnp.isfinite(value)) and bool(jnp.isfinite(gradient).all())
    assert bool((gradient != 0).any())


def test_elb_hard_is_the_bound_of_the_discrete_model():
    # One code an image: all K possible codes can be enumerated.
    config = dataclasses.replace(SMALL, image_size=4, vocab=6)
    params, images = random_params(config), random_images((1, 4, 4, 3))
    logits = reference_encoder(config, params['encoder'], images)[0, 0, 0]
    q = special.softmax(logits)
    x = np.float64(images) / 255 * 0.8 + 0.1
    log_p = np.zeros(6)
    for k in range(6):
        maps = reference_decoder(config, params, np.eye(6)[k][None, None, None])
        mu, s = maps[..., :3], maps[..., 3:]
        log_p[k] = -np.sum(np.log(2) + s + np.log(x * (1 - x))
                           + abs(special.logit(x) - mu) / np.exp(s))
    bound = q @ log_p - q @ np.log(6 * q)
    evidence = special.logsumexp(log_p) - np.log(6)
    assert bound < evidence

    def sample(key):
        ctx = Context(config=config, key=key)
        return dvae.loss(params, {}, {'image': jnp.asarray(images)}, ctx)[1]['elb_hard'][0]

    samples = np.asarray(jax.jit(jax.vmap(sample))(jax.random.split(jax.random.key(0), 4000)))
    error = samples.std() / np.sqrt(len(samples))
    assert error < 0.1 * abs(evidence - bound) and abs(samples.mean() - bound) < 5 * error


def test_both_bounds_agree_when_codes_are_certain():
    params = random_params(SMALL)
    params['encoder']['logits']['kernel'] *= 1e4
    _, terms, metrics = evaluate(SMALL, params, random_images((2, 16, 16, 3)), step=10**7,
                                 key=jax.random.key(0))
    assert metrics['elb_hard'] == pytest.approx(metrics['elb_relaxed'], rel=1e-3)
    assert float(terms['kl'].sum / terms['kl'].count) == pytest.approx(np.log(24), rel=1e-3)
    assert metrics['psnr_hard'] == pytest.approx(metrics['psnr'], rel=1e-3)


def test_training_needs_a_key_and_skips_the_hard_decodings():
    params, images = random_params(SMALL), random_images((2, 16, 16, 3))
    with pytest.raises(ValueError, match='ctx.key'):
        evaluate(SMALL, params, images, train=True)
    _, metrics, _ = jax.eval_shape(
        lambda: run_loss(SMALL, params, images, 0, jax.random.key(0), True))
    assert not {'elb_hard', 'mse_hard', 'psnr_hard'} & set(metrics)


def gradients(config, step=100):
    # Wide enough for no block to have only dead relus.
    config = dataclasses.replace(config, widths=(32,) * config.groups, image_size=12)
    params = random_params(config)
    images = jnp.asarray(random_images((4, config.image_size, config.image_size, 3)))

    def objective(params):
        ctx = Context(config=config, key=jax.random.key(0), step=step, train=True)
        terms, _, _ = dvae.loss(params, {}, {'image': images}, ctx)
        return sum(t.weight * t.sum / t.count for t in terms.values())

    return jax.jit(jax.grad(objective))(params)


def test_gradient_reaches_every_parameter():
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients(SMALL)):
        assert bool(jnp.isfinite(leaf).all()) and float(jnp.abs(leaf).max()) > 0, path


def test_warmup_leaves_the_codes_alone_and_then_ends():
    config = dataclasses.replace(PATCHED, warmup_steps=100, temperature_steps=50)
    of = gradients(config, step=99)
    unused = jax.tree.leaves((of['codebook'], of['encoder'].pop('logits')))
    assert all(not leaf.any() for leaf in unused)
    assert all(leaf.any() for leaf in jax.tree.leaves((of['encoder'], of['decoder'])))
    params, images = random_params(config), random_images((4, 12, 12, 3))
    clean = evaluate(config, params, images, step=60)[0]
    noisy = [evaluate(config, params, images, step=s, key=jax.random.key(0)) for s in (0, 60)]
    assert noisy[0][0] == pytest.approx(clean, rel=1e-6) and noisy[1][0] != clean
    assert noisy[1][1]['kl'].weight == 0 and noisy[1][2]['temperature'] == 1
    plain = dataclasses.replace(config, warmup_steps=0)
    for after in (0, 30, 60):
        ours, theirs = (evaluate(c, params, images, step=s, key=jax.random.key(0))[0]
                        for c, s in ((config, 100 + after), (plain, after)))
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_collapse_raises_the_alarm():
    config = dataclasses.replace(SMALL, image_size=64, vocab=200)
    params = random_params(config)
    params['encoder']['logits']['bias'] = 1e3 * jax.nn.one_hot(3, 200)
    _, _, metrics = evaluate(config, params, random_images((2, 64, 64, 3)))
    assert metrics['alarm/codebook_collapse'] == 1 and metrics['codes_used'] == 1
    params['encoder']['logits']['bias'] = jnp.zeros(200)
    _, _, metrics = evaluate(config, params, random_images((2, 64, 64, 3)))
    assert metrics['alarm/codebook_collapse'] == 0


# --- codes from data, snapshot ------------------------------------------------------------------


def test_prepare_puts_the_codes_on_the_latents():
    params = random_params(PATCHED)
    batches = [{'image': random_images((16, 12, 12, 3), seed)} for seed in range(8)]
    new, report = dvae.prepare(params, PATCHED, batches, jax.random.key(0))
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, params)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert report['kmeans/distortion'] < report['kmeans/distortion_of_seeds']
    assert report['kmeans/points'] == 8 * 16 * 4  # random squares are never flat

    images = random_images((8, 12, 12, 3), seed=99)
    latent, logits = latent_and_logits(new, PATCHED, images, jnp.float32)
    centres = np.asarray(new['codebook']['kernel'][0, 0])
    distances = ((np.asarray(latent)[..., None, :] - centres) ** 2).sum(-1)
    np.testing.assert_array_equal(logits.argmax(-1), distances.argmin(-1))
    np.testing.assert_allclose(dvae.lookup(new, distances.argmin(-1)),
                               centres[distances.argmin(-1)], atol=1e-6)
    # One mean squared error further costs codebook_sharpness.
    slope = np.polyfit(distances.reshape(-1, 16)[0], np.asarray(logits).reshape(-1, 16)[0], 1)[0]
    assert -slope * report['kmeans/distortion'] == pytest.approx(4.0, rel=1e-3)


def test_prepare_is_due_after_the_warmup():
    assert dvae.prepare_step(SMALL) is None
    assert dvae.prepare_step(dataclasses.replace(PATCHED, warmup_steps=7)) == 7


def test_prepare_needs_enough_squares():
    batch = {'image': np.full((4, 12, 12, 3), 7, np.uint8)}
    with pytest.raises(ValueError, match='16 centres'):
        dvae.prepare(random_params(PATCHED), PATCHED, [batch], jax.random.key(0))


def test_prepare_survives_fewer_distinct_latents_than_codes():
    tiles = random_images((2, 6, 6, 3))
    batch = {'image': np.tile(tiles, (8, 2, 2, 1))}
    new, report = dvae.prepare(random_params(PATCHED), PATCHED, [batch], jax.random.key(0))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(new))
    assert report['kmeans/distortion'] < 1e-6 and report['kmeans/sharpness'] < 1e7


def test_snapshot():
    def snapshot(config, params, images):
        return dvae.snapshot(params, {}, {'image': images}, Context(config=config))

    params, images = random_params(SMALL), random_images((2, 16, 16, 3))
    found = jax.jit(snapshot, static_argnums=0)(SMALL, params, images)
    np.testing.assert_array_equal(found['images/originals'], images)
    expected = decode(params, SMALL, encode(params, SMALL, images))
    np.testing.assert_allclose(found['images/reconstructions'], expected, atol=1e-6)
    assert found['counts/codes'].shape == (24,) and found['counts/codes'].sum() == 2 * 16
