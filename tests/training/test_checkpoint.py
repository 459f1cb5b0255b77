from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dalle_jax.training import checkpoint as lib
from dalle_jax.training import partition


class State(NamedTuple):
    """A tree with attribute paths, as the trainer's is."""

    params: Any
    averages: Any
    step: Any
    key: Any


STATE = State(params={'w': jnp.arange(4096, dtype=jnp.float32).reshape(64, 64),
                      'half': jnp.arange(8, dtype=jnp.bfloat16)},
              averages={}, step=jnp.int32(7), key=jnp.array([1, 2], jnp.uint32))
ABSTRACT = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE)


def saved(directory, *steps):
    checkpoints = lib.Checkpoints(directory)
    for step in steps:
        checkpoints.save(step, STATE._replace(step=jnp.int32(step)))
    checkpoints.close()
    return directory


def data_files(directory, step):
    files = [p for p in (directory / str(step) / 'state').rglob('*') if p.is_file()]
    return sorted((p for p in files if p.parent.name == 'd'), key=lambda p: p.stat().st_size)


def test_round_trip_is_exact(tmp_path):
    step, state = lib.Checkpoints(saved(tmp_path, 3, 7)).restore(ABSTRACT)
    assert step == 7
    jax.tree.map(np.testing.assert_array_equal, state, STATE)
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, STATE)


def test_nothing_saved(tmp_path):
    assert lib.Checkpoints(tmp_path).restore(ABSTRACT) is None
    with pytest.raises(lib.CheckpointError, match='there are no checkpoints in'):
        lib.restore_subtree(tmp_path / 'absent', ('params',))


def test_restores_onto_another_sharding(tmp_path):
    mesh = partition.make_mesh(partition.MeshConfig())
    sharding = NamedSharding(mesh, PartitionSpec('fsdp'))
    abstract = jax.tree.map(lambda a: a, ABSTRACT)
    abstract.params['w'] = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=sharding)
    _, state = lib.Checkpoints(saved(tmp_path, 7)).restore(abstract)
    assert state.params['w'].sharding == sharding
    np.testing.assert_array_equal(state.params['w'], STATE.params['w'])


def test_subtree_without_knowing_shapes(tmp_path):
    step, trees = lib.restore_subtree(saved(tmp_path, 5), ('params', 'averages'))
    assert step == 5 and trees['averages'] == {}
    jax.tree.map(np.testing.assert_array_equal, trees['params'], STATE.params)


@pytest.mark.parametrize('reader', ['state', 'subtree'])
def test_flipped_byte_falls_back_to_the_step_before(tmp_path, reader):
    saved(tmp_path, 3, 7)
    # Every data file of the newest step: whichever holds array bytes, the damage must be seen.
    for file in data_files(tmp_path, 7):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0x10
        file.write_bytes(content)
    if reader == 'state':
        step, _ = lib.Checkpoints(tmp_path).restore(ABSTRACT)
    else:
        step, _ = lib.restore_subtree(tmp_path, ('params',))
    assert step == 3


def test_a_damaged_step_is_saved_again(tmp_path):
    """The run that fell back to step 3 reaches step 7 once more."""
    saved(tmp_path, 3, 7)
    for file in data_files(tmp_path, 7):
        file.write_bytes(file.read_bytes()[:10])
    checkpoints = lib.Checkpoints(tmp_path)
    assert checkpoints.restore(ABSTRACT)[0] == 3
    checkpoints.save(7, STATE)
    checkpoints.close()
    assert lib.restore_subtree(tmp_path, ('params',))[0] == 7


def test_a_step_that_is_not_saved_is_an_error(tmp_path):
    checkpoints = lib.Checkpoints(saved(tmp_path, 7))
    with pytest.raises(lib.CheckpointError, match='step 3 was not saved .*: step 7 is there'):
        checkpoints.save(3, STATE)


def test_truncated_everywhere_is_an_error_with_a_remedy(tmp_path):
    saved(tmp_path, 3)
    for file in data_files(tmp_path, 3):
        file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(lib.CheckpointError, match='no usable checkpoint in .*step 3'):
        lib.Checkpoints(tmp_path).restore(ABSTRACT)
    with pytest.raises(lib.CheckpointError, match='Remove the directory and train again'):
        lib.restore_subtree(tmp_path, ('params',))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8', 'uint32'])
def test_checksum_sees_any_bit_and_any_swap(dtype):
    x = np.asarray(jnp.arange(-50, 50).astype(dtype))
    reference = lib.checksums({'x': x})
    rng = np.random.default_rng(0)
    for _ in range(30):
        damaged = x.copy()
        raw = damaged.view(np.uint8)
        raw[rng.integers(raw.size)] ^= 1 << rng.integers(8)
        assert lib.mismatches(reference, lib.checksums({'x': damaged})) == ['x']
    swapped = x.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert lib.checksums({'x': swapped}) != reference


def test_restored_state_of_a_donated_one(tmp_path):
    """What is saved is the state at the call, although training goes on and reuses its memory."""
    checkpoints = lib.Checkpoints(tmp_path)
    bump = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = jax.tree.map(jnp.copy, STATE)
    checkpoints.save(7, state)
    for _ in range(20):
        state = bump(state)
    checkpoints.close()
    _, restored = lib.Checkpoints(tmp_path).restore(ABSTRACT)
    jax.tree.map(np.testing.assert_array_equal, restored, STATE)
