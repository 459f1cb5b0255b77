"""One self-contained HTML page of words, numbers, pictures and curves.

A page is a list of blocks, and a block is what a function here returns: HTML in which everything
that came from outside is escaped. Style, charts and pictures are inline; no network, no scripts.
"""

import json
import os
import pathlib
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from PIL import Image

from dalle_jax import plots
from dalle_jax.plots import curves, histogram, matrix, number

EXAMPLES = 24  # of a snapshot's images are shown, to keep the page small
LOG_RANGE = 100  # a run's metric that spans a larger ratio gets a logarithmic axis

STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #191b1f; --soft: #5f666f;
  --line: #e5e5e2; --wash: #f3f3f0; --good: #1f7a4d; --bad: #b3261e; --alarm: #fcefed; --lift: none;
  --c0: #2f74d0; --c1: #d9691e; --c2: #23896a; --c3: #8657b8; --c4: #b8405e; --c5: #6f7782;
  --from: .36; --to: .66 }
@media (prefers-color-scheme: dark) { :root { --paper: #141517; --ink: #e8e8e5; --soft: #a1a7af;
  --line: #2d2f33; --wash: #1d1f22; --good: #6ccb98; --bad: #ff8f86; --alarm: #35201f;
  --lift: brightness(1.5); --c0: #6fa8fa; --c1: #f2a05c; --c2: #5cc6a0; --c3: #c29ae8;
  --c4: #ef8aa2; --c5: #99a1ab; --from: .55; --to: .88 } }
* { box-sizing: border-box; -webkit-text-size-adjust: 100% }
body { margin: 0 auto; max-width: 1328px; padding: 40px 24px 72px; background: var(--paper);
  color: var(--ink); overflow-wrap: anywhere; font: 1rem/1.55 system-ui, -apple-system, 'Segoe UI',
  Roboto, 'Helvetica Neue', Arial, sans-serif }
h1, h2, h3, h4, p, figure, dl, dd { margin: 0 } h1, h2, h3 { font-weight: 620 }
body > * + * { margin-top: 28px } p { max-width: 70ch }
header p, section > p, figcaption, .empty, .facts .beneath, .table th, .label, summary {
  color: var(--soft) }
h1 { font-size: clamp(1.75rem, 5vw, 2.5rem); line-height: 1.15; letter-spacing: -.02em }
h2 { font-size: 1.375rem; line-height: 1.25; letter-spacing: -.01em }
h3 { font-size: .9375rem; margin-bottom: .25rem }
h4 { font-size: .875rem; margin-bottom: .3rem; font-weight: 500 }
header p { font-size: 1.0625rem; margin: .5rem 0 4px } section > p { margin-top: .35rem }
section { border-top: 1px solid var(--line); margin-top: 40px; padding-top: 24px }
.flow { display: grid; gap: 32px 36px; margin-top: 20px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)) }
.flow > * { grid-column: 1 / -1; min-width: 0 } .flow > .chart { grid-column: auto }
figcaption, .empty, .caption { font-size: .8125rem; line-height: 1.4; margin-top: .4rem }
.facts { display: grid; gap: 24px 28px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 150px), 1fr)) }
.facts > div { border-top: 2px solid; padding-top: 8px; display: grid; align-content: start }
.facts dt { font-size: .875rem; line-height: 1.35; order: 1 }
.facts dd { font-size: 1.75rem; line-height: 1.35; letter-spacing: -.02em; font-weight: 600 }
.facts .beneath { font-size: .8125rem; font-weight: 400; letter-spacing: 0; order: 2 }
.note { padding: 10px 16px; border-left: 3px solid var(--c0); background: var(--wash) }
.note.alarm { border-color: var(--bad); background: var(--alarm) }
.scroll, pre { overflow-x: auto } .scroll { overflow-wrap: normal } summary { cursor: pointer }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
.table :is(th, td) { padding: 7px 28px 7px 0; text-align: left }
.table td { border-top: 1px solid var(--line) } .table th { font-weight: 500; font-size: .8125rem }
.table .n { text-align: right; white-space: nowrap }
.stages { display: grid; grid-template-columns: fit-content(40%) 1fr auto; gap: 7px 14px;
  align-items: center; font-size: .9375rem; max-width: 900px; font-variant-numeric: tabular-nums }
