"""Compares runs on one page: python -m dalle_jax.compare RUN RUN ... --out compare.html

Final values side by side with the losses relative to those of the first run, the keys in which the
experiments differ, and the curves of all runs in common figures. Runs may be in progress, and of
any length.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags

from dalle_jax import config as config_lib
from dalle_jax import plots, report, runs
from dalle_jax.runs import say

TAIL = 0.1  # the final training loss is the mean over this last part of a run's steps


class Logged(NamedTuple):
    """What a run has logged so far.

    Attributes:
      name: the end of its path, which no other run of the page has.
      lines: kind -> metric -> (steps, values), float64 in order of steps.
    """

    name: str
    experiment: config_lib.Experiment
    lines: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]

    def line(self, kind: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values; empty where the run does not log this."""
        return self.lines.get(kind, {}).get(metric, (np.zeros(0), np.zeros(0)))


def run(paths: Sequence[str | Path], out: str | Path) -> None:
    """Writes the page.

    Args:
      paths: directories of runs; the first is the one that the others are compared with.
      out: the HTML file, which is replaced.

    Raises:
      ValueError: not two to six runs, one of them twice, or `out` is a directory. RunError: a
        directory is no run or has not logged a step. All before anything is written.
    """
    paths, out = [Path(os.path.abspath(path)) for path in paths], Path(out)
    if not 2 <= len(paths) <= plots.COLOURS:
        raise ValueError(f'runs to compare: {len(paths)}; name the directories of 2 to '
                         f'{plots.COLOURS}, as many as a figure has colours')
    for i, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:i]]:
            raise ValueError(f'{path} is given twice; name every run once')
    if out.is_dir():
        raise ValueError(f'--out={out} is a directory; name the file the page is written to')
    html = page([_read(path, name) for path, name in zip(paths, runs.distinct_names(paths))])
    out.parent.mkdir(parents=True, exist_ok=True)
    report.write(out, html)
    say(f'wrote {out}')


def _read(path, name):
    experiment = runs.read_config(path)
    records = report.read_metrics(path / 'metrics.jsonl')
    # A resumed run repeats steps, and the later record counts.
    records = {(r['step'], str(r.get('kind', 'train'))): r for r in records}
    found = {}
    for (step, kind), record in sorted(records.items()):
        for metric, value in record.items():
            if isinstance(value, (int, float, type(None))):
                line = found.setdefault(kind, {}).setdefault(metric, [])
                line.append((step, np.nan if value is None else value))
    if 'train' not in found:
        raise runs.RunError(f'{path} has not logged a step yet; wait until it has done '
                            f'loop.log_every={experiment.loop.log_every} steps, or leave it out')
    return Logged(name, experiment, {kind: {
        metric: tuple(np.array(line, np.float64).T) for metric, line in lines.items()}
        for kind, lines in found.items()})


def page(found: Sequence[Logged]) -> str:
    """The page of two or more runs; the first is the one that the others are compared with."""
    others = ', '.join(one.name for one in found[1:])
    in_both = [metric for one in found for metric in one.lines['train']
               if metric in one.lines.get('valid', {})]
    terms = [metric for metric in dict.fromkeys(in_both) if metric not in ('loss', 'step', 'time')]
    blocks = [_final_values(found, terms), _differences(found)]
    for title, metrics, kinds in (
            ('Loss', ['loss'], ['train', 'valid']),
            ('Its terms and other metrics', terms, ['train', 'valid']),
            ('Stability and speed', ['gradient_norm', 'skipped', 'tokens_per_second'], ['train'])):
        charts = [_chart(found, metric, kind) for metric in metrics for kind in kinds
                  if any(len(one.line(kind, metric)[0]) for one in found)]
        blocks += [report.section(title, '', *charts)] * bool(charts)
    return report.page('Comparison of runs', f'{others} against {found[0].name}', blocks)


