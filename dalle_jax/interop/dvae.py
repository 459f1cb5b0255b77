"""OpenAI's released dVAE (encoder.pkl and decoder.pkl) to `models.dvae` and back.

Ramesh et al. 2021, app. A.1; the released code. The architecture is `dvae.Config()` in every place;
widths, vocabulary and blocks per group are read from the shapes. Its networks are convolutional, so
the side of an image is not part of the weights: 256, as in the paper.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dalle_jax.interop import weights
from dalle_jax.models import dvae

KINDS = {'encoder': "encoder of OpenAI's dVAE", 'decoder': "decoder of OpenAI's dVAE"}


def from_published(encoder: Mapping[str, np.ndarray], decoder: Mapping[str, np.ndarray]
                   ) -> tuple[dvae.Config, dict[str, Any]]:
    """Config and parameters, float32, of the released arrays by name ('blocks.input.w' and so on).

    Raises:
      ValueError: names or shapes are not those of the dVAE, the two networks do not fit together,
        or there are numbers that are not finite; names the arrays.
    """
    published = {'encoder': encoder, 'decoder': decoder}
    for (part, arrays), side in zip(published.items(), (7, 1)):
        weights.need(arrays, KINDS[part], {'blocks.input.w': 4, 'blocks.output.conv.w': 4})
        first = arrays['blocks.input.w'].shape
        if first[2:] != (side, side):
            raise ValueError(f'no {KINDS[part]}: blocks.input.w has the shape {list(first)}, and '
                             f'there it is a {side}x{side} convolution')
    blocks = {name.split('.')[2] for name in encoder if name.startswith('blocks.group_1.')}
    config = dvae.Config(
        vocab=len(encoder['blocks.output.conv.w']), hidden=len(encoder['blocks.input.w']),
        n_init=len(decoder['blocks.input.w']), blocks_per_group=len(blocks))
    names = _names(config)
    flat = {}
    for part, arrays in published.items():
        rules = {name: (path, shape) for path, (owner, name, shape) in names.items()
                 if owner == part}
        weights.check_names(KINDS[part], arrays, rules)
        for name, (path, shape) in rules.items():
            array = weights.take(arrays, name, shape)
            flat[path] = array.transpose(2, 3, 1, 0).copy() if array.ndim == 4 else array
    return config, weights.nested(flat)


def to_published(params: Any, config: dvae.Config
                 ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Our parameters as the released encoder's and decoder's arrays, float32.

    Raises:
      ValueError: the config has what the released architecture has not.
    """
    plain = dvae.Config(vocab=config.vocab, hidden=config.hidden, n_init=config.n_init)
    for name in ('groups', 'group_widths', 'patch', 'bottleneck', 'likelihood', 'post_gain'):
        if getattr(config, name) != getattr(plain, name):
            raise ValueError(f'dvae: {name}={getattr(config, name)!r}, and the released '
                             f'architecture has {getattr(plain, name)!r}: this model cannot be '
                             'written as one')
    if len({*config.group_blocks}) > 1:
        raise ValueError(f'dvae: blocks_per_group={config.blocks_per_group!r}, and all groups of '
                         'the released architecture have as many')
    out = {'encoder': {}, 'decoder': {}}
    for path, (part, name, _) in _names(config).items():
        value = params
        for key in path.split('/'):
            value = value[key]
        array = np.asarray(value, np.float32)
        out[part][name] = array.transpose(3, 2, 0, 1).copy() if array.ndim == 4 else array
    return out['encoder'], out['decoder']


def _names(config):
    """Our path -> (released file, name, shape)."""
    found = {}
    shapes = jax.eval_shape(lambda: dvae.init(config, jax.random.key(0))[0])
    for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        path = [key.key for key in keys]
        part, *inner, kind = path
        if part == 'codebook':  # the decoder's first layer there
            part, inner = 'decoder', ['input']
        match inner:
            case [block, conv]:  # 'group_1_block_2', 'conv_3' or 'id_path'
                group, number = re.fullmatch(r'(group_\d+)_(block_\d+)', block).groups()
                layer = f'{group}.{number}.' + (conv if conv == 'id_path' else f'res_path.{conv}')
            case ['logits' | 'output']:
                layer = 'output.conv'
            case ['input']:
                layer = 'input'
        shape = leaf.shape
        if kind == 'kernel':
            rows, columns, inputs, outputs = shape
            shape = outputs, inputs, rows, columns
        found['/'.join(path)] = (part, f"blocks.{layer}.{'w' if kind == 'kernel' else 'b'}", shape)
    return found