.stages i { display: block; min-width: 2px; height: 14px; background: var(--c0) }
.stages i, .track { border-radius: 2px } .stages > :nth-child(3n) { text-align: right }
.track, pre { background: var(--wash) } .total { font-weight: 600 }
img { display: block; width: 100%; height: auto; border-radius: 3px; background: var(--wash) }
.pixelated img { image-rendering: pixelated }
.verdict { width: 1.05em; height: 1.05em; vertical-align: -.16em; margin-right: .3em; fill: none;
  stroke: var(--good); stroke-width: 2.4; stroke-linecap: round; stroke-linejoin: round }
.verdict.bad { stroke: var(--bad) } .label { font-size: .75rem; margin-top: .25rem }
.examples { display: grid; gap: 24px; grid-template-columns: repeat(auto-fill,
  minmax(min(100%, max(136px, calc(var(--k) * 104px))), 1fr)) }
.row { display: grid; gap: 7px; grid-template-columns: repeat(var(--k), minmax(0, 1fr)) }
.candidates { display: grid; gap: 10px 28px }
.candidates .row { grid-template-columns: repeat(4, minmax(0, 1fr)) }
.chosen .label { color: var(--ink); font-weight: 600 }
.chosen img { outline: 2px solid var(--c0); outline-offset: 2px }
pre { padding: 14px 16px; font: .8125rem/1.5 ui-monospace, 'SF Mono', Menlo, Consolas, monospace }
@media (min-width: 800px) { .candidates { grid-template-columns: 13rem 1fr }
  .candidates .row { grid-template-columns: repeat(var(--k), minmax(0, 128px)) } }
@media (max-width: 480px) { body { padding: 28px 16px 56px } section { margin-top: 36px }
  .facts { gap: 20px 18px } .facts dd:not(.beneath) { font-size: 1.5rem }
  .stages { grid-template-columns: 1fr auto; grid-auto-flow: dense; gap: 3px 14px }
  .stages > :nth-child(3n + 2) { grid-column: 1 / -1; margin-bottom: 7px } }
"""


class Fact(NamedTuple):
    """A number in large print, what to hold it against ('goal 97 %'), and whether that is met."""

    value: str | float
    beneath: str = ''
    met: bool | None = None


def page(title: str, subtitle: str, blocks: Iterable[str]) -> str:
    """The whole document. The policy in its head forbids every script and network access."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        'content="default-src \'none\'; img-src data:; style-src \'unsafe-inline\'">'
        f'<title>{escape(title)}</title><style>{STYLE}{plots.STYLE}</style></head>\n<body>'
        f'<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>\n'
        + '\n'.join(blocks) + '\n</body></html>\n')


def section(title: str, text: str, *blocks: str) -> str:
    """A heading, a sentence, and blocks: charts flow side by side, all else takes a row."""
    words = f'<p>{escape(text)}</p>' if text else ''
    return (f'<section><h2>{escape(title)}</h2>{words}<div class="flow">'
            + '\n'.join(blocks) + '</div></section>')


def note(text: str, alarm: bool = False) -> str:
    """A sentence that stands out; in red if it is an alarm."""
    return f'<p class="note{" alarm" if alarm else ""}">{escape(text)}</p>'


def facts(values: Mapping[str, Fact | str | float]) -> str:
    """Big-number tiles; each value is text, a number, or a Fact with its goal beneath."""
    tiles = ''
    for label, fact in values.items():
        fact = fact if isinstance(fact, Fact) else Fact(fact)
        tiles += (f'<div><dt>{escape(label)}</dt><dd>{cell(fact.value)}</dd>'
                  f'<dd class="beneath">{verdict(fact.met)}{escape(fact.beneath)}</dd></div>')
    return f'<dl class="facts">{tiles}</dl>'


