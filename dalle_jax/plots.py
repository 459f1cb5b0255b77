"""Drawings for a report: line charts, code usage, attention maps; inline SVG and PNG.

Every drawing takes numpy arrays and returns one HTML <figure>. Colours are the custom properties
(--c0, --c1, ...) of the page around it, so that its light and dark themes apply here too.
"""

import base64
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 440, 230  # of a chart, in SVG units; near the pixels it is shown at, so text fits
TOP, RIGHT, BOTTOM = 12, 8, 24
COLOURS = 6
BUCKETS = 300  # a line keeps the smallest and the largest value of each
NOISY = 200  # points; a longer line, if it is rough, is drawn faint under its running mean
HOVERS = 64  # strips of a chart that tell their values: one for each layer of the largest model
MATRIX_SIZE = 320  # pixels; a larger matrix is pooled
MATRIX_COLOUR = 47, 116, 208

STYLE = """
.chart svg, .maps svg { width: 100%; height: auto; display: block }
.chart text, .maps text { font-size: 13px; fill: var(--soft); font-variant-numeric: tabular-nums }
.chart .x, .maps text { text-anchor: middle } .chart .y, .chart .end { text-anchor: end }
.chart svg { overflow: visible } .chart line { stroke: var(--line) }
.chart path { stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round }
.chart path:not(.area) { fill: none } .chart path.area { opacity: .75 }
.chart path.raw { stroke-width: 1; opacity: .3 } .chart path.ramp { stroke-width: 1.2 }
.chart .strip { fill: var(--ink); opacity: 0 } .chart .strip:hover { opacity: .07 }
.legend { width: 100%; font-size: .8125rem; margin-top: .3rem }
.legend th { color: var(--soft); font-weight: 400; text-align: right; width: 4.6rem }
.legend td { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.legend :is(td, th):first-child { text-align: left; white-space: normal; width: auto;
  overflow-wrap: anywhere }
.legend i { display: inline-block; width: .85rem; height: 3px; border-radius: 2px;
  margin-right: .5rem; vertical-align: middle }
.maps { display: grid; gap: 20px 28px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 240px), 1fr)) }
.maps image { image-rendering: pixelated; filter: var(--lift) }
.maps rect { fill: var(--wash) } .maps line { stroke: var(--soft); stroke-dasharray: 3 3 }
.scale { display: flex; align-items: center; gap: .5rem; font-size: .8125rem; color: var(--soft);
  flex-wrap: wrap; margin-top: .8rem }
.scale i { width: 9rem; height: .6rem; border-radius: 2px; filter: var(--lift) }
path.ramp { stroke: oklch(calc(var(--from) + (var(--to) - var(--from)) * var(--t)) .15
  calc(285 + 135 * var(--t))) }
.scale i.ramp { filter: none; background: linear-gradient(90deg in oklch increasing hue,
  oklch(var(--from) .15 285), oklch(var(--to) .15 60)) }
""" + '.scale i {{ background: linear-gradient(90deg, rgb({0} / .06), rgb({0})) }}\n'.format(
    ' '.join(map(str, MATRIX_COLOUR))) + ''.join(
    f'path.s{i} {{ stroke: var(--c{i}) }} .f{i} {{ fill: var(--c{i}) }} '
    f'i.s{i} {{ background: var(--c{i}) }}\n' for i in range(COLOURS))


