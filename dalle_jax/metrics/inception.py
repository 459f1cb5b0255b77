"""The Inception-v3 of FID and IS: features of images, in pure functions of published weights.

It is the network frozen as TensorFlow's inception-2015-12-05 (Szegedy et al. 2016), on which FID
(Heusel et al. 2017) and IS (Salimans et al. 2016) are defined. Torchvision's is another one: this
one has 1008 classes, its averages over 3x3 pixels leave out what lies beyond the border, and the
last block pools by the maximum.

Arrays are [B, H, W, C], kernels [height, width, inputs, outputs]. Batch norm is part of the
kernels. All products are in full float32, also where an accelerator would round their operands.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dalle_jax.metrics import resize as resize_lib
from dalle_jax.metrics.features import in_batches
from dalle_jax.models.context import unconstrained

CLASSES = 1008
EPSILON = 1e-3  # of the batch norm

# Channels averaged over space after the two first poolings, the block Mixed_6e and the last one;
# logits with and without the bias. IS is defined by the latter.
NAMES = ('64', '192', '768', '2048', 'logits', 'logits_unbiased')


class Conv(NamedTuple):
    """A convolution, its batch norm and a relu."""

    outputs: int
    height: int
    width: int
    stride: int = 1
    padding: str = 'SAME'

    def kernel(self, inputs: int) -> tuple[int, int, int, int]:
        """Shape of the kernel."""
        return self.height, self.width, inputs, self.outputs


def _down(outputs):
    return Conv(outputs, 3, 3, 2, 'VALID')


# A branch is a sequence of convolutions and of poolings over 3x3 pixels; a pair of convolutions
# stands for both of them beside each other. 'down' is the maximum at every second pixel.
STEM = {
    '64': (_down(32), Conv(32, 3, 3, padding='VALID'), Conv(64, 3, 3), 'down'),
    '192': (Conv(80, 1, 1), Conv(192, 3, 3, padding='VALID'), 'down'),
}
STEM_NAMES = ('Conv2d_1a_3x3', 'Conv2d_2a_3x3', 'Conv2d_2b_3x3', 'Conv2d_3b_1x1', 'Conv2d_4a_3x3')


def _grid_35(pool):
    return {'branch1x1': (Conv(64, 1, 1),),
            'branch5x5': (Conv(48, 1, 1), Conv(64, 5, 5)),
            'branch3x3dbl': (Conv(64, 1, 1), Conv(96, 3, 3), Conv(96, 3, 3)),
            'branch_pool': ('average', Conv(pool, 1, 1))}


def _grid_17(n):
    return {'branch1x1': (Conv(192, 1, 1),),
            'branch7x7': (Conv(n, 1, 1), Conv(n, 1, 7), Conv(192, 7, 1)),
            'branch7x7dbl': (Conv(n, 1, 1), Conv(n, 7, 1), Conv(n, 1, 7), Conv(n, 7, 1),
                             Conv(192, 1, 7)),
            'branch_pool': ('average', Conv(192, 1, 1))}


def _grid_8(pool):
    pair = (Conv(384, 1, 3), Conv(384, 3, 1))
    return {'branch1x1': (Conv(320, 1, 1),),
            'branch3x3': (Conv(384, 1, 1), pair),
            'branch3x3dbl': (Conv(448, 1, 1), Conv(384, 3, 3), pair),
            'branch_pool': (pool, Conv(192, 1, 1))}


BLOCKS = {
    'Mixed_5b': _grid_35(32),
    'Mixed_5c': _grid_35(64),
    'Mixed_5d': _grid_35(64),
    'Mixed_6a': {'branch3x3': (_down(384),),
                 'branch3x3dbl': (Conv(64, 1, 1), Conv(96, 3, 3), _down(96)),
                 'branch_pool': ('down',)},
    'Mixed_6b': _grid_17(128),
    'Mixed_6c': _grid_17(160),
    'Mixed_6d': _grid_17(160),
    'Mixed_6e': _grid_17(192),
    'Mixed_7a': {'branch3x3': (Conv(192, 1, 1), _down(320)),
                 'branch7x7x3': (Conv(192, 1, 1), Conv(192, 1, 7), Conv(192, 7, 1), _down(192)),
                 'branch_pool': ('down',)},
    'Mixed_7b': _grid_8('average'),
    'Mixed_7c': _grid_8('max'),
}


# -- the network -----------------------------------------------------------------------------------


def features(params: Mapping[str, Any], x: jax.Array) -> dict[str, jax.Array]:
    """All of NAMES, float32 [B, n], of float32 [B, 299, 299, 3] in [-1, 1] (see resize.py)."""
    found = {}
    for name, steps in STEM.items():
        x = _branch(params['stem'][name], steps, x)
        found[name] = x.mean((1, 2))
    for name, branches in BLOCKS.items():
        x = block(params[name], branches, x)
        if name == 'Mixed_6e':
            found['768'] = x.mean((1, 2))
    found['2048'] = x.mean((1, 2))
    found['logits_unbiased'] = jnp.dot(found['2048'], params['fc']['kernel'],
                                       precision=lax.Precision.HIGHEST)
    found['logits'] = found['logits_unbiased'] + params['fc']['bias'][None]
    return found


def block(params: Mapping[str, Any], branches: Mapping[str, tuple], x: jax.Array) -> jax.Array:
    """One of BLOCKS: the channels of its branches, one behind the other."""
    return jnp.concatenate([_branch(params[name], steps, x) for name, steps in branches.items()],
                           axis=-1)


def _branch(params, steps, x):
    params = iter(params)
    for step in steps:
        if isinstance(step, str):
            x = POOLINGS[step](x)
        elif isinstance(step, Conv):
            x = _conv(next(params), step, x)
        else:
            x = jnp.concatenate([_conv(p, conv, x) for p, conv in zip(next(params), step)], -1)
    return x


def _conv(params, conv, x):
    x = lax.conv_general_dilated(
        x, params['kernel'], (conv.stride, conv.stride), conv.padding,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'), precision=lax.Precision.HIGHEST)
    return jnp.maximum(x + params['bias'][None, None, None], 0)


def _window(x, start, function, stride, padding):
    return lax.reduce_window(x, start, function, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _average(x):
    """Mean of the 3x3 pixels around each; at the border, of those that there are."""
    inside = [np.convolve(np.ones(extent), np.ones(3), 'same') for extent in x.shape[1:3]]
    pixels = np.outer(*inside).astype(np.float32)[None, :, :, None]
    return _window(x, 0.0, lax.add, 1, 'SAME') / pixels


POOLINGS = {
    'average': _average,
    'max': lambda x: _window(x, -jnp.inf, lax.max, 1, 'SAME'),
    'down': lambda x: _window(x, -jnp.inf, lax.max, 2, 'VALID'),
}


# -- published weights -----------------------------------------------------------------------------


# What the two publications call the arrays of a convolution.
TORCH = {'kernel': '{}.conv.weight', 'gain': '{}.bn.weight', 'bias': '{}.bn.bias',
         'mean': '{}.bn.running_mean', 'variance': '{}.bn.running_var'}
GRAPH = {'kernel': '{}/conv2d_params', 'gain': '{}/batchnorm/gamma', 'bias': '{}/batchnorm/beta',
         'mean': '{}/batchnorm/moving_mean', 'variance': '{}/batchnorm/moving_variance'}

# Names that come along and say nothing about the network's function: PyTorch's counters, and the
# frozen graph's constants for reading an image, joining branches and flattening.
NO_WEIGHTS = re.compile(r'.*\.num_batches_tracked|(.*/)?join/concat_dim|pool_3/_reshape/shape|'
                        r'DecodeJpeg/contents|ExpandDims/dim|ResizeBilinear/size|Sub/y|Mul/y')


def from_published(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The params of `features` from published weights.

    Args:
      weights: name -> array, either of pytorch-fid's pt_inception-2015-12-05 (state dict names such
        as Mixed_5b.branch5x5_1.conv.weight, kernels [outputs, inputs, height, width], fc.weight
        [1008, 2048]), or the constants of TensorFlow's frozen graph inception-2015-12-05 (names
        such as mixed/tower/conv/conv2d_params, kernels [height, width, inputs, outputs],
        softmax/weights [2048, 1008]).

    Returns:
      float32 numpy arrays; the batch norm is folded into kernels and biases in float64.

    Raises:
      ValueError: names that are missing or unknown, shapes, values that are not finite, and the
        Inception of torchvision, which is another network.
    """
    graph = 'softmax/weights' in weights
    fc, bias = ('softmax/weights', 'softmax/biases') if graph else ('fc.weight', 'fc.bias')
    if (fc in weights and 1000 in weights[fc].shape
            or any(name.startswith('AuxLogits') for name in weights)):
        raise ValueError(
            "these are weights of torchvision's Inception-v3 (1000 classes, auxiliary logits). FID "
            'and IS need the network of 2015-12-05 with 1008 classes, whose file is called '
            'pt_inception-2015-12-05-6726825d.pth')
    patterns = GRAPH if graph else TORCH
    expected = {fc: (2048, CLASSES) if graph else (CLASSES, 2048), bias: (CLASSES,)}

    def expect(place, shape):
        for kind, pattern in patterns.items():
            expected[pattern.format(place)] = shape[-1:] if kind != 'kernel' else (
                shape if graph else _torch_shape(shape))

    def fold(place, shape):
        kernel, gain, bias, mean, variance = (
            weights[pattern.format(place)].astype(np.float64) for pattern in patterns.values())
        gain /= np.sqrt(variance + EPSILON)
        kernel = kernel if graph else kernel.transpose(2, 3, 1, 0)
        return {'kernel': (kernel * gain).astype(np.float32),
                'bias': (bias - mean * gain).astype(np.float32)}

    _convolutions(graph, expect)
    _check(weights, expected)
    kernel = weights[fc] if graph else weights[fc].T
    return _convolutions(graph, fold) | {
        'fc': {'kernel': np.ascontiguousarray(kernel, np.float32),
               'bias': np.asarray(weights[bias], np.float32)}}


