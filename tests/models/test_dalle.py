"""DALL-E: the paper's counts, the sequence, the loss in float64, and drawing token by token."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_jax.models import dalle, decoding, losses, patterns
from dalle_jax.models.context import Context, Frozen
from tests.models import test_transformer as stack

CONFIG = dalle.Config(depth=4, width=8, heads=2, text_length=5, text_vocab=11, grid=(3, 4),
                      image_vocab=13, kernel=3, remat='none', std=0.4, embed_std=0.7)
DEEP = dataclasses.replace(CONFIG, depth=9)
TEXT = np.array([[3, 5, 0, 0], [1, 2, 9, 4]])


def shapes(config):
    return jax.eval_shape(lambda: dalle.init(config, jax.random.key(0))[0])


def parameters(config, seed=0, scale=0.4):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape, scale=scale).astype(np.float32),
                        shapes(config))


def codes(count=2, config=CONFIG, seed=1):
    return np.random.default_rng(seed).integers(0, config.image_vocab, (count, *config.grid))


@functools.partial(jax.jit, static_argnums=(0, 3))
def terms(config, params, batch, train=True):
    return dalle.loss(params, {}, batch, Context(config, train=train))


@functools.partial(jax.jit, static_argnums=1)
def likelihood(params, config, text, ids):
    return dalle.likelihood(params, config, text, ids)


def objective(params, config, batch):
    return sum(t.weight * t.sum / t.count for t in terms(config, params, batch)[0].values())


# -- sizes -----------------------------------------------------------------------------------------


def test_parameters_of_the_12b_model():
    tree = shapes(dalle.PRESETS['12b'])
    sizes = {jax.tree_util.keystr(path, simple=True, separator='/'): x.size
             for path, x in jax.tree.leaves_with_path(tree)}

    def count(pattern):
        return sum(n for name, n in sizes.items() if re.search(pattern, name))

    assert count('kernel$') == 12_092_178_432
    assert count('^transformer/.*(bias|gain)$') == 3_309_312
    assert count('^(text|image)/') == 99_811_072
    assert count('^heads/') == 97_517_568
    assert sum(sizes.values()) == 12_292_816_384


@pytest.mark.parametrize('name,layers,heads,width,matrices,total', [
    ('tiny', 4, 4, 256, '3.15M', '15.9M'), ('small', 12, 8, 512, '37.7M', '63.3M'),
    ('base', 24, 12, 768, '170M', '208M'), ('large', 32, 16, 1024, '403M', '454M'),
    ('0.7b', 64, 15, 960, '708M', '756M'), ('1.3b', 64, 20, 1280, '1.258B', '1.323B'),
    ('1.4b', 64, 21, 1344, '1.387B', '1.455B'), ('2.8b', 64, 30, 1920, '2.831B', '2.928B'),
    ('5.6b', 64, 42, 2688, '5.549B', '5.685B'), ('12b', 64, 62, 3968, '12.092B', '12.293B')])
def test_family(name, layers, heads, width, matrices, total):
    config = dalle.PRESETS[name]
    assert (config.depth, config.heads, config.width) == (layers, heads, width)
    assert width == 64 * heads
    assert config.blocks.patterns[-1] == 'conv'
    tree = jax.tree.leaves_with_path(shapes(config))
    for expected, number in (
            (matrices, sum(x.size for path, x in tree if path[-1].key == 'kernel')),
            (total, sum(x.size for _, x in tree))):
        unit = {'M': 1e6, 'B': 1e9}[expected[-1]]
        digits = len(expected[:-1].partition('.')[2])
        assert f'{number / unit:.{digits}f}{expected[-1]}' == expected
    assert set(dalle.PRESETS) == {'tiny', 'small', 'base', 'large', '0.7b', '1.3b', '1.4b', '2.8b',
                                  '5.6b', '12b'}


def test_full_size_programs_trace():
    config, spec = dalle.PRESETS['12b'], jax.ShapeDtypeStruct
    params = shapes(config)
    batch = {'text': spec((2, 255), jnp.int32), 'codes': spec((2, 32, 32), jnp.int32)}
    grads = jax.eval_shape(lambda p, b: jax.grad(objective)(p, config, b), params, batch)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
    ids, logp = jax.eval_shape(
        lambda p, text, keys: dalle.generate(p, config, text, keys=keys, dtype=jnp.bfloat16),
        params, spec((1, 255), jnp.int32), jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (1, 64))))
    assert (ids.shape, logp.shape) == ((1, 64, 32, 32), (1, 64))
    caches = jax.eval_shape(lambda: decoding.empty_caches(config.blocks, 1, 64, jnp.bfloat16))
    per_candidate = sum(x.size * 2 for x in jax.tree.leaves(caches)) / 64
    # Keys and values in bfloat16: 47 rows of 32, 16 columns of 1024, 191, and the last state's.
    assert per_candidate == 2 * 3968 * 2 * (47 * 32 + 16 * 1024 + 191 + 64)


def test_axes_are_the_trees():
    axes = dalle.axes(DEEP)
    assert jax.tree.map(lambda x: len(x.shape), shapes(DEEP)) == jax.tree.map(
        len, axes, is_leaf=lambda x: isinstance(x, tuple))
    assert axes['heads']['text'] == ('embed', None)
    assert axes['text']['tokens'] == (None, 'embed')


def test_initial_values():
    params, state = jax.jit(dalle.init, static_argnums=0)(
        dataclasses.replace(CONFIG, width=64, depth=1), jax.random.key(3))
    assert state == {}
    assert params['text']['tokens'].std() == pytest.approx(0.7, rel=0.1)
    assert params['heads']['image'].std() == pytest.approx(0.4, rel=0.1)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))


@pytest.mark.parametrize('changes,message', [
    (dict(heads=3), 'width=8 is not divisible by heads=3'), (dict(text_length=1), 'text_length=1'),
    (dict(kernel=4), 'kernel=4 must be odd'), (dict(grid=(0, 4)), 'rows=0'),
    (dict(pads='some'), "pads='some'"), (dict(remat='half'), "remat='half'"),
    (dict(patterns=('bidirectional',) * 4), 'no pattern may see ahead'),
    (dict(patterns=['row']), '1 patterns for depth=4'), (dict(std=-1), 'std=-1'),
    (dict(caption_dropout=1.0), 'caption_dropout=1.0'), (dict(attention='flash'), 'flash')])
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_config_from_json_is_hashable():
    lists = dataclasses.replace(CONFIG, grid=[3, 4], patterns=['row', 'column', 'row', 'conv'])
    assert hash(lists) == hash(dataclasses.replace(lists, grid=(3, 4)))
    assert lists.blocks == CONFIG.blocks


def test_fit_and_batch_spec():
    tokenizer = types.SimpleNamespace(grid=(7, 9), vocab=77, image_size=36)
    config = dalle.fit(CONFIG, image_tokenizer_config=tokenizer, text_vocab=99)
    assert (config.grid, config.image_vocab, config.text_vocab) == ((7, 9), 77, 99)
    assert dalle.fit(CONFIG) == CONFIG
    spec = dalle.batch_spec(CONFIG, {'image': Frozen(None, tokenizer, None)})
    assert {k: (v.shape, v.dtype) for k, v in spec.items()} == {
        'image': ((36, 36, 3), jnp.uint8), 'text': ((4,), jnp.int32)}
    assert {k: v.shape for k, v in dalle.batch_spec(CONFIG).items()} == {
        'codes': (3, 4), 'text': (4,)}


# -- the loss --------------------------------------------------------------------------------------


def oracle(params, config, text, image):
    """Negative log-likelihoods of each token in float64: text [B, T - 1], image [B, I]."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    states = []
    for ids, grid in zip(text, image):
        columns = config.grid[1]
        previous = [p['text']['start']] + [
            p['text']['tokens'][t] if t else p['text']['pads'][slot]
            for slot, t in enumerate(ids, start=1)]
        states.append([x + y for x, y in zip(previous, p['text']['positions'])])
        previous = [p['image']['start']] + [p['image']['tokens'][i] for i in grid.reshape(-1)[:-1]]
        states[-1] += [x + p['image']['rows'][slot // columns] + p['image']['columns'][
            slot % columns] for slot, x in enumerate(previous)]
    out = stack.oracle(params['transformer'], config.blocks, np.array(states))

    def nll(states, head, targets):
        logits = states @ p['heads'][head]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -np.take_along_axis(logp, targets[..., None], -1)[..., 0]

    last = config.text_length - 1  # of which nothing is asked
    return (nll(out[:, :last], 'text', text),
            nll(out[:, last + 1:], 'image', image.reshape(len(image), -1)))


