"""Caches and cached steps against the definition of the patterns and the full forward pass."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models import decoding, patterns, transformer
from dalle_jax.models.patterns import Layout
from tests.models.test_attention import oracle, tensors
from tests.models.test_transformer import LAYOUT, blocks, inputs, parameters


@pytest.mark.parametrize('layout', [Layout(3, 4, 5, 3), Layout(2, 5, 3, 7), Layout(1, 1, 4)])
@pytest.mark.parametrize('kind', patterns.PATTERNS)
def test_cached_state_by_state(kind, layout):
    """Queries of N candidates on a shared text, with a cache written after each state."""
    candidates = 2
    q, k, v = tensors(layout, batch=candidates, heads=2, count=3)
    k[:, :, :layout.text], v[:, :, :layout.text] = k[:1, :, :layout.text], v[:1, :, :layout.text]
    want = oracle(patterns.mask(kind, layout), q, k, v, v)[0][:, :, layout.text:]
    text = [x[:1, :, :layout.text] for x in (k, v)]
    lanes, slots = decoding.cache_shape(kind, layout)
    caches = [np.zeros((*lanes, 1, 2, candidates, slots, 4), np.float32) for _ in range(2)]

    @jax.jit
    def step(position, *arrays):
        return decoding.attend_cached(*arrays, decoding.cache_visible(kind, layout, position))

    for position in range(layout.image):
        new = [x[:, :, layout.text + position].swapaxes(0, 1)[None] for x in (q, k, v)]
        lane, slot = decoding.cache_address(kind, layout, position)
        out = np.asarray(step(position, *new, text, [c[lane] for c in caches]))
        np.testing.assert_allclose(out[0].swapaxes(0, 1), want[:, :, position], atol=2e-6)
        for cache, x in zip(caches, new[1:]):
            cache[lane][..., slot, :] = x


def test_cache_sizes_of_the_paper():
    layout = Layout(256, 32, 32, 11)
    assert decoding.cache_shape('row', layout) == ((), 32)
    assert decoding.cache_shape('column', layout) == ((32,), 32)
    assert decoding.cache_shape('conv', layout) == ((), 191)


@pytest.mark.parametrize('depth,patterns', [
    (4, None), (9, None), (3, ('causal', 'conv', 'column')), (9, ('causal',) * 9)])
def test_steps_equal_the_forward_pass(depth, patterns):
    """C = 2 captions, N = 3 candidates each, the body scanned or not."""
    config = blocks(depth, patterns)
    params, text = parameters(config), LAYOUT.text
    x = inputs(config, batch=6).reshape(2, 3, LAYOUT.length, config.width)
    x[:, :, :text] = x[:, :1, :text]  # candidates share a caption
    forward = jax.jit(lambda p, x: transformer.forward(p, config, x))
    want = np.asarray(forward(params, x.reshape(6, *x.shape[2:]))).reshape(x.shape)[:, :, text:]

    @jax.jit
    def steps(params, x):
        _, prompt = decoding.prefill(params, config, x[:, 0, :text])

        def body(caches, scanned):
            out, caches = decoding.step(params, config, *scanned, prompt, caches)
            return caches, out
        states = jnp.moveaxis(x[:, :, text:], 2, 0)
        return jax.lax.scan(body, decoding.empty_caches(config, 2, 3),
                            (states, jnp.arange(LAYOUT.image)))[1]

    got = jnp.moveaxis(steps(params, x), 0, 2)
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize('depth,batch,candidates', [(4, 2, 3), (9, 2, 3), (4, 1, 1), (9, 1, 3)])
def test_no_step_copies_a_cache(depth, batch, candidates):
    config = blocks(depth)
    caches = jax.eval_shape(lambda: decoding.empty_caches(config, batch, candidates))
    params = parameters(config)

    def run(params, x, text):
        _, prompt = decoding.prefill(params, config, text)

        def body(carry, position):
            x, caches = carry
            return decoding.step(params, config, x, position, prompt, caches), None
        return jax.lax.scan(body, (x, decoding.empty_caches(config, batch, candidates)),
                            jnp.arange(LAYOUT.image))[0][0]

    program = jax.jit(run).lower(params, jnp.zeros((batch, candidates, 8)),
                                 jnp.zeros((batch, 3, 8))).compile()
    bodies = [part for part in re.split(r'\n(?=\S)', program.as_text())
              if not part.startswith('ENTRY')]
    shapes = {','.join(map(str, x.shape)) for x in jax.tree.leaves(caches.past)}
    for shape in shapes:
        assert not any(re.search(rf'= f32\[{shape}\]\S* copy\(', body) for body in bodies)
    written = sum('dynamic-update-slice(' in line and line.split('[')[1].split(']')[0] in shapes
                  for body in bodies for line in body.splitlines())
    assert written == len(jax.tree.leaves(caches.past))


@pytest.mark.parametrize('count', [1, 2, 5, 9, 12])
def test_steps_continue_a_prefill_of_the_image(count):
    """Of any number of states, in a ring that has turned or not; what follows them is not read."""
    config = blocks(9)
    params, text = parameters(config), LAYOUT.text
    x = inputs(config, batch=4).reshape(2, 2, LAYOUT.length, config.width)
    x[:, :, :text + count] = x[:, :1, :text + count]
    want = np.asarray(jax.jit(lambda p, x: transformer.forward(p, config, x))(
        params, x.reshape(4, *x.shape[2:]))).reshape(x.shape)

    @jax.jit
    def run(params, x):
        first, prompt, caches = decoding.prefill_image(
            params, config, x[:, 0].at[:, text + count:].set(1e3), count, 2)

        def body(caches, scanned):
            out, caches = decoding.step(params, config, *scanned, prompt, caches)
            return caches, out
        states = jnp.moveaxis(x[:, :, text + count:], 2, 0)
        return first, jax.lax.scan(body, caches, (states, jnp.arange(count, LAYOUT.image)))[1]

    first, rest = run(params, x)
    np.testing.assert_allclose(first[:, :text + count], want[:, 0, :text + count], atol=1e-4)
    np.testing.assert_allclose(jnp.moveaxis(rest, 0, 2), want[:, :, text + count:], atol=1e-4)