def _torch_shape(shape):
    height, width, inputs, outputs = shape
    return outputs, inputs, height, width


def _convolutions(graph: bool, make: Callable[[str, tuple[int, ...]], Any]) -> dict[str, Any]:
    """Params of all convolutions, each made of its published name and its kernel's shape.

    Args:
      graph: whether names are those of the frozen graph.
      make: (name, shape of the kernel) -> params.
    """
    params, channels, stem = {'stem': {}}, 3, iter(enumerate(STEM_NAMES))
    for part, steps in STEM.items():
        params['stem'][part] = []
        for conv in steps[:-1]:
            i, name = next(stem)
            params['stem'][part].append(make(
                _numbered('conv', i) if graph else name, conv.kernel(channels)))
            channels = conv.outputs
    for i, (name, branches) in enumerate(BLOCKS.items()):
        params[name], towers, outputs = {}, 0, 0
        for branch, steps in branches.items():
            place = f'{name}.{branch}'
            if graph:
                place = _numbered('mixed', i)
                # A branch of nothing but a convolution has no tower of its own.
                if steps[1:]:
                    place, towers = f'{place}/{_numbered("tower", towers)}', towers + 1
            params[name][branch], width = _branch_params(graph, make, place, steps, channels)
            outputs += width
        channels = outputs
    return params


