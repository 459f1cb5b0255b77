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
    assert lib.spec(('embed', 'mlp'), (4, 6), TWO) == PartitionSpec('fsdp', 'tensor')
    assert lib.spec((None, 'unlisted'), (3, 5), TWO) == PartitionSpec(None, None)
    with pytest.raises(ValueError, match=r"up \(5, 6\).*'embed' has 5 entries, which 2 devices"):
        lib.spec(('embed', 'mlp'), (5, 6), TWO, 'up')
    with pytest.raises(ValueError, match='two dimensions live on the same mesh axis'):
        lib.spec(('embed', 'vocab'), (4, 4), TWO, 'table')


def test_moments_and_averages_live_where_their_parameters_live():
    params = {'a': {'w': jnp.zeros((4, 2)), 'b': jnp.zeros(3)}}
    placed = lib.shardings({'a': {'w': ('embed', None), 'b': (None,)}}, params, TWO)
    tree = {'params': params, 'moments': {'mean': params, 'count': jnp.zeros(())}, 'averages': {}}
    found = lib.like_params(tree, placed, params, TWO)
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
        task = step_lib.Task(model, config, OptimizerConfig(peak_lr=1e-3, schedule='constant'), 1,
                             jnp.float32, 'threefry2x32', lib.Constrainer(mesh))
        abstract = jax.eval_shape(lambda: step_lib.init_state(task, 0))
        placed = lib.like_params(abstract, lib.shardings(model.axes(config), abstract.params, mesh),
                                 abstract.params, mesh)
        state = jax.jit(lambda: step_lib.init_state(task, 0), out_shardings=placed)()
        if mesh is TWO and name == 'dalle':  # no device holds all of a matrix
            kernel = state.params['transformer']['tail']['0']['mlp']['up']['kernel']
            assert kernel.addressable_shards[0].data.shape == (8, 64)
        train = step_lib.make_train(task, state)
        for _ in range(4):
            state, metrics = train(state, lib.put_batch(batch, mesh), {}, ())
            losses.append((float(metrics['loss']), float(metrics['gradient_norm'])))
    one, two = np.array(losses).reshape(2, 4, 2)
    np.testing.assert_allclose(two[0], one[0], rtol=2e-6)
    np.testing.assert_allclose(two, one, rtol=1e-4)
