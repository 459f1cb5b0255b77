"""What this machine can do, measured: matrix products, copies, free memory.

Figures of speed are worth something only beside these, measured in the same process on the same
arrays' type: `timed` runs all that is compared in turns.
"""

import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LONG_ENOUGH = 0.05  # seconds: shorter runs are called several times within one timing
MOST_CALLS = 16  # of them, as on accelerators the results of all exist until the last is done


class Probe(NamedTuple):
    """A piece of work that only the machine limits.

    Attributes:
      run: starts it and returns the array to wait for.
      work: FLOPs or bytes of one run.
      peak_bytes: of the arrays it needs.
    """

    run: Callable[[], jax.Array]
    work: int
    peak_bytes: int


def describe() -> str:
    """The accelerator's name and how many there are; of a CPU its model and cores."""
    device = jax.devices()[0]
    if device.platform != 'cpu':
        return f'{jax.device_count()} x {device.device_kind}'
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    models = [line.partition(':')[2].strip() for line in _lines(Path('/proc/cpuinfo'))
              if line.startswith('model name')]
    return f'{cores} x {models[0] if models else device.device_kind}'


def compute_dtype(precision: str) -> Any:
    """The dtype of matrix products: 'auto' is bfloat16 on TPU and GPU and float32 on CPU."""
    if precision == 'auto':
        precision = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
    return jnp.dtype(precision)


def timed(runs: Sequence[Callable[[], Any]], repeats: int,
          clock: Callable[[], float] = time.perf_counter) -> list[list[float]]:
    """Seconds of each run, `repeats` of them, in turns: one of each, then one of each again.

    So what else the machine does in the meantime falls on all alike, and medians compare. Every
    run is called once or twice before.

    Args:
      runs: functions that start work and return the arrays to wait for.
      clock: seconds.
    """
    calls = [_calls(run, clock) for run in runs]
    rounds = [[_seconds(run, count, clock) for run, count in zip(runs, calls)]
              for _ in range(repeats)]
    return [list(seconds) for seconds in zip(*rounds)]


def _calls(run, clock):
    """How many calls make one timing. Warms up."""
    if _seconds(run, 1, clock) > 1:
        return 1
    return max(1, min(MOST_CALLS, int(LONG_ENOUGH / _seconds(run, 1, clock))))


def _seconds(run, calls, clock):
    # Accelerators work off a queue, which hides the time it takes to start each call.
    queued, start = jax.default_backend() != 'cpu', clock()
    for call in range(calls):
        result = run()
        if not queued or call == calls - 1:
            jax.block_until_ready(result)
    return max(clock() - start, 1e-9) / calls


def matmul(dtype: Any, size: int | None = None) -> Probe:
    """A product of two random square matrices on one device.

    Random, as zeros are multiplied faster: they draw less power.

    Args:
      size: of a side; None: 8192, and 1536 on CPUs, where that already is the machine's rate.
    """
    size = size or (1536 if jax.default_backend() == 'cpu' else 8192)
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    product = jax.jit(jnp.matmul)
    return Probe(lambda: product(a, b), 2 * size**3, 3 * a.nbytes)


def copy(size: int | None = None) -> Probe:
    """Reads and writes an array once, in place, on one device.

    Args:
      size: float32 values; None: 256 MiB of them, and 1 GiB on accelerators.
    """
    size = size or (2**26 if jax.default_backend() == 'cpu' else 2**28)
    held = [jnp.zeros(size)]
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def run():
        held[0] = add(held[0])
        return held[0]

    return Probe(run, 2 * held[0].nbytes, held[0].nbytes)


def matmul_rate(dtype: Any, size: int | None = None, repeats: int = 3,
                clock: Callable[[], float] = time.perf_counter) -> float:
    """FLOP/s of one device in products of matrices [size, size], the median of `repeats`."""
    probe = matmul(dtype, size)
    return probe.work / statistics.median(timed([probe.run], repeats, clock)[0])


def devices() -> int:
    """How many times the rate of one device is there: the devices of a CPU share its cores."""
    return jax.process_count() if jax.default_backend() == 'cpu' else jax.device_count()


def memory(root: Path = Path('/')) -> int:
    """Bytes that are free for arrays on a device.

    On accelerators what the allocator may still give out. On CPUs what the system has available,
    or the process's control group if that leaves less; where the system does not tell, as outside
    Linux, all of its memory.

    Args:
      root: of the file system whose /proc and /sys are read.

    Raises:
      RuntimeError: an accelerator does not tell.
    """
    device = jax.local_devices()[0]
    if device.platform != 'cpu':
        stats = device.memory_stats() or {}
        if 'bytes_limit' not in stats:
            raise RuntimeError(f'{device.device_kind} does not tell how much memory is free; start '
                               'the process without XLA_PYTHON_CLIENT_ALLOCATOR=platform')
        return stats['bytes_limit'] - stats['bytes_in_use']
    available = [int(line.split()[1]) * 1024 for line in _lines(root / 'proc/meminfo')
                 if line.startswith('MemAvailable:')]
    if not available:
        available = [os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')]
    return max(0, min(available + list(_control_groups(root))))


def _control_groups(root: Path) -> Iterator[int]:
    """Bytes that each control group of this process, and each above it, leaves."""
    for line in _lines(root / 'proc/self/cgroup'):
        _, controllers, path = line.split(':', 2)
        if controllers == '':  # version 2
            base, limit, used = root / 'sys/fs/cgroup', 'memory.max', 'memory.current'
        elif 'memory' in controllers.split(','):
            base = root / 'sys/fs/cgroup/memory'
            limit, used = 'memory.limit_in_bytes', 'memory.usage_in_bytes'
        else:
            continue
        group = base / path.strip('/')
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            given = ''.join(_lines(folder / limit))
            if given.isdigit():  # not 'max', and not a group that this process cannot see
                # Files the kernel keeps in memory are given back when arrays need the room.
                files = [int(entry.split()[1]) for entry in _lines(folder / 'memory.stat')
                         if entry.split()[0] in ('inactive_file', 'total_inactive_file')]
                yield int(given) - int(_lines(folder / used)[0]) + max(files, default=0)


def _lines(path: Path) -> list[str]:
    """Lines of a file of the system, none where it does not exist."""
    return path.read_text().splitlines() if path.exists() else []


def keep_freed_memory() -> None:
    """Makes glibc keep large freed blocks, which saves a quarter of a training step on CPU.

    XLA allocates its temporaries anew in every call. By default glibc maps and unmaps each of them,
    and the kernel clears every page again. They must be allocated by one thread, the one that calls
    the program: those of other threads come from other heaps, which cannot hold them, or fragment
    the heap that they share. Has no effect once jax has touched a device.
    """
    if not sys.platform.startswith('linux'):
        return
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is not None:  # glibc; other C libraries have none
        M_TRIM_THRESHOLD, M_MMAP_MAX, never = -1, -4, -1
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, never)
        jax.config.update('jax_cpu_enable_async_dispatch', False)