def _branch_params(graph, make, place, steps, channels):
    """Params of a branch, and the channels of its result."""
    found, convs = [], [step for step in steps if not isinstance(step, str)]
    for i, step in enumerate(convs):
        name = place if len(convs) == 1 else f'{place}_{i + 1}'
        if isinstance(step, Conv):
            found.append(make(f'{place}/{_numbered("conv", i)}' if graph else name,
                              step.kernel(channels)))
            channels = step.outputs
        else:
            found.append([make(f'{place}/mixed/{_numbered("conv", j)}' if graph else name + 'ab'[j],
                               conv.kernel(channels)) for j, conv in enumerate(step)])
            channels = sum(conv.outputs for conv in step)
    return found, channels


def _numbered(name, i):
    return f'{name}_{i}' if i else name


def _check(weights, expected):
    missing = sorted(expected.keys() - weights.keys())
    unknown = sorted(n for n in weights.keys() - expected.keys() if not NO_WEIGHTS.fullmatch(n))
    if missing or unknown:
        raise ValueError(
            f'not the Inception-v3 of FID: {len(missing)} of {len(expected)} arrays are missing'
            f'{_examples(missing)}, {len(unknown)} are unknown{_examples(unknown)}; give the file '
            'pt_inception-2015-12-05-6726825d.pth or the constants of the frozen graph')
    for name, shape in expected.items():
        array = weights[name]
        if array.shape != shape or array.dtype.kind != 'f':
            raise ValueError(f'{name} is {array.dtype} {list(array.shape)}; in the Inception-v3 of '
                             f'FID it is floating point {list(shape)}')
        if not np.isfinite(array).all():
            raise ValueError(f'{name} has values that are not finite; the file is damaged')


