"""The stack: an independent float64 model, scan and remat, cached steps, what depends on what."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models import patterns, transformer
from dalle_jax.models.patterns import Layout
from dalle_jax.models.layers import Declared, init_module, module_axes
from dalle_jax.models.transformer import BlockConfig, dalle_patterns

LAYOUT = Layout(text=3, rows=3, columns=4, kernel=3)


def blocks(depth, patterns=None):
    return BlockConfig(depth, 8, 2, patterns or dalle_patterns(depth), LAYOUT)


def parameters(config, seed=0):
    """Random in all entries, biases and gains too."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_module(Declared(transformer.declare(config)),
                                                jax.random.key(0)))
    return jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.35).astype(np.float32), shapes)


def inputs(config, batch=2, seed=0):
    shape = batch, config.layout.length, config.width
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unstacked(params, config):
    """The layers in order, each without an axis of groups."""
    layers = [jax.tree.map(lambda x: x[group], params['body'][str(i)])
              for group in range(config.groups) for i in range(transformer.PERIOD)]
    return layers + [params['tail'][str(i)] for i in range(config.tail)]


def oracle(params, config, x):
    """The whole stack in float64 numpy, layer after layer, with dense masks."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + config.eps) * p['gain'] + p['bias']

    x = x.astype(np.float64)
    size = config.width // config.heads
    for layer, kind in zip(unstacked(params, config), config.patterns):
        p = layer['attention']
        qkv = norm(x, p['norm']) @ p['qkv']['kernel'] + p['qkv']['bias']
        out = np.zeros_like(x)
        for head in range(config.heads):
            q, k, v = (qkv[..., (3 * head + i) * size:][..., :size] for i in range(3))
            scores = q @ k.swapaxes(1, 2) / np.sqrt(size)
            scores = np.where(patterns.mask(kind, config.layout), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[..., head * size:][..., :size] = weights / weights.sum(-1, keepdims=True) @ v
        x = x + out @ p['out']['kernel'] + p['out']['bias']
        p = layer['mlp']
        hidden = norm(x, p['norm']) @ p['up']['kernel'] + p['up']['bias']
        hidden = hidden / (1 + np.exp(-1.702 * hidden))
        x = x + hidden @ p['down']['kernel'].T + p['down']['bias']
    return norm(x, params['norm'])


# -- the shape of the stack ------------------------------------------------------------------------


def test_patterns_of_the_paper():
    patterns = dalle_patterns(64)
    assert [patterns.count(kind) for kind in ('row', 'column', 'conv')] == [47, 16, 1]
    assert [i for i in range(1, 65) if patterns[i - 1] == 'column'] == list(range(2, 63, 4))
    assert patterns[:4] == ('row', 'column', 'row', 'row')
    assert patterns[-1] == 'conv'
    assert dalle_patterns(6)[-1] == 'conv'  # layer 6 would be a column layer


@pytest.mark.parametrize('depth,groups,tail', [
    (1, 0, 1), (4, 0, 4), (8, 0, 8), (9, 2, 1), (12, 2, 4), (13, 3, 1), (64, 15, 4)])
def test_groups(depth, groups, tail):
    config = blocks(depth)
    assert (config.groups, config.tail) == (groups, tail)
    shapes = jax.eval_shape(lambda: init_module(Declared(transformer.declare(config)),
                                                jax.random.key(0)))
    assert sorted(shapes['tail']) == sorted(map(str, range(tail)))
    assert ('body' in shapes) == (groups > 0)
    if groups:
        assert {x.shape[0] for x in jax.tree.leaves(shapes['body'])} == {groups}
    matrices = sum(x.size for path, x in jax.tree.leaves_with_path(shapes)
                   if path[-1].key == 'kernel')
    vectors = sum(x.size for x in jax.tree.leaves(shapes)) - matrices
    assert matrices == 12 * depth * 8 ** 2
    assert vectors == depth * (9 + 4) * 8 + 2 * 8


def test_initial_values_and_axes():
    config = BlockConfig(9, 64, 2, dalle_patterns(9), LAYOUT, std=0.05)
    module = Declared(transformer.declare(config))
    params, axes = jax.jit(lambda key: init_module(module, key))(jax.random.key(0)), module_axes(
        module)
    layer, names = params['body']['1'], axes['body']['1']
    for block, name, std in (('attention', 'qkv', 0.05), ('attention', 'out', 0.05 / 18 ** 0.5),
                             ('mlp', 'up', 0.05), ('mlp', 'down', 0.05 / 18 ** 0.5)):
        assert layer[block][name]['kernel'].std() == pytest.approx(std, rel=0.05)
        assert not layer[block][name]['bias'].any()
    assert (params['norm']['gain'] == 1).all() and not params['norm']['bias'].any()
    assert not np.allclose(layer['mlp']['up']['kernel'][0], layer['mlp']['up']['kernel'][1])
    assert names['attention']['qkv'] == {'kernel': ('layers', 'embed', 'heads'),
                                         'bias': ('layers', 'heads')}
    assert names['attention']['out'] == {'kernel': ('layers', 'heads', 'embed'),
                                         'bias': ('layers', None)}
    assert names['mlp']['down']['kernel'] == ('layers', 'embed', 'mlp')
    assert axes['tail']['0']['mlp']['up'] == {'kernel': ('embed', 'mlp'), 'bias': ('mlp',)}
    assert jax.tree.map(jnp.ndim, params) == jax.tree.map(
        len, axes, is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.parametrize('changes,message', [
    (dict(width=9), 'width=9 is not divisible by heads=2'), (dict(depth=0), 'depth=0'),
    (dict(patterns=('row',) * 3), '3 patterns for depth=4'),
    (dict(patterns=('rows',) * 4), "pattern 'rows'"), (dict(activation='tanh'), "'tanh'"),
    (dict(depth=9, patterns=('row',) * 7 + ('column', 'conv')), 'must repeat')])
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(blocks(4), **changes)


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('depth', [4, 9])
def test_forward_is_the_oracle(depth):
    """Unrolled (4) and scanned with a tail (9)."""
    config = blocks(depth)
    params, x = parameters(config), inputs(config)
    got = jax.jit(lambda p, x: transformer.forward(p, config, x))(params, x)
    np.testing.assert_allclose(got, oracle(params, config, x), atol=3e-5)


# Two scanned groups and a tail; 'causal' compiles fastest.
SCANNED = blocks(9, ('causal',) * 9)


def objective(params, remat):
    return jnp.sum(jnp.sin(transformer.forward(params, SCANNED, inputs(SCANNED), remat=remat)))


@functools.cache
def gradients(remat):
    return jax.jit(jax.grad(objective), static_argnums=1)(parameters(SCANNED), remat)


def test_scan_is_the_unrolled_stack(monkeypatch):
    """The same layers, all of them in the tail."""
    params, grads = parameters(SCANNED), gradients('none')
    layers, grads = unstacked(params, SCANNED), unstacked(grads, SCANNED)
    flat = {'tail': {str(i): layer for i, layer in enumerate(layers)}, 'norm': params['norm']}
    monkeypatch.setattr(BlockConfig, 'groups', 0)
    flat_grads = jax.jit(lambda p: jax.grad(objective)(p, 'none'))(flat)
    for i, grad in enumerate(grads):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
                     grad, flat_grads['tail'][str(i)])


@pytest.mark.parametrize('remat', ['dots', 'all-but-mlp', 'full'])
def test_remat_leaves_gradients_as_they_are(remat):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
                 gradients('none'), gradients(remat))


def test_remat_saves_memory():
    def kept(remat):
        residuals = jax.eval_shape(lambda p: jax.vjp(lambda p: objective(p, remat), p)[1],
                                   parameters(SCANNED))
        return sum(r.size for r in jax.tree.leaves(residuals))

    assert kept('full') < kept('all-but-mlp') < kept('dots') < kept('none')


def test_bfloat16_branches_on_a_float32_stream():
    config = blocks(4)
    params, x = parameters(config), inputs(config)
    exact = oracle(params, config, x)
    program = jax.jit(lambda p, x: transformer.forward(p, config, x, dtype=jnp.bfloat16)).lower(
        params, x)
    got = program.compile()(params, x)
    assert got.dtype == jnp.float32
    error = np.abs(np.asarray(got) - exact).max()
    assert 1e-4 < error < 0.15
    products = [line for line in program.as_text().splitlines() if 'dot_general' in line]
    assert products and all(line.split(':')[-1].count('bf16>') >= 2 for line in products)


def test_constrain_is_told_axes():
    seen = set()

    def constrain(x, axes):
        assert len(axes) == x.ndim
        seen.add(axes)
        return x

    config = blocks(4)
    jax.eval_shape(lambda p, x: transformer.forward(p, config, x, constrain=constrain),
                   parameters(config), inputs(config))
    assert seen == {('batch', None, None), ('batch', 'heads', None, None), ('batch', None, 'mlp')}


# -- what depends on what --------------------------------------------------------------------------


@pytest.mark.parametrize('kind', [*patterns.PATTERNS, 'bidirectional'])
def test_gradient_reaches_exactly_what_two_layers_see(kind):
    layout = None if kind == 'bidirectional' else LAYOUT
    config = dataclasses.replace(blocks(2, (kind, kind)), layout=layout)
    params, x = parameters(config), inputs(blocks(2), batch=1)
    jacobian = jax.jit(jax.jacrev(lambda x: transformer.forward(params, config, x)[0].sum(-1)))(x)
    reached = np.abs(np.asarray(jacobian)).sum(-1)[:, 0] != 0
    sees = np.ones((15, 15), bool) if layout is None else patterns.mask(kind, layout)
    np.testing.assert_array_equal(reached, sees.astype(int) @ sees > 0)


def test_attention_maps():
    """Rows sum to 1 and are where the pattern allows; the first row layer sees the input."""
    config = blocks(9)
    params, x = parameters(config), inputs(config, batch=1)
    maps = jax.jit(lambda p, x: transformer.attention_maps(p, config, x))(params, x)
    assert set(maps) == {'row', 'column', 'conv'}
    for kind, weights in maps.items():
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
        np.testing.assert_array_equal(weights[0] > 0, patterns.mask(kind, LAYOUT))
    first = blocks(1, ('row',))
    alone = jax.jit(lambda p, x: transformer.attention_maps(p, first, x))(
        {'tail': {'0': unstacked(params, config)[0]}, 'norm': params['norm']}, x)
    np.testing.assert_allclose(maps['row'], alone['row'], atol=1e-6)


def test_gradient_of_quick_gelu():
    """That of x sigmoid(1.702 x), in both directions far out, too."""
    x = np.concatenate([np.linspace(-12, 12, 401), [-1e4, -300, 300, 1e4]])
    s = 1 / (1 + np.exp(-1.702 * x.clip(-300, None)))
    got = jax.vmap(jax.grad(transformer.quick_gelu))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, s + 1.702 * x * s * (1 - s), atol=3e-6)
    assert np.isfinite(jax.grad(transformer.quick_gelu)(jnp.float16(60000)))
