import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models import clip
from dalle_jax.models.context import Context

TINY = clip.Config(image_size=12, patch=4, image_width=16, image_depth=2, image_heads=2,
                   text_length=6, text_vocab=20, text_width=12, text_depth=1, text_heads=2,
                   embedding=8)
PARAMS = clip.init(TINY, jax.random.key(0))[0]
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (5, 12, 12, 3), np.uint8)
TEXT = np.array([[3, 4, 5, 0, 0, 0], [7, 0, 0, 0, 0, 0], [2, 9, 9, 4, 1, 6], [5, 4, 3, 0, 0, 0],
                 [8, 8, 0, 0, 0, 0]], np.int32)

embed_image = jax.jit(clip.embed_image, static_argnums=1)
embed_text = jax.jit(clip.embed_text, static_argnums=1)


@jax.jit
def loss(params, images, text):
    terms, metrics, _ = clip.loss(params, {}, {'image': images, 'text': text},
                                  Context(TINY, train=True))
    return sum(t.weight * t.sum / t.count for t in terms.values()), metrics


def test_published_sizes():
    """The released ViT-B/32 has 151,277,313 parameters, and so has ours."""
    count = sum(x.size for x in jax.tree.leaves(
        jax.eval_shape(lambda: clip.init(clip.PRESETS['b32'], jax.random.key(0))[0])))
    assert count == 151_277_313


def test_loss_is_the_symmetric_cross_entropy():
    image = np.asarray(embed_image(PARAMS, TINY, IMAGES), np.float64)
    text = np.asarray(embed_text(PARAMS, TINY, TEXT), np.float64)
    logits = np.exp(float(PARAMS['log_scale'])) * image @ text.T

    def cross_entropy(rows):
        return np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(rows)])

    expected = (cross_entropy(logits) + cross_entropy(logits.T)) / 2
    found, metrics = loss(PARAMS, IMAGES, TEXT)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics['scale'][0], 1 / 0.07, rtol=1e-5)
    right = sum(row.argmax() == i for i, row in enumerate(logits))
    assert metrics['accuracy'][0] == right and metrics['accuracy'][1] == 5


def test_order_of_the_batch_does_not_matter():
    order = RNG.permutation(5)
    np.testing.assert_allclose(loss(PARAMS, IMAGES, TEXT)[0],
                               loss(PARAMS, IMAGES[order], TEXT[order])[0], rtol=1e-5)


def test_embeddings_are_unit_vectors_and_the_score_their_cosine():
    image, text = embed_image(PARAMS, TINY, IMAGES), embed_text(PARAMS, TINY, TEXT)
    np.testing.assert_allclose(np.linalg.norm(image, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(text, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(clip.score(PARAMS, TINY, IMAGES, TEXT),
                               np.sum(np.asarray(image) * np.asarray(text), -1), rtol=1e-5)


def test_text_is_read_up_to_its_end():
    """Every token counts, also of a caption that fills the context; padding beyond does not."""
    base = embed_text(PARAMS, TINY, TEXT)
    for row, length in enumerate((3, 1, 6, 3, 2)):
        for position in range(length):
            changed = TEXT.copy()
            changed[row, position] = 11
            moved = embed_text(PARAMS, TINY, changed)
            assert not np.allclose(moved[row], base[row], atol=1e-4), (row, position)
            others = np.arange(5) != row
            np.testing.assert_array_equal(moved[others], base[others])
    longer = dataclasses.replace(TINY, text_length=9)
    params = jax.tree.map(lambda x: x, PARAMS)
    params['text']['positions'] = jnp.concatenate([PARAMS['text']['positions'], jnp.ones((3, 12))])
    padded = np.pad(TEXT, ((0, 0), (0, 3)))
    np.testing.assert_allclose(embed_text(params, longer, padded), base, atol=1e-5)


def test_every_pixel_counts():
    base = embed_image(PARAMS, TINY, IMAGES)
    for place in ((0, 0, 0), (5, 7, 1), (11, 11, 2)):
        changed = IMAGES.copy()
        changed[(0, *place)] ^= 255
        assert not np.allclose(embed_image(PARAMS, TINY, changed)[0], base[0], atol=1e-5)


def test_gradient_reaches_every_parameter_and_learns():
    grad = jax.jit(jax.grad(lambda p: loss(p, IMAGES, TEXT)[0]))
    for path, leaf in jax.tree_util.tree_leaves_with_path(grad(PARAMS)):
        assert float(jnp.abs(leaf).max()) > 0, path
    params = PARAMS
    for _ in range(60):
        params = jax.tree.map(lambda p, g: p - 0.02 * g, params, grad(params))
    assert loss(params, IMAGES, TEXT)[0] < 0.2 * loss(PARAMS, IMAGES, TEXT)[0]


def test_temperature_is_clipped_at_one_hundredth():
    hot = PARAMS | {'log_scale': jnp.float32(9.0)}
    np.testing.assert_allclose(jnp.exp(clip.constrain_params(hot)['log_scale']), 100, rtol=1e-5)
    np.testing.assert_allclose(clip.constrain_params(PARAMS)['log_scale'], math.log(1 / 0.07),
                               rtol=1e-6)


@pytest.mark.parametrize('change,message', [
    ({'patch': 5}, 'image_size=12 is not divisible by patch=5'),
    ({'remat': 'some'}, "remat='some'"),
    ({'image_heads': 3}, 'width=16 is not divisible by heads=3'),
    ({'text_length': 0}, 'text_length=0'),
])
def test_bad_sizes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)