def _examples(names):
    return f' ({", ".join(names[:3])}{", ..." if len(names) > 3 else ""})' if names else ''


# -- features of many images -----------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=('how', 'constrain'))
def _resized(images, how, constrain):
    images = constrain(images, ('batch', None, None, None))
    return constrain.divide(functools.partial(resize_lib.resize, how=how), ('batch',))(images)


# Apart from resizing, so that images of another size do not compile the network again.
@functools.partial(jax.jit, static_argnames=('names', 'constrain'))
def _features(params, x, names, constrain):
    def chosen(params, x):
        found = features(params, x)
        return {name: found[name] for name in names}
    x = constrain(x, ('batch', None, None, None))
    return constrain.divide(chosen, ('batch',), params)(x)


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of images by the Inception of FID.

    Whatever has such a function `of` can stand in its place: fid.py knows features only.

    Attributes:
      params: of `from_published`, best where they are used: on the devices of a mesh, all of them.
      names: which of NAMES.
      resize: one of resize.RESIZES.
      batch: images at once, on all devices together; the ways a mesh divides a batch into divide
        it. The last images are padded to as many, so that one program serves all.
      constrain: divides a batch over the devices, as Context.constrain does.

    Raises:
      ValueError: unknown names, a batch that is not positive.
    """

    params: Any
    names: tuple[str, ...] = ('2048', 'logits_unbiased')
    resize: str = 'tensorflow'
    batch: int = 32
    constrain: Any = unconstrained

    def __post_init__(self):
        for name in self.names:
            if name not in NAMES:
                raise ValueError(f'Inception has no features {name!r}; there are '
                                 f'{", ".join(NAMES)}')
        if self.resize not in resize_lib.RESIZES:
            raise ValueError(f'resize {self.resize!r} is none of {", ".join(resize_lib.RESIZES)}')
        if self.batch < 1:
            raise ValueError(f'batch={self.batch}: give at least 1')

    def of(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """float32 [B, n] of each name, of images uint8 [B, H, W, 3].

        Raises:
          ValueError: images of another type or shape, or none.
        """
        def found(rows):
            x = (resize_lib.resize(rows, 'clean') if self.resize == 'clean' else
                 _resized(rows, self.resize, self.constrain))
            return _features(self.params, x, self.names, self.constrain)
        return in_batches(found, images, self.batch)