@pytest.mark.parametrize('config', [CONFIG, DEEP], ids=['unrolled', 'scanned'])
def test_loss_is_the_oracle(config):
    params, image = parameters(config), codes()
    got, metrics, state = terms(config, params, {'text': TEXT, 'codes': image})
    of_text, of_image = oracle(params, config, TEXT, image)
    np.testing.assert_allclose(got['text'].sum, of_text.sum(), rtol=1e-5)
    np.testing.assert_allclose(got['image'].sum, of_image.sum(), rtol=1e-5)
    assert (got['text'].count, got['image'].count) == (8, 24)
    assert (got['text'].weight, got['image'].weight) == (1 / 8, 7 / 8)
    assert metrics == {} and state == {}
    likelihoods = likelihood(params, config, TEXT, image)
    np.testing.assert_allclose(likelihoods[0], -of_text.sum(1), rtol=1e-5)
    np.testing.assert_allclose(likelihoods[1], -of_image.sum(1), rtol=1e-5)
    np.testing.assert_allclose(dalle.text_likelihood(params, config, TEXT), likelihoods[0],
                               rtol=1e-5)
    metrics = terms(config, params, {'text': TEXT, 'codes': image}, False)[1]
    np.testing.assert_allclose(metrics['text_nats_per_token'][0], of_text[TEXT > 0].sum(),
                               rtol=1e-5)


