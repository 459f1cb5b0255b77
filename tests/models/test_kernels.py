"""Attention kernels, interpreted on the CPU, against the definition; and the choice among them."""

import dataclasses
import functools
import importlib.util
import logging
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dalle_jax.models import attention, flash, kernels, patterns, transformer
from dalle_jax.models.patterns import Layout
from dalle_jax.models.flash import Tile
from dalle_jax.models.layers import Param
from dalle_jax.training import partition
from tests.models.test_attention import oracle, tensors

SPARSE = ('row', 'column', 'conv')
PAPER = Layout(256, 32, 32, 11)
# Several blocks even of short sequences, and unlike ones in all three kernels.
SMALL = (Tile(32, 16, 4, 1), Tile(16, 32, 4, 1), Tile(64, 16, 4, 1))


def order(kind, layout):
    """States in the kernels' order, of `layout` that attention.py counts row by row."""
    image = np.arange(layout.image).reshape(layout.rows, layout.columns)
    image = image.T if kind == 'column' else image
    return np.concatenate([np.arange(layout.text), layout.text + image.reshape(-1)])


def both_ways(attend):
    """(q, k, v, cotangent) -> output and gradients."""
    def run(q, k, v, cotangent):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(cotangent)
    return run


def interpreted(kernel, kind, layout=None, **more):
    return functools.partial(kernel, kind, layout=layout, interpret=True, **more)


def errors(got, expected):
    return [np.abs(np.asarray(g, np.float64) - want).max() / np.abs(want).max()
            for g, want in zip(got, expected, strict=True)]


# -- lists of blocks -------------------------------------------------------------------------------

layouts = st.builds(Layout, text=st.integers(1, 40), rows=st.integers(1, 12),
                    columns=st.integers(1, 12), kernel=st.sampled_from([1, 3, 5, 9, 27]))


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(patterns.PATTERNS), layout=layouts)
def test_visible_is_the_definition(kind, layout):
    state, states = np.arange(layout.length), order(kind, layout)
    np.testing.assert_array_equal(
        patterns.visible(kind, layout, state[:, None], state[None, :]),
        patterns.mask(kind, layout)[np.ix_(states, states)])


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(patterns.PATTERNS), layout=layouts, by_key=st.booleans(),
       own=st.sampled_from([8, 16]), other=st.sampled_from([8, 16]))
def test_blocks_are_those_with_pairs(kind, layout, by_key, own, other):
    states, length = order(kind, layout), layout.length + -layout.length % 16
    mask = np.zeros((length, length), bool)
    mask[:layout.length, :layout.length] = patterns.mask(kind, layout)[np.ix_(states, states)]
    mask = mask.T if by_key else mask
    listed, bounds = flash.blocks(kind, layout, length, own, other, by_key)
    for i, (start, middle, end) in enumerate(bounds):
        tiles = mask[i * own:(i + 1) * own].reshape(own, -1, other).swapaxes(0, 1)
        blocks = listed[start:end].tolist()
        assert len(set(blocks)) == len(blocks)
        assert {b for b, tile in enumerate(tiles) if tile.any()} <= set(blocks)
        # Blocks of states beyond the last may be listed and called full: they leave no trace.
        inside = [b for b in blocks if (max(b * other, i * own) + 16 <= layout.length)]
        assert all(tiles[b].any() for b in inside)
        full = set(listed[start:middle].tolist())
        assert {b for b in inside if tiles[b].all()} == full & set(inside)


@pytest.mark.parametrize('kind,large,small', [
    ('row', 34, 105), ('column', 27, 90), ('conv', 40, 132), ('causal', 55, 210)])
def test_sparsity_of_the_paper(kind, large, small):
    """Of 100 blocks of 128 x 128 and of 400 of 64 x 64, counted on the mask."""
    for size, count in ((128, large), (64, small)):
        states, blocks = order(kind, PAPER), 1280 // size
        mask = patterns.mask(kind, PAPER)[np.ix_(states, states)]
        assert mask.reshape(blocks, size, blocks, size).any((1, 3)).sum() == count
        for by_key in (False, True):
            assert len(flash.blocks(kind, PAPER, 1280, size, size, by_key)[0]) == count


# -- NVIDIA GPUs -----------------------------------------------------------------------------------


@pytest.mark.parametrize('layout', [Layout(6, 4, 4, 3), Layout(7, 5, 6, 3), Layout(16, 8, 8, 5)])
@pytest.mark.parametrize('kind', SPARSE)
def test_flash_equals_definition(kind, layout):
    arrays = tensors(layout, heads=2, size=32)
    attend = interpreted(kernels.pallas, kind, layout, tiles=SMALL)
    got = jax.jit(both_ways(attend))(*arrays)
    assert max(errors(got, oracle(patterns.mask(kind, layout), *arrays))) < 2e-6


