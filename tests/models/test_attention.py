"""Attention: the patterns of the paper's figure, and blocks and caches against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_jax.models import attention, patterns
from dalle_jax.models.patterns import Layout

SPARSE = ('row', 'column', 'conv')
TOY = Layout(text=6, rows=4, columns=4, kernel=3)

# Ramesh et al. 2021, fig. 11: image keys of each image query on the 4 x 4 grid.
FIGURE_11 = {
    'row': [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [1, 2, 3, 4, 5],
            [2, 3, 4, 5, 6], [3, 4, 5, 6, 7], [4, 5, 6, 7, 8], [5, 6, 7, 8, 9],
            [6, 7, 8, 9, 10], [7, 8, 9, 10, 11], [8, 9, 10, 11, 12], [9, 10, 11, 12, 13],
            [10, 11, 12, 13, 14], [11, 12, 13, 14, 15]],
    'column': [[0], [1], [2], [3], [0, 4], [1, 5], [2, 6], [3, 7], [0, 4, 8], [1, 5, 9],
               [2, 6, 10], [3, 7, 11], [0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14],
               [3, 7, 11, 15]],
    'conv': [[0], [0, 1], [1, 2], [0, 2, 3], [0, 1, 3, 4], [0, 1, 2, 4, 5], [1, 2, 3, 5, 6],
             [0, 2, 3, 4, 6, 7], [1, 3, 4, 5, 7, 8], [2, 4, 5, 6, 8, 9], [3, 5, 6, 7, 9, 10],
             [4, 6, 7, 8, 10, 11], [5, 7, 8, 9, 11, 12], [6, 8, 9, 10, 12, 13],
             [7, 9, 10, 11, 13, 14], [8, 10, 11, 12, 14, 15]],
}


def tensors(layout, batch=2, heads=3, size=4, seed=0, count=4):
    shape = (count, batch, heads, layout.length, size)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def oracle(mask, q, k, v, cotangent):
    """Output and gradients of masked attention in closed form, float64."""
    q, k, v, cotangent = (x.astype(np.float64) for x in (q, k, v, cotangent))
    scale = q.shape[-1] ** -0.5
    scores = np.where(mask, scale * q @ k.swapaxes(-1, -2), -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = cotangent @ v.swapaxes(-1, -2)
    ds = scale * p * (dp - (dp * p).sum(-1, keepdims=True))
    return p @ v, ds @ k, ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ cotangent


def output_and_gradients(kind, layout, q, k, v, cotangent):
    def run(q, k, v, cotangent):
        out, vjp = jax.vjp(lambda *x: attention.attend(kind, *x, layout), q, k, v)
        return out, *vjp(cotangent)
    return jax.jit(run)(q, k, v, cotangent)


@pytest.mark.parametrize('kind', SPARSE)
def test_figure_11(kind):
    mask = patterns.mask(kind, TOY)
    np.testing.assert_array_equal(mask[:6, :6], np.tri(6, dtype=bool))
    assert not mask[:6, 6:].any()
    assert mask[6:, :6].all()
    assert [np.flatnonzero(row).tolist() for row in mask[6:, 6:]] == FIGURE_11[kind]


@pytest.mark.parametrize('side,kernel,row,column,conv,causal', [
    (4, 3, 70, 40, 76, 136), (32, 11, 33_264, 16_896, 61_344, 524_800)])
def test_pair_counts(side, kernel, row, column, conv, causal):
    layout = Layout(1, side, side, kernel)
    pairs = {kind: patterns.mask(kind, layout)[1:, 1:].sum() for kind in patterns.PATTERNS}
    assert pairs == {'row': row, 'column': column, 'conv': conv, 'causal': causal}


def test_convolutional_offsets():
    ranges = [(0, 5), (27, 37), (59, 69), (91, 101), (123, 133), (155, 165), (187, 191)]
    expected = [o for first, last in ranges for o in range(first, last + 1)]
    assert len(expected) == 66
    assert patterns.offsets('conv', Layout(256, 32, 32, 11)).tolist() == expected


def test_causal_pattern_is_plain_causal_attention():
    np.testing.assert_array_equal(patterns.mask('causal', TOY), np.tri(22, dtype=bool))


layouts = st.builds(Layout, text=st.integers(1, 7), rows=st.integers(1, 7),
                    columns=st.integers(1, 9), kernel=st.sampled_from([1, 3, 5, 9]))


@settings(max_examples=12, deadline=None)
@given(kind=st.sampled_from(SPARSE), layout=layouts, seed=st.integers(0, 99))
def test_blocks_equal_definition(kind, layout, seed):
    arrays = tensors(layout, seed=seed)
    expected = oracle(patterns.mask(kind, layout), *arrays)
    for got, want in zip(output_and_gradients(kind, layout, *arrays), expected):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1, np.abs(want).max()))


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(SPARSE), layout=st.builds(
    Layout, text=st.just(1), rows=st.integers(1, 40), columns=st.integers(1, 40),
    kernel=st.sampled_from([1, 3, 5, 7, 11, 21])))
def test_blocks_hold_every_pair_once(kind, layout):
    """On shapes too large to run: block by block the same pairs as the definition."""
    block, reach, allowed = attention._blocks(kind, layout)
    n, pairs = len(allowed), set()
    order = np.arange(layout.image)
    if kind == 'column':
        order = order.reshape(layout.rows, layout.columns).T.reshape(-1)
    for i, query, key in zip(*np.nonzero(allowed)):
        pairs.add((order[i * block + query], order[i * block + key - reach]))
    assert n * block == layout.image
    assert len(pairs) == allowed.sum()
    assert pairs == set(zip(*np.nonzero(patterns.mask(kind, layout)[1:, 1:])))


@pytest.mark.parametrize('kind', SPARSE)
def test_blocks_at_two_windows_and_more(kind):
    """A grid that is cut into several blocks, and for 'conv' reaches back over two of them."""
    layout = Layout(3, 12, 6, 5)
    block, reach, allowed = attention._blocks(kind, layout)
    assert len(allowed) > 1
    arrays = tensors(layout, batch=1, heads=2)
    expected = oracle(patterns.mask(kind, layout), *arrays)
    for got, want in zip(output_and_gradients(kind, layout, *arrays), expected):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1, np.abs(want).max()))


@pytest.mark.parametrize('kind', SPARSE)
def test_bfloat16(kind):
    layout = Layout(5, 6, 6, 3)
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in tensors(layout, size=16)]
    got = output_and_gradients(kind, layout, *arrays)
    expected = oracle(patterns.mask(kind, layout), *(np.asarray(x, np.float32) for x in arrays))
    for g, want in zip(got, expected):
        assert g.dtype == jnp.bfloat16
        error = np.abs(np.asarray(g, np.float64) - want).max() / np.abs(want).max()
        assert error < 1.2e-2  # two roundings to 8 bits


def test_bfloat16_products_everywhere_and_float32_scores():
    """No product of a bfloat16 with a float32 operand, and no softmax below float32."""
    layout = Layout(5, 6, 6, 3)
    arrays = [jnp.zeros((1, 1, 41, 8), jnp.bfloat16)] * 4
    text = jax.jit(lambda *x: output_and_gradients('row', layout, *x)).lower(*arrays).as_text()
    products = [line for line in text.splitlines() if 'dot_general' in line]
    # Text to text, image to text, image to window; q k and p v; each forward and twice backward.
    assert len(products) == 3 * 2 * 3
    assert all(line.split(':')[-1].count('xbf16>') == 2 for line in products)
    assert all('xf32>' in line.split('->')[-1] for line in products)
    assert all('f32' in line for line in text.splitlines() if 'exponential' in line)


@pytest.mark.parametrize('layout', [TOY, Layout(2, 9, 4, 3)])
@pytest.mark.parametrize('kind', SPARSE)
def test_gradient_connects_exactly_what_the_mask_allows(kind, layout):
    q, k, v, _ = tensors(layout, batch=1, heads=1, size=2)
    jacobian = jax.jit(jax.jacrev(lambda v: attention.attend(kind, q, k, v, layout)[0, 0, :, 0]))
    np.testing.assert_array_equal(np.asarray(jacobian(v))[:, 0, 0, :, 0] != 0,
                                  patterns.mask(kind, layout))


@pytest.mark.parametrize('kind', SPARSE)
def test_forbidden_keys_leave_no_trace(kind):
    """Example i of the batch has huge keys and values wherever query i must not look."""
    layout = Layout(3, 5, 7, 3)
    mask = patterns.mask(kind, layout)
    clean = np.repeat(tensors(layout, batch=1, heads=2), layout.length, axis=1)
    poisoned = clean.copy()
    for i, row in enumerate(mask):
        poisoned[1:3, i][:, :, ~row] = 1e4
    attend = jax.jit(lambda q, k, v: attention.attend(kind, q, k, v, layout))
    diagonal = np.arange(layout.length)
    want, got = (np.asarray(attend(*x[:3]))[diagonal, :, diagonal] for x in (clean, poisoned))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('kind,mask', [
    ('causal', np.tri(9, dtype=bool)), ('bidirectional', np.ones((9, 9), bool))])
def test_plain_sequences_need_no_layout(kind, mask):
    arrays = tensors(Layout(1, 2, 4))
    expected = oracle(mask, *arrays)
    for got, want in zip(output_and_gradients(kind, None, *arrays), expected):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize('kind', SPARSE)
def test_weights_are_those_of_the_definition(kind):
    q, k, _, _ = tensors(TOY, heads=2)
    v = np.broadcast_to(np.eye(22), (2, 2, 22, 22))
    want = oracle(patterns.mask(kind, TOY), q, k, v, v)[0]
    np.testing.assert_allclose(attention.weights(kind, q, k, TOY), want, atol=1e-6)


@pytest.mark.parametrize('kind,least', [('row', 3.4), ('column', 3.4), ('conv', 2)])
def test_work_is_sparse(kind, least):
    """Floating point operations at the paper's sequence, against a dense mask."""
    layout = Layout(256, 32, 32, 11)
    arrays = [jax.ShapeDtypeStruct((1, 2, 1280, 64), jnp.float32)] * 4

    def flops(run):
        def both(q, k, v, cotangent):
            return jax.vjp(run, q, k, v)[1](cotangent)
        return jax.jit(both).lower(*arrays).cost_analysis()['flops']

    dense = flops(lambda q, k, v: attention._dense(q, k, v, np.ones((1280, 1280), bool)))
    assert dense / flops(lambda q, k, v: attention.attend(kind, q, k, v, layout)) > least


@pytest.mark.parametrize('values,message', [
    (dict(text=0), 'text=0 must be at least 1'), (dict(rows=0), 'rows=0'),
    (dict(kernel=4), 'kernel=4 must be odd')])
def test_layout_errors(values, message):
    with pytest.raises(ValueError, match=message):
        Layout(**{'text': 1, 'rows': 2, 'columns': 2, 'kernel': 3, **values})


def test_errors():
    x = jnp.zeros((1, 1, 22, 2))
    with pytest.raises(ValueError, match="'diagonal'; choose one of"):
        attention.attend('diagonal', x, x, x, TOY)
    with pytest.raises(ValueError, match="'diagonal'; choose one of"):
        patterns.offsets('diagonal', TOY)
    with pytest.raises(ValueError, match="'flash'; choose one of"):
        attention.attend('row', x, x, x, TOY, 'flash')
    with pytest.raises(ValueError, match='over 21 states'):
        attention.attend('row', x[:, :, 1:], x[:, :, 1:], x[:, :, 1:], TOY)
    with pytest.raises(ValueError, match='over 22 states with None'):
        attention.attend('row', x, x, x)