@pytest.mark.parametrize('pads,counted', [
    ('all', [[1, 1, 1, 1], [1, 1, 1, 1]]), ('first', [[1, 1, 1, 0], [1, 1, 1, 1]]),
    ('none', [[1, 1, 0, 0], [1, 1, 1, 1]])])
def test_pads_that_are_targets(pads, counted):
    config = dataclasses.replace(CONFIG, pads=pads)
    np.testing.assert_array_equal(dalle.text_targets(config, TEXT), counted)


def test_uncounted_pads():
    config = dataclasses.replace(CONFIG, pads='first')
    counted = [[1, 1, 1, 0], [1, 1, 1, 1]]
    params, image = parameters(config), codes()
    got = terms(config, params, {'text': TEXT, 'codes': image}, False)
    of_text, _ = oracle(params, config, TEXT, image)
    np.testing.assert_allclose(got[0]['text'].sum, (of_text * counted).sum(), rtol=1e-5)
    assert got[0]['text'].count == 7 == got[1]['text_accuracy'][1]
    text_logp, _ = likelihood(params, config, TEXT, image)
    np.testing.assert_allclose(text_logp, -(of_text * counted).sum(1), rtol=1e-5)


def test_accuracies():
    """With a head that adds a million to the logits of token 1, all predictions are 1."""
    params = parameters(CONFIG)
    params['transformer']['norm']['gain'][:] = 0
    for kind in ('text', 'image'):
        params['heads'][kind][:] = 0
        params['heads'][kind][:, 1] = 1e6 * params['transformer']['norm']['bias']
    image = codes()
    metrics = terms(CONFIG, params, {'text': TEXT, 'codes': image}, False)[1]
    assert metrics.pop('text_nats_per_token')[1] == 6
    assert metrics == {'text_accuracy': ((TEXT == 1).sum(), 8),
                       'image_accuracy': ((image == 1).sum(), 24)}


def test_every_slot_has_its_own_padding():
    """Each padded slot's row of the table, and no other, moves the loss."""
    params, batch = parameters(CONFIG), {'text': TEXT, 'codes': codes()}
    grads = jax.jit(jax.grad(lambda p: objective(p, CONFIG, batch)))(params)
    moved = np.abs(grads['text']['pads']).sum(-1) > 0
    assert moved.tolist() == [False, False, False, True, True]  # slots 3, 4: the 3rd and 4th token
    assert not grads['text']['tokens'][0].any()  # id 0 is never a token


