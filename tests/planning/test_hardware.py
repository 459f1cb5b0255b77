"""Topologies that exist and those that do not; limits of chips, checked with their compiler."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle_jax.planning import hardware as lib


@pytest.mark.parametrize('text,chip,shape,slices,chips', [
    ('v5p:8x8x16', 'v5p', (8, 8, 16), 1, 1024),
    ('v5p:16x16x24', 'v5p', (16, 16, 24), 1, 6144),  # the largest of Google's table
    ('v4:2x2x1', 'v4', (2, 2, 1), 1, 4),
    ('v4:12x12x24', 'v4', (12, 12, 24), 1, 3456),
    ('v5e:16x16', 'v5e', (16, 16), 1, 256),
    ('v6e:1x1', 'v6e', (1, 1), 1, 1),
    ('4*v5e:16x16', 'v5e', (16, 16), 4, 1024),
    ('h100:16x8', 'h100', (8,), 16, 128),
    ('h100:3x4', 'h100', (4,), 3, 12),
    ('h100:128', 'h100', (8,), 16, 128),
    ('h200:1', 'h200', (1,), 1, 1),
    ('h200:8', 'h200', (8,), 1, 8),
])
def test_topology(text, chip, shape, slices, chips):
    found = lib.topology(text)
    assert (found.chip.name, found.shape, found.slices) == (chip, shape, slices)
    assert (found.chips, found.per_slice) == (chips, chips // slices)
    assert lib.topology(str(found)) == found


@pytest.mark.parametrize('text,reason,nearest', [
    ('v5e:4x4x4', '2 dimensions, not 3', 'v5e:8x8'),
    ('v5p:8x8', '3 dimensions, not 2', 'v5p:4x4x4'),
    ('v5e:32x32', "at most 256 chips, and several are written '2[*]v5e:16x16'", 'v5e:16x16'),
    ('v5p:16x16x32', 'at most 6,144 chips', 'v5p:16x16x24'),
    ('v4:16x16x24', 'at most 4,096 chips', 'v4:16x16x16'),
    ('v6e:4x2', 'slices are 1x1, 2x2, 2x4', 'v6e:2x4'),
    ('v6e:3x3', 'slices are 1x1, 2x2, 2x4', 'v6e:2x4'),
    ('v5e:0x4', 'slices are', 'v5e:1x1'),
    ('v5p:4x4x6', 'multiples of 4', 'v5p:4x4x8'),
    ('v5p:8x8x4', 'A <= B <= C', 'v5p:4x8x8'),
    ('v4:2x2x3', 'multiples of 4', 'v4:2x2x4'),
    ('0*v5e:4x4', 'at least one slice', 'v5e:4x4'),
    ('h100:8x16', '1, 2, 4 or 8 GPUs to a node', 'h100:16x8'),
    ('h100:12', 'NODESxGPUS', 'h100:2x8'),
    ('h100:3', 'NODESxGPUS', 'h100:1x4'),
    ('h100:0x8', 'NODESxGPUS', 'h100:1x1'),
    ('2*h100:8', 'NODESxGPUS', 'h100:1x8'),
    ('h200:2x2x2', 'NODESxGPUS', 'h200:1x8'),
    ('a100:8', 'none of the chips v4, v5e, v5p, v6e, h100, h200', 'h100'),
    ('v3:4x4', 'none of the chips', 'v4'),
])
def test_topologies_that_do_not_exist(text, reason, nearest):
    with pytest.raises(ValueError, match=reason) as error:
        lib.topology(text)
    assert repr(text) in str(error.value) and repr(nearest) in str(error.value)


@pytest.mark.parametrize('text', ['', 'v5e', 'v5e:', 'v5e-256', ':4x4', 'v5e:4x', 'v5e:4*4'])
def test_what_is_no_topology(text):
    with pytest.raises(ValueError, match='write CHIP:SHAPE') as error:
        lib.topology(text)
    assert repr(text) in str(error.value)


@settings(max_examples=200, deadline=None)
@given(chip=st.sampled_from(['v4', 'v5e', 'v5p', 'v6e']),
       shape=st.lists(st.integers(0, 40), min_size=1, max_size=4))
def test_nearest_slice_exists(chip, shape):
    """And has at most as many chips as fit a slice; what exists is accepted."""
    text = f"{chip}:{'x'.join(map(str, shape))}"
    try:
        found = lib.topology(text)
        assert found.shape == tuple(shape)
    except ValueError as error:
        found = lib.topology(str(error).rpartition('nearest is ')[2].strip("'"))
    assert 1 <= found.chips <= found.chip.largest


def test_slices_that_exist():
    """All of Google's table of v5p, and none larger."""
    shapes = lib.shapes(lib.CHIPS['v5p'])
    listed = '2x2x1 2x2x2 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16 16x16x24'
    assert {tuple(map(int, s.split('x'))) for s in listed.split()} <= set(shapes)
    assert len(shapes) == len(set(shapes))
    assert max(map(math.prod, shapes)) == 6144


@pytest.mark.aot
@pytest.mark.parametrize('text', ['v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'v5e:1x1',
                                  '2*v5e:2x2', 'h100:2x8', 'h200:1'])
def test_compiler(text):
    """It knows as many devices as there are chips, and of TPUs the memory."""
    topology = lib.topology(text)
    try:
        devices = lib.devices(topology)
    except lib.NoCompiler as error:
        pytest.skip(str(error))
    assert len(devices) == topology.chips
    mesh = Mesh(np.array(devices), ('all',))
    size = 2 * topology.chip.hbm if topology.chip.platform == 'tpu' else 2**20
    x = jax.ShapeDtypeStruct((len(devices), size), jnp.uint8,
                             sharding=NamedSharding(mesh, PartitionSpec('all')))
    lowered = jax.jit(lambda x: x + 1).trace(x).lower(
        lowering_platforms=(topology.chip.platform,))
    if topology.chip.platform == 'tpu':
        with pytest.raises(jax.errors.JaxRuntimeError, match='exceeds available HBM') as error:
            lowered.compile()
        granted = float(re.search(r'available HBM \(([\d.]+)G\)', str(error.value))[1])
        assert -0.02 < topology.chip.hbm / 2**30 - granted < 0.01
    else:
        assert lowered.compile().memory_analysis().argument_size_in_bytes == size
