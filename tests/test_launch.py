"""The launchers: what --dry-run shows, and the supervisor with small programs in place of ranks."""

import ast
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import arguments, environment, kubernetes, local, slurm, tpu

ROOT = Path(__file__).parent.parent
TRAINING = ['--config', 'experiments/dalle.py:scenes', '--workdir', '/data/run']
MAINS = {
    'local': (local.main, ['--processes', '2', '--devices', '4']),
    'slurm': (slurm.main, ['--nodes', '2', '--time', '1:00:00']),
    'tpu': (tpu.main, ['run', 'pod', '--zone', 'zone']),
    'hosts': (tpu.main, ['run', '--hosts', 'a,me@b']),
    'kubernetes': (kubernetes.main, ['--name', 'run', '--image', 'image', '--claim', 'claim',
                                     '--nodes', '3']),
}
# Arguments that a shell, a scheduler or Kubernetes might take for something else.
WORDS = st.lists(st.text(st.sampled_from('ab $(){}`\'"\\*?~!#;&|<>=%@-\n\t\u00e9'), max_size=8),
                 max_size=4)


def wait_for(condition, what):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail(f'waited in vain for {what}')


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


# -- the supervisor ---------------------------------------------------------------------------

# A rank: `note` leaves a line in a file that all share; `start` is how often it was started.
RANK = '''
import os, pathlib, signal, subprocess, sys, time
rank, directory = int(sys.argv[1]), pathlib.Path(sys.argv[2])

def note(word):
    with open(directory / 'notes', 'a') as file:
        file.write(f'{rank} {word}\\n')

def notes(text):
    return (directory / 'notes').read_text().splitlines().count(text)

def wait(text, times=1):
    while notes(text) < times:
        time.sleep(0.02)

def stop(code):
    def handle(*_):
        note('SIGTERM')
        time.sleep(0.3)  # a second signal would come now
        sys.exit(code)
    signal.signal(signal.SIGTERM, handle)

note('start')
start = notes(f'{rank} start')
'''

SUPERVISOR = '''
import json, signal, sys
from launch import supervise
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
commands, workdir, options = json.loads(sys.argv[1])
sys.exit(supervise.supervise(lambda: [supervise.spawn(c) for c in commands], workdir, **options))
'''


@pytest.fixture
def supervisor(tmp_path):
    """Starts a supervisor in a process group of its own around one rank for each program."""
    started = []

    def start(*programs, workdir=None, **options):
        commands = [[sys.executable, '-c', RANK + program, str(rank), str(tmp_path)]
                    for rank, program in enumerate(programs)]
        given = json.dumps([commands, workdir and str(workdir), {'pause': 0.02} | options])
        started.append(subprocess.Popen([sys.executable, '-c', SUPERVISOR, given], cwd=ROOT,
                                        stderr=subprocess.PIPE, text=True, start_new_session=True))
        return started[-1]
    yield start
    for process in started:
        process.send_signal(signal.SIGINT)  # two kill the ranks, where a test has failed
        process.send_signal(signal.SIGINT)
        process.wait()
        process.stderr.close()


def ended(process):
    """(exit code, stderr)"""
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def notes(directory):
    return sorted((directory / 'notes').read_text().splitlines())


def wait_until_ready(directory, ranks):
    wait_for(lambda: (directory / 'notes').exists() and
             sum('ready' in line for line in notes(directory)) == ranks, 'the ranks')


def test_all_ranks_finish(supervisor, tmp_path):
    code, errors = ended(supervisor('', 'wait("0 start")'))
    assert (code, errors) == (0, '')
    assert notes(tmp_path) == ['0 start', '1 start']


def test_one_death_restarts_all_and_later_success_counts(supervisor, tmp_path):
    dies = '''
if start == 1:
    wait("1 ready")
    os.kill(os.getpid(), signal.SIGKILL)'''
    hangs_the_first_time = '''
stop(143)
note('ready')
while start == 1:
    time.sleep(0.02)'''
    code, errors = ended(supervisor(dies, hangs_the_first_time))
    assert code == 0
    assert notes(tmp_path) == ['0 start'] * 2 + ['1 SIGTERM'] + ['1 ready'] * 2 + ['1 start'] * 2
    assert 'rank 0 died with code 137 (SIGKILL)' in errors and 'restart 1 of 3' in errors


