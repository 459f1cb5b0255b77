"""Several processes that train together: how they meet, agree, and stop.

Each process runs the same command. It has its own devices and its own rows of every batch; all
programs run in all processes at once, so that what one of them does alone must not use the mesh.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

START_SECONDS = 300  # in which all processes must have started


class ProcessError(RuntimeError):
    """Processes cannot work together; the message says which, why, and the remedy."""


def define_flags():
    """Declares --distributed and --heartbeat."""
    from absl import flags

    return (
        flags.DEFINE_string(
            'distributed', '', "'' is a process alone. 'auto': the processes find each other (TPU "
            'pods, SLURM, Kubernetes, MPI). HOST:PORT,COUNT,INDEX: where the first of COUNT '
            'processes listens, and which this one is.'),
        flags.DEFINE_integer(
            'heartbeat', 100, 'Seconds after which a silent process is taken for dead, and all '
            'end.', lower_bound=1))


def start(spec: str, heartbeat: int = 100) -> None:
    """Joins the other processes; before jax touches a device, and after it knows how many it has.

    Args:
      spec: of the flag --distributed.
      heartbeat: seconds.

    Raises:
      ProcessError: a malformed spec, or no coordinator in START_SECONDS (another number of them is
        in the environment variable DALLE_JAX_START_SECONDS).
    """
    if not spec:
        return
    import jax

    given = {}
    if spec != 'auto':
        try:
            address, count, index = spec.split(',')
            given = dict(coordinator_address=address, num_processes=int(count),
                         process_id=int(index))
            assert ':' in address and 0 <= int(index) < int(count)
        except (ValueError, AssertionError):
            raise ProcessError(f"--distributed={spec!r}; give 'auto', or HOST:PORT,COUNT,INDEX "
                               'with INDEX below COUNT, such as 10.0.0.1:8476,4,0') from None
    seconds = int(os.environ.get('DALLE_JAX_START_SECONDS', START_SECONDS))
    if given and given['process_id']:
        _wait_for(given['coordinator_address'], seconds)
    # jax ends the process, instead of raising an error, when the time is over.
    hint = threading.Timer(0.9 * seconds, lambda: print(
        f'--distributed={spec}: not all processes have come in {0.9 * seconds:.0f} s; are all '
        'started, with the same address and count?', file=sys.stderr, flush=True))
    hint.daemon = True
    hint.start()
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=heartbeat,
                                   initialization_timeout=seconds)
    except (RuntimeError, ValueError) as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ProcessError(f'--distributed={spec}: the processes did not meet: {text}') from error
    finally:
        hint.cancel()
    logging.info('process %d of %d', jax.process_index(), jax.process_count())


def primary() -> bool:
    """Whether this process writes what is written once; a process alone is."""
    import jax

    return jax.process_index() == 0


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """What one process meets in this block, all raise at its end, instead of waiting for it.

    Nothing in the block may need the other processes.

    Raises:
      ProcessError: in the processes that had none; names those that had, and their errors.
    """
    error = None
    try:
        yield
    except Exception as found:
        error = found
    told = gather('' if error is None else f'{type(error).__name__}: {error}')
    if error is not None:
        raise error
    failed = {index: text for index, text in enumerate(told) if text}
    if failed:
        index, text = next(iter(failed.items()))
        raise ProcessError(f'{what} failed in {len(failed)} of {len(told)} processes; in process '
                           f'{index}: {text}')


def from_primary(make: Callable[[], Any]) -> Any:
    """What `make` returns in the first process, a value for JSON, in all of them."""
    from jax.experimental import multihost_utils

    with together('the first process'):
        data = json.dumps(make()).encode() if primary() else b''
    size = max(int(n) for n in gather(str(len(data))))
    padded = np.zeros(size, np.uint8)
    padded[:len(data)] = np.frombuffer(data, np.uint8)
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)))


def agree(facts: dict[str, Any]) -> None:
    """Makes sure that all processes have the same facts, values for JSON.

    Raises:
      ProcessError: in all processes; names the keys in which they differ, and the values.
    """
    told = [json.loads(text) for text in gather(json.dumps(facts))]
    for index, other in enumerate(told):
        different = [key for key in {**told[0], **other} if told[0].get(key) != other.get(key)]
        if different:
            listed = '; '.join(f'{key} is {told[0].get(key)!r} in process 0 and {other.get(key)!r} '
                               f'in process {index}' for key in different[:4])
            raise ProcessError(f'the processes do not run the same thing: {listed}. Start all with '
                               'the same command, code and packages')


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order, in all of them."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(data)], np.int32)).ravel()
    padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
    padded[:len(data)] = data
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes)]


def total(number: int) -> int:
    """Of the numbers of all processes."""
    return sum(int(text) for text in gather(str(number)))


def whole(tree: Any) -> Any:
    """numpy arrays of a tree of arrays that may be divided over the processes."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


class StopSignal:
    """A context in which signals ask for a save and a clean end.

    Of a process alone SIGTERM and SIGINT; a second one kills as usual. Of several processes
    SIGTERM, to any of them: jax passes it on, and all stop after the same step.
    """

    def __enter__(self):
        import jax

        self._requested, self._previous, self._asked = False, {}, -1
        self._alone = jax.process_count() == 1
        if self._alone and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number, frame):
        del frame
        self._requested = True
        signal.signal(number, self._previous[number])

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def after(self, step: int) -> bool:
        """Whether to stop after this step. To be called in all processes, with steps that rise."""
        if self._alone:
            return self._requested
        from jax.experimental import multihost_utils

        # jax answers for one number only, one above the largest asked so far, which a step that
        # follows a restored one, or several at once, may have passed.
        numbers = range(self._asked + 1, step + 1)
        self._asked = step
        return any([multihost_utils.reached_preemption_sync_point(n) for n in numbers])


def _wait_for(address, seconds):
    """Until something listens there."""
    host, _, port = address.rpartition(':')
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ProcessError(
                    f'no coordinator at {address} in {seconds} s ({error}): is process 0 started, '
                    'is the address right, and is the port open?') from error
            time.sleep(0.2)
