import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dalle_jax.models import clip, dalle, dvae
from dalle_jax.training import partition as lib
from dalle_jax.training import step as step_lib
from dalle_jax.training.optimizer import OptimizerConfig

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


RNG = np.random.default_rng(0)
MODELS = {
    'dvae': (dvae, dvae.Config(image_size=12, vocab=16, groups=2, widths=(8, 16), n_init=8,
                               blocks_per_group=1, kl_steps=1),
             {'image': RNG.integers(0, 256, (4, 12, 12, 3), np.uint8)}),
    'dalle': (dalle, dalle.Config(depth=3, width=16, heads=2, text_length=5, text_vocab=12,
                                  grid=(3, 4), image_vocab=14, kernel=3, remat='none'),
              {'codes': RNG.integers(0, 14, (4, 3, 4)).astype(np.int32),
               'text': RNG.integers(0, 12, (4, 4)).astype(np.int32)}),
    'clip': (clip, clip.Config(image_size=12, patch=4, image_width=16, image_depth=1,
                               image_heads=2, text_length=6, text_vocab=20, text_width=12,
                               text_depth=1, text_heads=2, embedding=8),
             {'image': RNG.integers(0, 256, (4, 12, 12, 3), np.uint8),
              'text': RNG.integers(0, 20, (4, 6)).astype(np.int32)}),
}


@pytest.mark.parametrize('name', MODELS)
def test_two_devices_train_like_one(name):
    """The same losses and gradient norms, sharded over fsdp; CLIP as replicas: its negatives are
    global."""
    model, config, batch = MODELS[name]
    losses = []
    other = TWO if name != 'clip' else lib.make_mesh(lib.MeshConfig(replica=2, fsdp=1))
    for mesh in (lib.make_mesh(lib.MeshConfig(), jax.devices()[:1]), other):
        task = step_lib.Task(model, config, OptimizerConfig(peak_lr=1e-3, schedule='constant'), 4,
                             partition=lib.Partitioner(mesh))
        state = step_lib.create_state(task, 0)
        if mesh is TWO and name == 'dalle':  # no device holds all of a matrix
            kernel = state.params['transformer']['tail']['0']['mlp']['up']['kernel']
            assert kernel.addressable_shards[0].data.shape == (8, 64)
        train = step_lib.make_train(task, step_lib.abstract_state(task))
        for _ in range(4):
            state, metrics = train(state, lib.put_batch(batch, mesh), {}, ())
            losses.append((float(metrics['loss']), float(metrics['gradient_norm'])))
    one, two = np.array(losses).reshape(2, 4, 2)
    np.testing.assert_allclose(two[0], one[0], rtol=2e-6)
    np.testing.assert_allclose(two, one, rtol=1e-4)