def test_gives_up_without_progress_with_the_code_of_the_first_death(supervisor, tmp_path):
    code, errors = ended(supervisor(
        'stop(9); wait("1 start", start); time.sleep(60)',
        'wait("0 start", start); sys.exit(7)', restarts=2, workdir=tmp_path))
    assert code == 7
    assert notes(tmp_path).count('1 start') == 3
    assert f'gives up: 2 restart(s) in a row without a new checkpoint in {tmp_path}' in errors


def test_a_new_checkpoint_resets_the_count(supervisor, tmp_path):
    program = '''
name = ['3', '10', '10.tmp'][start - 1]
(directory / 'checkpoints' / name).mkdir(parents=True)
sys.exit(1)'''
    code, errors = ended(supervisor(program, restarts=1, workdir=tmp_path))
    assert code == 1 and notes(tmp_path) == ['0 start'] * 3, '10 is progress, 10.tmp is none'
    assert 'from the checkpoint of step 3' in errors and 'of step 10' in errors


def test_goes_on_for_ever_while_checkpoints_come(supervisor, tmp_path):
    program = '''
(directory / 'checkpoints' / str(start)).mkdir(parents=True)
sys.exit(0 if start == 5 else 1)'''
    code, _ = ended(supervisor(program, restarts=1, workdir=tmp_path))
    assert code == 0 and notes(tmp_path) == ['0 start'] * 5


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_reaches_each_rank_once(supervisor, tmp_path, number):
    program = 'stop(143); note("ready"); time.sleep(60)'
    process = supervisor(program, program)
    wait_until_ready(tmp_path, 2)
    os.killpg(process.pid, number)
    code, _ = ended(process)
    assert code == 143
    assert notes(tmp_path) == ['0 SIGTERM', '0 ready', '0 start', '1 SIGTERM', '1 ready', '1 start']


def test_a_rank_that_ignores_the_signal_is_killed(supervisor, tmp_path):
    process = supervisor('signal.signal(15, signal.SIG_IGN); note("ready"); '
                         'time.sleep(60)', 'stop(143); note("ready"); time.sleep(60)', grace=0.6)
    wait_until_ready(tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    code, errors = ended(process)
    assert code == 137, '143 would claim that all ranks have saved'
    assert 'kills rank 0' in errors and notes(tmp_path).count('0 start') == 1


def test_a_second_interrupt_kills_at_once(supervisor, tmp_path):
    process = supervisor('signal.signal(15, signal.SIG_IGN); note("ready"); '
                         'time.sleep(60)', grace=1000)
    wait_until_ready(tmp_path, 1)
    process.send_signal(signal.SIGINT)
    assert 'stops' in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    code, errors = ended(process)
    assert code == 137 and 'kills the rank' in errors


def test_preemption_of_one_rank_stops_all_without_a_restart(supervisor, tmp_path):
    """They agree among themselves: a signal from the supervisor would hit a rank that is saving."""
    code, errors = ended(supervisor(
        'sys.exit(143)', 'stop(1); wait("0 start"); time.sleep(0.5); sys.exit(143)'))
    assert (code, errors) == (143, '')
    assert notes(tmp_path) == ['0 start', '1 start']


def test_a_signal_between_two_starts_is_obeyed(supervisor, tmp_path):
    process = supervisor('sys.exit(1)', pause=30)
    while 'restart 1' not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGTERM)
    code, errors = ended(process)
    assert code == 143 and notes(tmp_path) == ['0 start'] and errors == '', 'a rank was started'


def test_what_a_dead_rank_leaves_behind_is_killed(supervisor, tmp_path):
    program = '''
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], stderr=-3)
note(child.pid)
sys.exit(1)'''
    code, _ = ended(supervisor(program, restarts=0))
    pid = int(notes(tmp_path)[0].split()[1])
    assert code == 1

    def gone():
        try:
            return Path(f'/proc/{pid}/stat').read_text().rsplit(')')[1].split()[0] == 'Z'
        except OSError:
            return True
    wait_for(gone, 'the end of what the rank started')


