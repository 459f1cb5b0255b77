"""Published VQGANs (taming-transformers) to `models.vqgan` and back.

Esser et al. 2021. Both kinds of checkpoint: VQModel, the nearest code, and GumbelVQ. What belongs
to their training (the discriminator and the perceptual metric under 'loss.') is left out. Widths,
blocks and the resolutions with attention are read from names and shapes.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dalle_jax.interop import weights
from dalle_jax.models import vqgan

# Ours -> the released name; numbers of levels and blocks stay.
LAYERS = (
    (r'(down|up)_(\d+)_(block|attn)_(\d+)', r'\1.\2.\3.\4'),
    (r'(down|up)_(\d+)_(downsample|upsample)', r'\1.\2.\3.conv'),
    (r'mid_(\w+)', r'mid.\1'),
)


def from_published(arrays: Mapping[str, np.ndarray]) -> tuple[vqgan.Config, dict[str, Any]]:
    """Config and parameters, float32, of the released arrays by name.

    Args:
      arrays: of a checkpoint, where names begin with 'state_dict.', or of a state dict.

    Raises:
      ValueError: names or shapes are not those of a VQGAN, or there are numbers that are not
        finite; names the arrays.
    """
    if any(name.startswith('state_dict.') for name in arrays):  # beside it, the trainer's own
        arrays = {name.removeprefix('state_dict.'): a for name, a in arrays.items()
                  if name.startswith('state_dict.')}
    arrays = {name: a for name, a in arrays.items() if not name.startswith('loss.')}
    config = _recognise(arrays)
    names = _names(config)
    weights.check_names('VQGAN', arrays, [name for name, _ in names.values()])
    flat = {}
    for path, (name, shape) in names.items():
        array = weights.take(arrays, name, shape)
        flat[path] = array.transpose(2, 3, 1, 0).copy() if array.ndim == 4 else array
    return config, weights.nested(flat)


def to_published(params: Any, config: vqgan.Config) -> dict[str, np.ndarray]:
    """Our parameters as the released state dict, float32, without its training's part."""
    out = {}
    for path, (name, _) in _names(config).items():
        value = params
        for key in path.split('/'):
            value = value[key]
        array = np.asarray(value, np.float32)
        out[name] = array.transpose(3, 2, 0, 1).copy() if array.ndim == 4 else array
    return out


def _recognise(arrays):
    nearest = 'quantize.embedding.weight' in arrays
    codebook = 'quantize.embedding.weight' if nearest else 'quantize.embed.weight'
    weights.need(arrays, 'VQGAN', {codebook: 2, 'quant_conv.weight': 4})

    def found(pattern):
        return sorted({int(m[1]) for m in (re.match(pattern, name) for name in arrays) if m})

    widths = []
    for level in found(r'encoder\.down\.(\d+)\.'):
        last = f'encoder.down.{level}.block.0.conv2.weight'
        weights.need(arrays, 'VQGAN', {last: 4})
        widths.append(len(arrays[last]))
    factor = 2 ** (len(widths) - 1) if widths else 1
    return vqgan.Config(
        image_size=-(-256 // factor) * factor, vocab=len(arrays[codebook]), widths=tuple(widths),
        blocks=len(found(r'encoder\.down\.0\.block\.(\d+)\.')),
        attention=tuple(found(r'encoder\.down\.(\d+)\.attn\.')),
        latent=arrays['quant_conv.weight'].shape[1], embedding=arrays[codebook].shape[1],
        quantizer='nearest' if nearest else 'logits')


def _names(config):
    """Our path -> (released name, shape)."""
    codebook = 'quantize.embedding.weight' if config.quantizer == 'nearest' else (
        'quantize.embed.weight')
    found = {}
    shapes = jax.eval_shape(lambda: vqgan.init(config, jax.random.key(0))[0])
    for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        path = [key.key for key in keys]
        if path == ['codebook']:
            found['codebook'] = codebook, leaf.shape
            continue
        *layers, kind = path
        if layers == ['logits']:
            layers = ['quantize', 'proj']
        for pattern, replacement in LAYERS:
            layers = [re.sub(f'^{pattern}$', replacement, layer) for layer in layers]
        shape = leaf.shape
        if kind == 'kernel':
            rows, columns, inputs, outputs = shape
            shape = outputs, inputs, rows, columns
        name = '.'.join([*layers, 'bias' if kind == 'bias' else 'weight'])
        found['/'.join(path)] = name, shape
    return found
