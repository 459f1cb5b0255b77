"""Training on meshes of 8 devices equals training on one; all in another process, see `measure`."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models import clip, dalle, dvae
from dalle_jax.training import partition, step as lib
from dalle_jax.training.compression import CompressionConfig
from dalle_jax.training.optimizer import OptimizerConfig

B = 8
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (B, 12, 12, 3), np.uint8)
MODELS = {
    'dvae': (dvae, dvae.Config(image_size=12, vocab=16, groups=2, widths=(8, 16), n_init=8,
                               blocks_per_group=1, kl_steps=1), {'image': PIXELS}),
    'dalle': (dalle, dalle.Config(depth=2, width=32, heads=8, text_length=5, text_vocab=16,
                                  grid=(3, 4), image_vocab=14, kernel=3, remat='none'),
              {'codes': RNG.integers(0, 14, (B, 3, 4)).astype(np.int32),
               'text': RNG.integers(0, 16, (B, 4)).astype(np.int32)}),
    'clip': (clip, clip.Config(image_size=12, patch=4, image_width=16, image_depth=1,
                               image_heads=8, text_length=6, text_vocab=20, text_width=16,
                               text_depth=1, text_heads=8, embedding=8),
             {'image': PIXELS, 'text': RNG.integers(0, 20, (B, 6)).astype(np.int32)}),
}
ONE = partition.MeshConfig(fsdp=1)
FSDP = partition.MeshConfig()
TENSOR = partition.MeshConfig(fsdp=1, tensor=8)
REPLICA = partition.MeshConfig(replica=8)
MIXED = partition.MeshConfig(replica=2, fsdp=2, tensor=2)
# Ramesh et al. 2021, app. E.1: matrices divided along heads and hidden units.
PAPER = partition.MeshConfig(replica=2, fsdp=4, rules='embed=,heads=fsdp,mlp=fsdp')
CASES = {'dvae': [ONE, MIXED], 'dalle': [ONE, FSDP, MIXED, PAPER],
         'clip': [ONE, MIXED]}
MORE = {'dvae': [ONE, FSDP, TENSOR, REPLICA], 'dalle': [ONE, TENSOR, REPLICA],
        'clip': [ONE, FSDP, TENSOR, REPLICA]}
ADAM = OptimizerConfig(peak_lr=1e-3, schedule='constant')
SMALL = dataclasses.replace(ADAM, params_format='bfloat16', mean_format='1-6-9',
                            variance_format='0-6-10', average_decay=0.5, average_every=2,
                            average_memory='host')
LOSSLESS = CompressionConfig(rank=64, factor_format='float32', error_format='float32')
# What else a step can do: microbatches, recomputing, 16 bits, compression; in parts and together.
PARTS = {
    'accumulated': (MIXED, dict(microbatches=2, compression=LOSSLESS), 'dots'),
    'float16': (FSDP, dict(dtype=jnp.dtype('float16')), 'all-but-mlp'),
}
TOGETHER = {
    'all': (MIXED,
            dict(microbatches=2, dtype=jnp.dtype('float16'), compression=CompressionConfig(rank=32),
                 optimizer=dataclasses.replace(SMALL, params_format='float16')), 'full'),
    'stored': (FSDP, dict(optimizer=SMALL), 'none'),
}


def make(name, mesh, remat=None, **changes):
    """The task, and an array of the batch on its mesh."""
    model, config, batch = MODELS[name]
    if remat:
        config = dataclasses.replace(config, remat=remat)
    devices = jax.devices()[:1] if mesh == ONE else None
    built = partition.make_mesh(mesh, devices)
    task = lib.Task(model, config, ADAM, B, partition=partition.Partitioner(built, mesh.rules))
    return task._replace(**changes), partition.put_batch(batch, built)


def train(task, batch, steps, start=None):
    """[loss, gradient norm, skipped] of each step, and the last state."""
    abstract = lib.abstract_state(task)
    state = jax.device_put(start, lib.shardings(abstract)) if start else lib.create_state(task, 0)
    step = lib.make_train(task, abstract)
    rows = []
    for i in range(steps):
        averages = state.averages
        state, metrics = step(lib.on_device(task, state), batch, {}, ())
        # Two steps at a time on more devices than cores may wait for each other for ever.
        state = jax.block_until_ready(lib.with_averages(task, state, averages, i + 1))
        rows.append([float(metrics[name]) for name in ('loss', 'gradient_norm', 'skipped')])
    return rows, state


def on_four_replicas(task, state):
    """Differences of what a checkpoint holds, and of its buffers' places, from a run that continues
    on another mesh."""
    other = task._replace(partition=partition.Partitioner(partition.make_mesh(
        partition.MeshConfig(replica=4, fsdp=2))))
    abstract = lib.abstract_state(other)
    saved = lib.to_saved(task, state)
    placed = jax.device_put(jax.device_get(saved),
                            lib.shardings(lib.abstract_saved(other, abstract)))
    continued = lib.from_saved(other, placed)
    again = lib.to_saved(other, continued)
    return {'bits': all(np.array_equal(a, b) for a, b in zip(
                jax.tree.leaves(saved.residual), jax.tree.leaves(again.residual), strict=True)),
            'held': any(np.any(x) for x in jax.tree.leaves(saved.residual)),
            'places': jax.tree.all(jax.tree.map(
                lambda x, a: x.shape == a.shape and x.sharding.is_equivalent_to(a.sharding, x.ndim),
                continued, abstract))}


def compare(cases):
    """[loss, gradient norm, skipped] of ten steps: name -> mesh -> [10, 3]."""
    found = {}
    for name, meshes in cases.items():
        # Made on one device and divided; but one mesh makes its own, which is to be the same.
        start = jax.device_get(lib.create_state(make(name, ONE)[0], 0))
        found[name] = {
            repr(mesh): train(*make(name, mesh), 10, None if mesh == FSDP else start)[0]
            for mesh in meshes}
    return found


def measure_more():
    """What takes longer."""
    found = compare(MORE)
    for name, (mesh, changes, remat) in PARTS.items():
        found[name] = train(*make('dalle', mesh, remat, **changes), 10)[0]
    return found


def measure():
    """All else that needs 8 devices."""
    found = compare(CASES)
    for name, (mesh, changes, remat) in TOGETHER.items():
        task, batch = make('dalle', mesh, remat, **changes)
        found[name], state = train(task, batch, 10)
        if name == 'all':
            found['residual'] = on_four_replicas(task, state)
        if name == 'stored':
            averages = jax.tree.leaves(state.averages)
            found['averages'] = {
                'kinds': sorted({x.sharding.memory_kind for x in averages}),
                'distance': max(float(np.abs(np.asarray(a) - np.asarray(p, np.float32)).max())
                                for a, p in zip(averages, jax.tree.leaves(state.params)))}
    task, _ = make('dalle', FSDP)
    placed = lib.shardings(lib.abstract_state(task))
    program = jax.jit(lambda: lib.init_state(task, 0), out_shardings=placed).lower().compile()
    found['shapes'] = sorted(set(re.findall(r'f32\[([\d,]+)\]', program.as_text())))
    return found


def elsewhere(what):
    done = subprocess.run([sys.executable, '-m', 'tests.training.test_mesh', what],
                          capture_output=True, text=True, env=dict(os.environ, PYTHONPATH='.'))
    assert not done.returncode, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def found():
    return elsewhere('measure')


@pytest.mark.parametrize('name,mesh', [(name, mesh) for name, meshes in CASES.items()
                                       for mesh in meshes[1:]])
def test_eight_devices_train_like_one(found, name, mesh):
    check_alike(name, *(np.array(found[name][repr(m)])[:, :2] for m in (ONE, mesh)))


@pytest.fixture(scope='module')
def more():
    return elsewhere('more')


@pytest.mark.slow
@pytest.mark.parametrize('name', MORE)
def test_on_meshes_of_one_axis_too(more, name):
    one, *others = (np.array(rows)[:, :2] for rows in more[name].values())
    for eight in others:
        check_alike(name, one, eight)


def check_alike(name, one, eight):
    # The dVAE's loss is a logarithm of a density, here near 0.
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-6, atol=1e-7 if name == 'dvae' else 0)
    np.testing.assert_allclose(eight, one, rtol=1e-4)
    assert one[-1, 0] < one[0, 0]


@pytest.mark.slow
@pytest.mark.parametrize('name,loss,norm', [('accumulated', 1e-5, 1e-4), ('float16', 1e-4, 1e-2)])
def test_what_else_a_step_does_changes_little(more, name, loss, norm):
    check_near(more['dalle'][repr(ONE)], more[name], loss, norm)


def test_storage_in_16_bits_changes_little(found):
    check_near(found['dalle'][repr(ONE)], found['stored'], 5e-3, 5e-2)


def check_near(plain, other, loss, norm):
    plain, other = np.array(plain), np.array(other)
    np.testing.assert_allclose(other[:, 0], plain[:, 0], rtol=loss)
    np.testing.assert_allclose(other[:, 1], plain[:, 1], rtol=norm)
    assert not other[:, 2].any()


def test_all_of_it_at_once_learns(found):
    plain, other = np.array(found['dalle'][repr(ONE)]), np.array(found['all'])
    assert not other[:, 2].any()
    fall = other[0, 0] - other[-1, 0]
    assert fall > 0.5 * (plain[0, 0] - plain[-1, 0])
    # Of rank 8 of 32 on each device: shorter than the gradient, and not by much.
    assert np.all((0.5 * plain[0, 1] < other[0, 1]) & (other[0, 1] <= plain[0, 1]))


def test_error_buffers_continue_on_another_number_of_replicas(found):
    assert found['residual'] == {'bits': True, 'held': True, 'places': True}


def test_averages_on_the_host(found):
    assert found['averages']['kinds'] == ['pinned_host']
    assert 0 < found['averages']['distance'] < 0.02


def test_no_array_is_made_undivided(found):
    """In the program that makes the initial state there are parts only."""
    width, wide = 32, 128
    assert f'{width // 8},{wide}' in found['shapes']
    assert f'{width},{wide}' not in found['shapes']
    assert f'{width},{3 * width}' not in found['shapes']


if __name__ == '__main__':
    jax.config.update('jax_num_cpu_devices', 8)
    jax.config.update('jax_numpy_rank_promotion', 'raise')
    jax.config.update('jax_cpu_enable_async_dispatch', False)
    print(json.dumps(measure() if sys.argv[1] == 'measure' else measure_more()))
