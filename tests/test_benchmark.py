"""The benchmark's figures follow from timings taken in turns; its choices and errors."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from dalle_jax import benchmark, config as config_lib, machine, measure
from dalle_jax.models import dalle, dvae, patterns
from dalle_jax.training.optimizer import OptimizerConfig

TINY = benchmark.Preset(
    dalle.Config(depth=1, width=16, heads=2, text_length=4, text_vocab=9, grid=(3, 3),
                 image_vocab=7, kernel=3, remat='none'),
    dvae.Config(image_size=4, vocab=8, hidden=4, n_init=4, groups=1, blocks_per_group=1),
    train_batch=2, sample_batch=2)


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    """Smaller probes, which cost less time."""
    matmul, copy = machine.matmul, machine.copy
    monkeypatch.setattr(machine, 'matmul', lambda dtype: matmul(dtype, 16))
    monkeypatch.setattr(machine, 'copy', lambda: copy(64))


# -- measure ---------------------------------------------------------------------------------------


def cases(order):
    """Two ways of adding one, which note when they run."""
    def case(kind, **values):
        function = jax.jit(lambda x: x + 1)
        x = jnp.zeros(8)
        return measure.Case(kind, lambda: function.lower(x),
                            lambda compiled: order.append(kind) or compiled(x), **values)

    return [case('a', items=6, flops=1000, tokens=5, extra={'batch': 6}),
            case('b', items=2, bytes=300, runs=10,
                 check=lambda compiled: {'sum': float(compiled(jnp.ones(8)).sum())})]


class Turns:
    """A clock by which the runs of a round, in their order, take 1, 2, 3 and 4 s, and so on.

    With `late`, a round is that much slower than the one before it.
    """

    def __init__(self, count, late):
        self.count, self.late, self.readings, self.now = count, late, 0, 0.0

    def __call__(self):
        if self.readings % 2:  # the end of a run; the first round warms up
            place, turn = self.readings // 2 % self.count, self.readings // 2 // self.count
            self.now += place + 1 + self.late * (turn - 1) if turn else 10
        self.readings += 1
        return self.now


def test_figures_follow_from_timings_taken_in_turns(monkeypatch):
    monkeypatch.setattr(machine, 'devices', lambda: 2)
    order = []
    lines = measure.measure(cases(order), jnp.dtype('float32'), 3, {'name': 'sum'}, Turns(4, 0.5))
    assert ''.join(order) == 'ab' * 5  # two rounds to warm up
    a, b, matmul, copy = lines
    assert [line['kind'] for line in lines] == ['a', 'b', 'matmul', 'copy']
    assert all(line['name'] == 'sum' for line in lines)
    # Had the runs of a kind followed each other, they would not be one slowing round apart.
    assert a['seconds'] == [1.0, 1.5, 2.0] and copy['seconds'] == [4.0, 4.5, 5.0]
    assert a['seconds_median'] == 1.5 and a['items_per_s'] == 6 / 1.5
    assert a['tokens_per_s'] == 30 / 1.5 and a['model_tflops'] == 1000 / 1.5 / 1e12
    assert matmul['seconds_median'] == 3.5 and matmul['flops_per_s'] == 2 * 16**3 / 3.5
    assert a['of_matmul_rate'] == pytest.approx(1000 / 1.5 / (2 * matmul['flops_per_s']))
    assert copy['bytes_per_s'] == 2 * 4 * 64 / 4.5
    # Ten runs make up the whole of b.
    assert b['extrapolated'] and not a['extrapolated']
    assert b['seconds_median'] == 25.0 and b['items_per_s'] == 2 / 25.0
    assert b['roofline_fraction'] == pytest.approx(300 / copy['bytes_per_s'] / 25.0)
    assert a['speedup_over'] == {'b': 25 / 1.5} and b['speedup_over'] == {'a': 1.5 / 25}
    assert a['batch'] == 6 and b['sum'] == 16.0
    assert a['peak_bytes'] == 2 * 8 * 4  # argument and result


def test_what_does_not_fit_is_named_and_not_run(monkeypatch):
    order = []
    monkeypatch.setattr(machine, 'memory', lambda: 31)
    lines = measure.measure(cases(order), jnp.dtype('float32'), 1, {'name': 'sum'}, Turns(2, 0.0))
    assert not order
    assert 'needs 32 more bytes of memory and 31 are free' in lines[0]['error']
    assert lines[0]['seconds_median'] is None and 'speedup_over' not in lines[0]
    assert 'needs 32 more bytes' in measure.table(lines).splitlines()[1]
    json.dumps(lines, allow_nan=False)


def test_what_fails_leaves_the_rest(caplog):
    good, bad = cases([])
    failing = [bad._replace(kind='lower', lower=lambda: [][1]),
               bad._replace(kind='run', run=lambda compiled: {}['x\ny'])]
    lines = measure.measure([failing[0], good, failing[1]], jnp.float32, 1, {'name': 'n'})
    by_kind = {line['kind']: line for line in lines}
    assert by_kind['lower']['error'] == 'IndexError: list index out of range'
    assert by_kind['run']['failed'] and by_kind['run']['error'].startswith('KeyError')
    assert by_kind['a']['speedup_over'] == {} and by_kind['a']['seconds_median'] > 0
    assert [record.exc_info[0] for record in caplog.records] == [IndexError, KeyError]
    assert len(measure.table(lines).splitlines()) == 1 + len(lines)


def test_table_has_a_line_for_each():
    lines = measure.measure(cases([]), jnp.dtype('float32'), 1, {'name': 'sum'}, Turns(4, 0.0))
    head, a, b, matmul, copy = measure.table(lines).splitlines()
    assert a.startswith('sum a') and a.endswith('b 20.00')
    assert b.startswith('sum b') and b.endswith('a 0.05')
    assert matmul.endswith('TFLOP/s)') and copy.endswith('TB/s)')
    assert head.index('items/s') + len('items/s') == a.index(' 6 ') + 2  # right-aligned: 6 in 1 s


# -- benchmark -------------------------------------------------------------------------------------


def bench(*what, **values):
    return benchmark.Bench(what, 'toy', TINY, jnp.dtype('float32'), repeats=2, **values)


def check(lines):
    """What holds for every measurement."""
    by_name = {}
    for line in lines:
        by_name.setdefault(line['name'], {})[line['kind']] = line
    for group in by_name.values():
        assert {'matmul', 'copy'} < set(group)
        for line in group.values():
            assert {'name', 'preset', 'kind', 'seconds_median', 'items_per_s', 'peak_bytes',
                    'device', 'dtype', 'jax', 'date'} <= set(line)
            assert (line['preset'], line['dtype']) == ('toy', 'float32')
            assert line['seconds_median'] > 0 and line['peak_bytes'] > 0
            assert len(line['seconds']) == 2
            for other, ratio in line.get('speedup_over', {}).items():
                assert ratio == pytest.approx(
                    group[other]['seconds_median'] / line['seconds_median'])
            if 'of_matmul_rate' in line:
                assert line['of_matmul_rate'] == pytest.approx(
                    line['model_tflops'] * 1e12 / group['matmul']['flops_per_s'])
    return by_name


def test_attention_and_training(tmp_path, capsys):
    out = tmp_path / 'lines.jsonl'
    out.write_text('{"earlier": 1}\n')
    lines = benchmark.run(bench('attention', 'train'), str(out))
    found = check(lines)
    assert [json.loads(text) for text in out.read_text().splitlines()] == [{'earlier': 1}, *lines]
    printed = capsys.readouterr().out
    assert printed.startswith(out.read_text().split('\n', 1)[1])
    assert printed.endswith(measure.table(lines) + '\n')

    assert set(found) == {'attention/conv', 'train'}
    blocked, dense = (found['attention/conv'][kind] for kind in ('blocked', 'dense'))
    assert dense['max_relative_error'] < 1e-6 and 0 < blocked['max_relative_error'] < 1e-5
    pairs = patterns.mask('conv', TINY.dalle.blocks.layout).sum()
    assert blocked['model_tflops'] * blocked['seconds_median'] == pytest.approx(
        3 * 2 * 2 * 2 * 16 * pairs / 1e12)
    # The optimiser's arrays: parameters, their average and two moments pass through a step.
    count = sum(x.size for x in jax.tree.leaves(jax.eval_shape(
        lambda: dalle.init(TINY.dalle, jax.random.key(0))[0])))
    assert found['train']['auto']['peak_bytes'] > 4 * 4 * count
    assert found['train']['auto']['speedup_over'].keys() == {'dense'}
    assert found['train']['auto']['tokens_per_s'] == pytest.approx(
        13 * found['train']['auto']['items_per_s'])


def test_sampling(monkeypatch):
    decoded = []
    monkeypatch.setattr(benchmark, '_decoder', lambda bench: (
        {'scale': jnp.float32(2)}, lambda params, ids: decoded.append(ids.shape) or ids))
    group = check(benchmark.run(bench('sample', candidates=3, with_dvae=True)))['sample']
    assert set(group) == {'cached', 'dense_cache', 'recompute', 'matmul', 'copy'}
    assert decoded == [(6, 3, 3)] * 2
    again = group['recompute']
    assert again['extrapolated'] and not again['with_dvae']
    assert again['seconds_median'] == pytest.approx(9 * np.median(again['seconds']))
    assert again['items_per_s'] == pytest.approx(6 / again['seconds_median'])
    cached = group['cached']
    params = jax.eval_shape(lambda: dalle.init(TINY.dalle, jax.random.key(0))[0])
    floor = 9 * benchmark.token_bytes(params, TINY.dalle, 2, 3, jnp.float32)
    assert cached['roofline_fraction'] == pytest.approx(
        floor / group['copy']['bytes_per_s'] / cached['seconds_median'])
    assert cached['cache_bytes'] < group['dense_cache']['cache_bytes']


@pytest.mark.slow
def test_dvae():
    found = check(benchmark.run(bench('dvae', batch=2)))
    assert set(found) == {'dvae/train', 'dvae/encode', 'dvae/decode'}
    assert set(found['dvae/decode']) == {'lookup', 'one_hot', 'matmul', 'copy'}
    assert found['dvae/decode']['lookup']['batch'] == 2


def test_bytes_of_a_token():
    """By counting the masks; and of the 12-billion-parameter model a candidate's 30 MB."""
    config = dataclasses.replace(TINY.dalle, depth=2)
    layout = config.blocks.layout
    params = jax.eval_shape(lambda: dalle.init(config, jax.random.key(0))[0])
    images = [patterns.mask(kind, layout)[4:, 4:].sum() / 9 for kind in config.blocks.patterns]
    # Of a layer: matrices, biases of 3 d + d + 4 d + d and two layernorms; one behind the last.
    weights = 2 * (12 * 16 * 16 + 9 * 16 + 4 * 16) + 2 * 16 + 16 * 7
    expected = 2 * (weights + 2 * 16 * (5 * 2 * 4 + 5 * 3 * sum(images)))
    assert benchmark.token_bytes(params, config, 5, 3, jnp.bfloat16) == pytest.approx(expected)

    config = dalle.PRESETS['12b']
    params = jax.eval_shape(lambda: dalle.init(config, jax.random.key(0))[0])
    one, two = (benchmark.token_bytes(params, config, 1, n, jnp.bfloat16) for n in (1, 2))
    assert two - one == pytest.approx(30.4e6, rel=0.05)
    assert 2 * one - two == pytest.approx(24.4e9, rel=0.02)  # weights and a caption


