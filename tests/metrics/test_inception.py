"""FID's Inception: against PyTorch's results, NumPy in float64, and both publications' names."""

import jax
import numpy as np
import pytest

from dalle_jax.metrics import inception
from dalle_jax.metrics.inception import Features
from dalle_jax.training import partition
from tests.metrics import originals

STORED = np.load(originals.STORED)


@pytest.fixture(scope='module')
def published():
    """Random weights with the names and shapes of pytorch-fid's network."""
    lines = [line.split() for line in STORED['names']]
    return originals.weights({name: tuple(map(int, shape)) for name, *shape in lines})


@pytest.fixture(scope='module')
def params(published):
    return jax.device_put(inception.from_published(published))


@pytest.mark.parametrize('resize', ['tensorflow', 'pytorch'])
def test_features_of_the_originals(params, resize):
    """torch-fidelity's 'tensorflow', and pytorch-fid, which has no logits."""
    found = Features(params, inception.NAMES, resize, batch=2).of(originals.images(40, 52))
    for name in inception.NAMES[:4] if resize == 'pytorch' else inception.NAMES:
        expected = STORED[f'{resize}/{name}']
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, err_msg=name,
                                   atol=2e-6 * np.abs(expected).max())


# -- blocks in NumPy, float64, from the paper's figures --------------------------------------------