@dataclasses.dataclass(frozen=True)
class Axis:
    """Maps values in [low, high] to positions in [start, end], linearly or in the logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, values: np.ndarray) -> np.ndarray:
        """Positions of values; all must be positive on a logarithmic axis."""
        scale = np.log10 if self.log else np.asarray
        low, high = scale(self.low), scale(self.high)
        return self.start + (scale(values) - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Round values inside the axis with their labels: 1, 2 or 5 times a power of ten apart."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            stride = 1 + (last - first) // 6
            for digits in ('1', '125'):
                ticks = [(float(f'{digit}e{power}'), power)
                         for power in range(first, last + 1, stride) for digit in digits]
                ticks = [(v, power) for v, power in ticks if self.low <= v <= self.high]
                if len(ticks) >= 3:
                    return [(v, tick_label(v, power, v)) for v, power in ticks]
        step = (self.high - self.low) / 6
        power = math.floor(math.log10(step))
        digit, power = next(((d, power) for d in (1, 2, 5) if d * 10.0 ** power >= step),
                            (1, power + 1))
        unit = digit * 10.0 ** power
        # Through decimal text, so that a tick is the float nearest to 0.3 and not 3 * 0.1.
        values = [float(f'{k * digit}e{power}') for k in
                  range(math.ceil(self.low / unit - 1e-9), math.floor(self.high / unit + 1e-9) + 1)]
        largest = max(map(abs, values), default=0)
        return [(v, tick_label(v, power, largest)) for v in values]


def tick_label(value: float, power: int, largest: float) -> str:
    """The label of a tick that is a multiple of 10 ** power, on an axis up to `largest`."""
    if value == 0:
        return '0'
    if not 1e-3 <= largest < 1e10:
        return scientific(value)
    scale, suffix = (6, 'M') if largest >= 1e6 else (3, 'k') if largest >= 1e4 else (0, '')
    return f'{value / 10 ** scale:.{max(0, scale - power)}f}{suffix}'


def number(value: float) -> str:
    """A measured value to four digits: 12,345 / 2.312 / 0.001 / 3.1e-5."""
    value = float(value)
    if not math.isfinite(value):
        return {math.inf: '∞', -math.inf: '−∞'}.get(value, 'NaN')
    if value.is_integer() and abs(value) < 1e9 or 1e3 <= abs(value) < 1e9:
        return f'{value:,.0f}'
    if 1e-3 <= abs(value) < 1e3:
        return f'{value:.4g}'
    return scientific(value, 2)


def scientific(value: float, precision: int | None = None) -> str:
    """3.1e-5 / 2e12."""
    text = np.format_float_scientific(value, precision, trim='-', exp_digits=1)
    return text.replace('e+', 'e')


def figure(kind: str, title: str, body: str, caption: str = '') -> str:
    """A <figure>; `body` is HTML, title and caption are plain text."""
    title = f'<h3>{escape(title)}</h3>' if title else ''
    caption = f'<figcaption>{escape(caption)}</figcaption>' if caption else ''
    return f'<figure class="{kind}">{title}{body}{caption}</figure>'


def data_uri(image: Image.Image) -> str:
    """The image as a data: URI holding a PNG, losslessly."""
    buffer = io.BytesIO()
    image.save(buffer, 'PNG', optimize=True)
    return 'data:image/png;base64,' + base64.b64encode(buffer.getvalue()).decode('ascii')


def fit_axis(values: np.ndarray, start: float, end: float, log: bool = False,
             pad: float = 0.0) -> Axis:
    """An axis around finite values; from zero where the values reach down near it."""
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        half = 0.1 * abs(low) or 1.0
        low, high = (low / 2, high * 2) if log else (low - half, high + half)
    elif log:
        margin = (high / low) ** pad
        low, high = low / margin, high * margin
    else:
        margin = pad * (high - low)
        low, high = 0.0 if 0 <= low < 0.25 * high else low - margin, high + margin
    return Axis(low, high, start, end, log)


def decimate(values: np.ndarray, drawn: np.ndarray, buckets: int = BUCKETS) -> np.ndarray:
    """Indices of at most 2 * buckets + 2 of the drawn values, for a line of limited size.

    All of them, or else the first, the last, and each bucket's smallest and largest.
    """
    indices = np.flatnonzero(drawn)
    if len(indices) <= 2 * buckets:
        return indices
    kept = {0, len(indices) - 1}
    for start, end in pairwise(np.linspace(0, len(indices), buckets + 1).astype(int)):
        part = values[indices[start:end]]
        kept |= {start + int(part.argmin()), start + int(part.argmax())}
    return indices[sorted(kept)]


def running_mean(values: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a fiftieth of the points, of those that are drawn."""
    half = max(2, len(values) // 100)
    total, count = (np.concatenate([[0.0], np.cumsum(np.where(drawn, v, 0.0))])
                    for v in (values, np.ones(len(values))))
    start = np.maximum(np.arange(len(values)) - half, 0)
    end = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[end] - total[start]) / np.maximum(count[end] - count[start], 1)