def table(rows: Sequence[Sequence], header: Sequence[str]) -> str:
    """A table of text, numbers, verdicts (bool) and blanks (None); numeric columns align right."""
    if not rows:
        return '<p class="empty">No rows.</p>'
    body = [list(map(cell, row)) for row in rows]
    numeric = [all(not text or text.lstrip('+-−≥≤ ')[:1].isdigit() for text in column)
               for column in zip(*body, strict=True)]

    def line(tag, cells):
        return '<tr>' + ''.join(f'<{tag}{" class=n" * n}>{text}</{tag}>'
                                for text, n in zip(cells, numeric, strict=True)) + '</tr>'

    return (f'<div class="scroll"><table class="table"><thead>{line("th", map(escape, header))}'
            f'</thead><tbody>{"".join(line("td", row) for row in body)}</tbody></table></div>')


def cell(value) -> str:
    """One value as HTML: text, a number, a verdict, or nothing for None."""
    if isinstance(value, (bool, np.bool_)):
        return verdict(value)
    return escape('' if value is None else value if isinstance(value, str) else number(value))


def stages(seconds: Mapping[str, float]) -> str:
    """A timeline: each stage's bar begins where the one before it ended."""
    total = sum(seconds.values())
    if not total:
        return '<p class="empty">No stage has run yet.</p>'
    rows, start = '', 0.0
    for name, spent in seconds.items():
        bar = f'margin-left:{100 * start / total:.2f}%;width:{100 * spent / total:.2f}%'
        rows += (f'<span>{escape(name)}</span><span class="track"><i style="{bar}"></i></span>'
                 f'<span>{duration(spent)}</span>')
        start += spent
    return (f'<div class="stages">{rows}<span class="total">total</span><span></span>'
            f'<span class="total">{duration(total)}</span></div>')


def duration(seconds: float) -> str:
    """4.2 s / 3 min 07 s / 5 h 12 min."""
    if seconds < 59.95:
        return f'{seconds:.1f} s'
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f'{minutes} min {rest:02d} s'
    return f'{minutes // 60:,} h {minutes % 60:02d} min'


def verdict(right: bool | None) -> str:
    """A check or a cross, told apart by shape and by name as well as by colour."""
    if right is None:
        return ''
    kind, name, path = (('good', 'right', 'M2.5 8.8l3.6 3.6L13.5 4') if right else
                        ('bad', 'wrong', 'M3.5 3.5l9 9M12.5 3.5l-9 9'))
    return (f'<svg class="verdict {kind}" viewBox="0 0 16 16" role="img" aria-label="{name}">'
            f'<title>{name}</title><path d="{path}"/></svg>')


