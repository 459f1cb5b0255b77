from pathlib import Path

import jax
import numpy as np
import pytest

from dalle_jax.interop import clip as interop
from dalle_jax.interop import files
from dalle_jax.models import clip

FIXTURES = Path(__file__).parent / 'fixtures'
NAMES = {'openai': 'clip_openai.pt', 'huggingface': 'clip_huggingface.safetensors'}
PUBLISHED = {layout: files.read(FIXTURES / name) for layout, name in NAMES.items()}
CONFIG, PARAMS = interop.from_published(PUBLISHED['openai'], head_width=8)
EXPECTED = np.load(FIXTURES / 'clip.npz')


def ours(ids, end):
    """Released ids [start, words, end, 0...] of [B, T + 1] as this library's [B, T]."""
    found = np.zeros((len(ids), ids.shape[1] - 1), np.int32)
    for row, given in zip(found, ids.tolist()):
        length = given.index(end)
        row[:length] = np.array(given[:length]) + 1
    return found


TEXT = ours(EXPECTED['ids'], CONFIG.text_vocab - 1)


# -- an independent forward pass, of the released names, float64 -----------------------------------


def reference(arrays, images, ids):
    """Logits of each image with each text: the paper's pseudocode on the released arrays."""
    p = {name: np.asarray(a, np.float64) for name, a in arrays.items()}

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * p[f'{name}.weight'] + p[f'{name}.bias']

    def tower(x, prefix, heads, causal):
        layers = len({name.split('resblocks.')[1].split('.')[0] for name in p
                      if name.startswith(prefix)})
        for i in range(layers):
            block = f'{prefix}{i}.'
            h = norm(x, block + 'ln_1') @ p[block + 'attn.in_proj_weight'].T
            q, k, v = np.split(h + p[block + 'attn.in_proj_bias'], 3, axis=-1)
            out = np.zeros_like(x)
            for one in np.split(np.arange(x.shape[-1]), heads):
                scores = q[..., one] @ k[..., one].swapaxes(1, 2) / np.sqrt(len(one))
                if causal:
                    scores = np.where(np.tri(x.shape[1], dtype=bool), scores, -np.inf)
                scores = np.exp(scores - scores.max(-1, keepdims=True))
                out[..., one] = scores / scores.sum(-1, keepdims=True) @ v[..., one]
            x = x + out @ p[block + 'attn.out_proj.weight'].T + p[block + 'attn.out_proj.bias']
            h = norm(x, block + 'ln_2') @ p[block + 'mlp.c_fc.weight'].T
            h = h + p[block + 'mlp.c_fc.bias']
            h = h / (1 + np.exp(-1.702 * h))
            x = x + h @ p[block + 'mlp.c_proj.weight'].T + p[block + 'mlp.c_proj.bias']
        return x

    mean, std = np.array([[0.48145466, 0.4578275, 0.40821073],
                          [0.26862954, 0.26130258, 0.27577711]])
    pixels = (images / 255 - mean) / std
    kernel, n = p['visual.conv1.weight'], p['visual.conv1.weight'].shape[-1]
    patches = [np.einsum('bijc,dcij->bd', pixels[:, r:r + n, c:c + n], kernel)
               for r in range(0, pixels.shape[1], n) for c in range(0, pixels.shape[2], n)]
    start = np.broadcast_to(p['visual.class_embedding'], patches[0].shape)
    x = np.stack([start, *patches], axis=1) + p['visual.positional_embedding']
    x = tower(norm(x, 'visual.ln_pre'), 'visual.transformer.resblocks.', 2, False)
    image = norm(x[:, 0], 'visual.ln_post') @ p['visual.proj']

    x = p['token_embedding.weight'][ids] + p['positional_embedding']
    x = norm(tower(x, 'transformer.resblocks.', 3, True), 'ln_final')
    text = x[np.arange(len(x)), ids.argmax(1)] @ p['text_projection']
    image, text = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (image, text))
    return np.exp(p['logit_scale']) * image @ text.T


# -- parity ----------------------------------------------------------------------------------------


def logits(config, params, images, text):
    image = jax.jit(clip.embed_image, static_argnums=1)(params, config, images)
    text = jax.jit(clip.embed_text, static_argnums=1)(params, config, text)
    return np.exp(params['log_scale']) * np.asarray(image) @ np.asarray(text).T


def test_logits_are_those_of_the_released_code():
    found = logits(CONFIG, PARAMS, EXPECTED['images'], TEXT)
    np.testing.assert_allclose(found, EXPECTED['logits'], atol=1e-4)
    np.testing.assert_allclose(found, EXPECTED['huggingface'], atol=1e-4)
    np.testing.assert_allclose(
        found, reference(PUBLISHED['openai'], EXPECTED['images'], EXPECTED['ids']), atol=1e-4)
    assert np.ptp(found, axis=0).min() > 0.1 and np.ptp(found, axis=1).min() > 1