def window(x, height, width, stride, same):
    """[taps, B, H, W, C]: what each tap of a window sees, nan beyond the border."""
    pads = [(n // 2, n // 2) if same else (0, 0) for n in (height, width)]
    x = np.pad(x, ((0, 0), *pads, (0, 0)), constant_values=np.nan)
    rows, columns = ((n - size) // stride + 1 for n, size in zip(x.shape[1:3], (height, width)))
    return np.stack([x[:, i:i + stride * rows:stride, j:j + stride * columns:stride][
        :, :rows, :columns] for i in range(height) for j in range(width)])


def conv(published, name, x, stride=1, same=True):
    kernel = published[f'{name}.conv.weight'].astype(np.float64)
    taps = np.nan_to_num(window(x, *kernel.shape[2:], stride, same))
    gain, bias, mean, variance = (
        published[f'{name}.bn.{kind}'].astype(np.float64)
        for kind in ('weight', 'bias', 'running_mean', 'running_var'))
    x = np.einsum('tbhwc,oct->bhwo', taps, kernel.reshape(*kernel.shape[:2], -1))
    return np.maximum((x - mean) / np.sqrt(variance + 1e-3) * gain + bias, 0)


def block_5b(p, x):
    one, five = conv(p, '1x1', x), conv(p, '5x5_2', conv(p, '5x5_1', x))
    three = conv(p, '3x3dbl_3', conv(p, '3x3dbl_2', conv(p, '3x3dbl_1', x)))
    return one, five, three, conv(p, '_pool', np.nanmean(window(x, 3, 3, 1, True), axis=0))


def block_6a(p, x):
    three = conv(p, '3x3dbl_2', conv(p, '3x3dbl_1', x))
    return (conv(p, '3x3', x, 2, False), conv(p, '3x3dbl_3', three, 2, False),
            np.nanmax(window(x, 3, 3, 2, False), axis=0))


def block_6b(p, x):
    seven, double = x, x
    for i in range(1, 4):
        seven = conv(p, f'7x7_{i}', seven)
    for i in range(1, 6):
        double = conv(p, f'7x7dbl_{i}', double)
    pooled = np.nanmean(window(x, 3, 3, 1, True), axis=0)
    return conv(p, '1x1', x), seven, double, conv(p, '_pool', pooled)


def block_7a(p, x):
    three, seven = conv(p, '3x3_1', x), conv(p, '7x7x3_1', x)
    seven = conv(p, '7x7x3_3', conv(p, '7x7x3_2', seven))
    return (conv(p, '3x3_2', three, 2, False), conv(p, '7x7x3_4', seven, 2, False),
            np.nanmax(window(x, 3, 3, 2, False), axis=0))


def block_7(p, x, pool):
    three, double = conv(p, '3x3_1', x), conv(p, '3x3dbl_2', conv(p, '3x3dbl_1', x))
    return (conv(p, '1x1', x), conv(p, '3x3_2a', three), conv(p, '3x3_2b', three),
            conv(p, '3x3dbl_3a', double), conv(p, '3x3dbl_3b', double),
            conv(p, '_pool', pool(window(x, 3, 3, 1, True), axis=0)))


@pytest.mark.parametrize('name,channels,expected', [
    ('Mixed_5b', 192, block_5b), ('Mixed_6a', 288, block_6a), ('Mixed_6b', 768, block_6b),
    ('Mixed_7a', 768, block_7a), ('Mixed_7b', 1280, lambda p, x: block_7(p, x, np.nanmean)),
    ('Mixed_7c', 2048, lambda p, x: block_7(p, x, np.nanmax))])
def test_block(published, params, name, channels, expected):
    """The pooled branch of the last block takes the maximum, the others' leave out the border."""
    x = np.random.default_rng(0).uniform(-1, 1, (1, 5, 6, channels))
    place = f'{name}.branch'
    own = {key.removeprefix(place): value for key, value in published.items() if place in key}
    expected = np.concatenate(expected(own, x), axis=-1)
    block = jax.jit(lambda params, x: inception.block(params, inception.BLOCKS[name], x))
    found = block(params[name], x.astype(np.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# -- published names -------------------------------------------------------------------------------


# The frozen graph's names within a block, by the kind of block.
FIVE = {'1x1': 'conv', '5x5_1': 'tower/conv', '5x5_2': 'tower/conv_1', '3x3dbl_1': 'tower_1/conv',
        '3x3dbl_2': 'tower_1/conv_1', '3x3dbl_3': 'tower_1/conv_2', '_pool': 'tower_2/conv'}
SIX_A = {'3x3': 'conv', '3x3dbl_1': 'tower/conv', '3x3dbl_2': 'tower/conv_1',
         '3x3dbl_3': 'tower/conv_2'}
SIX = {'1x1': 'conv', '7x7_1': 'tower/conv', '7x7_2': 'tower/conv_1', '7x7_3': 'tower/conv_2',
       '7x7dbl_1': 'tower_1/conv', '7x7dbl_2': 'tower_1/conv_1', '7x7dbl_3': 'tower_1/conv_2',
       '7x7dbl_4': 'tower_1/conv_3', '7x7dbl_5': 'tower_1/conv_4', '_pool': 'tower_2/conv'}
SEVEN_A = {'3x3_1': 'tower/conv', '3x3_2': 'tower/conv_1', '7x7x3_1': 'tower_1/conv',
           '7x7x3_2': 'tower_1/conv_1', '7x7x3_3': 'tower_1/conv_2', '7x7x3_4': 'tower_1/conv_3'}
SEVEN = {'1x1': 'conv', '3x3_1': 'tower/conv', '3x3_2a': 'tower/mixed/conv',
         '3x3_2b': 'tower/mixed/conv_1', '3x3dbl_1': 'tower_1/conv', '3x3dbl_2': 'tower_1/conv_1',
         '3x3dbl_3a': 'tower_1/mixed/conv', '3x3dbl_3b': 'tower_1/mixed/conv_1',
         '_pool': 'tower_2/conv'}
GRAPH = {'Conv2d_1a_3x3': 'conv', 'Conv2d_2a_3x3': 'conv_1', 'Conv2d_2b_3x3': 'conv_2',
         'Conv2d_3b_1x1': 'conv_3', 'Conv2d_4a_3x3': 'conv_4'}
for number, (which, kind) in enumerate(zip(
        ('5b', '5c', '5d', '6a', '6b', '6c', '6d', '6e', '7a', '7b', '7c'),
        (FIVE, FIVE, FIVE, SIX_A, SIX, SIX, SIX, SIX, SEVEN_A, SEVEN, SEVEN))):
    for torch_name, node in kind.items():
        GRAPH[f'Mixed_{which}.branch{torch_name}'] = (
            f'mixed_{number}/{node}' if number else f'mixed/{node}')
KINDS = {'bn.weight': 'batchnorm/gamma', 'bn.bias': 'batchnorm/beta',
         'bn.running_mean': 'batchnorm/moving_mean', 'bn.running_var': 'batchnorm/moving_variance'}


def as_graph(published):
    """The same weights as constants of the frozen graph."""
    found = {'softmax/weights': published['fc.weight'].T, 'softmax/biases': published['fc.bias']}
    for name, array in published.items():
        place, kind = name.rsplit('.', 2)[0], '.'.join(name.split('.')[-2:])
        if kind == 'conv.weight':
            found[f'{GRAPH[place]}/conv2d_params'] = array.transpose(2, 3, 1, 0)
        elif kind in KINDS:
            found[f'{GRAPH[place]}/{KINDS[kind]}'] = array
    return found


def test_the_frozen_graph_gives_the_same(published):
    graph = as_graph(published)
    assert len(graph) == len(published) == 94 * 5 + 2
    # Other constants that the file has.
    graph |= {name: np.zeros(1, np.int32) for name in (
        'DecodeJpeg/contents', 'ExpandDims/dim', 'ResizeBilinear/size', 'Sub/y', 'Mul/y',
        'mixed/join/concat_dim', 'mixed_10/join/concat_dim', 'pool_3/_reshape/shape')}
    counters = {'Mixed_5b.branch1x1.bn.num_batches_tracked': np.array(0)}
    found, expected = (inception.from_published(x) for x in (graph, published | counters))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def changed(weights, name, change):
    return weights | {name: change(weights[name])}


@pytest.mark.parametrize('change,message', [
    (lambda w: changed(w, 'fc.weight', lambda x: x[:1000]), "torchvision's.*1008 classes"),
    (lambda w: w | {'AuxLogits.fc.bias': np.zeros(1000)}, "torchvision's.*auxiliary"),
    (lambda w: {n: x for n, x in w.items() if not n.startswith('Mixed_7c.branch3x3_1.')},
     r'5 of 472 arrays are missing \(Mixed_7c.branch3x3_1.bn.bias, .*, 0 are unknown'),
    (lambda w: w | {'state': np.zeros(2)}, r'0 of 472.* 1 are unknown \(state\)'),
    (lambda w: {}, '472 of 472 arrays are missing'),
    (lambda w: changed(w, 'Mixed_6b.branch7x7_2.conv.weight', lambda x: x.swapaxes(2, 3)),
     r'Mixed_6b.branch7x7_2.conv.weight is float32 \[128, 128, 7, 1\].* \[128, 128, 1, 7\]'),
    (lambda w: changed(w, 'fc.bias', lambda x: x.astype(int)), 'fc.bias is int64'),
    (lambda w: changed(w, 'Mixed_5d.branch_pool.bn.bias', lambda x: x * np.nan),
     'Mixed_5d.branch_pool.bn.bias.*not finite')])
def test_refuses_other_weights(published, change, message):
    with pytest.raises(ValueError, match=message):
        inception.from_published(change(published))


def test_refuses_an_incomplete_graph(published):
    graph = as_graph(published)
    del graph['mixed_9/tower_1/mixed/conv_1/batchnorm/gamma']
    with pytest.raises(ValueError, match=r'missing \(mixed_9/tower_1/mixed/conv_1/batchnorm/gamma'):
        inception.from_published(graph)


# -- many images -----------------------------------------------------------------------------------


def test_batches_on_a_mesh(params):
    """Whatever the batch and wherever it is, an image has the same features."""
    images = originals.images(20, 30, 5)
    one_by_one = np.concatenate([
        Features(params, ('192',), batch=1).of(image[None])['192'] for image in images])
    mesh = partition.make_mesh(partition.MeshConfig())
    placed = jax.device_put(params, partition.replicated(mesh))
    divided = Features(placed, ('192',), batch=2, constrain=partition.Partitioner(mesh))
    found = divided.of(images)
    assert set(found) == {'192'}
    np.testing.assert_allclose(found['192'], one_by_one, rtol=1e-5, atol=1e-6)
    assert np.abs(np.diff(one_by_one, axis=0)).max() > 0.01
    with pytest.raises(ValueError, match="'batch' has 3 entries.* 2 does not divide"):
        Features(placed, batch=3, constrain=divided.constrain).of(images)


def test_clean_images(params):
    """Pillow's float channels reach the network: images of its size are not changed."""
    images = originals.images(299, 299, 1)
    found = {how: Features(params, ('64',), how, batch=1).of(images)['64']
             for how in ('clean', 'tensorflow')}
    np.testing.assert_allclose(found['clean'], found['tensorflow'], rtol=1e-6)


@pytest.mark.parametrize('arguments,message', [
    ({'names': ('2048', '1024')}, "no features '1024'; there are 64, 192, 768, 2048, logits"),
    ({'resize': 'area'}, "'area' is none of tensorflow, pytorch, clean"),
    ({'batch': 0}, 'batch=0')])
def test_refuses_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        Features({}, **arguments)


@pytest.mark.parametrize('images', [
    np.zeros((2, 9, 9, 3), np.float32), np.zeros((9, 9, 3), np.uint8),
    np.zeros((2, 9, 9, 1), np.uint8), np.zeros((0, 9, 9, 3), np.uint8)])
def test_refuses_images(images):
    with pytest.raises(ValueError, match='give uint8'):
        Features({}).of(images)