def picture(image: np.ndarray, alt: str) -> str:
    """An <img> of one image, uint8 or float in [0, 1], [H, W, 3]; NaN becomes black."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f'a picture has shape [H, W, 3], got {list(image.shape)}')
    if image.dtype != np.uint8:
        if not np.issubdtype(image.dtype, np.floating):
            raise ValueError(f'a picture is uint8 or float in [0, 1], got {image.dtype}')
        image = np.nan_to_num(image.astype(np.float32), nan=0.0, posinf=1.0, neginf=0.0)
        image = (image.clip(0, 1) * 255).round().astype(np.uint8)
    height, width, _ = image.shape
    return (f'<img alt="{escape(alt)}" width="{width}" height="{height}" '
            f'src="{plots.data_uri(Image.fromarray(image))}">')


def captioned(image: np.ndarray, alt: str, right: bool | None, text: str, kind: str) -> str:
    """A picture above its verdict and a text."""
    words = verdict(right) + escape(text)
    words = f'<div class="{kind}">{words}</div>' if words else ''
    return f'<div>{picture(image, alt)}{words}</div>'


def image_grid(images: np.ndarray, captions: Sequence[str] | None = None,
               verdicts: Sequence[bool | None] | None = None, scale: str = 'auto') -> str:
    """Pictures in a grid that wraps, each with its caption and verdict; see `side_by_side`."""
    return side_by_side({'': images}, captions, {} if verdicts is None else {'': verdicts}, scale)


def side_by_side(columns: Mapping[str, np.ndarray], captions: Sequence[str] | None = None,
                 verdicts: Mapping[str, Sequence[bool | None]] | None = None,
                 scale: str = 'auto') -> str:
    """Several versions of each example next to each other, such as original and reconstruction.

    Args:
      columns: name -> n images, uint8 or float in [0, 1], [n, H, W, 3]; '' goes without a label.
      captions: n texts, one an example.
      verdicts: column name -> n of True (check), False (cross), None; a column may be absent.
      scale: how a browser enlarges: 'auto' is smooth, 'pixelated' shows each pixel.
    """
    verdicts = verdicts or {}
    count = common_length({**columns, 'captions': captions, **{
        f'verdicts of {name}': marks for name, marks in verdicts.items()}})
    if not count:
        return '<p class="empty">No pictures yet.</p>'
    examples = ''
    for i in range(count):
        caption, cells, beneath = '' if captions is None else captions[i], '', ''
        for name, images in columns.items():
            right = verdicts[name][i] if name in verdicts else None
            cells += captioned(images[i], caption or name, right, name or caption,
                               'label' if name else 'caption')
        if caption and '' not in columns:
            beneath = f'<div class="caption">{escape(caption)}</div>'
        examples += f'<div><div class="row">{cells}</div>{beneath}</div>'
    return f'<div class="examples {escape(scale)}" style="--k:{len(columns)}">{examples}</div>'


def candidates(caption: str, images: np.ndarray, scores: Sequence[float],
               verdicts: Sequence[bool | None] | None, chosen: int,
               scale: str = 'auto') -> str:
    """All k candidates of one caption, the highest score first; `chosen`, an index, is framed.

    Images, verdicts and scale are as in `side_by_side`; each score is shown beneath its picture.
    """
    count = common_length({'images': images, 'scores': scores, 'verdicts': verdicts})
    cells = ''
    for i in np.argsort(-np.asarray(scores, np.float64), kind='stable').tolist():
        alt = f'{caption} (chosen)' if i == chosen else caption
        cell = captioned(images[i], alt, None if verdicts is None else verdicts[i],
                         number(scores[i]), 'label')
        cells += f'<div class="chosen">{cell}</div>' if i == chosen else cell
    return (f'<div class="candidates {escape(scale)}" style="--k:{min(count, 8)}">'
            f'<p>{escape(caption)}</p><div class="row">{cells}</div></div>')


def common_length(parts: Mapping[str, Sequence | None]) -> int:
    """The length of all parts that are given; a ValueError tells them if they differ."""
    found = {name or 'images': len(part) for name, part in parts.items() if part is not None}
    if len(set(found.values())) > 1:
        raise ValueError(f'pictures and what is said of them differ in number: {found}')
    return next(iter(found.values()), 0)


def write(path: str | os.PathLike, html: str) -> None:
    """Replaces the file at once, so that a reader never meets half a page."""
    path = pathlib.Path(path)
    partial = path.with_name(f'.{path.name}.{os.getpid()}')
    partial.write_text(html, encoding='utf-8', errors='replace')
    os.replace(partial, path)


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """The records of a JSON-lines file; none if it does not exist.

    A line that is no JSON object with a step is left out: a killed run leaves such a line, at the
    end of the file or, once the run is resumed, in its middle.
    """
    path, records = pathlib.Path(path), []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get('step'), (int, float)):
            records.append(record)
    return records


def run_page(workdir: str | os.PathLike) -> str:
    """The page of a training run, finished or not, from the files in its directory.

    Reads metrics.jsonl, config.json, snapshot.npz (arrays named kind/name, drawn by their kind:
    images, counts, matrix) and snapshot.json (step, captions, and optionally boundary: the first
    image position of the matrices). Any of them may be missing.
    """
    workdir = pathlib.Path(workdir)
    records = read_metrics(workdir / 'metrics.jsonl')
    status = 'No metrics yet'
    if records:
        step, spent = max(r['step'] for r in records), records[-1].get('time', 0.0)
        status = f'Step {number(step)} after {duration(spent)}'
    blocks = metric_blocks(records) + snapshot_blocks(workdir)
    if (workdir / 'config.json').exists():
        config = escape((workdir / 'config.json').read_text(encoding='utf-8', errors='replace'))
        folded = f'<details><summary>config.json</summary><pre>{config}</pre></details>'
        blocks.append(section('Configuration', '', folded))
    return page(workdir.resolve().name, status, blocks)


def metric_blocks(records: Sequence[Mapping]) -> list[str]:
    """Alarms, then a section of charts for each prefix of the metrics' names."""
    # name -> kind -> step -> value: a resumed run repeats steps, and the later line counts.
    metrics = {}
    for record in {(str(r.get('kind')), r['step']): r for r in records}.values():
        kind = str(record.get('kind', 'train'))
        for name, value in record.items():
            if name not in ('kind', 'step', 'time') and isinstance(value, (int, float, type(None))):
                value = float('nan') if value is None else value
                metrics.setdefault(name, {}).setdefault(kind, {})[record['step']] = value
    scales = scale_blocks(metrics)
    shared = Counter(name.rpartition('/')[0] for name in metrics)
    alarms, groups = [], {}
    for name, kinds in metrics.items():
        prefix, _, short = name.rpartition('/')
        if prefix == 'alarm':
            raised = [(step, value) for points in kinds.values()
                      for step, value in points.items() if value > 0]
            alarms += [note(f'Alarm: {short} was {number(value)} at step {number(step)}.', True)
                       for step, value in sorted(raised)[-1:]]
            continue
        if shared[prefix] == 1:  # a section of its own would be nearly empty
            prefix, short = '', name
        series = {kind: tuple(zip(*sorted(points.items()))) for kind, points in kinds.items()}
        values = np.concatenate([np.array(line, float) for _, line in series.values()])
        values = values[np.isfinite(values)]
        log = len(values) > 0 and 0 < LOG_RANGE * values.min() < values.max()
        groups.setdefault(prefix, []).append(curves(series, short, log=log))
    return alarms + [section(prefix.capitalize() or 'Training', '', *groups[prefix])
                     for prefix in sorted(groups)] + scales