def test_flash_of_a_plain_sequence():
    arrays = tensors(Layout(1, 6, 8), batch=1, heads=2, size=32)
    got = jax.jit(both_ways(interpreted(kernels.pallas, 'causal')))(*arrays)
    assert max(errors(got, oracle(np.tri(49, dtype=bool), *arrays))) < 2e-6


@pytest.mark.parametrize('kind,size,dtype,most', [
    ('row', 64, jnp.bfloat16, 1.2e-2), ('column', 128, jnp.float16, 1.5e-3),
    ('conv', 32, jnp.bfloat16, 1.2e-2)])
def test_flash_in_16_bits(kind, size, dtype, most):
    """With the blocks that it has by default, full ones among them."""
    layout = Layout(70, 9, 10, 5)
    assert np.diff(flash.blocks(kind, layout, 256, 64, 64, False)[1][:, :2]).any()
    arrays = [jnp.asarray(x, dtype) for x in tensors(layout, batch=1, heads=2, size=size)]
    got = jax.jit(both_ways(interpreted(kernels.pallas, kind, layout)))(*arrays)
    assert all(g.dtype == dtype for g in got)
    expected = oracle(patterns.mask(kind, layout), *(np.asarray(x, np.float64) for x in arrays))
    assert max(errors(got, expected)) < most


@pytest.mark.parametrize('kind', SPARSE)
def test_forbidden_keys_leave_no_trace(kind):
    """Example i of the batch has huge keys and values wherever query i must not look."""
    layout = Layout(3, 5, 7, 3)
    clean = np.repeat(tensors(layout, batch=1, heads=1, size=32), layout.length, axis=1)
    poisoned = clean.copy()
    for i, row in enumerate(patterns.mask(kind, layout)):
        poisoned[1:3, i][:, :, ~row] = 1e4
    attend = jax.jit(interpreted(kernels.pallas, kind, layout, tiles=SMALL))
    diagonal = np.arange(layout.length)
    want, got = (np.asarray(attend(*x[:3]))[diagonal, :, diagonal] for x in (clean, poisoned))
    np.testing.assert_array_equal(got, want)


def test_flash_divided_over_devices():
    layout = Layout(7, 5, 6, 3)
    arrays = tensors(layout, heads=2, size=32)
    mesh, spec = Mesh(np.array(jax.devices()[:2]), ('heads',)), PartitionSpec(None, 'heads')
    attend = jax.shard_map(interpreted(kernels.pallas, 'column', layout), mesh=mesh,
                           in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    got = jax.jit(both_ways(attend), in_shardings=(NamedSharding(mesh, spec),) * 4)(*arrays)
    assert max(errors(got, oracle(patterns.mask('column', layout), *arrays))) < 2e-6


@pytest.mark.parametrize('kernel', [kernels.pallas, kernels.splash])
def test_saved_by_name(kernel):
    """Under jax.checkpoint, a policy that saves 'attended' keeps the kernel from running twice."""
    layout, x = Layout(7, 5, 6, 3), jax.ShapeDtypeStruct((1, 2, 37, 64), jnp.float32)

    def count(jaxpr):
        """Kernels with a result that is used: the others are dropped when compiled."""
        jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
        used = {id(x) for eqn in jaxpr.eqns for x in eqn.invars} | set(map(id, jaxpr.outvars))
        live = [eqn for eqn in jaxpr.eqns if used & set(map(id, eqn.outvars))]
        return sum(1 if eqn.primitive.name == 'pallas_call' else
                   sum(count(x) for x in eqn.params.values() if hasattr(x, 'eqns')) for eqn in live)

    def kernels_run(policy):
        attend = jax.checkpoint(interpreted(kernel, 'row', layout), policy=policy)
        return count(jax.make_jaxpr(both_ways(attend))(*[x] * 4))

    assert kernels_run(jax.checkpoint_policies.save_only_these_names('attended')) == 3
    assert kernels_run(jax.checkpoint_policies.nothing_saveable) == 4


@pytest.mark.parametrize('kind,size,dtype', [
    ('row', 64, jnp.bfloat16), ('column', 64, jnp.bfloat16), ('conv', 64, jnp.bfloat16),
    ('causal', 32, jnp.float16), ('row', 128, jnp.bfloat16), ('row', 64, jnp.float32)])
@pytest.mark.filterwarnings('ignore:The Pallas Triton backend is deprecated:DeprecationWarning')
def test_flash_lowers_for_a_gpu(kind, size, dtype):
    """To Triton's language, at the paper's sequence, with no array of scores."""
    x = jax.ShapeDtypeStruct((2, 62, 1280, size), dtype)
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice('NVIDIA H100', 132, 'cuda'))
    run = jax.jit(both_ways(functools.partial(kernels.pallas, kind, layout=PAPER)))
    with jax.sharding.use_abstract_mesh(mesh):
        text = run.trace(x, x, x, x).lower(lowering_platforms=('cuda',)).as_text()
    assert text.count('@__gpu$xla.gpu.triton') == 3
    assert '1280x1280' not in text


