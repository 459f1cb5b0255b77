"""Runs a command and starts it again when it dies: a run continues from its newest checkpoint.

    python -m launch.supervise --workdir DIR -- COMMAND...

A rank is one process of a training. What its exit code tells, and what follows from it:

    0      finished. All ranks of this machine are 0: so is the supervisor.
    143    stopped by SIGTERM, and all ranks have saved. Nothing is started again, since a machine
           that is being taken away must be left; the supervisor ends with 143, too.
    other  died. The other ranks of this machine cannot go on without it: they get SIGTERM, after a
           moment SIGKILL, and then all are started again.

Restarts go on for ever as long as new checkpoints come (the newest directory
DIR/checkpoints/STEP). --restarts in a row without one give up with the code of the rank that died
first. SIGTERM, SIGINT and SIGHUP to the supervisor reach every rank as exactly one SIGTERM.

On a pod every host runs its own supervisor around its own rank, and they need not talk to each
other. When a rank dies anywhere, jax ends all others within the heartbeat (code 134), so that every
supervisor sees a death; every one starts its rank again, and the ranks meet where they met the
first time: jax.distributed.initialize waits for all of them at the coordinator, and all restore the
same newest checkpoint. A rank that comes back before the others have died is refused by the old
coordinator, which ends those others at once; it tries again, or dies and is started again after a
pause that grows. In the same way a SIGTERM to one rank makes all of them save and end with 143,
and no supervisor starts anything.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launch import arguments
from launch.arguments import say

STOPPED = 128 + signal.SIGTERM
SAVING = 300.0   # seconds that ranks have to save and end after a SIGTERM
DYING = 10.0     # seconds for the same where one is dead: without it the others cannot save
PAUSE = 5.0      # seconds before the first restart; doubles with each in a row
LONGEST_PAUSE = 60.0
POLL = 0.05


def spawn(command: Sequence[str], env: Mapping[str, str] | None = None, output=None
          ) -> subprocess.Popen:
    """Starts a rank in a session of its own.

    A Ctrl-C, or a scheduler that signals a process group, then reaches the supervisor alone; the
    rank would take the second of two signals as a wish to die without saving.
    """
    return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=output,
                            stderr=subprocess.STDOUT if output else None,
                            start_new_session=True)


def newest_checkpoint(workdir: str | Path | None) -> int:
    """Step of the newest checkpoint, -1 if there is none."""
    directory = Path(workdir, 'checkpoints') if workdir else None
    if directory is None or not directory.is_dir():
        return -1
    return max((int(p.name) for p in directory.iterdir() if p.name.isdigit()), default=-1)


def supervise(start: Callable[[], list[subprocess.Popen]], workdir: str | Path | None = None,
              restarts: int = 3, grace: float = SAVING, pause: float = PAUSE) -> int:
    """Runs a group of ranks until all are finished, stopped, or beyond help; see above.

    Args:
      start: starts all ranks (`spawn`); called for each start anew.
      workdir: directory of the run, whose checkpoints show progress; None: nothing does.
      restarts: how many in a row, without a new checkpoint, are allowed.
      grace: seconds from SIGTERM to SIGKILL.
      pause: seconds before the first restart.

    Returns:
      the exit code for the supervisor.
    """
    seen, count = newest_checkpoint(workdir), 0
    with _Stop() as stop:
        while True:
            code = _run(start(), stop, grace)
            if code == 0 or stop.requested:  # by us, or by a rank that ended with 143
                return code
            step = newest_checkpoint(workdir)
            if step > seen:
                seen, count = step, 0
            if count == restarts:
                say(f'gives up: {restarts} restart(s) in a row without a new checkpoint'
                    + (f' in {workdir}/checkpoints' if workdir else '')
                    + '; what the rank that died first printed tells why')
                return code
            seconds = min(pause * 2 ** count, LONGEST_PAUSE)
            count += 1
            say(f'restart {count} of {restarts} in {seconds:g} s, from '
                + (f'the checkpoint of step {step}' if step >= 0 else 'the beginning'))
            _sleep(seconds, stop)
            if stop.requested:
                return STOPPED


def _run(ranks, stop, grace):
    """Waits until all have ended. Returns the code of the first that died, else 143, else 0."""
    codes, died, told, deadline = [None] * len(ranks), None, False, None
    try:
        while None in codes:
            for i, rank in enumerate(ranks):
                if codes[i] is None and rank.poll() is not None:
                    codes[i] = 128 - rank.returncode if rank.returncode < 0 else rank.returncode
                    if codes[i] not in (0, STOPPED) and died is None:
                        died = codes[i]
                        say(f'{_name(i, ranks)} died with code {died}{_signal_name(died)}')
            now = time.monotonic()
            if stop.requested and not told:
                say(f'stops: all ranks have {grace:g} s to save and end')
            if (stop.requested or died is not None) and not told:
                told, deadline = True, now + (grace if died is None else min(grace, DYING))
                _send(ranks, signal.SIGTERM)
            elif STOPPED in codes and deadline is None:
                # A SIGTERM reached one rank. The others save and end without one, and a second
                # would kill a rank that is saving; but whatever they do, no restart follows.
                stop.requested, told, deadline = True, True, now + grace
            alive = [_name(i, ranks) for i, code in enumerate(codes) if code is None]
            if alive and (stop.urgent or (deadline is not None and now > deadline)):
                say(f'kills {", ".join(alive)}')
                _kill(ranks)
                deadline, stop.urgent = float('inf'), False
            if alive:
                time.sleep(POLL)
    finally:
        _kill(ranks)  # and whatever a rank has left behind
    return died if died is not None else max(codes)


def _name(i, ranks):
    return f'rank {i}' if len(ranks) > 1 else 'the rank'  # which one of the pod is not known here


def _send(ranks, number):
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def _kill(ranks):
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(rank.pid, signal.SIGKILL)


def _signal_name(code):
    with contextlib.suppress(ValueError):
        return f' ({signal.Signals(code - 128).name})'
    return ''


def _sleep(seconds, stop):
    end = time.monotonic() + seconds
    while not stop.requested and time.monotonic() < end:
        time.sleep(min(POLL, seconds))


class _Stop:
    """Whether this process was asked to end; `urgent` after a second Ctrl-C."""

    def __enter__(self):
        self.requested = self.urgent = False
        self._previous = {}
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number, frame):
        del frame
        self.urgent = self.requested and number == signal.SIGINT
        self.requested = True

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m launch.supervise', usage='%(prog)s [options] -- COMMAND...',
        description='Runs a command and starts it again when it dies.')
    parser.add_argument('--workdir', help='directory of the run, whose checkpoints show progress')
    parser.add_argument('--restarts', type=arguments.count(0), default=3, metavar='N',
                        help='restarts in a row without a new checkpoint (default 3)')
    parser.add_argument('--grace', type=float, default=SAVING, metavar='SECONDS',
                        help=f'from SIGTERM to SIGKILL (default {SAVING:g})')
    options, command = arguments.split(parser, argv)
    if not command or shutil.which(command[0]) is None:
        parser.error(f'no program {command[0]!r}' if command else 'no command; give it after --')
    return supervise(lambda: [spawn(command)], options.workdir, options.restarts, options.grace)


if __name__ == '__main__':
    sys.exit(main())