def _chart(found, metric, kind):
    # A run without the metric keeps its place, so that each has its colour in all figures.
    lines = {one.name: one.line(kind, metric) for one in found}
    values = np.concatenate([values[np.isfinite(values)] for _, values in lines.values()])
    log = len(values) > 0 and 0 < report.LOG_RANGE * values.min() < values.max()
    return plots.curves(lines, f'{metric}, {kind}', log=log)


def _final_values(found, terms):
    """A table with a row for each metric and a column for each run."""
    first, *others = [one.name for one in found]
    steps = [one.line('train', 'step')[0].max() for one in found]
    rows = [['steps done', *steps],
            ['steps planned', *(one.experiment.loop.steps for one in found)],
            ['hours', *(_last(one.line('train', 'time'), 1 / 3600) for one in found)]]
    for what, kind, final in (('training loss', 'train', _tail),
                              ('validation loss', 'valid', _last)):
        losses = [final(one.line(kind, 'loss')) for one in found]
        changes = [change(loss, losses[0]) for loss in losses[1:]]
        rows += [[what, *losses], [f'{what}, against {first}', None, *changes]]
    rows += [[f'{metric}, valid', *(_last(one.line('valid', metric)) for one in found)]
             for metric in terms]
    rows += [['gradient norm', *(_tail(one.line('train', 'gradient_norm')) for one in found)],
             ['steps skipped', *(_share(one.line('train', 'skipped')) for one in found)],
             ['tokens/s', *(_median(one.line('train', 'tokens_per_second')) for one in found)]]
    rows = [row for row in rows if any(value is not None for value in row[1:])]
    text = (f'Training loss and gradient norm: means over the last {TAIL:.0%} of the steps; '
            'tokens/s: the median; steps skipped: of all; otherwise the last value.')
    if len(set(steps)) > 1:
        text += ' The runs have done different numbers of steps.'
    return report.section('Final values', text, report.table(rows, ['', first, *others]))


def _last(line, scale=1.0):
    return line[1][-1] * scale if len(line[1]) else None


def _tail(line):
    """Mean of the finite values of the last steps; NaN where none of them is."""
    steps, values = line
    if not len(steps):
        return None
    values = values[steps > (1 - TAIL) * steps[-1]]
    values = values[np.isfinite(values)]
    return values.mean() if len(values) else np.nan


def _median(line):
    values = line[1][np.isfinite(line[1])]
    return np.median(values) if len(values) else None


def _share(line):
    """Of steps, from the shares of windows that end at the steps of the line."""
    steps, shares = line
    if not len(steps):
        return None
    return f'{100 * np.average(shares, weights=np.diff(steps, prepend=0)):.2f} %'


def change(value: float | None, first: float | None) -> str | None:
    """'+1.50 %': the difference to `first` in relation to its size; None where there is none."""
    if value is None or first is None or not np.isfinite([value, first]).all() or first == 0:
        return None
    percent = round(100 * (value - first) / abs(first), 2)
    return f'{percent + 0.0:+.2f} %'  # adding 0 makes -0 a 0


def _differences(found):
    """A table with a row for each key that is not the same in all experiments."""
    first, *others = found
    changed = [config_lib.differences(first.experiment, one.experiment) for one in others]
    rows = []
    for key in sorted(set().union(*changed)):
        old = next(differences[key][0] for differences in changed if key in differences)
        values = [old, *(differences.get(key, (old, old))[1] for differences in changed)]
        rows.append([key, *map(_text, values)])
    if not rows:
        return report.section('What differs', 'The experiments are the same in every key.')
    header = ['key', *(one.name for one in found)]
    return report.section('What differs', 'The keys in which the experiments are not the same.',
                          report.table(rows, header))


def _text(value):
    """Exact, unlike a measured number; a key that an experiment does not have stays blank."""
    return value if value is None or isinstance(value, str) and value else json.dumps(value)


def main(argv):
    run(argv[1:], FLAGS.out)


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    flags.DEFINE_string('out', None, 'HTML file that the page is written to.', required=True)
    runs.start(main)