def line_path(x: np.ndarray, y: np.ndarray, keep: np.ndarray, drawn: np.ndarray) -> str:
    """SVG path data through the points `keep`, broken wherever a point is not drawn."""
    missing = np.cumsum(~drawn)
    parts = []
    for run in np.split(keep, np.flatnonzero(np.diff(missing[keep])) + 1):
        # A lone point is a line to itself: its round cap shows as a dot.
        run = run if len(run) > 1 else run.repeat(2)
        parts.append('M' + 'L'.join(f'{x[i]:.1f},{y[i]:.1f}' for i in run))
    return ''.join(parts)


def frame(across: Axis, up: Axis, x: str, y: str) -> str:
    """Grid lines, tick labels and the names of both axes."""
    parts = []
    for value, label in up.ticks():
        at = f'{float(up.place(value)):.1f}'
        parts.append(f'<line x1="{across.start}" x2="{across.end}" y1="{at}" y2="{at}"/>'
                     f'<text class="y" x="{across.start - 6}" y="{at}" dy="4">{label}</text>')
    for value, label in across.ticks():
        at = float(across.place(value))
        # The axis is named at its right end, in place of a tick label that would run into it.
        if at < across.end - 7.5 * len(x) - 4 * len(label) - 8:
            parts.append(f'<text class="x" x="{at:.1f}" y="{HEIGHT - 6}">{label}</text>')
    return ''.join(parts) + (
        f'<text class="end" x="{across.end}" y="{HEIGHT - 6}">{escape(x)}</text>'
        f'<text x="{across.start + 4}" y="{TOP + 2}">{escape(y)}</text>')


def hover_strips(across: Axis, xs: np.ndarray, tell) -> str:
    """Invisible strips around at most HOVERS of the sorted xs; tell(low, x, high) -> text."""
    xs = xs[np.unique(np.linspace(0, len(xs) - 1, min(len(xs), HOVERS)).round().astype(int))]
    edges = np.concatenate([[across.low], (xs[1:] + xs[:-1]) / 2, [across.high]])
    parts = []
    for x, (low, high) in zip(xs, pairwise(edges)):
        left, right = across.place(np.array([low, high]))
        parts.append(f'<rect class="strip" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" '
                     f'height="{HEIGHT - TOP - BOTTOM}"><title>{escape(tell(low, x, high))}'
                     '</title></rect>')
    return ''.join(parts)