# -- choices and errors ----------------------------------------------------------------------------


@pytest.mark.parametrize('name,depth,width,heads,text,side,text_vocab,image_vocab,train,sample', [
    ('bench_tiny', 4, 256, 4, 32, 16, 2048, 1024, 16, 8),
    ('bench_small', 8, 512, 8, 64, 16, 8192, 8192, 8, 4),
    ('paper_seq', 4, 512, 8, 256, 32, 16384, 8192, 4, 2),
])
def test_presets(name, depth, width, heads, text, side, text_vocab, image_vocab, train, sample):
    preset = benchmark.PRESETS[name]
    assert dataclasses.replace(preset.dalle, kernel=11, remat='none') == preset.dalle == (
        dalle.Config(depth=depth, width=width, heads=heads, text_length=text, grid=(side, side),
                     text_vocab=text_vocab, image_vocab=image_vocab, kernel=11, remat='none'))
    assert (preset.train_batch, preset.sample_batch) == (train, sample)


@given(st.data())
def test_slices_keep_the_first_layers(data):
    name = data.draw(st.sampled_from([*benchmark.PRESETS]))
    whole = benchmark.PRESETS[name].dalle
    layers = data.draw(st.integers(1, whole.depth))
    config = benchmark.chosen(name, layers).dalle
    assert config.blocks.patterns == whole.blocks.patterns[:layers]
    assert dataclasses.replace(config, depth=whole.depth, patterns=None) == whole