def test_supervise_command_line(tmp_path):
    command = [sys.executable, '-m', 'launch.supervise', '--restarts', '0', '--workdir',
               str(tmp_path), '--', sys.executable, '-c', 'import sys; sys.exit(len(sys.argv))',
               '--', '-h']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3, 'the words after the first -- are the command'
    assert 'gives up' in done.stderr


# -- --dry-run --------------------------------------------------------------------------------

def dry(capsys, name, training=TRAINING, *options):
    main, own = MAINS[name]
    assert main([*own, *options, '--dry-run', '--', *training]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize('name', MAINS)
def test_dry_run_runs_nothing(name, capsys, monkeypatch, tmp_path):
    def forbidden(*_, **__):
        raise AssertionError('--dry-run started a program')
    monkeypatch.setattr(subprocess, 'Popen', forbidden)
    monkeypatch.setenv('PATH', '')  # and needs none to be installed
    training = ['--config=x', f'--workdir={tmp_path}/run']
    out = dry(capsys, name, training, *(['--mount', str(tmp_path)] if name == 'kubernetes' else []))
    assert 'dalle_jax.train' in out and not list(tmp_path.iterdir())


def test_local_ranks(capsys):
    lines = dry(capsys, 'local').splitlines()
    port = int(lines[0].split('localhost:')[1].split(',')[0])
    words = f'{sys.executable} -m dalle_jax.train {" ".join(TRAINING)} --config.cpu_devices=4'
    assert lines == [f'{words} --distributed=localhost:{port},2,0',
                     f'{words} --distributed=localhost:{port},2,1 '
                     '>> /data/run/logs/rank_1.log 2>&1']


def test_local_one_process_is_a_plain_training(capsys):
    assert local.main(['--dry-run', '--', *TRAINING]) == 0
    assert capsys.readouterr().out == (
        f'{sys.executable} -m dalle_jax.train {" ".join(TRAINING)}\n')


def test_local_runs_ranks_and_keeps_their_logs(tmp_path):
    """With a program in place of dalle_jax.train, which the ranks find first."""
    executable(tmp_path / 'dalle_jax' / '__init__.py', '')
    executable(tmp_path / 'dalle_jax' / 'train.py',
               'import os, sys\nprint(os.environ["JAX_PLATFORMS"], sys.argv[-1])\n')
    done = subprocess.run(
        [sys.executable, '-m', 'launch.local', '--processes', '3', '--devices', '1', '--',
         '--config=x', '--workdir=run'], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {'PYTHONPATH': str(ROOT)})
    logs = {p.name: p.read_text() for p in (tmp_path / 'run' / 'logs').iterdir()}
    assert done.returncode == 0 and set(logs) == {'rank_1.log', 'rank_2.log'}
    first, *others = [text.rsplit(',', 1) for text in
                      (done.stdout, logs['rank_1.log'], logs['rank_2.log'])]
    assert first[0].startswith('cpu --distributed=localhost:') and first[0].endswith(',3')
    assert [first[1], *(o[1] for o in others)] == ['0\n', '1\n', '2\n']
    assert {o[0] for o in others} == {first[0]}, 'all ranks meet at one port'


def sbatch_options(text):
    """As sbatch reads them: the comments before the first command."""
    head = text.split('\n\n')[0].splitlines()
    assert head[0] == '#!/bin/bash' and all(line.startswith('#SBATCH ') for line in head[1:])
    return dict(shlex.split(line.removeprefix('#SBATCH '))[0].removeprefix('--').partition('=')[::2]
                for line in head[1:])


def test_slurm_script(capsys):
    text = dry(capsys, 'slurm', ['--config=x', '--workdir=/data/my run'], '--gpus-per-node', '4',
               '--cpus-per-task', '6', '--sbatch=--partition=fast', '--requeues', '7')
    subprocess.run(['bash', '-n'], input=text, text=True, check=True)
    assert sbatch_options(text) == {
        'job-name': 'dalle_jax', 'nodes': '2', 'ntasks-per-node': '4', 'gpus-per-node': '4',
        'cpus-per-task': '6', 'time': '1:00:00', 'signal': 'TERM@120', 'requeue': '',
        'open-mode': 'append', 'output': '/data/my run/logs/slurm_%j.log', 'partition': 'fast'}
    # jax takes GPU SLURM_LOCALID of those it sees; one GPU a task would hide all but the first.
    assert 'gpus-per-task' not in text
    line = next(line for line in text.splitlines() if 'launch.supervise' in line)
    assert 'srun --kill-on-bad-exit=1 --cpus-per-task=6' in line
    assert line.endswith('--distributed=auto') and '-lt 7 ]' in text


def test_slurm_without_gpus(capsys):
    text = dry(capsys, 'slurm', TRAINING, '--gpus-per-node', '0')
    assert sbatch_options(text)['ntasks-per-node'] == '1' and 'gpu' not in text


@pytest.fixture(scope='module')
def programs(tmp_path_factory):
    """A PATH on which the programs of a cluster are small scripts.

    ssh and gcloud run what they are given in a home directory of the host; python is this one for
    the supervisor, and for a training leaves its arguments in OUT and ends with CODE, or waits for
    a SIGTERM where CODE is `wait`.
    """
    root = tmp_path_factory.mktemp('programs')
    python = executable(root / 'python', f'''#!/bin/bash
case "$2" in
  launch.supervise) PYTHONPATH={ROOT} exec {sys.executable} "$@" ;;
  dalle_jax.train)
    printf '%s\\0' "${{@:3}}" > "$OUT.new"; mv "$OUT.new" "$OUT"
    if [ "$CODE" = wait ]; then
      trap 'echo saved; exit 143' TERM
      echo trains as "${{@: -1}}" with "$EXTRA" "$XLA_FLAGS"
      while true; do sleep 0.05; done
    fi
    exit "$CODE" ;;
esac
''')
    remote = '''
mkdir -p "$HOSTS/$host/dalle_jax/source" "$HOSTS/$host/dalle_jax/venv/bin"
cd "$HOSTS/$host" || exit 1
ln -sf "$PYTHON" dalle_jax/venv/bin/python
'''
    # ssh [options] HOST STRING and gcloud compute tpus tpu-vm ssh POD [options] --command=STRING
    # give one string to the shell of the user on the host.
    executable(root / 'bin' / 'ssh', f'''#!/bin/bash
host="${{@: -2:1}}" text="${{@: -1}}"
{remote}
OUT="$OUT.$host" exec sh -c "$text"
''')
    executable(root / 'bin' / 'gcloud', f'''#!/bin/bash
host="$5" text="${{@: -1}}"
{remote}
OUT="$OUT.$host" exec sh -c "${{text#--command=}}"
''')
    executable(root / 'bin' / 'srun', '''#!/bin/bash
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@"
''')
    executable(root / 'bin' / 'scontrol', '#!/bin/bash\necho "$@" > "$OUT.scontrol"\n')
    environ = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'PYTHONPATH')}
    return environ | {'PATH': f'{root}/bin:{os.environ["PATH"]}', 'PYTHON': str(python),
                      'HOSTS': str(root / 'hosts'), 'OUT': str(root / 'out'), 'CODE': '0',
                      'SLURM_JOB_ID': '42', 'SLURM_JOB_NODELIST': 'node1'}


