"""Several processes train like one: equal losses, one signal stops all, any number continues."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from dalle_jax import distributed
from dalle_jax.report import read_metrics
from tests.data.test_tokens import make, write

pytestmark = pytest.mark.processes
STEPS = 8
SMALL = {'arch.width': 32, 'arch.heads': 4, 'arch.depth': 1, 'arch.text_length': 12,
         'arch.attention': 'dense', 'text_vocab': 100, 'optimizer.name': 'adamw',
         'optimizer.average_every': 2, 'optimizer.average_memory': 'host',
         'optimizer.mean_format': '1-6-9', 'loop.log_every': 1, 'loop.valid_batches': 1,
         'loop.save_every': 100, 'loop.snapshot_every': 4, 'loop.valid_every': 4}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    records = make(40)
    return write(tmp_path_factory.mktemp('data') / 'tokens', [records[:20], records[20:]])


def start(workdir, data, processes=1, devices=8, index=0, port=0, **overrides):
    """A rank of a training, as a process."""
    values = {**SMALL, 'cpu_devices': devices, **overrides}
    flags = [f'--config.{key}={value}' for key, value in values.items()]
    if processes > 1:
        flags.append(f'--distributed=localhost:{port},{processes},{index}')
    return subprocess.Popen(
        [sys.executable, '-m', 'dalle_jax.train', '--workdir', str(workdir), '--heartbeat=20',
         '--config', f'experiments/dalle.py:folder,source=tokens,path={data},dvae=,batch=8,'
         f'steps={STEPS}', *flags],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ))


def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]


def together(workdir, data, processes, devices, after=None, act=None, **overrides):
    """Return codes and outputs of all ranks; act(ranks) once rank 0 has said `after`."""
    port = free_port()
    ranks = [start(workdir, data, processes, devices, i, port, **overrides)
             for i in range(processes)]
    said = []
    try:
        if after:
            for line in ranks[0].stdout:
                said.append(line)
                if re.search(after, line):
                    break
            act(ranks)
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
        return [rank.returncode for rank in ranks], [''.join(said) + outputs[0], *outputs[1:]]
    finally:
        for rank in ranks:
            rank.kill()


def losses(workdir):
    return {line['step']: (line['loss'], line['gradient_norm'])
            for line in read_metrics(workdir / 'metrics.jsonl') if line['kind'] == 'train'}


@pytest.fixture(scope='module')
def alone(data, tmp_path_factory):
    """The losses of one process with 8 devices, never stopped."""
    workdir = tmp_path_factory.mktemp('alone') / 'run'
    codes, outputs = together(workdir, data, 1, 8)
    assert codes == [0], outputs[0][-3000:]
    return workdir


@pytest.fixture(scope='module')
def stopped(data, tmp_path_factory):
    """Two processes of 4 devices, the second of which gets a SIGTERM."""
    workdir = tmp_path_factory.mktemp('stopped') / 'run'
    codes, outputs = together(workdir, data, 2, 4, after=r'step 2/',
                              act=lambda ranks: ranks[1].send_signal(signal.SIGTERM))
    assert codes == [143, 143], '\n'.join(o[-3000:] for o in outputs)
    return workdir, outputs


def check_continued(workdir, alone):
    found, expected = losses(workdir), losses(alone)
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    np.testing.assert_allclose([found[s] for s in found], [expected[s] for s in found], rtol=1e-6)
    done = [json.loads((w / 'done.json').read_text()) for w in (workdir, alone)]
    for name in ('loss', 'text', 'image'):  # of the averaged parameters
        np.testing.assert_allclose(done[0][name], done[1][name], rtol=1e-6)


def test_a_signal_to_one_saves_and_ends_all(stopped):
    workdir, outputs = stopped
    saved = [int(p.name) for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit()]
    assert len(saved) == 1 and saved[0] < STEPS
    assert f'stopped by a signal after step {saved[0]}' in outputs[0]
    assert 'step 2/' not in outputs[1]  # the first speaks for all
    assert max(losses(workdir)) == saved[0]


def test_one_process_continues_two(stopped, alone, data, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(stopped[0], workdir)
    codes, outputs = together(workdir, data, 1, 8)
    assert codes == [0], outputs[0][-3000:]
    check_continued(workdir, alone)


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [{}, {'mesh.fsdp': 2, 'mesh.tensor': 4}])
def test_four_processes_continue_two(stopped, alone, data, tmp_path, mesh):
    workdir = tmp_path / 'run'
    shutil.copytree(stopped[0], workdir)
    codes, outputs = together(workdir, data, 4, 2, **mesh)
    assert codes == [0] * 4, outputs[0][-3000:]
    check_continued(workdir, alone)


@pytest.mark.slow
def test_a_death_ends_all_and_the_supervisor_starts_again(alone, data, tmp_path):
    workdir = tmp_path / 'run'
    values = {**SMALL, 'loop.save_every': 2}
    launcher = subprocess.Popen(
        [sys.executable, '-m', 'launch.local', '--processes', '2', '--devices', '4', '--',
         '--workdir', str(workdir), '--heartbeat=10', '--config',
         f'experiments/dalle.py:folder,source=tokens,path={data},dvae=,batch=8,steps={STEPS}',
         *(f'--config.{key}={value}' for key, value in values.items())],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said, killed = [], False
    try:
        for line in launcher.stdout:
            said.append(line)
            if 'step 4/' in line and not killed:
                killed = True
                rank = subprocess.run(['pgrep', '-f', f'{workdir}.*distributed=localhost:.*,2,1'],
                                      capture_output=True, text=True).stdout.split()
                os.kill(int(rank[-1]), signal.SIGKILL)
        assert launcher.wait(timeout=240) == 0, ''.join(said)[-4000:]
    finally:
        launcher.kill()
    assert killed and 'continues after step' in ''.join(said)
    check_continued(workdir, alone)


def test_ranks_that_disagree_are_told_the_key(data, tmp_path):
    port = free_port()
    ranks = [start(tmp_path / 'run', data, 2, 1, i, port, seed=i) for i in range(2)]
    try:
        for rank in ranks:
            output = rank.communicate(timeout=120)[0]
            assert rank.returncode == 2
            assert 'seed is 0 in process 0 and 1 in process 1' in output
    finally:
        for rank in ranks:
            rank.kill()
    assert not (tmp_path / 'run').exists()


def test_a_dead_coordinator_is_named():
    rank = subprocess.run(
        [sys.executable, '-c', 'from dalle_jax import distributed\n'
         f'distributed.start("localhost:{free_port()},2,1")'],
        env=dict(os.environ, DALLE_JAX_START_SECONDS='2'), capture_output=True, text=True,
        timeout=120)
    assert rank.returncode == 1
    assert re.search(r'ProcessError: no coordinator at localhost:\d+ in 2 s', rank.stderr)


@pytest.mark.parametrize('spec', ['host,2,0', 'host:1,2', 'host:1,2,2', 'host:1,a,0', 'slurm'])
def test_malformed_specs(spec):
    with pytest.raises(distributed.ProcessError, match='HOST:PORT,COUNT,INDEX'):
        distributed.start(spec)


def test_a_process_alone_agrees_with_itself():
    assert distributed.primary()
    assert distributed.gather('text') == ['text']
    assert distributed.from_primary(lambda: {'a': [1, None]}) == {'a': [1, None]}
    assert distributed.total(3) == 3
    distributed.agree({'a': 1})
    with pytest.raises(KeyError), distributed.together('nothing'):
        raise KeyError('its own error')
