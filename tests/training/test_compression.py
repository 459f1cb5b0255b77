"""PowerSGD. What needs a mesh runs in one other process with 16 devices, see `measure`."""

import dataclasses
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from dalle_jax.models import dalle
from dalle_jax.training import compression as lib
from dalle_jax.training import formats, partition

D = 64
# A stack of two, shards with more rows than columns and with fewer, and what is not compressed.
SHAPES = {'body/qkv/kernel': (2, D, 3 * D), 'mlp/down/kernel': (D, 4 * D), 'out/bias': (D,),
          'out/kernel': (D, D), 'text/tokens': (12, D)}
SPECS = {'body/qkv/kernel': PartitionSpec(None, 'fsdp', None),
         'mlp/down/kernel': PartitionSpec('fsdp', 'tensor'), 'out/bias': PartitionSpec(None),
         'out/kernel': PartitionSpec(None, 'fsdp'), 'text/tokens': PartitionSpec(None, 'fsdp')}
MATRICES = [name for name in SHAPES if name.endswith('kernel')]
# Ramesh et al. 2021, app. E.1: every matrix divided along its output, the second of the MLP, here
# stored [outputs, inputs], along its input.
PAPER_SHAPES = {'qkv': (3, D, D), 'out': (D, D), 'up': (D, 4 * D), 'down': (D, 4 * D)}
PAPER_SPECS = {'qkv': PartitionSpec(None, None, 'fsdp'), 'out': PartitionSpec(None, 'fsdp'),
               'up': PartitionSpec(None, 'fsdp'), 'down': PartitionSpec(None, 'fsdp')}
EXACT = dict(factor_format='float32', error_format='float32')
LOW = lib.CompressionConfig(rank=16, **EXACT)  # rank 2 on each of 8 devices
FULL = dataclasses.replace(LOW, rank=D)
CODED = lib.CompressionConfig(rank=16)


def abstract(shapes, specs, mesh):
    return ({name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()},
            {name: NamedSharding(mesh, spec) for name, spec in specs.items()})


def gradients(seed, replicas, scale=0.1):
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.standard_normal((replicas, *shape))).astype(np.float32)
            for name, shape in SHAPES.items()}


def difference(a, b):
    """Norm of a - b relative to that of b, over the tree."""
    parts = [(np.sum((np.float64(a[k]) - b[k])**2), np.sum(np.float64(b[k])**2)) for k in b]
    return float(np.sqrt(sum(p[0] for p in parts) / sum(p[1] for p in parts)))


def mean(tree):
    return {name: np.mean(np.float64(x), axis=0) for name, x in tree.items()}


def added(*trees):
    return {name: sum(np.float64(t[name]) for t in trees if name in t) for name in trees[0]}


def norm_error(outputs):
    """Largest relative difference of the norms from those of the gradients beside them."""
    return max(abs(float(o.norm) / np.sqrt(sum(
        np.sum(np.float64(g)**2) for g in o.grads.values())) - 1) for o in outputs)


class Runner:
    """A reducer with what it needs to run steps and to look at its errors."""

    def __init__(self, config, mesh, shapes=SHAPES, specs=SPECS):
        self.config = config
        params, placed = abstract(shapes, specs, mesh)
        self.reducer = lib.powersgd(config, params, placed)
        self.bytes_sent = lib.bytes_sent(config, params, placed)
        self.init = jax.jit(self.reducer.init, out_shardings=self.reducer.shardings)
        replicas = mesh.shape['replica']
        self.placed = {name: NamedSharding(mesh, PartitionSpec('replica', *spec))
                       for name, spec in specs.items()}
        self.reduce = jax.jit(self.reducer.reduce).lower(
            {name: jax.ShapeDtypeStruct((replicas, *shape), jnp.float32,
                                        sharding=self.placed[name])
             for name, shape in shapes.items()},
            jax.tree.map(lambda e, s: jax.ShapeDtypeStruct(e.shape, e.dtype, sharding=s),
                         jax.eval_shape(self.init), self.reducer.shardings)).compile()

    def run(self, batches, state=None):
        """Reduced of each batch of gradients, and the last state."""
        state, outputs = self.init() if state is None else state, []
        for grads in batches:
            # Two steps at a time on more devices than cores may wait for each other for ever.
            outputs.append(jax.block_until_ready(
                self.reduce(jax.device_put(grads, self.placed), state)))
            state = outputs[-1].state
        return outputs, state

    def errors(self, state):
        return {name: np.asarray(formats.decode(jax.device_get(e), self.config.error_format))
                for name, e in state.items()}

    def telescoped(self, outputs, state, batches):
        """Of sum_t ghat_t + mean_w(e_T) from sum_t mean_w(g_t)."""
        return difference(added(*(o.grads for o in outputs), mean(self.errors(state))),
                          added(*map(mean, batches)))