def test_microbatches_add_up():
    config = dataclasses.replace(CONFIG, pads='first')
    params, image = parameters(config), codes()
    whole = terms(config, params, {'text': TEXT, 'codes': image}, False)[0]
    parts = [terms(config, params, {'text': TEXT[i:i + 1], 'codes': image[i:i + 1]}, False)[0]
             for i in range(2)]
    for name, term in whole.items():
        np.testing.assert_allclose(sum(p[name].sum for p in parts), term.sum, rtol=1e-5)
        assert sum(p[name].count for p in parts) == term.count


def test_dropped_captions():
    """A dropped caption is the empty one, and its text has no loss."""
    config = dataclasses.replace(CONFIG, caption_dropout=0.5)
    params = jax.tree.map(jnp.asarray, parameters(config))
    batch = {'text': TEXT, 'codes': codes()}
    none, both = (oracle(params, config, text, batch['codes']) for text in (TEXT, 0 * TEXT))
    run = jax.jit(lambda key: dalle.loss(params, {}, batch, Context(config, key, train=True))[0])
    seen = set()
    for seed in range(12):
        got = run(jax.random.key(seed))
        fits = [dropped for dropped in ((0, 0), (0, 1), (1, 0), (1, 1)) if np.isclose(
            got['image'].sum, sum((both if d else none)[1][i].sum() for i, d in enumerate(dropped)),
            rtol=1e-5)]
        assert len(fits) == 1
        kept = [i for i, d in enumerate(fits[0]) if not d]
        np.testing.assert_allclose(got['text'].sum, none[0][kept].sum(), rtol=1e-5)
        assert got['text'].count == max(1, 4 * len(kept))
        seen |= set(fits)
    assert len(seen) == 4
    validation = dalle.loss(params, {}, batch, Context(config))[0]
    np.testing.assert_allclose(validation['image'].sum, none[1].sum(), rtol=1e-5)


def test_flops():
    """By hand for one layer; and of the family, where 6 a parameter of the blocks is most of it."""
    config = dataclasses.replace(CONFIG, depth=1, patterns=('row',))
    pairs = 5 * 6 // 2 + 12 * 5 + sum(min(q, 4) + 1 for q in range(12))
    assert dalle.flops(config) == (
        2 * 17 * (8 * 24 + 8 * 8 + 2 * 8 * 32) + 4 * 8 * pairs + 2 * 8 * (4 * 11 + 12 * 13))
    for name, blocks in {'1.4b': 1.387e9, '2.8b': 2.831e9, '5.6b': 5.549e9, '12b': 12.092e9}.items():
        assert 1.01 < 3 * dalle.flops(dalle.PRESETS[name]) / (6 * 1280 * blocks) < 1.05, name


@pytest.mark.parametrize('pattern', patterns.PATTERNS)
def test_nothing_sees_ahead(pattern):
    """Exactly zero: gradients of a token's likelihood by the embedding of it or of a later one."""
    config = dataclasses.replace(CONFIG, depth=1, patterns=(pattern,))
    params = parameters(config)
    text, image = TEXT[1:], codes(1)
    # Distinct tokens, so that the gradient by a table's row is that by one state.
    image[:] = np.arange(12).reshape(3, 4)
    params['image']['tokens'] = params['image']['tokens'][:12]

    def nlls(tables):
        p = {**params, 'text': {**params['text'], 'tokens': tables[0]},
             'image': {**params['image'], 'tokens': tables[1]}}
        states = dalle._states(p, config, text, image.reshape(1, -1), jnp.float32,
                               lambda x, axes: x)
        return jnp.concatenate([losses.vocabulary_cross_entropy(
            x, p['heads'][kind], ids, jnp.float32)[0] for x, kind, ids in zip(
                states, ('text', 'image'), (text, image.reshape(1, -1)))])

    tables = params['text']['tokens'], params['image']['tokens']
    by_text, by_image = (np.abs(np.asarray(j)).sum(-1) > 0 for j in jax.jit(jax.jacrev(nlls))(
        tables))
    by_text = by_text[:, text[0]]
    # Token j stands in state j + 1 and is thus seen by the predictions of later tokens only.
    assert (by_text[:4] == np.tri(4, k=-1, dtype=bool)).all()
    assert by_text[4:].all()  # every image state sees all of the text
    assert not by_image[:4].any()
    assert not np.triu(by_image[4:]).any()
    assert by_image[4:][np.arange(1, 12), np.arange(11)].all()