def test_both_layouts_are_one_model():
    config, params = interop.from_published(PUBLISHED['huggingface'], head_width=8)
    assert config == CONFIG == clip.Config(
        image_size=12, patch=4, image_width=16, image_depth=9, image_heads=2, text_length=11,
        text_vocab=604, text_width=24, text_depth=2, text_heads=3, embedding=20)
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    shapes = jax.eval_shape(lambda: clip.init(CONFIG, jax.random.key(0))[0])
    assert jax.tree.structure(shapes) == jax.tree.structure(PARAMS)
    for declared, found in zip(jax.tree.leaves(shapes), jax.tree.leaves(PARAMS)):
        assert (declared.shape, declared.dtype) == (found.shape, found.dtype)


def test_the_last_place_is_read_where_a_caption_is_cut():
    """The released code cuts to 12 states and puts the end into the last one; so is ours."""
    assert (EXPECTED['ids'][2, -1], EXPECTED['ids'][2].argmax()) == (603, 11)
    assert TEXT[2].all()


@pytest.mark.parametrize('layout', NAMES)
def test_out_again(layout):
    out = interop.to_published(PARAMS, CONFIG, layout)
    assert out.keys() == PUBLISHED[layout].keys() - set(interop.HARMLESS)
    for name, array in out.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, PUBLISHED[layout][name].astype(np.float32), name)


def test_a_model_trained_here_goes_out_and_returns():
    """Eleven layers: two groups of four, and three unrolled."""
    config = clip.Config(image_size=8, patch=4, image_width=64, image_depth=2, image_heads=1,
                         text_length=3, text_vocab=9, text_width=128, text_depth=11, text_heads=2,
                         embedding=4)
    params = clip.init(config, jax.random.key(1))[0]
    for layout in NAMES:
        again, found = interop.from_published(interop.to_published(params, config, layout))
        assert again == config
        jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize('preset', clip.PRESETS)
def test_released_sizes_are_recognised(preset):
    """From shapes alone: no memory is behind these arrays."""
    config = clip.PRESETS[preset]
    rules = interop._rules(config, interop.LAYOUTS['openai'])
    arrays = {name: np.broadcast_to(np.float16(0), rule.shape)
              for rule in rules for name in rule.names}
    assert interop._recognise(arrays, interop.LAYOUTS['openai'], 64) == config
    counts = {'b32': 151_277_313, 'b16': 149_620_737, 'l14': 427_616_513}
    assert sum(a.size for a in arrays.values()) == counts[preset]
    assert len(arrays) == {'b32': 302, 'b16': 302, 'l14': 446}[preset]


# -- refusals --------------------------------------------------------------------------------------


def changed(layout='openai', **arrays):
    return PUBLISHED[layout] | {name.replace('__', '.'): a for name, a in arrays.items()}


def without(name, layout='openai'):
    return {key: a for key, a in PUBLISHED[layout].items() if key != name}


@pytest.mark.parametrize('arrays,message', [
    (without('ln_final.bias'), 'no CLIP: lacking ln_final.bias'),
    (without('visual.conv1.weight'), 'no CLIP: visual.conv1.weight is missing'),
    (without('visual.transformer.resblocks.3.mlp.c_fc.bias'), 'lacking .*resblocks.3.mlp.c_fc'),
    (without('text_projection.weight', 'huggingface'), 'text_projection.weight is missing'),
    (without('text_model.encoder.layers.1.self_attn.v_proj.bias', 'huggingface'),
     'lacking .*layers.1.self_attn.v_proj.bias'),
    (changed(head__weight=np.zeros(3)), 'not known head.weight'),
    (changed(visual__layer1__0__conv1__weight=np.zeros(3)), 'a CLIP with a ResNet'),
    (changed(visual__proj=np.zeros((16, 21))), r'visual.proj has the shape \[16, 21\].*\[16, 20\]'),
    (changed(visual__proj=np.zeros((16, 20), np.int64)), 'visual.proj holds int64'),
    (changed(ln_final__weight=np.full(24, np.nan)), 'ln_final.weight holds 24 values .* finite'),
    (changed(positional_embedding=np.zeros(3)), r'positional_embedding has the shape \[3\]'),
    ({'encoder.weight': np.zeros(3)}, 'no CLIP: visual.conv1.weight is missing'),
    ({}, 'no CLIP: visual.conv1.weight is missing; it has nothing'),
])
def test_other_weights_are_refused_by_name(arrays, message):
    with pytest.raises(ValueError, match=message):
        interop.from_published(arrays, head_width=8)


def test_heads_must_fit():
    with pytest.raises(ValueError, match='the width 16 of the image tower is no multiple of 64'):
        interop.from_published(PUBLISHED['openai'])
