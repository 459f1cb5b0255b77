import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from dalle_jax.interop import dvae as interop
from dalle_jax.interop import files
from dalle_jax.models import dvae

FIXTURES = Path(__file__).parent / 'fixtures'
ENCODER, DECODER = (files.read(FIXTURES / f'dalle_{part}.pkl') for part in ('encoder', 'decoder'))
CONFIG, PARAMS = interop.from_published(ENCODER, DECODER)
EXPECTED = np.load(FIXTURES / 'dvae.npz')
CODES = EXPECTED['codes'].astype(np.int32)


@jax.jit
def networks(params):
    """Logits of the images, maps and pixels of the codes."""
    images, codes = EXPECTED['images'], CODES
    logits = dvae._encoder(CONFIG).apply({'params': params['encoder']}, dvae.map_pixels(images))[1]
    maps = dvae.decode_embedded(params, CONFIG, dvae.lookup(params, codes), np.float32)
    return logits, maps, dvae.read_out(maps, CONFIG)


def test_outputs_are_those_of_the_released_code():
    for name, found in zip(('logits', 'maps', 'decoded'), networks(PARAMS)):
        np.testing.assert_allclose(found, EXPECTED[name], atol=1e-4)
    np.testing.assert_array_equal(np.argmax(networks(PARAMS)[0], axis=-1), CODES)
    assert EXPECTED['logits'].std() > 0.5 and EXPECTED['maps'].std((0, 1, 2)).min() > 0.04


def test_every_kernel_plays_its_part():
    """Two of one shape that were mistaken for each other would have shown above."""
    base = networks(PARAMS)
    leaves, tree = jax.tree_util.tree_flatten_with_path(PARAMS)
    for i, (path, leaf) in enumerate(leaves):
        if leaf.ndim == 4:
            moved = [np.roll(x, 1, axis=-1) + 0.5 if j == i else x
                     for j, (_, x) in enumerate(leaves)]
            found = networks(jax.tree.unflatten(tree, moved))
            part = 0 if path[0].key == 'encoder' else 1
            assert float(np.abs(found[part] - base[part]).max()) > 1e-3, path


def test_sizes():
    assert CONFIG == dvae.Config(vocab=24, hidden=4, n_init=6)
    shapes = jax.eval_shape(lambda: dvae.init(CONFIG, jax.random.key(0))[0])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), PARAMS)


def test_out_again():
    for found, published in zip(interop.to_published(PARAMS, CONFIG), (ENCODER, DECODER)):
        assert found.keys() == published.keys()
        for name in found:
            np.testing.assert_array_equal(found[name], published[name], name)


def test_released_sizes():
    """App. A.1: 97.6 million parameters."""
    names = interop._names(dvae.Config())
    sizes = {part: sum(int(np.prod(shape)) for owner, _, shape in names.values() if owner == part)
             for part in ('encoder', 'decoder')}
    assert sizes == {'encoder': 53_786_240, 'decoder': 43_829_766}


@pytest.mark.parametrize('changes,message', [
    ({'patch': 2}, 'patch=2, and the released architecture has 1'),
    ({'bottleneck': 8}, 'bottleneck=8'), ({'widths': (8, 8, 8, 8)}, 'group_widths='),
    ({'likelihood': 'mse'}, "likelihood='mse'"), ({'groups': 3}, 'groups=3'),
    ({'post_gain': 0.5}, 'post_gain=0.5'), ({'blocks_per_group': (1, 2, 2, 2)}, 'all groups'),
])
def test_other_architectures_cannot_be_written(changes, message):
    with pytest.raises(ValueError, match=message):
        interop.to_published(PARAMS, dataclasses.replace(CONFIG, **changes))


def without(arrays, name):
    return {key: a for key, a in arrays.items() if key != name}


RES = 'blocks.group_2.block_1.res_path.conv_1.w'


@pytest.mark.parametrize('encoder,decoder,message', [
    (DECODER, ENCODER, 'no encoder of .*blocks.input.w has the shape .*7x7 convolution'),
    (ENCODER, ENCODER, 'no decoder of .*blocks.input.w has the shape .*1x1 convolution'),
    ({'conv1.weight': np.zeros(3)}, DECODER, 'blocks.input.w is missing; it has conv1.weight'),
    (without(ENCODER, RES), DECODER, f'no encoder of .*: lacking {RES}'),
    (ENCODER, DECODER | {'blocks.extra.w': np.zeros(1)}, 'no decoder .*not known blocks.extra.w'),
    (ENCODER | {RES: np.zeros((2, 4, 1, 1))}, DECODER, rf'{RES} has the shape \[2, 4, 1, 1\]'),
    (ENCODER, DECODER | {'blocks.input.b': np.array([0, np.inf, 0, 0, 0, 0])},
     'blocks.input.b holds 1 values that are not finite'),
    (ENCODER, DECODER | {'blocks.input.w': np.zeros((6, 25, 1, 1))}, r'\[6, 25, 1, 1\]'),
])
def test_other_weights_are_refused_by_name(encoder, decoder, message):
    with pytest.raises(ValueError, match=message):
        interop.from_published(encoder, decoder)
