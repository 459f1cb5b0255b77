"""Submits a training to SLURM: a script, printed with --dry-run, otherwise given to sbatch.

    python -m launch.slurm --nodes 4 --time 24:00:00 --sbatch=--partition=PARTITION -- \\
        --config experiments/dalle.py:1.4b,path=DIR --workdir /shared/runs/dalle

One task for each GPU: that is what jax's detection of SLURM assumes (task i of a node takes GPU i
of the node). Hence --gpus-per-node and no --gpus-per-task, which would hide the others' GPUs and
with them the numbers that jax goes by.

When a rank dies, srun ends all others, and launch.supervise starts srun again in the same
allocation. Before the time limit SLURM sends SIGTERM to the ranks and not to this script: they save
and end with 143, and the job goes back to the queue, at most --requeues times (SLURM counts them).
A SIGTERM to srun itself would kill the ranks without saving.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import arguments
from launch.arguments import say, shown
from launch.environment import environment, exports

SAVING = 120  # seconds before the time limit at which the ranks begin to save


def script(training: Sequence[str], workdir: str, nodes: int, gpus: int, time: str, name: str,
           cpus: int | None = None, restarts: int = 3, requeues: int = 100,
           extra: Sequence[str] = (), python: str = sys.executable) -> str:
    """The sbatch script.

    Args:
      gpus: of each node; 0: one rank a node, on its CPU.
      time: limit in SLURM's notation.
      cpus: of each rank; None: what the cluster gives.
      extra: options of sbatch.
    """
    header = [f'--job-name={name}', f'--nodes={nodes}', f'--ntasks-per-node={max(gpus, 1)}',
              *([f'--gpus-per-node={gpus}'] if gpus else []),
              *([f'--cpus-per-task={cpus}'] if cpus else []),
              f'--time={time}', f'--signal=TERM@{SAVING}', '--requeue', '--open-mode=append',
              f'--output={log_directory(workdir)}/slurm_%j.log', *extra]
    # srun does not take --cpus-per-task from the job.
    srun = ['srun', '--kill-on-bad-exit=1', *([f'--cpus-per-task={cpus}'] if cpus else []),
            *arguments.train(training, 'auto', python)]
    options = ''.join(f'#SBATCH {shown([option])}\n' for option in header)
    return f'''#!/bin/bash
{options}
{exports(environment('cuda' if gpus else 'cpu'))}
echo "launch: job $SLURM_JOB_ID, requeued ${{SLURM_RESTART_COUNT:-0}} times, on $SLURM_JOB_NODELIST"
{shown(arguments.supervised(srun, workdir, restarts, python))}
code=$?
if [ "$code" -eq 143 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {requeues} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
'''


def log_directory(workdir: str) -> Path:
    return Path(workdir, 'logs')


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m launch.slurm', usage='%(prog)s [options] -- ARGUMENTS OF dalle_jax.train',
        description='Submits a training to SLURM.')
    parser.add_argument('--nodes', type=arguments.count(1), required=True, metavar='N')
    parser.add_argument('--gpus-per-node', type=arguments.count(0), default=8, metavar='N',
                        help='ranks of each node (default 8); 0: one rank on its CPU')
    parser.add_argument('--cpus-per-task', type=arguments.count(1), metavar='N',
                        help='CPUs of each rank')
    parser.add_argument('--time', required=True, help='limit of one session, such as 24:00:00')
    parser.add_argument('--name', default='dalle_jax', help='of the job')
    parser.add_argument('--restarts', type=arguments.count(0), default=3, metavar='N',
                        help='restarts in a row without a new checkpoint (default 3)')
    parser.add_argument('--requeues', type=arguments.count(0), default=100, metavar='N',
                        help='sessions after the first (default 100)')
    parser.add_argument('--sbatch', action='append', default=[], metavar='OPTION',
                        help='an option of sbatch, such as --sbatch=--partition=NAME; may be given '
                             'several times')
    parser.add_argument('--python', default=sys.executable,
                        help='Python on the nodes (default: this one)')
    parser.add_argument('--dry-run', action='store_true', help='print the script, submit nothing')
    options, training = arguments.split(parser, argv)
    workdir = arguments.check_training(parser, training)
    text = script(training, workdir, options.nodes, options.gpus_per_node, options.time,
                  options.name, options.cpus_per_task, options.restarts, options.requeues,
                  options.sbatch, options.python)
    if options.dry_run:
        print(text, end='')
        return 0
    arguments.require(parser, 'sbatch', 'submit from a login node of the cluster')
    log_directory(workdir).mkdir(parents=True, exist_ok=True)  # sbatch does not
    say(f'output in {log_directory(workdir)}')
    return subprocess.run(['sbatch'], input=text, text=True).returncode


if __name__ == '__main__':
    sys.exit(main())