def test_optimisers_are_those_of_the_experiments():
    for module, spec in ((dalle, 'experiments/dalle.py:12b'), (dvae, 'experiments/dvae.py:paper')):
        values = config_lib.load(spec).to_dict()['optimizer']
        stored = benchmark.PRESETS['12b'].stored if module is dalle else {}
        assert dataclasses.replace(benchmark.OPTIMIZERS[module],
                                   **stored) == OptimizerConfig(**values)


@pytest.mark.parametrize('values,message', [
    (dict(name='12c'), '--preset=12c: choose one of bench_tiny, .*12b'),
    (dict(name='12b', layers=65), '--layers=65: 12b has 64 layers'),
    (dict(name='12b', layers=-1), '--layers=-1'),
    (dict(name='12b', remat='most'), "remat='most': choose one of"),
    (dict(name='12b', dvae_preset='huge'), '--dvae_preset=huge: choose one of paper'),
])
def test_choices_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        benchmark.chosen(**values)


@pytest.mark.parametrize('what,values,message', [
    ('speed', {}, '--what=speed: choose from attention, train, sample, dvae'),
    ('train', dict(repeats=0), '--repeats=0'),
    ('sample', dict(candidates=0), '--candidates=0'),
    ('train', dict(batch=-1), '--batch=-1'),
    ('train', dict(batch=3), '--batch=3 is not divisible by the 2 devices'),
])
def test_options_are_checked(what, values, message):
    with pytest.raises(ValueError, match=message):
        benchmark.Bench(**{'what': (what,), 'name': 'toy', 'preset': TINY, 'dtype': jnp.float32}
                        | values)


