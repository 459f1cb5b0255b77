"""Published CLIP weights to `models.clip` and back.

Radford et al. 2021. Two layouts of the same numbers: 'openai', the state dict of the released code
(in a TorchScript archive), and 'huggingface', that of transformers' CLIPModel (model.safetensors,
pytorch_model.bin). ViT-B/32, B/16, L/14 and all sizes between are recognised from the shapes; the
models with a ResNet are not here.

The text is the same model in another notation. The released one reads [start, words..., end, 0...]
at the end, id 49407, and pads with 0, the id of '!'. Here id 0 is both end and padding, so row 0 of
the table is the released row 49407, and row v + 1 the released row v.

d width of a tower, H heads, D = d / H.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dalle_jax.interop import weights
from dalle_jax.models import clip
from dalle_jax.models.transformer import PERIOD

HEAD_WIDTH = 64  # D of all released models; the shapes do not tell it

HARMLESS = ('input_resolution', 'context_length', 'vocab_size',
            'text_model.embeddings.position_ids', 'vision_model.embeddings.position_ids')


class Layout(NamedTuple):
    """Names of a published layout; blocks with {} for the number of a layer.

    Attributes:
      qkv: of the weights of queries, keys and values, in one array or in three.
      projections: how they are stored: [d, embedding], or transposed.
    """

    patches: str
    start: str  # the class token
    image_positions: str
    norm_pre: str
    image_norm: str
    image_projection: str
    image_block: str
    tokens: str
    text_positions: str
    text_norm: str
    text_projection: str
    text_block: str
    norms: tuple[str, str]
    qkv: tuple[str, ...]
    out: str
    up: str
    down: str
    transposed_projections: bool


LAYOUTS = {
    'openai': Layout(
        'visual.conv1.weight', 'visual.class_embedding', 'visual.positional_embedding',
        'visual.ln_pre', 'visual.ln_post', 'visual.proj', 'visual.transformer.resblocks.{}.',
        'token_embedding.weight', 'positional_embedding', 'ln_final', 'text_projection',
        'transformer.resblocks.{}.', ('ln_1', 'ln_2'), ('attn.in_proj_',), 'attn.out_proj',
        'mlp.c_fc', 'mlp.c_proj', False),
    'huggingface': Layout(
        'vision_model.embeddings.patch_embedding.weight',
        'vision_model.embeddings.class_embedding',
        'vision_model.embeddings.position_embedding.weight',
        'vision_model.pre_layrnorm', 'vision_model.post_layernorm', 'visual_projection.weight',
        'vision_model.encoder.layers.{}.', 'text_model.embeddings.token_embedding.weight',
        'text_model.embeddings.position_embedding.weight', 'text_model.final_layer_norm',
        'text_projection.weight', 'text_model.encoder.layers.{}.',
        ('layer_norm1', 'layer_norm2'),
        ('self_attn.q_proj.', 'self_attn.k_proj.', 'self_attn.v_proj.'), 'self_attn.out_proj',
        'mlp.fc1', 'mlp.fc2', True),
}


class Rule(NamedTuple):
    """How one of our arrays is made of published ones.

    Attributes:
      path: of ours, such as 'text/positions'; layers are counted, as 'image/transformer/0/...'.
      names, shape: of the published arrays, all of one shape.
      read: published arrays -> ours; write: ours -> the published arrays.
    """

    path: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    read: Callable = lambda a: a
    write: Callable = lambda a: (a,)


def from_published(arrays: Mapping[str, np.ndarray], head_width: int = HEAD_WIDTH
                   ) -> tuple[clip.Config, dict[str, Any]]:
    """Config and parameters, float32, of published arrays in either layout.

    Args:
      arrays: by their published names, floating-point of any precision.
      head_width: D.

    Raises:
      ValueError: names or shapes are not those of a CLIP with a vision transformer, or there are
        numbers that are not finite; names the arrays.
    """
    layout = LAYOUTS[layout_of(arrays)]
    config = _recognise(arrays, layout, head_width)
    rules = _rules(config, layout)
    weights.check_names('CLIP', arrays, [name for rule in rules for name in rule.names], HARMLESS)
    flat = {}
    for rule in rules:
        parts = (weights.take(arrays, name, rule.shape) for name in rule.names)
        flat[rule.path] = np.asarray(rule.read(*parts), order='C')
    params = weights.nested(flat)
    for tower, blocks in (('image', config.image_blocks), ('text', config.text_blocks)):
        params[tower]['transformer'] = _stacked(params[tower]['transformer'], blocks)
    return config, params


def layout_of(arrays: Mapping[str, np.ndarray]) -> str:
    """A key of LAYOUTS, by the names."""
    return 'huggingface' if any(n.startswith('vision_model.') for n in arrays) else 'openai'


def read_description(path: Path) -> int:
    """The width of a head, which weights do not tell, from the config.json of transformers.

    Raises:
      ValueError: the towers compute what `models.clip` does not.
    """
    widths = set()
    # What is absent has the value of ViT-B/32.
    for tower, width, heads in (('text_config', 512, 8), ('vision_config', 768, 12)):
        try:
            described = json.loads(path.read_text()).get(tower) or {}
            values = {'hidden_act': 'quick_gelu', 'layer_norm_eps': 1e-5, 'hidden_size': width,
                      'num_attention_heads': heads} | described
            head = values['hidden_size'] / values['num_attention_heads']
            if head < 1 or head != int(head):
                raise ValueError(f'{tower} has heads {head} wide')
        except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f'{path} is no description of a CLIP ({error}); give the one that was '
                             'published with the weights, or take it away') from error
        for name, supported in (('hidden_act', 'quick_gelu'), ('layer_norm_eps', 1e-5)):
            if values[name] != supported:
                raise ValueError(f'{path}: {tower}.{name} is {values[name]!r}; this library has '
                                 f'{supported!r}, as the CLIPs of OpenAI')
        widths.add(int(head))
    if len(widths) > 1:
        raise ValueError(f'{path}: heads {widths} wide; the towers of all CLIPs of OpenAI have '
                         'heads of one width')
    return widths.pop()


def to_published(params: Any, config: clip.Config, layout: str) -> dict[str, np.ndarray]:
    """Our parameters as float32 arrays under the names of a layout: 'openai' or 'huggingface'."""
    found = {}
    for rule in _rules(config, LAYOUTS[layout]):
        parts = rule.write(_ours(params, config, rule.path))
        found |= {name: np.asarray(part, np.float32, order='C')
                  for name, part in zip(rule.names, parts, strict=True)}
    return found


def _recognise(arrays, layout, head_width):
    if 'visual.layer1.0.conv1.weight' in arrays:
        raise ValueError('a CLIP with a ResNet, which this library does not have; give one with a '
                         'vision transformer: ViT-B/32, ViT-B/16, ViT-L/14')
    weights.need(arrays, 'CLIP', {
        layout.patches: 4, layout.image_positions: 2, layout.tokens: 2, layout.text_positions: 2,
        layout.text_projection: 2})
    image_width, _, _, patch = arrays[layout.patches].shape
    vocab, text_width = arrays[layout.tokens].shape
    side = round((len(arrays[layout.image_positions]) - 1) ** 0.5)
    for tower, width in (('image', image_width), ('text', text_width)):
        if width % head_width:
            raise ValueError(f'the width {width} of the {tower} tower is no multiple of '
                             f'{head_width}, the width of a head in all published CLIPs')

    def depth(block):
        prefix = block.split('{}')[0]
        return len({name.removeprefix(prefix).split('.')[0] for name in arrays
                    if name.startswith(prefix)})

    return clip.Config(
        image_size=side * patch, patch=patch, image_width=image_width,
        image_depth=depth(layout.image_block), image_heads=image_width // head_width,
        text_length=len(arrays[layout.text_positions]) - 1, text_vocab=vocab,
        text_width=text_width, text_depth=depth(layout.text_block),
        text_heads=text_width // head_width,
        embedding=arrays[layout.text_projection].shape[0 if layout.transposed_projections else 1])


def _rules(config, layout):
    d, t, e, p = config.image_width, config.text_width, config.embedding, config.patch
    transpose = dict(read=lambda a: a.T, write=lambda a: (a.T,))
    projection = transpose if layout.transposed_projections else {}

    def project(width):
        return (e, width) if layout.transposed_projections else (width, e)

    rules = [
        Rule('image/patches/kernel', (layout.patches,), (d, 3, p, p),
             lambda a: a.transpose(2, 3, 1, 0).reshape(-1, d),
             lambda a: (a.reshape(p, p, 3, d).transpose(3, 2, 0, 1),)),
        Rule('image/class', (layout.start,), (d,)),
        Rule('image/positions', (layout.image_positions,), ((config.image_size // p)**2 + 1, d)),
        *_norm('image/norm_pre', layout.norm_pre, d),
        *_norm('image/transformer/norm', layout.image_norm, d),
        Rule('image/projection', (layout.image_projection,), project(d), **projection),
        Rule('text/tokens', (layout.tokens,), (config.text_vocab, t),
             lambda a: np.roll(a, 1, axis=0), lambda a: (np.roll(a, -1, axis=0),)),
        Rule('text/positions', (layout.text_positions,), (config.text_length + 1, t)),
        *_norm('text/transformer/norm', layout.text_norm, t),
        Rule('text/projection', (layout.text_projection,), project(t), **projection),
        Rule('log_scale', ('logit_scale',), ()),
    ]
    for tower, block, blocks in (('image', layout.image_block, config.image_blocks),
                                 ('text', layout.text_block, config.text_blocks)):
        for i in range(blocks.depth):
            rules += _block(f'{tower}/transformer/{i}', block.format(i), layout, blocks)
    return rules


def _norm(path, name, width):
    return [Rule(f'{path}/gain', (f'{name}.weight',), (width,)),
            Rule(f'{path}/bias', (f'{name}.bias',), (width,))]


def _block(path, name, layout, blocks):
    d, heads = blocks.width, blocks.heads
    hidden, parts = blocks.mlp_ratio * d, len(layout.qkv)
    transpose = dict(read=lambda a: a.T, write=lambda a: (a.T,))

    # Published rows are [3, H, D], our columns [H, 3, D].
    def read_qkv(*published):
        rows = np.concatenate(published)
        return rows.reshape(3, heads, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape).T

    def write_qkv(ours):
        rows = ours.T.reshape(heads, 3, -1, *ours.shape[:-1]).swapaxes(0, 1)
        return np.split(rows.reshape(ours.T.shape), parts)

    def dense(inner, published, shape, **how):
        return [Rule(f'{path}/{inner}/kernel', (f'{name}{published}.weight',), shape, **how),
                Rule(f'{path}/{inner}/bias', (f'{name}{published}.bias',), shape[:1])]

    return [
        *_norm(f'{path}/attention/norm', name + layout.norms[0], d),
        *(Rule(f'{path}/attention/qkv/{ours}', tuple(f'{name}{q}{theirs}' for q in layout.qkv),
               (3 * d // parts, *rest), read_qkv, write_qkv)
          for ours, theirs, rest in (('kernel', 'weight', (d,)), ('bias', 'bias', ()))),
        *dense('attention/out', layout.out, (d, d), **transpose),
        *_norm(f'{path}/mlp/norm', name + layout.norms[1], d),
        *dense('mlp/up', layout.up, (hidden, d), **transpose),
        *dense('mlp/down', layout.down, (d, hidden)),  # stored transposed here, too
    ]


def _stacked(layers, blocks):
    """{'norm', '0', '1'...} as transformer.declare has it: {'norm', 'body', 'tail'}."""
    body = PERIOD * blocks.groups
    stack = {'norm': layers['norm'],
             'tail': {str(i - body): layers[str(i)] for i in range(body, blocks.depth)}}
    if body:
        stack['body'] = {str(i): _stack([layers[str(j)] for j in range(i, body, PERIOD)])
                         for i in range(PERIOD)}
    return stack


def _stack(trees):
    if isinstance(trees[0], dict):
        return {name: _stack([tree[name] for tree in trees]) for name in trees[0]}
    return np.stack(trees)


def _ours(params, config, path):
    """The array at a rule's path."""
    parts = path.split('/')
    index = ()
    if parts[1:2] == ['transformer'] and parts[2].isdigit():
        blocks = config.image_blocks if parts[0] == 'image' else config.text_blocks
        layer, body = int(parts[2]), PERIOD * blocks.groups
        if layer < body:
            parts[2:3], index = ['body', str(layer % PERIOD)], (layer // PERIOD,)
        else:
            parts[2:3] = ['tail', str(layer - body)]
    value = params
    for part in parts:
        value = value[part]
    return np.asarray(value)[index]