TOKENIZER = types.SimpleNamespace(
    encode=lambda params, config, images, dtype: jnp.round(
        params * images[:, ::2, ::2, 0].astype(jnp.float32)).astype(jnp.int32),
    decode=lambda params, config, ids: jnp.stack([ids / 12.0] * 3, -1).repeat(2, 1).repeat(2, 2))


def tokenized():
    image = codes()
    pictures = np.repeat(np.repeat(image, 2, 1), 2, 2)[..., None].repeat(3, -1).astype(np.uint8)
    config = dataclasses.make_dataclass('Config', ['grid', 'vocab', 'image_size'], frozen=True)(
        (3, 4), 13, 6)
    return image, pictures, {'image': Frozen(TOKENIZER, config, jnp.float32(1))}


def test_images_are_tokenized_in_the_loss():
    image, pictures, frozen = tokenized()
    params = parameters(CONFIG)
    want = terms(CONFIG, params, {'text': TEXT, 'codes': image})[0]
    got = jax.jit(lambda p, images: dalle.loss(
        p, {}, {'text': TEXT, 'image': images}, Context(CONFIG, train=True, frozen=frozen))[0])(
            params, pictures)
    np.testing.assert_allclose(got['image'].sum, want['image'].sum, rtol=1e-6)
    with pytest.raises(ValueError, match='frozen.image'):
        terms(CONFIG, params, {'text': TEXT, 'image': pictures})


def test_caption_of_another_length():
    with pytest.raises(ValueError, match='captions of 3 tokens.*text_length - 1 = 4'):
        terms(CONFIG, parameters(CONFIG), {'text': TEXT[:, 1:], 'codes': codes()})


def test_golden_step():
    """Loss and gradient norm of one batch; parameters without a random generator."""
    count = 0

    def waves(x):
        nonlocal count
        count += x.size
        return np.sin(np.arange(count - x.size, count, dtype=np.float32)).reshape(x.shape) / 2

    params = jax.tree.map(waves, shapes(CONFIG))
    batch = {'text': TEXT, 'codes': np.arange(24).reshape(2, 3, 4) % 13}
    loss, grads = jax.jit(jax.value_and_grad(lambda p: objective(p, CONFIG, batch)))(params)
    norm = np.sqrt(sum(float(np.sum(np.square(g))) for g in jax.tree.leaves(grads)))

    def exact(distance):
        """The float64 oracle's loss, this far along the gradient."""
        moved = jax.tree.map(lambda p, g: p + distance / norm * np.asarray(g, np.float64),
                             params, grads)
        of_text, of_image = oracle(moved, CONFIG, TEXT, batch['codes'])
        return of_text.mean() / 8 + of_image.mean() * 7 / 8

    assert float(loss) == pytest.approx(exact(0), rel=1e-5)
    # Only along the true gradient is the slope the norm.
    assert norm == pytest.approx((exact(1e-4) - exact(-1e-4)) / 2e-4, rel=1e-5)
    assert (float(loss), norm) == (pytest.approx(2.594367, rel=1e-5),
                                   pytest.approx(0.3740567, rel=1e-4))


def test_snapshot():
    image, pictures, frozen = tokenized()
    params = jax.tree.map(jnp.asarray, parameters(CONFIG))
    arrays = dalle.snapshot(params, {}, {'text': TEXT, 'image': pictures},
                            Context(CONFIG, frozen=frozen))
    assert {name: np.shape(x) for name, x in arrays.items()} == {
        'matrix/row': (17, 17), 'matrix/column': (17, 17), 'matrix/conv': (17, 17),
        'images/originals': (2, 6, 8, 3), 'images/tokenised': (2, 6, 8, 3),
        'images/samples': (2, 6, 8, 3)}
    np.testing.assert_allclose(arrays['images/tokenised'] * 12, pictures, rtol=1e-6)
    for kind in ('row', 'column', 'conv'):
        np.testing.assert_array_equal(
            np.asarray(arrays[f'matrix/{kind}']) > 0,
            patterns.mask(kind, patterns.Layout(5, 3, 4, 3)))
    assert set(dalle.snapshot(parameters(CONFIG), {}, {'text': TEXT, 'codes': image},
                              Context(CONFIG))) == {'matrix/row', 'matrix/column', 'matrix/conv'}