def wire_bytes(text, pairs):
    """Bytes per device of the collectives in compiled HLO whose groups are exactly `pairs`."""
    total = 0
    for line in text.splitlines():
        found = re.search(r'= (.*?) (all-reduce|all-gather|all-to-all)\(', line)
        if not found or replica_groups(line) != pairs:
            continue
        size = sum(np.prod([int(n) for n in dims.split(',') if n]) * {'u16': 2, 'f32': 4}[kind]
                   for kind, dims in re.findall(r'(\w+)\[([\d,]*)\]', found[1]))
        m = len(next(iter(pairs)))
        total += size * (m - 1) / m * (2 if found[2] == 'all-reduce' else 1)
    return total


def replica_groups(line):
    if explicit := re.search(r'replica_groups=\{(\{.*?\})\}', line):
        groups = [g.split(',') for g in re.findall(r'\{([\d,]+)\}', explicit[1])]
    else:
        out, dims, order = re.search(
            r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', line).groups()
        dims = [int(n) for n in dims.split(',')]
        ids = np.arange(np.prod(dims)).reshape(dims)
        ids = ids.transpose([int(n) for n in order.split(',')]) if order else ids
        groups = ids.reshape([int(n) for n in out.split(',')])
    return {tuple(int(i) for i in group) for group in groups}


def measure():
    """All that needs 16 devices, as numbers."""
    mesh = partition.make_mesh(partition.MeshConfig(replica=2, fsdp=8))
    low, full, coded = (Runner(c, mesh) for c in (LOW, FULL, CODED))
    batches = [gradients(seed, 2) for seed in range(4)]
    found = {}

    outputs, state = full.run(batches[:2])
    found['full_rank'] = max(difference(o.grads, mean(b)) for o, b in zip(outputs, batches))
    found['full_rank_error'] = difference(
        added(batches[1], mean(full.errors(state))), batches[1])

    for name, runner in (('low', low), ('coded', coded)):
        outputs, state = runner.run(batches)
        found[name] = {
            'telescoped': runner.telescoped(outputs, state, batches),
            'missed': difference(outputs[0].grads, mean(batches[0])),
            'norm': norm_error(outputs),
            'finite': all(bool(o.finite) for o in outputs)}

    # A factorisation of each shard: rank, and orthogonality of what is kept and what is missed.
    kept, whole = (np.split(np.asarray(x['out/kernel']), 8, axis=1)
                   for x in (low.run(batches[:1])[0][0].grads, mean(batches[0])))
    values = np.array([np.linalg.svd(k, compute_uv=False) for k in kept])
    found['rank'] = float(np.min(values[:, 1] / values[:, 0])), float(
        np.max(values[:, 2] / values[:, 0]))
    found['projection'] = max(float(abs(np.sum(k * (w - k)) / np.sum(k * k)))
                              for k, w in zip(kept, whole))

    # Equal shards are projected on different columns; on the same ones again at the next step.
    same = gradients(0, 2)
    same['out/kernel'] = np.tile(same['out/kernel'][..., :8], 8)
    (first,), state = low.run([same])
    parts = np.split(np.asarray(first.grads['out/kernel']), 8, axis=1)
    found['shards_differ'] = min(difference({'': a}, {'': b})
                                 for a, b in itertools.combinations(parts, 2))
    again = {n: g - low.errors(state).get(n, 0.0) for n, g in same.items()}
    found['steps_differ'] = difference(low.run([again], state)[0][0].grads, first.grads)

    # Replicas of full rank whose mean has rank 1 are exact if all replicas use the same Gaussian.
    rng = np.random.default_rng(5)
    for name in MATRICES:
        *stack, rows, columns = SHAPES[name]
        product = (rng.standard_normal((*stack, rows, 1)) * rng.standard_normal((columns,)))
        noise = 0.1 * rng.standard_normal(product.shape)
        same[name] = np.stack([0.1 * product + noise, 0.1 * product - noise]).astype(np.float32)
    found['rank_one'] = difference(low.run([same])[0][0].grads, mean(same))
    zeros = {n: np.zeros_like(g) for n, g in same.items()}
    (output,), state = coded.run([zeros])
    found['zeros'] = float(output.norm), max(float(np.max(np.abs(e)))
                                             for e in coded.errors(state).values())

    # One number of one replica that is not finite; in the middle of a run.
    for kind, name in (('nan', 'mlp/down/kernel'), ('inf', 'text/tokens')):
        before, state = coded.run(batches[:1])
        poisoned = {n: g.copy() for n, g in batches[1].items()}
        poisoned[name][1, 3, 5] = float(kind)
        (output,), state = coded.run([poisoned], state)
        (after,), _ = coded.run(batches[2:3], state)
        if kind == 'nan':  # one shard's gradient is dropped
            poisoned[name][1, :D // 8] = 0
        used = [{n: g[n] for n in MATRICES} for g in (batches[0], poisoned)]
        grads = [{n: o.grads[n] for n in MATRICES} for o in (*before, output)]
        found[kind] = {
            'norms': [str(float(s.data)) for s in output.norm.addressable_shards],
            'finite': bool(output.finite), 'after': bool(after.finite),
            'lost': difference(added(*grads, mean(coded.errors(state))), added(*map(mean, used)))}

    # Factors beyond the format: errors keep the gradient; and do not if it is beyond it as well.
    for kind, scale in (('p_overflows', 2.0), ('error_overflows', 100.0)):
        grads = gradients(1, 2, scale)
        (output,), state = coded.run([grads])
        kept = {n: grads[n] if scale == 2.0 else np.zeros_like(grads[n]) for n in MATRICES}
        found[kind] = {'finite': bool(output.finite), 'norm': str(float(output.norm)),
                       'kept': max(float(np.max(np.abs(e - kept[n]) / (np.abs(kept[n]) + 1e-9)))
                                   for n, e in coded.errors(state).items())}

    # Saved by two replicas and continued by four, with other shards, some on several devices.
    outputs, state = low.run(batches[:2])
    other = Runner(LOW, partition.make_mesh(partition.MeshConfig(replica=4, fsdp=2, tensor=2)))
    saved = jax.device_get(jax.jit(low.reducer.to_saved)(state))
    more = [gradients(seed, 4) for seed in (7, 8)]
    continued, state = other.run(more, jax.device_put(
        other.reducer.from_saved(saved), other.reducer.shardings))
    found['restored'] = other.telescoped(outputs + continued, state, batches[:2] + more)
    found['restored_norm'] = norm_error(continued)

    # Bytes between replicas.
    pairs = {(i, i + 8) for i in range(8)}
    paper = Runner(CODED, mesh, PAPER_SHAPES, PAPER_SPECS)
    for name, runner in (('low', low), ('coded', coded), ('paper', paper)):
        found[f'{name}_bytes'] = [wire_bytes(runner.reduce.as_text(), pairs), runner.bytes_sent]
    return found


@pytest.fixture(scope='module')
def found():
    root = Path(__file__).parents[2]
    process = subprocess.run([sys.executable, '-m', 'tests.training.test_compression'], cwd=root,
                             capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_full_rank_is_plain_averaging(found):
    assert found['full_rank'] < 1e-5
    assert found['full_rank_error'] < 1e-5  # the replicas' errors cancel


def test_nothing_is_lost(found):
    """What was returned and what the error buffers hold add up to all gradients, at any rank."""
    assert found['low']['telescoped'] < 1e-6
    assert found['coded']['telescoped'] < 4 * 2**-10  # four times rounded to 9 + 1 bits
    assert found['restored'] < 1e-6
    for name in ('low', 'coded'):
        assert found[name]['missed'] > 0.3, 'rank 2 of 8 cannot hold a random matrix'
        assert found[name]['finite']


def test_norm_is_that_of_the_returned_gradient(found):
    assert found['low']['norm'] < 1e-5
    assert found['coded']['norm'] < 1e-5
    assert found['restored_norm'] < 1e-5


def test_each_shard_is_projected_on_its_rank(found):
    second, third = found['rank']
    assert second > 0.1 and third < 1e-5
    assert found['projection'] < 1e-5


def test_gaussians(found):
    assert found['shards_differ'] > 0.3
    assert found['steps_differ'] < 1e-5
    assert found['rank_one'] < 1e-4


def test_zero_gradient(found):
    assert found['zeros'] == [0, 0]


@pytest.mark.parametrize('kind', ['nan', 'inf'])
def test_one_bad_number_stops_all_devices(found, kind):
    assert found[kind]['norms'] == ['inf'] * 16
    assert not found[kind]['finite']
    assert found[kind]['after']
    assert found[kind]['lost'] < 2 * 2**-10  # error buffers go on as if it had been 0


def test_overflow_of_factors(found):
    for kind, precision in (('p_overflows', 2**-10), ('error_overflows', 0)):
        assert not found[kind]['finite'] and found[kind]['norm'] == 'inf'
        assert found[kind]['kept'] <= precision


def test_bytes_between_replicas(found):
    for name in ('low', 'coded', 'paper'):
        compiled, sent = found[f'{name}_bytes']
        assert compiled == sent['p'] + sent['q'] + sent['others']
    # Ramesh et al. 2021, app. E.1: 5 r / 8 d of the 16-bit bytes on 8 devices.
    assert sent['others'] == 0
    assert (sent['p'] + sent['q']) / sent['matrices'] == 5 * CODED.rank / (8 * D)


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(0, 4), seed=st.integers(0, 2**31), exponent=st.integers(-12, 8))
def test_orthonormal(rank, seed, exponent):
    """A basis of the columns, whatever their rank and size."""
    rng = np.random.default_rng(seed)
    p = rng.standard_normal((3, 12, rank)) @ rng.standard_normal((3, rank, 4))
    p = (10.0**exponent * p).astype(np.float32)
    basis = np.asarray(lib.orthonormal(p))
    np.testing.assert_allclose(basis.mT @ basis, np.tile(np.eye(4), (3, 1, 1)), atol=1e-5)
    moved = p + 1e-6 * np.eye(12, 4, dtype=np.float32)
    np.testing.assert_allclose(basis @ (basis.mT @ moved), moved,
                               atol=1e-5 * np.abs(moved).max())


@pytest.mark.parametrize('format', ['float32', 'bfloat16', 'float16', '1-6-9'])
def test_mean_in_format(format):
    """Of a size that the devices do not divide; the scale brings small numbers into range."""
    mesh = partition.make_mesh(partition.MeshConfig(replica=2, fsdp=1))
    run = jax.jit(jax.shard_map(
        lambda x: jax.tree.map(lambda y: y[None],
                               lib.mean_in_format(x[0], format, 2.0**40, 'replica')),
        mesh=mesh, in_specs=PartitionSpec('replica'), out_specs=PartitionSpec('replica'),
        check_vma=False))
    x = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32) * 2.0**-40
    means, fits = run(x)
    assert fits.all()
    np.testing.assert_array_equal(means[0], means[1])
    precision = {'float32': 2**-23, 'bfloat16': 2**-8, 'float16': 2**-11, '1-6-9': 2**-10}[format]
    np.testing.assert_allclose(means[0], x.mean(0), rtol=0,
                               atol=2 * precision * np.abs(x).max())
    x[1, 0, 0] = np.inf  # only its replica sees it
    np.testing.assert_array_equal(run(x)[1], [True, False])


def test_averaging():
    reducer = lib.averaging()
    grads = {'a': jnp.array([2, 4], jnp.bfloat16), 'b': np.float32([3.5, 0])}
    reduced = reducer.reduce(grads, reducer.init())
    assert reduced.grads is grads
    assert reduced.finite and reduced.norm == np.sqrt(32.25, dtype=np.float32)
    grads['b'][1] = np.nan
    reduced = reducer.reduce(grads, reducer.init())
    assert not reduced.finite and reduced.norm == np.inf
    assert reducer.from_saved(reducer.to_saved(reduced.state)) == reducer.init()


def test_block_matrices_are_compressed():
    config = dalle.Config(depth=6, width=D, heads=2, text_length=5, text_vocab=12, grid=(3, 4),
                          image_vocab=14, kernel=3)
    params = jax.eval_shape(lambda: dalle.init(config, jax.random.key(0)))[0]
    mesh = partition.make_mesh(partition.MeshConfig())
    placed = partition.Partitioner(mesh).shardings(dalle.axes(config), params)

    def compressed(rank):
        reducer = lib.powersgd(lib.CompressionConfig(rank=rank), params, placed)
        return set(jax.eval_shape(reducer.init))
    names = {partition.path_name(path)
             for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]}
    assert compressed(D) == {n for n in names if re.search('/(qkv|out|up|down)/kernel$', n)}
    assert compressed(D)
    assert not compressed(0)
    assert not compressed(D + 2)  # D / 2 rows on each of two devices have no rank of D / 2 + 1

    mesh = jax.sharding.AbstractMesh((2, 8, 1), partition.AXES)
    placed = partition.Partitioner(mesh).shardings(dalle.axes(config), params)
    sent = lib.bytes_sent(CODED, params, placed)
    assert (sent['p'] + sent['q']) / sent['matrices'] == pytest.approx(25 * CODED.rank / (24 * D))


def test_other_error_buffers_are_refused():
    reducer = lib.powersgd(CODED, *abstract(
        SHAPES, SPECS, partition.make_mesh(partition.MeshConfig())))
    saved = jax.eval_shape(lambda: reducer.to_saved(reducer.init()))
    del saved['out/kernel']
    with pytest.raises(ValueError, match=r"differ in \['out/kernel'\]; restore with the same"):
        reducer.from_saved(saved)


@pytest.mark.parametrize('wrong,message', [
    (dict(rank=-1), r'compression.rank is -1'),
    (dict(p_scale=0.0), r'compression.p_scale is 0.0'),
    (dict(factor_format='0-6-10'), r'has no sign'),
    (dict(error_format='half'), r"'half'; choose one of"),
])
def test_wrong_configs_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        lib.CompressionConfig(**wrong)


if __name__ == '__main__':
    jax.config.update('jax_num_cpu_devices', 16)
    jax.config.update('jax_numpy_rank_promotion', 'raise')
    print(json.dumps(measure()))
