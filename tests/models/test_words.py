"""The network of words: its loss in NumPy, what counts as a word, and its features on a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.metrics.features import Features
from dalle_jax.models import words
from dalle_jax.models.context import Context
from dalle_jax.training import partition
from tests.models.test_flops import walked

TINY = words.Config(image_size=12, text_length=6, text_vocab=12, patch=3, widths=(8, 12),
                    blocks_per_group=(1, 1))
PARAMS = words.init(TINY, jax.random.key(0))[0]
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (5, 12, 12, 3), np.uint8)
# Repeated words, a full caption, an empty one.
TEXT = np.array([[3, 4, 3, 3, 0, 0], [7, 0, 0, 0, 0, 0], [2, 9, 8, 4, 1, 6], [0] * 6,
                 [5, 5, 11, 0, 0, 0]], np.int32)


@jax.jit
def loss(params, images, text):
    terms, metrics, _ = words.loss(params, {}, {'image': images, 'text': text},
                                   Context(TINY, train=True))
    (term,) = terms.values()
    return term.weight * term.sum / term.count, metrics


def value(params, images=IMAGES, text=TEXT):
    return float(loss(params, images, text)[0])


def test_loss_and_metrics_by_the_formula():
    """-ln of each word's probability to be there, or not to be; the k best guesses."""
    odds = np.asarray(words.forward(PARAMS, TINY, IMAGES)[1], np.float64)
    p = 1 / (1 + np.exp(-odds))
    entropy, wrong, exact, right, count = 0, 0, 0, 0, 0
    for row, chances, text in zip(odds, p, TEXT.tolist()):
        told = set(text) - {0}
        entropy -= sum(np.log(c if word in told else 1 - c) for word, c in enumerate(chances))
        guessed = {word for word in range(12) if row[word] > 0}
        wrong += len(told ^ guessed)
        exact += told == guessed
        right += len(told & set(np.argsort(-row)[:len(told)].tolist()))
        count += len(told)
    found, metrics = loss(PARAMS, IMAGES, TEXT)
    np.testing.assert_allclose(found, entropy / 5, rtol=1e-5)
    assert {name: (float(a), float(b)) for name, (a, b) in metrics.items()} == {
        'wrong': (wrong, 5), 'exact': (exact, 5), 'precision': (right, count)}
    assert 0 < right < count and wrong


def test_words_count_once_and_padding_never():
    same = np.array([[4, 3, 4, 0, 0, 0], [7, 7, 7, 7, 7, 7], [9, 4, 2, 1, 6, 8], [0] * 6,
                     [0, 11, 0, 5, 0, 0]], np.int32)
    assert value(PARAMS, text=same) == value(PARAMS)
    other = TEXT.copy()
    other[1, 3] = 2
    assert value(PARAMS, text=other) != value(PARAMS)
    np.testing.assert_array_equal(np.argwhere(words.present(jnp.array(TEXT[:2]), 12)),
                                  [[0, 3], [0, 4], [1, 7]])


def test_gradient_reaches_every_parameter_and_learns():
    text = np.delete(TEXT, 3, axis=0)
    grad = jax.jit(jax.grad(lambda p: loss(p, IMAGES[:4], text)[0]))
    for path, leaf in jax.tree_util.tree_leaves_with_path(grad(PARAMS)):
        assert float(jnp.abs(leaf).max()) > 0, path
    params = PARAMS
    for _ in range(150):
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grad(params))
    assert value(params, IMAGES[:4], text) < 0.2 * value(PARAMS, IMAGES[:4], text)
    assert loss(params, IMAGES[:4], text)[1]['exact'][0] == 4


def test_log_odds_are_affine_in_the_features():
    """So the features are the penultimate layer."""
    features, odds = words.forward(PARAMS, TINY, IMAGES)
    head = PARAMS['logits']
    expected = features @ head['kernel'][0, 0] + head['bias'][None]
    np.testing.assert_allclose(odds, expected, rtol=1e-5, atol=1e-6)
    assert features.shape == (5, TINY.features) and np.all(features >= 0)


def test_distribution_of_words():
    """Each word weighted by its probability, so that certain words do not hide the others."""
    odds = np.asarray(words.forward(PARAMS, TINY, IMAGES)[1], np.float64)
    p = 1 / (1 + np.exp(-odds))
    logits = words.embed(PARAMS, TINY, IMAGES)['logits']
    np.testing.assert_allclose(jax.nn.softmax(logits), p / p.sum(axis=1, keepdims=True), rtol=1e-5)
    everywhere = PARAMS | {'logits': jax.tree.map(jnp.zeros_like, PARAMS['logits'])}
    everywhere['logits']['bias'] = jnp.where(jnp.arange(12) < 4, 30.0 + jnp.arange(12), -30)
    logits = words.embed(everywhere, TINY, IMAGES)['logits']
    np.testing.assert_allclose(jax.nn.softmax(logits)[:, :4], 1 / 4, rtol=1e-5)


def test_gradients_on_a_mesh():
    mesh = partition.make_mesh(partition.MeshConfig())
    placed = jax.device_put(PARAMS, partition.replicated(mesh))
    batch = {'image': IMAGES[:4], 'text': TEXT[:4]}

    def gradient(params, batch, **changes):
        def objective(params):
            terms, metrics, _ = words.loss(params, {}, batch, Context(TINY, train=True, **changes))
            return terms['words'].sum, metrics
        return jax.jit(jax.grad(objective, has_aux=True))(params)

    found = gradient(placed, partition.put_batch(batch, mesh),
                     constrain=partition.Partitioner(mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found,
                 gradient(PARAMS, batch))


def test_flops():
    params = jax.eval_shape(lambda: PARAMS)
    images = jax.ShapeDtypeStruct((1, 12, 12, 3), jnp.uint8)
    assert words.flops(TINY) == walked(lambda p, x: words.embed(p, TINY, x), params, images)


def test_features_of_many_on_a_mesh():
    """Whatever the batch and wherever it is, an image has the same features."""
    expected = words.embed(PARAMS, TINY, IMAGES)
    mesh = partition.make_mesh(partition.MeshConfig())
    placed = jax.device_put(PARAMS, partition.replicated(mesh))
    for features in (Features(PARAMS, TINY, batch=3),
                     Features(placed, TINY, 4, partition.Partitioner(mesh))):
        found = features.of(IMAGES)
        assert found.keys() == {'features', 'logits'}
        for name in found:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('images,message', [
    (np.zeros((2, 15, 15, 3), np.uint8), r'are \[15, 15, 3\], .* trained on \[12, 12, 3\]'),
    (np.zeros((2, 12, 12, 3), np.float32), 'give uint8'),
    (np.zeros((0, 12, 12, 3), np.uint8), 'give uint8')])
def test_refuses_images(images, message):
    with pytest.raises(ValueError, match=message):
        Features(PARAMS, TINY).of(images)


@pytest.mark.parametrize('change,message', [
    ({'patch': 5}, 'image_size=12 is not divisible by 10'),
    ({'widths': (8, 10)}, 'multiples of 4'),
    ({'blocks_per_group': (1,)}, 'one number for each resolution'),
    ({'text_vocab': 1}, 'text_vocab=1')])
def test_bad_sizes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)