def trained(environ, suffix=''):
    """The arguments that a rank was started with."""
    path = Path(environ['OUT'] + suffix)
    wait_for(path.exists, 'the training')
    words = path.read_bytes().decode().split('\0')[:-1]
    path.unlink()
    return words


@given(WORDS)
@settings(max_examples=40, deadline=None)
def test_words_survive_a_shell(words):
    printed = subprocess.run(['sh', '-c', f"printf '%s\\0' x {arguments.shown(words)}"],
                             capture_output=True, check=True).stdout.decode()
    assert printed.split('\0')[1:-1] == words


@given(words=WORDS)
@settings(max_examples=6, deadline=None)
def test_words_survive_slurm(programs, words):
    text = slurm.script([*TRAINING, *words], '/data/run', 1, 0, '1', 'name',
                        python=programs['PYTHON'])
    subprocess.run(['bash'], input=text, text=True, env=programs, check=True, capture_output=True)
    assert trained(programs) == [*TRAINING, *words, '--distributed=auto']


@pytest.mark.parametrize('own,place', [
    (['pod', '--zone', 'zone'], ['auto']),
    (['--hosts', 'a,me@b'], ['a:8476,2,0', 'a:8476,2,1'])])
def test_words_survive_ssh(programs, capsys, own, place):
    """Printed by --dry-run, read by a shell, handed to ssh, read by a shell on the host."""
    @given(words=WORDS)
    @settings(max_examples=6, deadline=None)
    def check(words):
        assert tpu.main(['run', *own, '--dry-run', '--', *TRAINING, *words]) == 0
        subprocess.run(['bash', '-e'], input=capsys.readouterr().out, text=True, env=programs,
                       check=True)
        names = ['pod'] if len(place) == 1 else ['a', 'me@b']
        for name, distributed in zip(names, place):
            assert trained(programs, f'.{name}') == [*TRAINING, *words,
                                                     f'--distributed={distributed}']
            # The supervisor holds the lock as long as it lives.
            subprocess.run(['flock', f'{programs["HOSTS"]}/{name}/dalle_jax/lock', 'true'],
                           check=True)
    check()


