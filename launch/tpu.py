"""Trains on the hosts of a TPU pod, or on any hosts that ssh reaches.

    python -m launch.tpu setup POD --zone ZONE
    python -m launch.tpu run POD --zone ZONE -- \\
        --config experiments/dalle.py:12b,path=DIR --workdir /shared/runs/dalle
    python -m launch.tpu logs POD --zone ZONE
    python -m launch.tpu stop POD --zone ZONE

POD is a TPU VM, of one or many hosts, that `gcloud` reaches; jax finds the hosts of the pod by
itself. `--hosts a,b,c` names the hosts instead: in the order of the pod's workers for a TPU, in any
order for GPUs (--accelerator cuda).

setup copies the last commit of this repository and installs it in a virtual environment; run starts
launch.supervise on every host, in the background; stop sends SIGTERM and waits until all have saved
and ended. On a host everything is in ~/dalle_jax: source, venv, log.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from launch import arguments
from launch.arguments import say, shown
from launch.environment import environment, exports

ROOT = Path(__file__).resolve().parent.parent
PORT = 8476
ARCHIVE = 'dalle_jax.tar.gz'

STOP = '''cd dalle_jax || exit 1
if flock -n lock true; then echo "$(hostname): not running"; exit 0; fi
kill -TERM "$(cat pid)"
flock lock true
tail -n 3 log | sed "s/^/$(hostname): /"
'''


def setup_script(accelerator: str, python: str) -> str:
    """Installs the copied archive; what was installed before is replaced."""
    return f'''set -e
rm -rf dalle_jax/source
mkdir -p dalle_jax/source
tar -xzf {ARCHIVE} -C dalle_jax/source
cd dalle_jax
test -d venv || {shlex.quote(python)} -m venv venv
venv/bin/python -m pip install -q -e {shlex.quote(f'./source[{accelerator}]')}
'''


def run_script(training: Sequence[str], workdir: str, distributed: str, accelerator: str,
               env: Sequence[tuple[str, str]], restarts: int) -> str:
    """Starts the supervisor, which holds the lock until it ends; its ranks do not inherit it."""
    python = '../venv/bin/python'
    command = arguments.supervised(arguments.train(training, distributed, python), workdir,
                                   restarts, python)
    own = ''.join(f'export {name}={shlex.quote(value)}\n' for name, value in env)
    return f'''cd dalle_jax/source || exit 1
exec 9>../lock
flock -n 9 || {{ echo "$(hostname): already running; stop it first" >&2; exit 1; }}
{own}{exports(environment(accelerator))}nohup setsid {shown(command)} >>../log 2>&1 </dev/null &
echo $! >../pid
'''


def logs_script(lines: int) -> str:
    return f'tail -n {lines} dalle_jax/log | sed "s/^/$(hostname): /"\n'


def remote(options, scripts: Sequence[str]) -> list[list[str]]:
    """Commands that run the scripts, one for each host, or one for the whole pod."""
    if options.hosts:
        return [['ssh', '-o', 'BatchMode=yes', *options.option, host, script]
                for host, script in zip(options.hosts, scripts)]
    return [['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', options.pod, f'--zone={options.zone}',
             '--worker=all', *options.option, f'--command={scripts[0]}']]


def copies(options, archive: str) -> list[list[str]]:
    """Commands that copy the archive to the home directory of every host."""
    if options.hosts:
        return [['scp', '-q', '-o', 'BatchMode=yes', *options.option, archive, f'{host}:{ARCHIVE}']
                for host in options.hosts]
    return [['gcloud', 'compute', 'tpus', 'tpu-vm', 'scp', archive, f'{options.pod}:{ARCHIVE}',
             f'--zone={options.zone}', '--worker=all', *options.option]]


def stages(options, training: Sequence[str], workdir: str | None) -> list[list[list[str]]]:
    """What a verb does: stages one after the other, of commands that run at once."""
    count = len(options.hosts) if options.hosts else 1
    if options.verb == 'setup':
        archive = str(Path(tempfile.gettempdir(), f'{os.getuid()}_{ARCHIVE}'))
        pack = ['git', '-C', str(ROOT), 'archive', '--format=tar.gz', f'--output={archive}', 'HEAD']
        script = setup_script(options.accelerator, options.python)
        return [[pack], copies(options, archive), remote(options, [script] * count)]
    if options.verb == 'run':
        places = ['auto']
        if options.hosts:
            first = options.hosts[0].split('@')[-1]
            places = [f'{first}:{options.port},{count},{i}' for i in range(count)]
        return [remote(options, [run_script(training, workdir, place, options.accelerator,
                                            options.env, options.restarts) for place in places])]
    script = STOP if options.verb == 'stop' else logs_script(options.lines)
    return [remote(options, [script] * count)]


def execute(commands: Sequence[Sequence[str]]) -> int:
    """Runs commands at once; returns the highest of their exit codes."""
    running = [subprocess.Popen(command, stdin=subprocess.DEVNULL) for command in commands]
    codes = [process.wait() for process in running]
    for command, code in zip(commands, codes):
        if code:
            say(f'code {code} from {shown(command).splitlines()[0]} ...')
    return max(abs(code) for code in codes)


def _hosts(text):
    hosts = text.split(',')
    if not all(hosts) or any(set(host) & set(' \t:') or host[0] == '-' for host in hosts):
        raise argparse.ArgumentTypeError(f'{text!r}; give names separated by commas, such as a,b,c')
    if len(set(hosts)) < len(hosts):
        raise argparse.ArgumentTypeError(f'{text!r} names a host twice')
    return hosts


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m launch.tpu',
        usage='%(prog)s {setup,run,stop,logs} (POD --zone ZONE | --hosts a,b,c) [options] '
              '[-- ARGUMENTS OF dalle_jax.train]',
        description='Trains on the hosts of a TPU pod, or on any hosts that ssh reaches.')
    parser.add_argument('verb', choices=('setup', 'run', 'stop', 'logs'))
    parser.add_argument('pod', nargs='?', help='name of the TPU VM')
    parser.add_argument('--zone', help='of the TPU VM')
    parser.add_argument('--hosts', type=_hosts, metavar='a,b,c', help='hosts for plain ssh')
    parser.add_argument('--port', type=arguments.count(1), default=PORT,
                        help=f'of the coordinator, on the first of --hosts (default {PORT})')
    parser.add_argument('--accelerator', choices=('tpu', 'cuda'), default='tpu')
    parser.add_argument('--env', type=arguments.variable, action='append', default=[],
                        metavar='NAME=VALUE', help='for the ranks; may be given several times')
    parser.add_argument('--python', default='python3', help='Python 3.11 or newer on the hosts')
    parser.add_argument('--restarts', type=arguments.count(0), default=3, metavar='N',
                        help='restarts in a row without a new checkpoint (default 3)')
    parser.add_argument('--lines', type=arguments.count(1), default=20, help='of each log')
    parser.add_argument('--option', action='append', default=[],
                        help='an option of gcloud, or of ssh and scp, such as '
                             '--option=--internal-ip; may be given several times')
    parser.add_argument('--dry-run', action='store_true', help='print the commands, run nothing')
    options, training = arguments.split(parser, argv)
    if bool(options.pod) == bool(options.hosts):
        parser.error('name a POD, or --hosts, and not both')
    if options.pod and not options.zone:
        parser.error(f'no --zone of {options.pod}')
    workdir = None
    if options.verb == 'run':
        workdir = arguments.check_training(parser, training, shared=True)
    elif training:
        parser.error(f'{options.verb} takes no arguments of the training')
    todo = stages(options, training, workdir)
    if options.dry_run:
        print('\n'.join(shown(command) for commands in todo for command in commands))
        return 0
    program, remedy = (('ssh', 'install an OpenSSH client') if options.hosts else
                       ('gcloud', 'install the Google Cloud CLI and run gcloud auth login'))
    arguments.require(parser, program, remedy)
    for commands in todo:
        if code := execute(commands):
            return code
    return 0


if __name__ == '__main__':
    sys.exit(main())
