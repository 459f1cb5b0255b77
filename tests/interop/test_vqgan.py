import json
from pathlib import Path

import jax
import numpy as np
import pytest

from dalle_jax.interop import vqgan as interop
from dalle_jax.models import vqgan
from tests.interop.random_weights import random_weights

STORED = np.load(Path(__file__).parent / 'fixtures' / 'vqgan.npz')
PUBLISHED = {kind: {name: random_weights(name, shape) for name, shape in
                    json.loads(str(STORED[f'{kind}_names'])).items()}
             for kind in ('nearest', 'logits')}
SIZES = {'nearest': dict(widths=(32, 64, 64), attention=(2,), embedding=8),
         'logits': dict(widths=(32, 64), attention=(1,), embedding=12, quantizer='logits')}


@pytest.mark.parametrize('kind', PUBLISHED)
def test_outputs_are_those_of_the_released_code(kind):
    config, params = interop.from_published(PUBLISHED[kind])
    assert config == vqgan.Config(vocab=20, blocks=1, latent=12, **SIZES[kind])
    codes = STORED[f'{kind}_codes'].astype(np.int32)

    @jax.jit
    def outputs(params):
        return (vqgan.latent(params, config, STORED['images']),
                vqgan.encode(params, config, STORED['images']),
                vqgan.decode(params, config, codes))

    latent, ids, decoded = outputs(params)
    np.testing.assert_allclose(latent, STORED[f'{kind}_latent'], atol=1e-4)
    np.testing.assert_array_equal(ids, codes)
    np.testing.assert_allclose(decoded, np.clip((STORED[f'{kind}_decoded'] + 1) / 2, 0, 1),
                               atol=1e-4)
    assert len(np.unique(codes)) > 5 and STORED[f'{kind}_decoded'].std() > 0.3


@pytest.mark.parametrize('kind', PUBLISHED)
def test_out_again(kind):
    config, params = interop.from_published(PUBLISHED[kind])
    found = interop.to_published(params, config)
    assert found.keys() == PUBLISHED[kind].keys()
    for name in found:
        np.testing.assert_array_equal(found[name], PUBLISHED[kind][name], name)
    shapes = jax.eval_shape(lambda: vqgan.init(config, jax.random.key(0))[0])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params)
    assert jax.tree.map(lambda x: len(x.shape), shapes) == jax.tree.map(
        len, vqgan.axes(config), is_leaf=lambda x: isinstance(x, tuple))


def test_what_belongs_to_training_is_left_out():
    """A checkpoint of the trainer: the discriminator, the metric, numbers of its own."""
    whole = {f'state_dict.{name}': a for name, a in PUBLISHED['nearest'].items()}
    whole |= {'state_dict.loss.discriminator.main.0.weight': np.zeros(3),
              'optimizer.step': np.zeros(1)}
    config, params = interop.from_published(whole)
    expected = interop.from_published(PUBLISHED['nearest'])
    assert config == expected[0]
    jax.tree.map(np.testing.assert_array_equal, params, expected[1])


@pytest.mark.parametrize('changes,message', [
    ({'decoder.norm_out.bias': None}, 'no VQGAN: lacking decoder.norm_out.bias'),
    ({'quant_conv.weight': None}, 'no VQGAN: quant_conv.weight is missing'),
    ({'quantize.embedding.weight': None}, 'no VQGAN: quantize.embed.weight is missing'),
    ({'encoder.extra.weight': np.zeros(3)}, 'not known encoder.extra.weight'),
    ({'decoder.conv_out.bias': np.zeros(4)}, r'decoder.conv_out.bias has the shape \[4\].*\[3\]'),
    ({'decoder.conv_out.bias': np.array([0, np.nan, 0])}, 'decoder.conv_out.bias holds 1 values'),
    ({'encoder.down.0.block.0.conv2.weight': np.zeros((33, 32, 3, 3))}, r'multiples of 32'),
])
def test_other_weights_are_refused_by_name(changes, message):
    arrays = {n: a for n, a in (PUBLISHED['nearest'] | changes).items() if a is not None}
    with pytest.raises(ValueError, match=message):
        interop.from_published(arrays)


@pytest.mark.parametrize('preset,count', [
    ('f16', 76_073_859), ('f16_1024', 72_141_699), ('f8', 68_995_971)])
def test_presets(preset, count):
    """The counts are those of the released code with the released configs."""
    config = vqgan.PRESETS[preset]
    assert config.grid == ((32, 32) if preset == 'f8' else (16, 16))
    names = interop._names(config)
    assert len({name for name, _ in names.values()}) == len(names)
    assert sum(int(np.prod(shape)) for _, shape in names.values()) == count


@pytest.mark.parametrize('change,message', [
    ({'widths': (48,)}, 'multiples of 32'), ({'image_size': 250}, 'downsampling factor 16'),
    ({'quantizer': 'x'}, "quantizer='x'"), ({'widths': ()}, 'multiples of 32'),
])
def test_bad_sizes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        vqgan.Config(**change)


def test_sides_must_be_divisible():
    config, params = interop.from_published(PUBLISHED['nearest'])
    with pytest.raises(ValueError, match='images of 16x18 are not divisible by .* factor 4'):
        vqgan.encode(params, config, np.zeros((1, 16, 18, 3), np.uint8))