def expanded(word, variables):
    """What Kubernetes makes of $ in a command (its third_party/forked/golang/expansion)."""
    out, i = '', 0
    while i < len(word):
        if word[i] != '$' or i + 1 == len(word):
            out, i = out + word[i], i + 1
        elif word[i + 1] == '$':
            out, i = out + '$', i + 2
        elif word[i + 1] == '(' and ')' in word[i:]:
            name, _, rest = word[i + 2:].partition(')')
            out, i = out + variables.get(name, f'$({name})'), len(word) - len(rest)
        else:
            out, i = out + word[i:i + 2], i + 2
    return out


@given(WORDS)
@settings(max_examples=60, deadline=None)
def test_words_survive_kubernetes(words):
    words = [*words, '$(JOB_COMPLETION_INDEX)', '$HOME', '$$(X)']
    made = kubernetes.manifest([*TRAINING, *words], '/data/run', 'run', 'image', 'claim', '/data',
                               'nvidia.com/gpu', 8, 3)
    pod = made['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']
    command = [expanded(word, {'JOB_COMPLETION_INDEX': '2'})
               for word in pod['containers'][0]['command']]
    assert command == [
        'python', '-m', 'launch.supervise', '--workdir=/data/run', '--restarts=3', '--',
        'python', '-m', 'dalle_jax.train', *TRAINING, *words,
        '--distributed=run-ranks-0-0.run:8476,3,2']


@pytest.mark.parametrize('code,count,requeued', [
    ('143', '', True), ('143', '6', True), ('143', '7', False), ('1', '', False),
    ('0', '', False)])
def test_slurm_requeues_what_was_stopped_and_nothing_else(programs, code, count, requeued):
    text = slurm.script(TRAINING, '/data/run', 1, 8, '1', 'name', restarts=0, requeues=7,
                        python=programs['PYTHON'])
    done = subprocess.run(['bash'], input=text, text=True, capture_output=True, env=programs | {
        'CODE': code, 'SLURM_RESTART_COUNT': count})
    assert done.returncode == int(code) and trained(programs)
    asked = Path(programs['OUT'] + '.scontrol')
    assert asked.exists() == requeued
    if requeued:
        assert asked.read_text() == 'requeue 42\n'
        asked.unlink()


def test_tpu_life_of_a_run(programs, monkeypatch, capfd):
    """run, run again, logs, stop, stop again: on two hosts, through the scripts themselves."""
    for name, value in (programs | {'CODE': 'wait'}).items():
        monkeypatch.setenv(name, value)
    own = ['--hosts', 'c,d', '--accelerator', 'cuda']
    run = ['run', *own, '--port', '9000', '--env', "EXTRA=it's $1", '--', *TRAINING]
    try:
        assert tpu.main(run) == 0
        for name, index in (('c', 0), ('d', 1)):
            assert trained(programs, f'.{name}')[-1] == f'--distributed=c:9000,2,{index}'
            log = Path(programs['HOSTS'], name, 'dalle_jax', 'log')
            wait_for(lambda: 'trains' in log.read_text(), 'the log')
        capfd.readouterr()
        assert tpu.main(run) == 1
        assert capfd.readouterr().err.count('already running; stop it first') == 2
        assert tpu.main(['logs', *own]) == 0
        out = capfd.readouterr().out
        assert out.count(f"with it's $1 {environment.XLA_GPU}") == 2 and 'c:9000,2,1' in out
    finally:
        assert tpu.main(['stop', *own]) == 0
    assert capfd.readouterr().out.count('saved') == 2, 'stop returns after the ranks have saved'
    assert tpu.main(['stop', *own]) == 0
    assert capfd.readouterr().out.count('not running') == 2


