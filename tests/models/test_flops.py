"""Model FLOPs by formula against a walk over the traced programs, and the paper's sizes."""

import math

import jax
import jax.numpy as jnp
import pytest

from dalle_jax.models import clip, dalle, dvae, patterns


def walked(function, *args):
    """FLOPs of all matrix products and convolutions of a traced function, loops unrolled.

    A multiply-add is two; every convolution is padded to the size of its input.
    """
    def count(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            name, p = equation.primitive.name, equation.params
            a, b = (v.aval for v in (*equation.invars, None, None)[:2]) if name in (
                'dot_general', 'conv_general_dilated') else (None, None)
            if name == 'dot_general':
                (contracted, _), _ = p['dimension_numbers']
                inner = math.prod(a.shape[axis] for axis in contracted)
                total += 2 * inner * equation.outvars[0].aval.size
            elif name == 'conv_general_dilated':
                assert p['feature_group_count'] == 1
                features = b.shape[p['dimension_numbers'].rhs_spec[0]]
                total += 2 * equation.outvars[0].aval.size * b.size // features
            assert name not in ('while', 'cond')
            times = p['length'] if name == 'scan' else 1
            # A custom derivative's other programs are functions, not jaxprs.
            for inner in jax.tree.leaves(p, is_leaf=lambda x: hasattr(x, 'eqns')):
                inner = getattr(inner, 'jaxpr', inner)
                if hasattr(inner, 'eqns'):
                    total += times * count(inner)
        return total

    return count(jax.make_jaxpr(function)(*args).jaxpr)


def abstract(module, config):
    return jax.eval_shape(lambda: module.init(config, jax.random.key(0))[0])


def test_the_walk_counts():
    x, k = jnp.ones((2, 8, 8, 3)), jnp.ones((5, 5, 3, 7))

    def function(x, k):
        y = jax.lax.conv_general_dilated(x, k, (1, 1), 'SAME',
                                         dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
        def body(c, _):
            return jax.checkpoint(lambda c: c @ jnp.ones((7, 7)))(c), None
        return jax.lax.scan(body, y.reshape(-1, 7), length=3)[0]

    assert walked(function, x, k) == 2 * 2 * 64 * (25 * 3 * 7 + 3 * 7 * 7)


@pytest.mark.parametrize('config', [
    dvae.Config(image_size=16, vocab=24, hidden=8, n_init=12, groups=3, blocks_per_group=2),
    dvae.Config(image_size=24, vocab=16, widths=(8, 12), blocks_per_group=(1, 3), groups=2, patch=3,
                bottleneck=5, n_init=20, likelihood='mse'),
    dvae.Config(image_size=16, vocab=20, widths=(8, 8), groups=2, blocks_per_group=1, n_init=8),
])
def test_dvae(config):
    params = abstract(dvae, config)
    images = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.uint8)
    ids = jax.ShapeDtypeStruct((1, *config.grid), jnp.int32)
    weights = jax.ShapeDtypeStruct((1, *config.grid, config.vocab), jnp.float32)
    found = {
        'encoder': walked(lambda p, x: dvae.encode(p, config, x), params, images),
        'decoder': walked(lambda p, x: dvae.decode(p, config, x), params, ids),
        'codebook': walked(lambda p, w: w @ p['codebook']['kernel'][0, 0], params, weights)}
    assert found == {part: dvae.flops(config, [part]) for part in found}
    assert dvae.flops(config) == sum(found.values())


def test_dvae_of_the_paper():
    """At 256 pixels; the decoder does less than in the released code, which repeats pixels first:
    there, 1x1 convolutions from 8n, 4n and 2n channels, 3 at each pixel, run on repeated ones."""
    config = dvae.Config()
    assert dvae.flops(config, ['encoder']) == pytest.approx(272e9, rel=2e-3)
    n, wasted = config.hidden, 0
    for coarse, side in ((8 * n, 32), (4 * n, 64), (2 * n, 128)):
        fine = coarse // 2
        wasted += 3 * 2 * side**2 * coarse * (fine + fine // 4)
    assert dvae.flops(config, ['codebook', 'decoder']) + wasted == pytest.approx(308e9, rel=2e-3)


def test_clip():
    config = clip.Config(image_size=12, patch=4, image_width=16, image_depth=2, image_heads=2,
                         text_length=5, text_vocab=11, text_width=8, text_depth=3, text_heads=2,
                         embedding=6)
    images, text = jnp.zeros((1, 12, 12, 3), jnp.uint8), jnp.zeros((1, 5), jnp.int32)
    found = walked(lambda p, x, t: clip.score(p, config, x, t), abstract(clip, config), images,
                   text)
    hidden = 4 * config.text_depth * config.text_width * (6 * 5 // 2)  # pairs above the diagonal
    assert clip.flops(config) == found - hidden
    # ViT-B/32 at 224 pixels and a text of 77 states: 4.4 and 2.9 billion multiply-adds.
    assert clip.flops(clip.Config()) == pytest.approx(2 * (4.4e9 + 2.95e9), rel=0.02)


@pytest.mark.parametrize('config', [
    dalle.Config(depth=4, width=16, heads=2, text_length=5, text_vocab=13, grid=(4, 4),
                 image_vocab=11, kernel=3, remat='none', attention='dense'),
    dalle.Config(depth=9, width=8, heads=2, text_length=4, text_vocab=9, grid=(3, 5),
                 image_vocab=7, kernel=5, remat='full', attention='dense'),
])
def test_dalle(config):
    length = config.text_length + config.image_length
    text = jnp.zeros((1, config.text_length - 1), jnp.int32)
    ids = jnp.zeros((1, *config.grid), jnp.int32)
    found = walked(lambda p, t, i: dalle.likelihood(p, config, t, i), abstract(dalle, config),
                   text, ids)
    hidden = sum(length**2 - int(patterns.mask(kind, config.blocks.layout).sum())
                 for kind in config.blocks.patterns)
    assert dalle.flops(config) == found - 4 * config.width * hidden


def test_dalle_of_the_paper():
    """64 layers: 47 rows, 16 columns and one convolution over 256 text and 32x32 image states."""
    prefix = 256 * 257 // 2 + 1024 * 256  # text to text, image to text
    pairs = 64 * prefix + 47 * 33_264 + 16 * 16_896 + 61_344
    for name, d, billions in (('12b', 3968, 73.9), ('5.6b', 2688, 34.2), ('2.8b', 1920, 17.7),
                              ('1.4b', 1344, 8.8)):
        heads = d * (255 * 16_384 + 1024 * 8_192)
        found = dalle.flops(dalle.PRESETS[name])
        assert found == 2 * (64 * 1280 * 12 * d * d + 2 * d * pairs + heads)
        # A training step, a token; with both vocabularies at every one.
        everywhere = found + 2 * (d * 1280 * 24_576 - heads)
        assert 3 * everywhere / 1280 == pytest.approx(billions * 1e9, rel=5e-3)
