"""What the launchers share: arguments on both sides of '--', the command of a rank, messages."""

import argparse
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence


def say(text: str) -> None:
    print(f'launch: {text}', file=sys.stderr, flush=True)


def count(least: int) -> Callable[[str], int]:
    """argparse type: an integer of at least `least`."""
    def parse(text):
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f'{value} is less than {least}')
        return value
    parse.__name__ = 'integer'  # argparse: invalid integer value
    return parse


def pair(text: str) -> tuple[str, str]:
    """argparse type: KEY=VALUE."""
    key, equals, value = text.partition('=')
    if not key or not equals:
        raise argparse.ArgumentTypeError(f'{text!r} is not KEY=VALUE')
    return key, value


def variable(text: str) -> tuple[str, str]:
    """argparse type: NAME=VALUE of the environment."""
    name, value = pair(text)
    if not name.isidentifier():
        raise argparse.ArgumentTypeError(f'{name!r} is no name of a variable')
    return name, value


def split(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
          ) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's own options, which stand before the first '--', and what stands after it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index('--') if '--' in argv else len(argv)
    return parser.parse_args(argv[:cut]), argv[cut + 1:]


def flag(training: Sequence[str], name: str) -> str | None:
    """Value of a flag of the training, '--name=value' or '--name value'; the last one counts."""
    value = None
    for word, following in zip(training, [*training[1:], None]):
        head, equals, tail = word.partition('=')
        if head in (f'--{name}', f'-{name}'):
            value = tail if equals else following
    return value


def check_training(parser: argparse.ArgumentParser, training: Sequence[str],
                   shared: bool = False) -> str:
    """Refuses arguments of the training that cannot work; returns its workdir.

    Args:
      shared: hosts of a pod read the directory under the same name: it has to be absolute.
    """
    if not training:
        parser.error('no arguments of the training; give them after --, such as '
                     '-- --config experiments/dalle.py:scenes --workdir DIR')
    for name in ('config', 'workdir'):
        if not flag(training, name):
            parser.error(f'the arguments of the training lack --{name}')
    if flag(training, 'distributed') is not None:
        parser.error('--distributed is given by the launcher; leave it out')
    workdir = flag(training, 'workdir')
    if shared and not workdir.startswith('/'):
        parser.error(f'--workdir {workdir!r} is not absolute; name a directory on a file system '
                     'that all hosts share (mount a bucket to use it)')
    return workdir


def train(training: Sequence[str], distributed: str | None, python: str = 'python') -> list[str]:
    """Command line of one rank; `distributed` as in dalle_jax.train, None: a single process."""
    extra = [] if distributed is None else [f'--distributed={distributed}']
    return [python, '-m', 'dalle_jax.train', *training, *extra]


def supervised(command: Sequence[str], workdir: str, restarts: int, python: str = 'python'
               ) -> list[str]:
    """Command line of a rank, or of all of them, under launch.supervise."""
    return [python, '-m', 'launch.supervise', f'--workdir={workdir}', f'--restarts={restarts}',
            '--', *command]


def require(parser: argparse.ArgumentParser, program: str, remedy: str) -> None:
    """Ends with an error that names the remedy where a program is not installed."""
    if shutil.which(program) is None:
        parser.error(f'{program} is not installed here: {remedy}, or print what would be done with '
                     '--dry-run')


def shown(command: Sequence[str]) -> str:
    """The command as a line that a shell reads back word for word."""
    return shlex.join(command)