def test_tpu_setup_copies_the_commit_and_installs_it(capsys):
    assert tpu.main(['setup', 'pod', '--zone', 'zone', '--dry-run', '--option=--internal-ip']) == 0
    pack, copy, install = [shlex.split(line) for line in _statements(capsys.readouterr().out)]
    archive = pack[-2].removeprefix('--output=')
    assert pack[:4] == ['git', '-C', str(ROOT), 'archive'] and pack[-1] == 'HEAD'
    assert copy == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'scp', archive, 'pod:dalle_jax.tar.gz',
                    '--zone=zone', '--worker=all', '--internal-ip']
    assert install[:8] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', 'pod', '--zone=zone',
                           '--worker=all']
    script = install[-1].removeprefix('--command=')
    subprocess.run(['sh', '-n'], input=script, text=True, check=True)
    assert 'source[tpu]' in script and 'tar -xzf dalle_jax.tar.gz' in script


def _statements(text):
    """Lines of shell, those in quotes joined."""
    statement = ''
    for line in text.splitlines(keepends=True):
        statement += line
        try:
            shlex.split(statement)
        except ValueError:
            continue
        yield statement
        statement = ''
    assert not statement


def test_kubernetes_tpu(capsys):
    assert kubernetes.main([
        '--name', 'run', '--image', 'image', '--claim', 'claim', '--tpu', 'tpu-v5p-slice',
        '--topology', '4x4x8', '--slices', '2', '--node-selector', 'a.b/c=d', '--env', 'X=a=b',
        '--max-restarts', '5', '--host-network', '--privileged', '--dry-run', '--', *TRAINING]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made['apiVersion'], made['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
    assert made['metadata'] == {'name': 'run', 'annotations': {
        'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'}}
    assert made['spec']['network'] == {'enableDNSHostnames': True, 'subdomain': 'run',
                                       'publishNotReadyAddresses': True}
    policy = made['spec']['failurePolicy']
    assert (policy['maxRestarts'], policy['restartStrategy']) == (5, 'BlockingRecreate')
    assert policy['rules'] == [{'name': 'stopped', 'action': 'RestartJobSetAndIgnoreMaxRestarts',
                                'onJobFailureReasons': ['PodFailurePolicy']}]
    [group] = made['spec']['replicatedJobs']
    assert (group['name'], group['replicas']) == ('ranks', 2)
    job = group['template']['spec']
    assert job['parallelism'] == job['completions'] == 32  # 128 chips, 4 a host
    assert job['completionMode'] == 'Indexed' and job['backoffLimit'] == 0
    assert {r['action'] for r in job['podFailurePolicy']['rules']} == {'FailJob'}
    assert job['podFailurePolicy']['rules'][1]['onExitCodes'] == {
        'containerName': 'rank', 'operator': 'In', 'values': [143]}
    pod = job['template']['spec']
    assert pod['restartPolicy'] == 'Never' and pod['terminationGracePeriodSeconds'] == 330
    assert pod['nodeSelector'] == {'a.b/c': 'd', 'cloud.google.com/gke-tpu-topology': '4x4x8',
                                   'cloud.google.com/gke-tpu-accelerator': 'tpu-v5p-slice'}
    assert pod['hostNetwork'] and pod['dnsPolicy'] == 'ClusterFirstWithHostNet'
    assert pod['volumes'] == [{'name': 'shared', 'persistentVolumeClaim': {'claimName': 'claim'}}]
    [container] = pod['containers']
    assert container['name'] == 'rank' and container['image'] == 'image'
    assert container['resources'] == {'limits': {'google.com/tpu': 4}}
    assert container['securityContext'] == {'privileged': True}
    assert container['volumeMounts'] == [{'name': 'shared', 'mountPath': '/data'}]
    assert container['command'][-1] == '--distributed=auto'
    variables = {v['name']: v['value'] for v in container['env']}
    assert variables == {'PYTHONUNBUFFERED': '1', 'X': 'a=b',
                         'LIBTPU_INIT_ARGS': environment.LIBTPU_SLICES}


def test_kubernetes_gpu(capsys):
    made = json.loads(dry(capsys, 'kubernetes', TRAINING, '--env', 'XLA_FLAGS=--mine'))
    assert made['metadata']['annotations'] == {}
    [group] = made['spec']['replicatedJobs']
    assert group['replicas'] == 1 and group['template']['spec']['completions'] == 3
    pod = group['template']['spec']['template']['spec']
    [container] = pod['containers']
    assert container['resources'] == {'limits': {'nvidia.com/gpu': 8}}
    assert [v['mountPath'] for v in container['volumeMounts']] == ['/data', '/dev/shm']
    assert pod['volumes'][1]['emptyDir'] == {'medium': 'Memory'}
    assert {v['name']: v['value'] for v in container['env']}['XLA_FLAGS'] == '--mine'
    assert 'hostNetwork' not in pod and 'securityContext' not in container


@pytest.mark.parametrize('name,program', [('slurm', 'sbatch'), ('kubernetes', 'kubectl')])
def test_what_dry_run_prints_is_what_is_sent(name, program, tmp_path, capsys, monkeypatch):
    training = ['--config=x', f'--workdir={tmp_path}/run']
    options = ['--mount', str(tmp_path)] if name == 'kubernetes' else []
    shown = dry(capsys, name, training, *options)
    executable(tmp_path / 'bin' / program, f'#!/bin/bash\ncat > {tmp_path}/got; exit 5\n')
    monkeypatch.setenv('PATH', f'{tmp_path}/bin:{os.environ["PATH"]}')
    main, own = MAINS[name]
    assert main([*own, *options, '--', *training]) == 5
    assert (tmp_path / 'got').read_text().rstrip() == shown.rstrip()
    if name == 'slurm':
        assert (tmp_path / 'run' / 'logs').is_dir(), 'sbatch makes no directories'


# -- bad input --------------------------------------------------------------------------------

@pytest.mark.parametrize('name', MAINS)
@pytest.mark.parametrize('training,message', [
    ([], 'no arguments of the training'),
    (['--config', 'x'], 'lack --workdir'),
    (['--workdir', '/data/x'], 'lack --config'),
    (['--config', 'x', '--workdir'], 'lack --workdir'),
    ([*TRAINING, '--distributed=auto'], '--distributed is given by the launcher')])
def test_arguments_of_the_training(name, training, message, capsys):
    main, own = MAINS[name]
    with pytest.raises(SystemExit) as error:
        main([*own, '--', *training])
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize('name,own,message', [
    ('local', ['--processes', '0'], '0 is less than 1'),
    ('local', ['--processes', 'two'], "invalid integer value: 'two'"),
    ('local', ['--processes', '2'], 'give --devices'),
    ('slurm', ['--nodes', '0', '--time', '1'], '0 is less than 1'),
    ('slurm', ['--nodes', '1'], '--time'),
    ('tpu', ['run'], 'name a POD, or --hosts'),
    ('tpu', ['run', 'pod', '--hosts', 'a'], 'and not both'),
    ('tpu', ['run', 'pod'], 'no --zone of pod'),
    ('tpu', ['run', '--hosts', 'a,,b'], 'separated by commas'),
    ('tpu', ['run', '--hosts', 'a, b'], 'separated by commas'),
    ('tpu', ['run', '--hosts', 'a:22,b'], 'separated by commas'),
    ('tpu', ['run', '--hosts', '-oProxyCommand=x'], 'expected one argument'),
    ('tpu', ['run', '--hosts=-oProxyCommand=x'], 'separated by commas'),
    ('tpu', ['run', '--hosts', 'a,a'], 'names a host twice'),
    ('tpu', ['run', '--hosts', 'a', '--env', '1+1=2'], 'no name of a variable'),
    ('tpu', ['stop', '--hosts', 'a'], 'stop takes no arguments of the training'),
    ('kubernetes', ['--nodes', '1', '--tpu', 'x'], 'give --tpu and --topology, or --nodes'),
    ('kubernetes', ['--tpu', 'x'], 'give --tpu and --topology, or --nodes'),
    ('kubernetes', ['--tpu', 'x', '--topology', '4'], 'is not a topology'),
    ('kubernetes', ['--tpu', 'x', '--topology', '3x3'], '9 chips, which --chips-per-host 4 does'),
    ('kubernetes', ['--nodes', '1', '--mount', '/dat'], 'is not below --mount /dat'),
    ('kubernetes', ['--nodes', '1', '--name', 'My_Run'], 'lower-case letters'),
    ('kubernetes', ['--nodes', '1', '--env', 'X'], 'is not KEY=VALUE')])
def test_options(name, own, message, capsys):
    if name == 'kubernetes':
        own = ['--name', 'run', '--image', 'image', '--claim', 'claim', *own]
    with pytest.raises(SystemExit) as error:
        MAINS[name][0]([*own, '--dry-run', '--', *TRAINING])
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize('name', ['tpu', 'hosts', 'kubernetes'])
@pytest.mark.parametrize('workdir', ['runs/dalle', 'gs://bucket/dalle'])
def test_hosts_need_a_shared_workdir(name, workdir, capsys):
    with pytest.raises(SystemExit):
        dry(capsys, name, ['--config=x', f'--workdir={workdir}'])
    assert 'all hosts share' in capsys.readouterr().err.replace('\n', ' ')


@pytest.mark.parametrize('name,program', [('slurm', 'sbatch'), ('tpu', 'gcloud'), ('hosts', 'ssh'),
                                          ('kubernetes', 'kubectl')])
def test_a_missing_program_is_named_with_the_remedy(name, program, capsys, monkeypatch):
    monkeypatch.setenv('PATH', '')
    main, own = MAINS[name]
    with pytest.raises(SystemExit) as error:
        main([*own, '--', *TRAINING])
    text = capsys.readouterr().err.replace('\n', ' ')
    assert error.value.code == 2 and f'{program} is not installed here: ' in text
    assert '--dry-run' in text


@pytest.mark.parametrize('training,value', [
    (['--workdir', 'a'], 'a'), (['--workdir=a'], 'a'), (['-workdir=a'], 'a'),
    (['--workdir=a', '--workdir', 'b'], 'b'), (['--workdir=a=b'], 'a=b'), (['--workdirs=a'], None),
    (['--workdir'], None), ([], None)])
def test_flag_as_absl_reads_it(training, value):
    assert arguments.flag(training, 'workdir') == value


# -- environment ------------------------------------------------------------------------------

@pytest.mark.parametrize('mine,expected', [
    ({}, f'{environment.XLA_GPU}|0.95'),
    ({'XLA_FLAGS': '--a --b', 'XLA_CLIENT_MEM_FRACTION': '.5'},
     f'{environment.XLA_GPU} --a --b|.5')])
def test_the_users_environment_wins(mine, expected):
    script = environment.exports(environment.environment('cuda'))
    out = subprocess.run(['sh', '-c', f'{script}echo "$XLA_FLAGS|$XLA_CLIENT_MEM_FRACTION"'],
                         env={'PATH': os.environ['PATH'], **mine}, capture_output=True, text=True,
                         check=True).stdout
    assert out == expected + '\n'


def test_xla_knows_the_flags():
    """It ends a process that names another one."""
    done = subprocess.run(
        [sys.executable, '-c', 'import jax; jax.numpy.zeros(1)'],
        env=os.environ | environment.environment('cuda') | {'JAX_PLATFORMS': 'cpu'},
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_standard_library_only_and_short():
    allowed = sys.stdlib_module_names | {'launch'}
    for path in (ROOT / 'launch').glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            names = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                     [node.module] if isinstance(node, ast.ImportFrom) else [])
            assert {name.split('.')[0] for name in names} <= allowed, path.name
        lines = path.read_text().splitlines()
        assert len(lines) <= 205 and max(map(len, lines)) <= 100, path.name
