"""Measures ways of doing the same beside each other, and beside what the machine can do.

A figure of speed is a ratio: to another way of computing the same, or to the machine's own rates of
matrix products and copies. All that is compared runs in turns in one process.
"""

import functools
import logging
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from dalle_jax import machine


class Case(NamedTuple):
    """One way of doing something.

    Attributes:
      kind: its name, beside the others of its group.
      lower: traces it -> jax.stages.Lowered.
      run: does it once with what has been compiled -> arrays to wait for.
      items: examples or images of a run.
      flops: model FLOPs of a run; 0 where they are not counted.
      bytes: that a run must at least read and write; 0 where they are not counted.
      tokens: of an item; 0 where there are none.
      runs: how many runs make up the whole, of which one is measured.
      extra: more keys of its JSON object.
      check: looks at results: what has been compiled -> more keys of the JSON object.
    """

    kind: str
    lower: Callable[[], Any]
    run: Callable[[Any], Any]
    items: int
    flops: int = 0
    bytes: float = 0
    tokens: int = 0
    runs: int = 1
    extra: Mapping[str, Any] = {}
    check: Callable[[Any], Mapping[str, Any]] = lambda compiled: {}


def measure(cases: Sequence[Case], dtype: Any, repeats: int, common: Mapping[str, Any],
            clock: Callable[[], float] = time.perf_counter) -> list[dict[str, Any]]:
    """Compiles the cases and times them and the machine's rates in turns.

    Args:
      dtype: of the machine's matrix products.
      common: keys that every JSON object gets.
      clock: seconds.

    Returns:
      a JSON object for each case, and one each of kind 'matmul' and 'copy':
        kind; seconds_median of the whole, which for 'extrapolated' is several runs; items_per_s,
          tokens_per_s; seconds of each repeat of a run;
        peak_bytes: arguments, results and temporaries of the program; process_peak_bytes and
          device_peak_bytes: the most that was held until its first run, by anything since the
          process began, so that they speak of the first case of a process;
        speedup_over: kind of another case -> its median divided by this one's;
        model_tflops, and as a share of the matrix products: of_matmul_rate;
        roofline_fraction: the share of the time that copying `bytes` would take;
        error, instead of times, where the memory that is free does not suffice, or what was
          raised: 'failed' is true, and the other cases are measured all the same.
    """
    facts, runs = {}, {}
    for case in cases:
        facts[case.kind] = found = dict(case.extra)
        try:
            run = _prepare(case, found)
        except Exception as error:  # whatever a compiler or a driver may raise
            logging.exception('%s is not measured', case.kind)
            found |= {'error': f'{type(error).__name__}: {str(error)[:1000]}', 'failed': True}
        else:
            if run:
                runs[case.kind] = run
    matmul, copy = machine.matmul(dtype), machine.copy()
    seconds = dict(zip((*runs, 'matmul', 'copy'), machine.timed(
        [*runs.values(), matmul.run, copy.run], repeats, clock)))
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    rate = {'matmul': matmul.work / median['matmul'], 'copy': copy.work / median['copy']}
    median |= {case.kind: case.runs * median[case.kind] for case in cases if case.kind in runs}

    lines = []
    for case in cases:
        line = {**common, 'kind': case.kind, 'seconds_median': None, 'items_per_s': None,
                **facts[case.kind]}
        if case.kind in runs:
            own = median[case.kind]
            line |= {'seconds_median': own, 'items_per_s': case.items / own,
                     'seconds': seconds[case.kind], 'extrapolated': case.runs > 1,
                     'speedup_over': {other: median[other] / own for other in runs
                                      if other != case.kind}}
            if case.tokens:
                line['tokens_per_s'] = case.tokens * case.items / own
            if case.flops:
                line['model_tflops'] = case.flops / own / 1e12
                line['of_matmul_rate'] = case.flops / own / (rate['matmul'] * machine.devices())
            if case.bytes:
                line['roofline_fraction'] = case.bytes / own / rate['copy']
        lines.append(line)
    for kind, probe, unit in (('matmul', matmul, 'flops_per_s'), ('copy', copy, 'bytes_per_s')):
        lines.append({**common, 'kind': kind, 'seconds_median': median[kind],
                      'items_per_s': 1 / median[kind], 'peak_bytes': probe.peak_bytes,
                      'seconds': seconds[kind], unit: rate[kind]})
    return lines


def _prepare(case, found):
    """Compiles a case, runs it once and notes its facts; the run, or None if memory is short."""
    started = time.perf_counter()
    compiled = case.lower().compile()
    found['compile_seconds'] = time.perf_counter() - started
    found['peak_bytes'], new = _program_bytes(compiled)
    free = machine.memory()
    if new > free:
        found['error'] = f'needs {new:,} more bytes of memory and {free:,} are free'
        return None
    run = functools.partial(case.run, compiled)
    jax.block_until_ready(run())
    found |= _held()
    found |= case.check(compiled)
    return run


def _program_bytes(compiled):
    """Bytes that a program needs in all, and those beside its arguments."""
    found = compiled.memory_analysis()
    new = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + new, new


def _held():
    """The most bytes that the process, and a device that tells it, have held so far."""
    unit = 1 if sys.platform == 'darwin' else 1024
    found = {'process_peak_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    stats = jax.local_devices()[0].memory_stats() or {}
    if 'peak_bytes_in_use' in stats:
        found['device_peak_bytes'] = stats['peak_bytes_in_use']
    return found


# Head of a column of the table: key of the JSON object, unit, format.
COLUMNS = {
    'seconds': ('seconds_median', 1, '.4g'), 'items/s': ('items_per_s', 1, '.4g'),
    'tokens/s': ('tokens_per_s', 1, ',.0f'), 'TFLOP/s': ('model_tflops', 1, '.4g'),
    'of matmul': ('of_matmul_rate', 1, '.3f'), 'of roofline': ('roofline_fraction', 1, '.3f'),
    'MiB': ('peak_bytes', 2**20, ',.0f'), 'compiled in s': ('compile_seconds', 1, '.1f'),
}


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """JSON objects of `measure`, with a name, as text of one line each."""
    rows = [('', *COLUMNS, 'times as fast as')]
    for line in lines:
        cells = [format(line[key] / unit, form) if line.get(key) is not None else ''
                 for key, unit, form in COLUMNS.values()]
        ratios = [f'{kind} {ratio:.2f}' for kind, ratio in line.get('speedup_over', {}).items()]
        for kind, unit in (('flops_per_s', 'TFLOP/s'), ('bytes_per_s', 'TB/s')):
            ratios += [f'({line[kind] / 1e12:.4g} {unit})'] if kind in line else []
        rows.append((f"{line['name']} {line['kind']}", *cells,
                     line.get('error', '').partition('\n')[0] or ', '.join(ratios)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join(
        cell.ljust(width) if i in (0, len(COLUMNS) + 1) else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows)