def test_errors():
    x = jnp.zeros((1, 1, 22, 48))
    with pytest.raises(ValueError, match='with heads of 48; its kernels are for'):
        kernels.pallas('causal', x, x, x)
    x = jnp.zeros((1, 1, 22, 64), jnp.int8)
    with pytest.raises(ValueError, match='of int8, int8 and int8; choose one of float32'):
        kernels.pallas('causal', x, x, x)
    with pytest.raises(ValueError, match="'diagonal'; choose"):
        patterns.visible('diagonal', PAPER, 0, 0)


# -- TPUs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind,layout', [
    ('row', Layout(16, 12, 12, 5)), ('column', Layout(16, 12, 11, 5)),
    ('conv', Layout(16, 12, 12, 5)), ('column', Layout(7, 5, 6, 3))])
def test_splash_equals_definition(kind, layout):
    arrays = tensors(layout, heads=2, size=64)
    got = jax.jit(both_ways(interpreted(kernels.splash, kind, layout)))(*arrays)
    assert max(errors(got, oracle(patterns.mask(kind, layout), *arrays))) < 2e-6


@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='needs libtpu')
@pytest.mark.parametrize('kind,heads', [('row', 62), ('column', 2), ('conv', 2)])
def test_splash_compiles_for_a_tpu(kind, heads, monkeypatch):
    """Ahead of time at the paper's sequence; kernels forward, for q, and for k and v."""
    import libtpu
    library = os.path.join(os.path.dirname(libtpu.__file__), 'libtpu.so')
    for name, value in (('TPU_LIBRARY_PATH', library), ('TPU_SKIP_MDS_QUERY', '1'),
                        ('TPU_WORKER_HOSTNAMES', 'localhost'),
                        ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')):
        monkeypatch.setenv(name, value)
    devices = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices
    where = NamedSharding(Mesh(np.array(devices[:1]), ('one',)), PartitionSpec())
    x = jax.ShapeDtypeStruct((1, heads, 1280, 64), jnp.bfloat16, sharding=where)
    run = jax.jit(both_ways(functools.partial(kernels.splash, kind, layout=PAPER)))
    compiled = run.trace(x, x, x, x).lower(lowering_platforms=('tpu',)).compile()
    assert compiled.as_text().count('tpu_custom_call') == 3


# -- in a model ------------------------------------------------------------------------------------


@pytest.mark.parametrize('name,remat,mesh', [
    ('pallas', 'dots', {'tensor': 2}), ('splash', 'full', {'tensor': 2}),
    *(pytest.param('pallas', remat, {'replica': 2}, marks=pytest.mark.slow)
      for remat in ('none', 'full'))])
def test_kernels_in_a_transformer_on_a_mesh(name, remat, mesh, monkeypatch):
    """Gradients are those of the blocked computation without a mesh."""
    monkeypatch.setattr(kernels, name, functools.partial(getattr(kernels, name), interpret=True))
    layout = Layout(7, 5, 6, 3)
    config = transformer.BlockConfig(depth=3, width=128, heads=2, patterns=SPARSE, layout=layout,
                                     attention='blocked')
    declared, paths = jax.tree.flatten(transformer.declare(config),
                                       is_leaf=lambda x: isinstance(x, Param))
    params = jax.tree.unflatten(paths, [param.init(jax.random.key(i))
                                        for i, param in enumerate(declared)])
    x = np.random.default_rng(0).normal(size=(4, layout.length, 128)).astype(np.float32)

    def gradients(config, **more):
        def loss(params, x):
            return (transformer.forward(params, config, x, **more)**3).sum()
        return jax.jit(jax.grad(loss, (0, 1)))(params, x)

    mesh = partition.make_mesh(partition.MeshConfig(**mesh))
    got = gradients(dataclasses.replace(config, attention=name), remat=remat,
                    constrain=partition.Partitioner(mesh))
    expected = map(np.asarray, jax.tree.leaves(gradients(config)))
    assert max(errors(jax.tree.leaves(got), expected)) < 1e-5


# -- the choice ------------------------------------------------------------------------------------

SHAPE, TINY = (4, 2, 22, 8), Layout(6, 4, 4, 3)


def blocked(kind, q, k, v, layout):
    return attention.attend(kind, q, k, v, layout)


def fails(kind, q, k, v, layout):
    raise NotImplementedError('no such instruction')


def wrong(kind, q, k, v, layout):
    return blocked('causal', q, k, v, layout)


def wrong_gradient(kind, q, k, v, layout):
    return blocked(kind, q, jax.lax.stop_gradient(k), v, layout)


def not_a_number(kind, q, k, v, layout):
    """In a gradient alone."""
    hidden = q - jax.lax.stop_gradient(q)
    return blocked(kind, q, k, v, layout) + jnp.where(hidden == 0, 0, hidden / hidden)


def right(kind, q, k, v, layout):
    return attention.attend(kind, q, k, v, layout, 'dense')


@pytest.fixture
def choose(monkeypatch, caplog):
    """choose(kernel, seconds of the kernel and of 'blocked') as if on a GPU, and the log."""
    caplog.set_level(logging.INFO)

    def run(kernel, seconds=None, dtype=jnp.bfloat16, processes=1):
        times = iter(seconds or ())
        kernel.__name__ = 'pallas'
        monkeypatch.setattr(kernels, 'pallas', kernel)
        monkeypatch.setattr(kernels, '_seconds', lambda run, arrays: next(times))
        monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
        monkeypatch.setattr(jax, 'process_count', lambda: processes)
        found = kernels.choose('row', SHAPE, dtype, TINY, blocked)
        assert next(times, None) is None
        return found, caplog

    kernels._better.cache_clear()
    return run


@pytest.mark.parametrize('kernel,reason', [
    (fails, 'does not run.*NotImplementedError: no such instruction'),
    (wrong, 'differs by'), (wrong_gradient, 'differs by'), (not_a_number, 'differs by nan')])
def test_a_kernel_that_is_wrong_is_not_used(choose, kernel, reason):
    for _ in range(2):
        found, log = choose(kernel)
        assert found == 'blocked'
    record, = log.records  # warned once
    assert record.levelname == 'WARNING'
    assert "attention 'row' (2, 2, 22, 8) bfloat16 by 'pallas'" in record.message
    assert "'blocked' is used" in record.message
    assert re.search(reason, record.message)


def test_the_faster_is_used(choose):
    found, log = choose(right, (1.0, 2.0))
    assert found == 'pallas'
    assert log.records[0].levelname == 'INFO' and 'takes 0.50 times' in log.records[0].message
    kernels._better.cache_clear()
    assert choose(right, (3.0, 2.0))[0] == 'blocked'


def test_several_processes_choose_alike(choose):
    """Times would differ between them, so none is taken."""
    assert choose(right, processes=2)[0] == 'pallas'
    kernels._better.cache_clear()
    assert choose(wrong, processes=2)[0] == 'blocked'


def test_float32_on_gpus_is_blocked(choose):
    found, log = choose(fails, dtype=jnp.float32)
    assert found == 'blocked' and not log.records


def test_chosen_in_the_middle_of_a_trace(choose):
    """Of a scan under jit, jax.grad, jax.checkpoint and jax.shard_map; once for all layers."""
    found = []

    def layer(x, _):
        # A second choice would find no more times.
        found.append(choose(right, () if found else (1.0, 2.0))[0])
        return x * 2, None

    def loss(x):
        return jax.lax.scan(jax.checkpoint(layer), x, None, length=3)[0].sum()

    mesh = Mesh(np.array(jax.devices()[:2]), ('data',))
    run = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=PartitionSpec('data'),
                        out_specs=PartitionSpec('data'))
    np.testing.assert_array_equal(jax.jit(run)(jnp.ones(4)), np.full(4, 8.0))
    assert set(found) == {'pallas'}


def test_cpus_do_without_pallas():
    code = '''if True:
        import sys
        import jax.numpy as jnp
        from dalle_jax.models import kernels
        assert kernels.choose('row', (1, 2, 22, 8), jnp.float32, None, None) == 'blocked'
        assert not any('pallas' in name for name in sys.modules)'''
    subprocess.run([sys.executable, '-c', code], check=True, timeout=60)
