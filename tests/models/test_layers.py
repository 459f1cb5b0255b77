"""Products in tiles against products with the kernel."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_jax.models import decoding, layers
from dalle_jax.models.transformer import BlockConfig, dalle_patterns
from tests.models.test_transformer import LAYOUT, inputs, parameters


@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 12), inputs=st.integers(1, 20), transposed=st.booleans(),
       outputs=st.sampled_from([1, 24, 63, 64, 65, 128, 320]))
def test_products_in_tiles(rows, inputs, outputs, transposed):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(rows, 1, inputs)), rng.normal(size=(inputs, outputs))
    bias = rng.normal(size=outputs)
    given = {'kernel': jnp.asarray(kernel.T if transposed else kernel), 'bias': jnp.asarray(bias)}
    tiles = {'tiles': layers.tiled(jnp.asarray(kernel), rows), 'bias': given['bias']}
    np.testing.assert_allclose(layers.dense(x, given, jnp.float32, transposed),
                               x @ kernel + bias, atol=2e-5)
    np.testing.assert_allclose(layers.dense(x, tiles, jnp.float32, transposed),
                               x @ kernel + bias, atol=2e-5)


@pytest.mark.parametrize('rows,width', [(1, 192), (2, 64), (8, 64), (9, 192)])
def test_tiles_are_columns_in_one_piece(rows, width):
    kernel = np.arange(2 * 5 * 192).reshape(2, 5, 192)
    tiles = np.asarray(layers.tiled(jnp.asarray(kernel), rows))
    assert tiles.shape == (2, 192 // width, 5, width)
    for i in range(192 // width):
        np.testing.assert_array_equal(tiles[:, i], kernel[:, :, i * width:][:, :, :width])


@pytest.mark.parametrize('depth', [4, 9])
def test_a_stack_in_tiles_steps_alike(depth):
    """Wide enough for tiles, in a body or not."""
    config = BlockConfig(depth, 64, 2, dalle_patterns(depth), LAYOUT)
    params = parameters(config)
    tiles = decoding.tiled_stack(params, 6)
    assert tiles['tail']['0']['mlp']['down']['tiles'].shape == (1, 256, 64)
    assert tiles['tail']['0']['attention']['qkv']['tiles'].shape == (3, 64, 64)
    x = inputs(config)
    _, prompt = decoding.prefill(params, config, x[:, :LAYOUT.text])
    caches = decoding.empty_caches(config, 2, 3)
    state = inputs(config, batch=6, seed=1)[:, 0].reshape(2, 3, 64)
    want, _ = decoding.step(params, config, state, 0, prompt, caches)
    got, _ = decoding.step(tiles, config, state, 0, prompt, caches)
    np.testing.assert_allclose(got, want, atol=1e-5)