def test_decoding_needs_a_square():
    wide = dataclasses.replace(TINY, dalle=dataclasses.replace(TINY.dalle, grid=(2, 3)))
    with pytest.raises(ValueError, match='toy has a grid of 2x3'):
        benchmark.Bench(('sample',), 'toy', wide, jnp.float32, with_dvae=True)


def test_needs_few_libraries():
    """As on a machine that is only lent for measuring."""
    code = '''
import runpy, sys
for name in ('ml_collections', 'orbax', 'PIL', 'sentencepiece', 'etils', 'tensorboardX',
             'tensorflow_datasets', 'array_record', 'grain'):
    sys.modules[name] = None
sys.argv = ['benchmark', %r]
runpy.run_module('dalle_jax.benchmark', run_name='__main__')
'''
    def start(argument):
        return subprocess.run([sys.executable, '-c', code % argument], capture_output=True,
                              text=True, timeout=120)

    shown = start('--help')
    for flag in ('--what', '--preset', '--layers', '--repeats', '--out', '--batch', '--candidates',
                 '--precision', 'bench_tiny', '5.6b'):
        assert flag in shown.stdout, shown.stdout + shown.stderr
    wrong = start('--preset=12c')
    assert wrong.returncode and '--preset=12c: choose one of' in wrong.stdout + wrong.stderr


@pytest.mark.slow
def test_precisions_of_the_stored_model():
    """Both steps train, with 16-bit parameters and moments; an unscaled float16 is no case."""
    preset = dataclasses.replace(TINY, stored=benchmark.PRESETS['12b_one_gpu'].stored)
    bench = benchmark.Bench(('precision',), 'tiny', preset, jnp.dtype('float32'), repeats=1)
    lines = {line['kind']: line for line in benchmark.run(bench)}
    assert lines['bfloat16']['speedup_over'].keys() == {'float16'}
    assert lines['float16']['model_tflops'] > 0 and not lines['float16'].get('failed')
    assert lines['float16']['batch'] == TINY.train_batch


def test_the_one_gpu_preset_is_the_12b_model_stored_smaller():
    one, whole = (benchmark.chosen(name, 8) for name in ('12b_one_gpu', '12b'))
    assert one.dalle == whole.dalle and one.dalle.width == 3968
    assert one.stored == {**whole.stored, 'params_format': 'bfloat16'}
    experiment = config_lib.resolve(config_lib.load('experiments/dalle.py:12b_one_gpu,path=X'))
    for key, value in one.stored.items():
        assert getattr(experiment.optimizer, key) == value
