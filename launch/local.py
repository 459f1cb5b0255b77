"""Trains with several processes on this machine, restarted together when one dies.

    python -m launch.local --processes 2 --devices 4 -- \\
        --config experiments/dalle.py:scenes --workdir runs/dalle

To try on CPUs what a pod does: --devices splits each process's CPU into that many devices. With one
process and no --devices it is a training on all accelerators of this machine that restarts itself.
Rank 0 prints to the console, rank I to WORKDIR/logs/rank_I.log.
"""

import argparse
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import arguments, supervise


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(('localhost', 0))
        return sock.getsockname()[1]


def commands(training: Sequence[str], processes: int, devices: int | None, port: int,
             python: str = sys.executable) -> list[list[str]]:
    """Command line of each rank."""
    split = [] if devices is None else [f'--config.cpu_devices={devices}']
    return [arguments.train([*training, *split], None if processes == 1 else
                            f'localhost:{port},{processes},{rank}', python)
            for rank in range(processes)]


def log_file(workdir: str, rank: int) -> Path | None:
    """Where a rank prints; None: to the console."""
    return Path(workdir, 'logs', f'rank_{rank}.log') if rank else None


def start(training, workdir, processes, devices):
    """Starts all ranks; a port for each start, as the last one may still be taken."""
    ranks = []
    if processes > 1:
        log_file(workdir, 1).parent.mkdir(parents=True, exist_ok=True)
    for rank, command in enumerate(commands(training, processes, devices, free_port())):
        path = log_file(workdir, rank)
        if path is None:
            ranks.append(supervise.spawn(command, _environment(devices)))
            continue
        with path.open('a') as output:
            ranks.append(supervise.spawn(command, _environment(devices), output))
    return ranks


def _environment(devices):
    cpu = {} if devices is None else {'JAX_PLATFORMS': 'cpu'}
    return os.environ | {'PYTHONUNBUFFERED': '1'} | cpu


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m launch.local', usage='%(prog)s [options] -- ARGUMENTS OF dalle_jax.train',
        description='Trains with several processes on this machine.')
    parser.add_argument('--processes', type=arguments.count(1), default=1, metavar='N',
                        help='ranks (default 1)')
    parser.add_argument('--devices', type=arguments.count(1), metavar='M',
                        help='CPU devices of each rank; without it the devices of this machine')
    parser.add_argument('--restarts', type=arguments.count(0), default=3, metavar='N',
                        help='restarts in a row without a new checkpoint (default 3)')
    parser.add_argument('--dry-run', action='store_true', help='print the commands, run nothing')
    options, training = arguments.split(parser, argv)
    workdir = arguments.check_training(parser, training)
    if options.processes > 1 and options.devices is None:
        parser.error(f'{options.processes} processes cannot share accelerators; give --devices for '
                     'CPUs, or one process, which uses all accelerators of this machine')
    if options.dry_run:
        for rank, command in enumerate(commands(training, options.processes, options.devices,
                                                free_port())):
            path = log_file(workdir, rank)
            print(arguments.shown(command) + (f' >> {shlex.quote(str(path))} 2>&1' if path else ''))
        return 0
    return supervise.supervise(
        lambda: start(training, workdir, options.processes, options.devices), workdir,
        options.restarts)


if __name__ == '__main__':
    sys.exit(main())