def scale_blocks(metrics: dict) -> list[str]:
    """Gradient scales (Ramesh et al. 2021, fig. 12) and skips; takes their keys out of metrics."""
    scales, skips = {}, {}
    for name in sorted(sorted(n for n in metrics if n.startswith('log2_scale/')), key=len):
        _, layer, branch = name.split('/')
        lines = scales.setdefault(branch, {})
        lines[f'layer {layer}'] = tuple(zip(*sorted(metrics.pop(name)['train'].items())))
        skipped = metrics.pop(f'overflow/{layer}/{branch}', {'train': {}})['train']
        skips.setdefault(branch, []).append(sum(skipped.values()))
    if not scales:
        return []
    steps, shares = zip(*sorted(metrics['skipped']['train'].items()))
    share = np.average(shares, weights=np.diff(steps, prepend=0))
    charts = [curves(scales[branch], f'{branch}: log2 of the scale', ramp=True)
              for branch in sorted(scales)]
    skips = {branch: (range(len(skips[branch])), skips[branch]) for branch in sorted(skips)}
    charts.append(curves(skips, 'Updates skipped because of a block', x='layer'))
    return [section('Gradient scales', f'{share:.2%} of updates were skipped.', *charts)]


def snapshot_blocks(workdir: pathlib.Path) -> list[str]:
    """The latest snapshot: pictures of one number side by side, then counts, then matrices."""
    try:
        with np.load(workdir / 'snapshot.npz') as stored:
            arrays = {name: stored[name] for name in stored.files}
        described = workdir / 'snapshot.json'
        about = json.loads(described.read_bytes()) if described.exists() else {}
        pictures, counts, matrices = {}, [], {}
        for name, array in arrays.items():
            kind, _, short = name.partition('/')
            if kind == 'images':
                pictures.setdefault(len(array), {})[short] = array[:EXAMPLES]
            elif kind == 'counts':
                counts.append(histogram(array, short))
            elif kind == 'matrix':
                matrices[short] = array
        blocks = []
        for count, columns in pictures.items():
            captions = about.get('captions', ())
            captions = captions[:EXAMPLES] if len(captions) == count else None
            blocks.append(side_by_side(columns, captions))
        blocks += counts + [matrix(matrices, about.get('boundary'))] * bool(matrices)
        text = f'Taken at step {number(about["step"])}.' if 'step' in about else ''
        return [section('Snapshot', text, *blocks)]
    except FileNotFoundError:
        return []
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        return [note(f'The snapshot cannot be drawn: {error}', alarm=True)]