def svg(label: str, body: str, width: float = WIDTH, height: float = HEIGHT) -> str:
    return (f'<svg viewBox="0 0 {width:g} {height:g}" role="img" '
            f'aria-label="{escape(label)}">{body}</svg>')


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str = '',
           x: str = 'step', y: str = '', log: bool = False, ramp: bool = False) -> str:
    """A line chart with a legend that tells each line's last, smallest and largest value.

    Values that are not finite, or not positive on a logarithmic axis, leave a gap and are counted
    beneath. Rough lines of more than 200 points are drawn faint with their running mean over them.

    Args:
      series: name -> (positions [n] in ascending order, values [n]).
      title: of the chart.
      x, y: names of the axes, with their unit.
      log: whether the vertical axis is logarithmic.
      ramp: whether the lines are many and in order, such as layers: coloured by it, ends named.

    Raises:
      ValueError: positions and values of a line differ in length.
    """
    lines, hidden = {}, 0
    for name, (steps, values) in series.items():
        steps, values = np.asarray(steps, np.float64), np.asarray(values, np.float64)
        if steps.ndim != 1 or steps.shape != values.shape:
            raise ValueError(f'curve {name!r} has positions of shape {steps.shape} and values of '
                             f'shape {values.shape}; give two lists of one length')
        drawn = np.isfinite(steps) & np.isfinite(values) & (not log or values > 0)
        hidden += int((~drawn).sum())
        lines[name] = steps, values, drawn
    count = '1 value is' if hidden == 1 else f'{hidden:,} values are'
    caption = f'{count} not finite{" or not positive" if log else ""} and not drawn.' * bool(hidden)
    if not any(drawn.any() for _, _, drawn in lines.values()):
        return figure('chart', title, '<p class="empty">Nothing to draw yet.</p>', caption)

    xs, ys = (np.concatenate([line[axis][line[2]] for line in lines.values()]) for axis in (0, 1))
    up = fit_axis(ys, HEIGHT - BOTTOM, TOP, log, pad=0.06)
    left = max(32, 10 + 7.5 * max(len(label) for _, label in up.ticks()))
    across = fit_axis(xs, left, WIDTH - RIGHT)
    body, legend = frame(across, up, x, y + (', log' if log and y else '')), ''
    for i, (name, (steps, values, drawn)) in enumerate(lines.items()):
        if not drawn.any():
            continue
        colour = f's{i % COLOURS}'
        px, py = (np.full(len(values), np.nan) for _ in range(2))
        px[drawn], py[drawn] = across.place(steps[drawn]), up.place(values[drawn])
        if ramp:
            path = line_path(px, py, decimate(values, drawn, BUCKETS // 4), drawn)
            body += f'<path class="ramp" style="--t:{i / max(len(lines) - 1, 1):.3f}" d="{path}"/>'
            continue
        mean = running_mean(py, drawn)
        noisy = drawn.sum() > NOISY and np.abs(py - mean)[drawn].mean() > 1
        path = line_path(px, py, decimate(values, drawn), drawn)
        body += f'<path class="{colour}{" raw" if noisy else ""}" d="{path}"/>'
        if noisy:
            path = line_path(px, mean, decimate(mean, drawn, BUCKETS // 4), drawn)
            body += f'<path class="{colour}" d="{path}"/>'
        else:
            body += f'<circle class="f{i % COLOURS}" r="3" cx="{px[drawn][-1]:.1f}" ' \
                    f'cy="{py[drawn][-1]:.1f}"/>'
        shown = values[drawn]
        legend += (f'<tr><td><i class="{colour}"></i>{escape(name)}</td>' + ''.join(
            f'<td>{number(v)}</td>' for v in (shown[-1], shown.min(), shown.max())) + '</tr>')

    def tell(low, at, high):
        told = []
        for name, (steps, values, drawn) in lines.items():
            steps, values = steps[drawn], values[drawn]
            if len(steps):
                near = np.abs(steps - at).argmin()
                told += [(values[near], name)] * bool(low <= steps[near] <= high)
        told = [min(told), max(told)] if ramp else told  # the lowest and the highest
        return '\n'.join([f'{x} {number(at)}', *(f'{name} {number(v)}' for v, name in told)])

    body += hover_strips(across, np.unique(xs), tell)
    first, last = (f'<span>{escape(list(lines)[i])}</span>' for i in (0, -1))
    legend = f'<div class="scale">{first}<i class="ramp"></i>{last}</div>' if ramp else (
        '<table class="legend"><tr><th></th><th>last</th><th>min</th><th>max</th></tr>'
        f'{legend}</table>')
    return figure('chart', title, svg(title or ', '.join(lines), body) + legend, caption)


def histogram(counts: np.ndarray, title: str = 'Codebook use') -> str:
    """How often each code is used, most used first, on a logarithmic axis.

    Args:
      counts: [K], not negative; need not be integers.
      title: of the chart.

    Raises:
      ValueError: a count is negative or not finite.
    """
    counts = np.asarray(counts, np.float64).ravel()
    if not (np.isfinite(counts) & (counts >= 0)).all():
        raise ValueError(f'{title}: counts must be finite and not negative; the smallest is '
                         f'{counts.min()}')
    if not counts.any():
        return figure('chart', title, '<p class="empty">No code has been counted yet.</p>')
    order = np.argsort(-counts, kind='stable')
    codes, used = len(counts), int((counts > 0).sum())
    share = counts[order[:used]] / counts.sum()
    perplexity = float(np.exp(-(share * np.log(share)).sum()))
    low, high = counts[order[used - 1]], counts[order[0]]
    up = Axis(low / 1.5, max(high, 3 * low), HEIGHT - BOTTOM, TOP, log=True)
    left = max(32, 10 + 7.5 * max(len(label) for _, label in up.ticks()))
    across = Axis(0, codes, left, WIDTH - RIGHT)
    ranks = np.unique(np.linspace(0, used, min(used, BUCKETS) + 1).astype(int))
    tops, rights = up.place(counts[order[ranks[:-1]]]), across.place(ranks[1:])
    path = f'M{left},{HEIGHT - BOTTOM}' + ''.join(
        f'V{top:.1f}H{right:.1f}' for top, right in zip(tops, rights)) + f'V{HEIGHT - BOTTOM}Z'

    def tell(_, at, __):
        code = order[int(at)]
        return f'rank {int(at) + 1}: code {code}, {number(counts[code])}'

    body = (frame(across, up, 'rank of code', 'count, log') + f'<path class="area f0" d="{path}"/>'
            + hover_strips(across, np.arange(codes, dtype=float), tell))
    caption = (f'{used:,} of {codes:,} codes used ({used / codes:.1%}), '
               f'perplexity {number(perplexity)}.')
    return figure('chart', title, svg(title, body), caption)


def matrix(matrices: Mapping[str, np.ndarray], boundary: int | None = None,
           title: str = '') -> str:
    """Heat maps of attention weights, side by side, with one logarithmic colour scale.

    Zeros (masked positions) and values that are not finite stay blank. A dot of a large matrix
    shows the largest of several weights.

    Args:
      matrices: name -> weights [queries, keys], not negative.
      boundary: the first image position, where lines are drawn; None draws none.
      title: of the block.

    Raises:
      ValueError: a matrix is not two-dimensional.
    """
    weights = {}
    for name, values in matrices.items():
        values = np.asarray(values, np.float64)
        if values.ndim != 2:
            raise ValueError(f'matrix {name!r} has shape {values.shape}; give [queries, keys]')
        weights[name] = np.where(np.isfinite(values), values, 0).clip(0)
    weights = {name: values for name, values in weights.items() if values.any()}
    if not weights:
        return figure('matrix', title, '<p class="empty">No weights to draw yet.</p>')
    high = max(values.max() for values in weights.values())
    keys = max(values.shape[1] for values in weights.values())
    low = high * 10.0 ** min(-1, math.floor(-math.log10(keys)))  # below a uniform row's weight
    maps = ''
    for name, values in weights.items():
        height, width = values.shape
        side = 300 / max(height, width)
        alpha = 0.06 + 0.94 * np.log(values.clip(low) / low) / math.log(high / low)
        dots = np.where(values > 0, 255 * alpha, 0).round().astype(np.uint8)
        factor = -(-max(height, width) // MATRIX_SIZE)
        for axis, size in enumerate(dots.shape):
            dots = np.maximum.reduceat(dots, range(0, size, factor), axis)
        image = Image.fromarray(dots)
        image.putpalette(bytes(MATRIX_COLOUR) * 256)
        image.info['transparency'] = bytes(range(256))
        right, bottom = side * width, side * height
        lines = ''
        if boundary is not None:
            at = side * boundary
            lines = (f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{bottom:.1f}"/>'
                     f'<line x1="0" x2="{right:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>'
                     f'<text x="{at / 2:.1f}" y="{bottom + 16:.1f}">text</text>'
                     f'<text x="{(at + right) / 2:.1f}" y="{bottom + 16:.1f}">image</text>')
        body = (f'<rect width="{right:.1f}" height="{bottom:.1f}"/><image '
                f'width="{side * factor * image.width:.1f}" preserveAspectRatio="none" '
                f'height="{side * factor * image.height:.1f}" href="{data_uri(image)}"/>')
        maps += (f'<div><h4>{escape(name)}</h4>'
                 + svg(name, body + lines, right, bottom + 20 * (boundary is not None)) + '</div>')
    scale = (f'<div class="scale"><span>{number(low)}</span><i></i><span>{number(high)}</span>'
             '<span>attention weight; a query a row, a key a column; blank is masked</span></div>')
    return figure('matrix', title, f'<div class="maps">{maps}</div>{scale}')
