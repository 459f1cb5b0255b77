"""Plans against closed forms; what cannot be, and what to change. Compilers: test_compiled.py.

The closed forms are of experiments/dalle.py with the sizes below: N parameters, of which M are
divided over fsdp. Nine layers are eight that are scanned and one that is not.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dalle_jax import config, plan
from dalle_jax.models import dalle, patterns
from dalle_jax.planning import advice, ahead, hardware, memory, table, text
from dalle_jax.planning.collectives import Collective

GIB = 2**30
DEPTH, D, HEADS, T, ROWS, COLUMNS, V_TEXT, V_IMAGE = 2, 64, 2, 64, 8, 8, 48, 32
I, L = ROWS * COLUMNS, T + ROWS * COLUMNS
BATCH = 32
SMALL = {'arch.depth': DEPTH, 'arch.width': D, 'arch.heads': HEADS, 'arch.text_length': T,
         'arch.grid': (ROWS, COLUMNS), 'arch.kernel': 3, 'arch.text_vocab': V_TEXT,
         'arch.image_vocab': V_IMAGE, 'data.batch_size': BATCH}
MATRICES = 12 * DEPTH * D * D
TABLES = (V_TEXT + 2 * T + V_IMAGE + ROWS + COLUMNS) * D
HEAD = (V_TEXT + V_IMAGE) * D
M = MATRICES + TABLES + HEAD
N = M + DEPTH * 13 * D + 2 * D + 2 * D  # biases and norms; the last norm; two starts


def load(name='tiny', **changes):
    return config.load(f'experiments/dalle.py:{name}', {**SMALL, **changes})


def analytic(loaded, topology, mesh=''):
    return plan.run(loaded, topology, mesh, 'analytic')


def test_parameters_and_state():
    found = analytic(load(), 'h100:4', 'replica=2,fsdp=2')
    assert found['parameters'] == N
    each = M // 2 + N - M
    assert found['memory']['params'] == 4 * each
    # Matrices have moments of 16 bits; what is not divided or looked up has float32.
    exceptions = each - MATRICES // 2
    assert found['memory']['moments'] == 4 * MATRICES // 2 + 8 * exceptions
    assert found['memory']['others'] < 64  # the averages are on the host
    on_device = analytic(load(**{'optimizer.average_memory': 'device'}), 'h100:4',
                         'replica=2,fsdp=2')['memory']
    assert on_device['others'] - found['memory']['others'] == 4 * each
    assert sum(found['memory'][name] for name in ('params', 'moments', 'others')) == \
        found['memory']['state']


def test_the_paper():
    """12 billion parameters: 64 layers of 12 d^2 + 13 d, and the rest."""
    loaded = config.load('experiments/dalle.py:12b', {'arch.attention': 'blocked'})
    found = analytic(loaded, 'v5p:8x8x16', 'replica=64,fsdp=16')
    d = 3968
    assert found['parameters'] == (
        64 * (12 * d * d + 13 * d) + 2 * d + (16_384 + 2 * 256 + 8_192 + 64 + 2) * d
        + (16_384 + 8_192) * d)
    assert found['fits'] and found['memory']['peak'] < 14 * GIB


@pytest.mark.parametrize('remat,executed', [
    ('none', 1), ('dots', 1), ('all-but-mlp', 1 + 1 / 9), ('full', 4 / 3)])
def test_flops(remat, executed):
    found = analytic(load(**{'arch.remat': remat}), 'h100:1')
    arch = dalle.Config(depth=DEPTH, width=D, heads=HEADS, text_length=T, text_vocab=V_TEXT,
                        grid=(ROWS, COLUMNS), image_vocab=V_IMAGE, kernel=3)
    masks = [patterns.mask(kind, patterns.Layout(T, ROWS, COLUMNS, 3))
             for kind in arch.blocks.patterns]
    forward = (2 * L * 12 * D * D * DEPTH + 4 * D * sum(m.sum() for m in masks)
               + 2 * D * ((T - 1) * V_TEXT + I * V_IMAGE))
    assert found['flops'] == 3 * BATCH * forward
    assert found['executed_flops'] == pytest.approx(executed * found['flops'])


@pytest.mark.parametrize('remat,values,heads', [
    ('full', 0, 0), ('all-but-mlp', 5, 1), ('dots', 9, 1)])
def test_activations(remat, values, heads):
    """What scanned layers keep: their float32 input; per state `values` of d in 16 bits, and the
    softmax's sum of each head in float32."""
    loaded = load(**{'arch.depth': 9, 'arch.remat': remat, 'loop.microbatches': 2})
    task, _ = abstract(loaded, 'h100:4', 'replica=2,fsdp=2')
    everything, scanned = memory.activations(task, hardware.CHIPS['h100'])
    layer = L * (4 * D + 2 * values * D + 4 * heads * HEADS)
    assert scanned == 8 * layer * BATCH // 2 // 4
    # The ninth layer, the last norm's input, gradients of the heads' inputs, targets and such.
    rest = everything / (BATCH // 2 // 4) - 8 * layer
    assert layer + 8 * L * D < rest < layer + 16 * L * D


def test_activations_of_tensor():
    """Heads and hidden units are divided, the residual stream and what is added to it are not."""
    loaded = load(**{'arch.depth': 9, 'arch.remat': 'dots'})
    kept = []
    for mesh in ('fsdp=1,tensor=1', 'fsdp=1,tensor=2'):
        task, _ = abstract(loaded, f'h100:{mesh[-1]}', mesh)
        kept.append(memory.activations(task, hardware.CHIPS['h100'])[1])
    of_stream = 8 * BATCH * L * (4 * D + 2 * D)
    assert kept[1] - of_stream == (kept[0] - of_stream) / 2


def abstract(loaded, topology, mesh=''):
    target = hardware.topology(topology)
    return plan._abstract(plan._experiment(loaded, target, mesh), target)


def test_gradients():
    """Of layers' matrices in 16 bits, of the rest in float32; microbatches add a float32 sum."""
    sizes = []
    for microbatches in (1, 2):
        loaded = load(**{'arch.depth': 9, 'arch.remat': 'full', 'loop.microbatches': microbatches})
        task, state = abstract(loaded, 'h100:4', 'replica=2,fsdp=2')
        found = memory.estimate(task, state, hardware.CHIPS['h100'])
        sizes.append(found.gradients)
    matrices = 9 * 12 * D * D // 2
    assert sizes[0] == found.params - 2 * matrices
    assert sizes[1] == 2 * found.params - 2 * matrices


def test_measured_keeps_the_peak():
    task, state = abstract(load(), 'h100:4')
    found = memory.measured(123_456_789, task, state, hardware.CHIPS['h100'])
    assert found.peak == 123_456_789
    assert found._replace(working=0) == memory.estimate(
        task, state, hardware.CHIPS['h100'])._replace(working=0)


# -- network and time ----------------------------------------------------------------------------


def test_network_in_closed_form():
    found = analytic(load(**{'arch.remat': 'full', 'loop.microbatches': 2}), 'h100:2x8',
                     'replica=2,fsdp=8')
    sent = {(link['kind'], tuple(link['axes']), link['between']): link['bytes']
            for link in found['network']}
    part, m = 7 / 8, 2
    chunks = 1  # of both logits, at most 128 positions
    assert sent['all-gather', ('fsdp',), False] == pytest.approx(
        part * (2 * MATRICES * m * 7 / 3 + 2 * HEAD * m * chunks + 4 * TABLES), rel=0.01)
    assert sent['reduce-scatter', ('fsdp',), False] == pytest.approx(
        part * m * (2 * MATRICES + 4 * HEAD * chunks))
    # Replicas are nodes.
    assert sent['all-reduce', ('replica',), True] == pytest.approx(
        m * (2 * MATRICES + 4 * HEAD) / 8)
    assert sent['all-reduce', ('replica', 'fsdp'), True] == pytest.approx(
        2 * 15 / 16 * m * 4 * (TABLES + N - M))
    speeds = {(link['between'], link['bandwidth']) for link in found['network']}
    assert speeds == {(False, 450e9), (True, 50e9)}
    for link in found['network']:
        assert link['seconds'] == pytest.approx(link['bytes'] / (0.8 * link['bandwidth']))


def test_network_between():
    """fsdp over two nodes leaves them; tensor sums activations; one chip sends nothing."""
    across = analytic(load(), 'h100:2x8', 'replica=1,fsdp=16')
    assert {link['between'] for link in across['network']} == {True}
    split = analytic(load(**{'arch.remat': 'dots'}), 'h100:2', 'fsdp=1,tensor=2')
    sums = [link for link in split['network'] if link['axes'] == ('tensor',)]
    assert [link['kind'] for link in sums] == ['all-reduce']
    assert sums[0]['bytes'] == 4 * DEPTH * BATCH * L * D * 2
    assert analytic(load(), 'h100:1')['network'] == []


def test_gradients_that_are_summed_whole():
    """Those of matrices of a shape, in the dtype that gradients of layers have, along fsdp."""
    task, state = abstract(load(), 'h100:4', 'fsdp=4')

    def names(dtype, shape, axes=('fsdp',), kind='all-reduce'):
        found = Collective('x', kind, ((dtype, shape),), 4, axes, False, 1)
        return ahead.summed_whole([found], task, state)

    layers = [f'transformer/tail/{layer}/mlp/{name}/kernel' for layer in '01'
              for name in ('down', 'up')]
    assert names('bf16', (D, 4 * D)) == names('bf16', (4 * D, D)) == layers
    assert names('f32', (V_TEXT, D)) == ['text/tokens']
    assert names('f32', (D, V_TEXT)) == ['heads/text']
    for other in (names('f32', (D, 4 * D)), names('bf16', (D // 4, D)),
                  names('bf16', (D, 4 * D), ('replica',)),
                  names('bf16', (D, 4 * D), kind='reduce-scatter')):
        assert other == []


def test_compression_sends_less_between_replicas():
    """Two factors of rank r of each matrix; twice the rank, twice as many bytes."""
    sent = []
    for rank in (0, 2, 4):
        found = analytic(load(**{'compression.rank': rank}), 'h100:2x8', 'replica=2,fsdp=8')
        sent.append(sum(link['bytes'] for link in found['network']
                        if link['axes'] == ('replica',) and link['kind'] != 'all-reduce'))
    assert sent[0] == 0
    shards = DEPTH * ((D // 8 + 3 * D) + (D // 8 + D) + 2 * (D // 8 + 4 * D))
    assert sent[1] == pytest.approx(2 * shards * 1 / 2 * 2, rel=0.01)  # rank 2 over 8 is 1


def test_duration():
    found = analytic(load(**{'arch.remat': 'full'}), 'v5e:2x2', 'fsdp=4')
    time, peak = found['time'], 4 * 197e12
    for seconds, share in zip(time['step'], reversed(time['mfu'])):
        assert share == pytest.approx(found['flops'] / (seconds * peak))
    assert time['products'] == pytest.approx(
        [found['executed_flops'] / (peak * share) for share in (0.75, 0.55)])
    assert time['network'] == pytest.approx(sum(link['seconds'] for link in found['network']))
    fast = max(time['products'][0] + time['elementwise'], time['network']) + time['update']
    slow = time['products'][1] + time['elementwise'] + 0.5 * time['network'] + time['update']
    assert time['step'] == pytest.approx((fast, slow))
    parts = [time['products'][0], time['elementwise'] + time['update'], time['network']]
    names = ['matrix products', 'memory bandwidth', 'network']
    assert time['limit'] == names[parts.index(max(parts))]


# -- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize('topology,mesh,changes,message', [
    ('v5e:3x3', '', {}, "the nearest is 'v5e:2x4'"),
    ('v3:4x4', '', {}, 'none of the chips'),
    ('v5e:4x4', 'replica=3,fsdp=5', {}, 'needs 15 devices, but there are 16'),
    ('v5e:4x4', 'replica=3', {}, 'needs 15 devices, but there are 16'),
    ('2*v5e:2x2', 'replica=1,fsdp=8', {}, 'mesh.replica must be a multiple of 2'),
    ('v5e:4x4', 'fsdp=16', {'arch.width': 40}, 'fsdp = 16 does not divide'),
    ('v5e:2x2', 'fsdp=1,tensor=4', {'arch.width': 54}, 'tensor = 4 does not divide'),
    ('v5e:4x4', 'fsdp=16', {'data.batch_size': 24}, '16 or 32 can'),
    ('v5e:4x4', 'fsdp=16', {'loop.microbatches': 4}, '64 can'),
    ('v5e:4x4', 'fsdp=-1,data=2', {}, 'replica, fsdp, tensor'),
    ('v5e:4x4', 'fsdp=many', {}, "'fsdp=many'; write AXIS=EXTENT"),
    ('v5e:4x4', 'fsdp=0,replica=16', {}, 'each is at least 1'),
])
def test_clear_errors_before_anything_is_compiled(monkeypatch, topology, mesh, changes, message):
    monkeypatch.setattr(ahead, 'placed', lambda *_: pytest.fail('this must not be compiled'))
    with pytest.raises(ValueError, match=message):
        plan.run(load(**changes), topology, mesh, 'compile')


def test_unknown_mode():
    with pytest.raises(ValueError, match='auto, compile, analytic'):
        plan.run(load(), 'v5e:2x2', mode='fast')


def test_without_a_compiler(monkeypatch):
    def none(target):
        raise hardware.NoCompiler("nothing here compiles for v5e:2x2. Install 'dalle_jax[tpu]'")
    monkeypatch.setattr(hardware, 'devices', none)
    found = plan.run(load(), 'v5e:2x2')
    assert found['mode'] == 'analytic' and 'dalle_jax[tpu]' in found['why']
    with pytest.raises(hardware.NoCompiler, match='Install'):
        plan.run(load(), 'v5e:2x2', mode='compile')


@pytest.mark.parametrize('message,gib', [
    ('RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries '
     '(18.18G) exceeds available HBM (15.75G).', 18.18 + 2),
    ('RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.10G of 15.75G hbm. '
     'Exceeded hbm capacity by 1.35G.', 17.10),
])
def test_refusals_of_compilers(message, gib):
    """Temporaries are what there is besides the state, here 2 GiB."""
    assert ahead._refused(message, 2 * GIB) == pytest.approx(gib * GIB)
    assert ahead._refused('INTERNAL: something else', 2 * GIB) is None


# -- what to change ------------------------------------------------------------------------------


@pytest.mark.parametrize('topology,mesh,changes,kinds', [
    ('h100:1', '', {'arch.width': 1024, 'data.batch_size': 65_536},
     ['--config.arch.remat', '--config.loop.microbatches']),
    ('v5e:2x4', 'replica=8,fsdp=1', {'arch.width': 8192, 'data.batch_size': 64}, ['--mesh']),
    ('v5e:1x1', '', {'arch.width': 8192, 'data.batch_size': 64},
     ['--config.optimizer.params_format']),
])
def test_the_change_makes_it_fit(topology, mesh, changes, kinds):
    """Applied by its own flags, it does; what costs more is not changed before it must be."""
    changes = {**changes, 'arch.attention': 'blocked', 'arch.remat': 'none'}
    first = analytic(load(**changes), topology, mesh)
    said, flags = text.verdict(first)[0], first['change']['flags']
    assert not first['fits'] and 'does NOT fit' in said and all(flag in said for flag in flags)
    assert [flag.partition('=')[0] for flag in flags] == kinds
    for flag in flags:
        key, _, value = flag.partition('=')
        if key == '--mesh':
            mesh = value
        else:
            changes[key.removeprefix('--config.')] = int(value) if value.isdigit() else value
    second = analytic(load(**changes), topology, mesh)
    assert second['fits'] and second['memory']['peak'] == first['change']['peak']


def test_nothing_makes_it_fit():
    found = analytic(load(**{'arch.width': 16_384, 'arch.attention': 'blocked'}), 'v5e:1x1')
    assert not found['fits'] and found['change'] is None
    assert 'take more or larger chips' in text.verdict(found)[0]


def test_a_smaller_batch_is_the_last_resort():
    """Examples that are compared with each other cannot be divided into microbatches."""
    found = analytic(config.load('experiments/clip.py:scenes,batch=65536'), 'v5e:1x1')
    assert [flag.partition('=')[0] for flag in found['change']['flags']] == [
        '--config.arch.remat', '--config.data.batch_size']
    assert 0.9 * found['memory']['hbm'] < found['change']['peak'] < found['memory']['hbm']


def test_room_is_told():
    found = analytic(load(**{'arch.remat': 'full'}), 'h100:1')
    assert found['fits'] and found['change']['flags'] == ['--config.arch.remat=none']
    assert text.verdict(found)[0].startswith('fits: ')
    assert analytic(load(**{'arch.remat': 'none'}), 'h100:1')['change'] is None


def test_estimates_near_the_limit_are_called_so():
    found = analytic(load(), 'h100:1')
    found['memory'] |= {'peak': int(0.9 * found['memory']['hbm'])}
    assert 'compile to be sure' in text.verdict(found)[0]
    found['memory'] |= {'peak': int(0.5 * found['memory']['hbm'])}
    assert 'compile' not in text.verdict(found)[0]


def test_smallest_is_smallest():
    """With fewer chips of that kind, no way of dividing the work makes it fit."""
    loaded, chip = load(**{'arch.width': 8192, 'arch.attention': 'blocked'}), hardware.CHIPS['v5e']
    task, _ = abstract(loaded, 'v5e:1x1')
    found = table.smallest(task, chip)
    assert found.target.chips == 4 and found.needs.peak <= advice.FITS * chip.hbm
    alone = load(**{'arch.width': 8192, 'arch.attention': 'blocked', 'loop.microbatches': BATCH})
    assert analytic(alone, 'v5e:1x1')['memory']['peak'] > advice.FITS * chip.hbm


def test_table():
    task, _ = abstract(load(), 'h100:1')
    lines = list(table.table({'small': lambda chip: task}, steps=86_400 * 1_000_000))
    assert {line.count('|') for line in lines} == {2 + len(hardware.CHIPS)}
    chips, days = lines[2].split('|')[6].split(':')
    found = plan.run(load(), 'h100:1', mode='analytic')
    low, high = (float(n.replace(',', '')) for n in days.split('-'))
    assert int(chips) == 1
    assert (low, high) == pytest.approx([1e6 * s for s in found['time']['step']], rel=0.1)


# -- other models, output ------------------------------------------------------------------------


@pytest.mark.parametrize('spec', ['dvae.py:scenes', 'clip.py:scenes', 'dalle.py:scenes'])
def test_other_models(spec):
    loaded = config.load(f'experiments/{spec}')
    found = analytic(loaded, 'v5e:2x2')
    assert found['fits'] and found['parameters'] > 0 and found['memory']['activations'] > 0
    assert 0 < found['time']['mfu'][0] <= found['time']['mfu'][1] < 1
    again = analytic(config.resolve(loaded), 'v5e:2x2')
    assert {**again, 'why': ''} == {**found, 'why': ''}


def test_json_and_text():
    found = analytic(load(), 'v5p:2x2x2', 'replica=2,fsdp=4')
    written = json.loads(json.dumps(found))
    assert written['memory'] == found['memory'] and written['mesh'] == found['mesh']
    parts = [found['memory'][name] for name in
             ('params', 'moments', 'others', 'gradients', 'activations', 'working')]
    assert sum(parts) == found['memory']['peak']
    assert found['memory']['hbm'] == hardware.CHIPS['v5p'].hbm
    shown = '\n'.join(text.lines(found))
    for wanted in ('v5p:2x2x2, 8 chips: replica 2 x fsdp 4', f'{N:,} parameters', 'GiB', 'GB/s',
                   'MFU', 'assumed', 'reduce-scatter', 'fits: '):
        assert wanted in shown
    assert max(map(len, text.lines(found))) <= 120


def test_command():
    """Exit codes, and JSON alone on the console."""
    def command(*arguments):
        return subprocess.run(
            [sys.executable, '-m', 'dalle_jax.plan', '--mode', 'analytic', *arguments],
            cwd=Path(__file__).parents[2], capture_output=True, text=True)

    small = ['--config', 'experiments/dalle.py:tiny', '--config.arch.depth=2']
    refused = command(*small, '--topology', 'v5e:4x5', '--json', '-')
    assert refused.returncode == 2 and 'v5e:4x4' in refused.stderr and not refused.stdout
    large = command(*small, '--topology', 'v5e:1x1', '--json', '-')
    assert large.returncode == 1 and not json.loads(large.stdout)['fits']
