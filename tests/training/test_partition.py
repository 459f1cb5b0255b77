import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dalle_jax.planning import hardware
from dalle_jax.training import partition as lib

TWO = lib.make_mesh(lib.MeshConfig())


def test_mesh_takes_what_is_left():
    assert dict(TWO.shape) == {'replica': 1, 'fsdp': 2, 'tensor': 1}
    assert dict(lib.make_mesh(lib.MeshConfig(replica=2)).shape)['fsdp'] == 1


@pytest.mark.parametrize('config,message', [
    (lib.MeshConfig(fsdp=4), r"'fsdp': 4.* needs 4 devices, but there are 2"),
    (lib.MeshConfig(replica=-1), 'one may be -1'),
    (lib.MeshConfig(tensor=0), 'at least 1'),
])
def test_impossible_meshes_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        lib.make_mesh(config)


def test_logical_axes_become_mesh_axes():
    placed = lib.Partitioner(TWO)
    assert placed.spec(('embed', 'mlp'), (4, 6)) == PartitionSpec('fsdp', 'tensor')
    assert placed.spec((None, 'unlisted'), (3, 5)) == PartitionSpec(None, None)
    assert placed.spec(('batch', None), (4, 3)) == PartitionSpec(('replica', 'fsdp'), None)
    with pytest.raises(ValueError, match='two dimensions live on the same mesh axis'):
        placed.spec(('embed', 'vocab'), (4, 4), 'table')


def test_rules_can_be_overridden():
    placed = lib.Partitioner(TWO, 'embed=,heads=fsdp,mlp=fsdp+tensor')
    assert placed.spec(('embed', 'mlp'), (4, 6)) == PartitionSpec(None, ('fsdp', 'tensor'))
    assert placed.spec(('heads', 'embed'), (4, 6)) == PartitionSpec('fsdp', None)
    assert lib.Partitioner(TWO).spec(('heads',), (4,)) == PartitionSpec('tensor')


@pytest.mark.parametrize('rules,message', [
    ('embd=fsdp', r"has 'embd=fsdp'; write .* AXIS of embed, vocab, heads, mlp"),
    ('embed', r"has 'embed'; write AXIS=MESHAXIS"),
    ('batch=fsdp', r"has 'batch=fsdp'"),
    ('embed=replica', r"parameters live on fsdp and tensor, not on replica"),
    ('mlp=fsdp+model', r"not on model"),
])
def test_wrong_rules_are_named(rules, message):
    with pytest.raises(ValueError, match=message):
        lib.MeshConfig(rules=rules)


def test_what_the_mesh_does_not_divide_is_named():
    """The 12B model's width is 2^7 * 31, its heads are 62."""
    mesh = jax.sharding.AbstractMesh((2, 24, 4), lib.AXES)
    placed = lib.Partitioner(mesh)
    with pytest.raises(ValueError, match=(
            r"up \(3968, 5\) with axes .*'embed' has 3968 entries, which fsdp = 24 does not "
            'divide; 16 or 31 would')):
        placed.spec(('embed', None), (3968, 5), 'up')
    with pytest.raises(ValueError, match="'heads' has 62 entries, which tensor = 4.*; 2 or 31"):
        placed.spec(('batch', 'heads'), (48, 62), 'activation')
    with pytest.raises(ValueError, match='replica x fsdp = 48 does not divide; 32 or 64 would'):
        placed.spec(('batch',), (64,))


@pytest.mark.parametrize('batch_size,microbatches,near', [
    (100, 1, '96 or 144'), (96, 4, '192'), (20, 1, '48')])
def test_a_batch_that_the_mesh_cannot_split(batch_size, microbatches, near):
    mesh = jax.sharding.AbstractMesh((2, 24, 4), lib.AXES)
    with pytest.raises(ValueError, match=f'batch_size={batch_size} .* 48 ways .*; {near} can'):
        lib.check_batch(mesh, batch_size, microbatches)
    lib.check_batch(mesh, 192, 4)


def test_moments_and_averages_live_where_their_parameters_live():
    params = {'a': {'w': jnp.zeros((4, 2)), 'b': jnp.zeros(3)}}
    part = lib.Partitioner(TWO)
    placed = part.shardings({'a': {'w': ('embed', None), 'b': (None,)}}, params)
    tree = {'params': params, 'moments': {'mean': params, 'count': jnp.zeros(())}, 'averages': {}}
    found = part.like_params(tree, params, placed)
    assert found['moments']['mean']['a']['w'].spec == PartitionSpec('fsdp', None)
    assert found['params']['a']['b'].spec == PartitionSpec(None)
    assert found['moments']['count'].spec == PartitionSpec()


@pytest.mark.aot
@pytest.mark.parametrize('topology,config,ring', [
    ('v5e:4x4', lib.MeshConfig(replica=4, fsdp=4), 4),
    ('v5e:4x4', lib.MeshConfig(replica=2, fsdp=4, tensor=2), 4),
    ('v5p:4x4x4', lib.MeshConfig(replica=4, fsdp=16), 16),
    ('2*v5e:4x4', lib.MeshConfig(replica=4, fsdp=8), 8),
])
def test_neighbours_have_links(topology, config, ring):
    """Neighbours on the axis fsdp are neighbours in a slice's grid, or at its two ends."""
    try:
        devices = hardware.devices(hardware.topology(topology))
    except hardware.NoCompiler as error:
        pytest.skip(str(error))
    mesh = lib.make_mesh(config, devices)
    for line in np.moveaxis(mesh.devices, 1, -1).reshape(-1, ring):
        assert len({getattr(device, 'slice_index', 0) for device in line}) == 1
        for a, b in zip(line, line[1:]):
            steps = np.abs(np.subtract(a.coords, b.coords))
            assert np.count_nonzero(steps) <= 2
    if topology.startswith('2*'):
        with pytest.raises(ValueError, match='multiple of 2'):
            lib.make_mesh(lib.MeshConfig(replica=1, fsdp=32), devices)
