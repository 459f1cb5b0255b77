"""Draws pictures: python -m dalle_jax.sample --run runs/dalle --out DIR 'a red circle' ...

Writes DIR/<caption number>-<rank>.png for the kept candidates, DIR/samples.jsonl with one line an
image, and from these DIR/grid.png and DIR/report.html. The lines of a caption are written once all
its images are: stopped at any moment, the same command continues with the first unfinished one.
"""

import hashlib
import itertools
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import app, flags

from dalle_jax import runs
from dalle_jax.progress import Images
from dalle_jax.runs import say

GRID = 48, 16  # rows and columns of grid.png at most
REPORT_IMAGES = 512  # in report.html at most, which holds them inside


class Prompt(NamedTuple):
    """An image prompt: the file's name, uint8 [S, S, 3], and the token rows and columns kept."""

    file: str
    image: np.ndarray
    rows: int
    columns: int


def run(model, captions: Sequence[str], sampling, keep: int, out: str | Path,
        notes: Sequence[Mapping[str, str]] | None = None, prompt: Prompt | None = None) -> None:
    """Draws, ranks and writes what `out` does not hold yet.

    Args:
      model: generate.Model of a DALL-E run, with a CLIP for ranking or without (then by
        log-likelihood).
      sampling: generate.Sampling.
      keep: best candidates written per caption.
      notes: of each caption, further fields of its lines.
      prompt: an image prompt.

    Raises:
      ValueError: options that the model does not allow. RunError: `out` holds samples drawn with
        other settings. Both before anything is drawn or written.
    """
    from PIL import Image

    if not 1 <= keep <= sampling.candidates:
        raise ValueError(f'keep is {keep}; give 1 to {sampling.candidates}, the candidates drawn')
    out, notes = Path(out), notes or [{}] * len(captions)
    old = _read_settings(out)
    if old and not sampling.batch:
        sampling = replace(sampling, batch=old['batch'])  # less memory may be free now
    sampling = model.fit(sampling, len(captions))
    settings = _settings(model, captions, sampling, keep, notes, prompt)
    _check_settings(out, old, settings)
    lines = _finished(out, keep)
    start = len(lines) // keep
    if start:
        say(f'{out} holds {start} of {len(captions)} captions')
    where = (prompt.image, prompt.rows, prompt.columns) if prompt else ()
    drawing = model.draw(captions, sampling, *where, start=start, progress=Images(
        (len(captions) - start) * sampling.candidates))

    with runs.take(out, '--out'):
        runs.write_atomic(out / 'settings.json', json.dumps(settings, indent=2))
        runs.write_atomic(out / 'samples.jsonl', ''.join(lines))
        for number, drawn in enumerate(drawing, start=start):
            if drawn.truncated:
                say(f'caption {number} is cut at the text limit: {drawn.caption!r}')
            best = drawn.order()[:keep]
            new = _lines(drawn, best, number, sampling, notes[number], prompt)
            for line, i in zip(new, best):
                Image.fromarray(drawn.images[i]).save(out / line['file'])
            new = [json.dumps(line) + '\n' for line in new]
            with open(out / 'samples.jsonl', 'a') as file:
                file.write(''.join(new))
            lines += new
        in_grid, in_report = _write_overviews(out, [json.loads(line) for line in lines], keep)
    say(f'wrote {len(lines)} images and samples.jsonl to {out}; grid.png shows {in_grid} of them '
        f'and report.html {in_report}')


def _lines(drawn, best, number, sampling, note, prompt):
    """What samples.jsonl says of the kept images of a caption, best first."""
    options = asdict(sampling)
    common = {name: options[name] for name in ('seed', 'temperature', 'top_k', 'top_p', 'guidance',
                                               'candidates')}
    return [{
        'file': f'{number:05}-{rank:03}.png', 'caption': drawn.caption, **note,
        'index': sampling.first + int(i), 'rank': rank, 'logp_text': drawn.logp_text,
        'logp_image': float(drawn.logp[i]),
        'clip_score': None if drawn.scores is None else float(drawn.scores[i]),
        'truncated': drawn.truncated, **common, 'batch': list(drawn.batch),
        'image_prompt': prompt.file if prompt else None,
        'rows': prompt.rows if prompt else 0, 'columns': prompt.columns if prompt else 0,
    } for rank, i in enumerate(best)]


# Fields of a line, which a column of a table cannot be called.
FIELDS = ('file', 'index', 'rank', 'logp_text', 'logp_image', 'clip_score', 'truncated', 'seed',
          'temperature', 'top_k', 'top_p', 'guidance', 'candidates', 'batch', 'image_prompt',
          'rows', 'columns')


def _settings(model, captions, sampling, keep, notes, prompt):
    """All that the files depend on, and for readers the paths of the run and of the prompt."""
    weights = {f'weights of the {kind}': value for kind, value in model.fingerprints.items()}
    written = json.dumps([list(captions), [dict(note) for note in notes]])
    return {'run': str(model.run.path), **weights, 'dtype': str(model.dtype),
            'mesh': dict(model.mesh.shape), **asdict(sampling),
            'keep': keep, 'captions': len(captions), 'hash of captions': _hash(written.encode()),
            'image_prompt': prompt.file if prompt else None,
            'hash of image_prompt': _hash(prompt.image.tobytes()) if prompt else None,
            'rows': prompt.rows if prompt else 0, 'columns': prompt.columns if prompt else 0}


def _check_settings(out, old, new):
    if old:
        was, now = ({name: value for name, value in settings.items()
                     if name not in ('run', 'image_prompt')} for settings in (old, new))
        runs.check_same(was, now, f'{out} holds samples drawn otherwise',
                        'Give another --out, or remove it')


def _hash(data):
    return hashlib.sha256(data).hexdigest()[:16]


def _read_settings(out):
    """The settings that `out` was begun with; {} if it is new."""
    if (out / 'settings.json').exists():
        return json.loads((out / 'settings.json').read_text())
    if (out / 'samples.jsonl').exists():
        raise runs.RunError(f'{out} holds samples.jsonl without settings.json, so it is not known '
                            'how they were drawn; give another --out, or remove it')
    return {}


def _finished(out, keep):
    """The lines of the leading captions whose lines and images are all there."""
    file, lines = out / 'samples.jsonl', []
    for line in file.read_text().splitlines(keepends=True) if file.exists() else []:
        if not line.endswith('\n') or not (out / json.loads(line)['file']).exists():
            break
        lines.append(line)
    return lines[:len(lines) // keep * keep]


def _write_overviews(out, lines, keep):
    """grid.png and report.html, from the files; returns the numbers of images in them."""
    from PIL import Image

    from dalle_jax import report

    # -- a caption's images in as few rows as they need, then those of the next caption ---------
    rows = [lines[i + c:i + min(c + GRID[1], keep)]
            for i in range(0, len(lines), keep) for c in range(0, keep, GRID[1])][:GRID[0]]
    pictures = {line['file']: np.asarray(Image.open(out / line['file']))
                for line in sum(rows, lines[:max(REPORT_IMAGES, keep)])}
    Image.fromarray(grid([np.stack([pictures[line['file']] for line in row]) for row in rows])
                    ).save(out / 'grid.png')

    by = 'logp_image' if lines[0]['clip_score'] is None else 'clip_score'
    blocks = []
    for i in range(0, min(len(lines), max(REPORT_IMAGES // keep, 1) * keep), keep):
        shown = lines[i:i + keep]
        blocks.append(report.candidates(
            shown[0]['caption'], np.stack([pictures[line['file']] for line in shown]),
            [line[by] for line in shown], None, 0))
    report.write(out / 'report.html', report.page(
        out.resolve().name, f'{len(blocks)} of {len(lines) // keep} captions; the best {keep} of '
        f'{lines[0]["candidates"]} candidates by {by}, which stands beneath each', blocks))
    return sum(map(len, rows)), len(blocks) * keep


def grid(rows: Sequence[np.ndarray], gap: int = 2) -> np.ndarray:
    """A contact sheet, uint8 [H, W, 3]: one row per entry of `rows`, each uint8 [n, S, S, 3]."""
    size = rows[0].shape[1] + gap
    sheet = np.full((len(rows) * size + gap, max(map(len, rows)) * size + gap, 3), 255, np.uint8)
    for r, images in enumerate(rows):
        for c, image in enumerate(images):
            top, left = r * size + gap, c * size + gap
            sheet[top:top + size - gap, left:left + size - gap] = image
    return sheet


def read_captions(arguments: Sequence[str], file: str | None
                  ) -> tuple[list[str], list[dict[str, str]]]:
    """Captions, and what a table says of each besides.

    Args:
      arguments: captions, or none.
      file: None, or a file with a caption a line ('-': standard input), or a table: cells divided
        by tabs, and a first line naming the columns, of which Prompt holds the captions (the
        layout of PartiPrompts). The other columns' names become lower case.

    Raises:
      UsageError: none, or an empty one, named by its line; a table that cannot be read.
    """
    if file and arguments:
        raise app.UsageError(f'captions as arguments and in {file}; give one or the other')
    if file:
        where = f'{"standard input" if file == "-" else file}: line'
        lines = (sys.stdin.read() if file == '-' else _read_text(file)).rstrip().split('\n')
    else:
        where, lines = 'caption', list(arguments)
    header, table = ['caption'], False
    if file and (file.endswith('.tsv') or '\t' in lines[0] and 'Prompt' in lines[0].split('\t')):
        header, table = _header(file, lines[0]), True
    if not any(line.strip() for line in lines[table:]):
        raise app.UsageError('no captions: give them as arguments, or --captions FILE')
    captions, notes = [], []
    for number, line in enumerate(lines[table:], start=1 + table):
        cells = line.split('\t') if table else [line]
        if len(cells) > len(header):
            raise app.UsageError(f'{where} {number} has {len(cells)} cells, and the header has '
                                 f'{len(header)}')
        note = {name: cell.strip()
                for name, cell in itertools.zip_longest(header, cells, fillvalue='')}
        if not note['caption']:
            raise app.UsageError(f'{where} {number} is empty; every caption needs a word')
        captions.append(note.pop('caption'))
        notes.append(note)
    return captions, notes


def _header(file, line):
    """Names of a table's columns, in lower case, 'caption' for Prompt."""
    names = [name.strip() for name in line.split('\t')]
    if 'Prompt' not in names:
        raise app.UsageError(f'{file} has the columns {", ".join(names)}, and none is called '
                             'Prompt')
    names = ['caption' if name == 'Prompt' else name.lower() for name in names]
    for name in names:
        if name in FIELDS or names.count(name) > 1:
            raise app.UsageError(f'{file} has a column {name!r}, which another column or a field '
                                 'of samples.jsonl is called; rename it')
    return names


def _read_text(file):
    try:
        return Path(file).read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise app.UsageError(f'{file} is no UTF-8 text: {error}') from error


def read_prompt(file: str, size: int, rows: int, columns: int) -> Prompt:
    """An image prompt from a file, its short side resized to `size` and its centre taken.

    Raises:
      BadRecord: it cannot be read, or its short side is below `size`.
    """
    from dalle_jax.data import images

    image = images.decode(Path(file).read_bytes(), file)
    return Prompt(file, images.crop_center(image, size, file), rows, columns)


def main(argv):
    from dalle_jax.generate import Model, Sampling

    # All that is finished is on disk at any moment, and Python would wait for the batch's end.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    captions, notes = read_captions(argv[1:], FLAGS.captions)
    if (FLAGS.rows or FLAGS.columns) and not FLAGS.image_prompt:
        raise app.UsageError('--rows and --columns say what is kept of --image_prompt; give one')
    sampling = Sampling(FLAGS.n, FLAGS.temperature, FLAGS.top_k, FLAGS.top_p, FLAGS.seed,
                        FLAGS.batch, FLAGS.guidance, FLAGS.first)
    model, prompt = Model(FLAGS.run, FLAGS.clip, FLAGS.mesh), None
    if FLAGS.image_prompt:
        prompt = read_prompt(FLAGS.image_prompt, model.image_run.config.image_size, FLAGS.rows,
                             FLAGS.columns)
    run(model, captions, sampling, FLAGS.keep or FLAGS.n, FLAGS.out, notes, prompt)


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    flags.DEFINE_string('run', None, 'Directory of a finished DALL-E run.', required=True)
    flags.DEFINE_string('clip', None, 'Directory of a finished CLIP run that ranks the candidates.')
    flags.DEFINE_string('out', None, 'Directory the images are written to.', required=True)
    flags.DEFINE_string('captions', None, 'File with one caption a line, or a table with a column '
                        "Prompt (TSV); '-': standard input.")
    flags.DEFINE_integer('n', 8, 'Candidates drawn per caption.')
    flags.DEFINE_integer('keep', 0, 'Best candidates written per caption; 0: all.')
    flags.DEFINE_float('temperature', 1.0, 'Divides the logits; 0: the most probable token.')
    flags.DEFINE_integer('top_k', 0, 'Draw from this many most probable tokens; 0: off.')
    flags.DEFINE_float('top_p', 1.0, 'Draw from the tokens that reach this probability; 1: off.')
    flags.DEFINE_float('guidance', 1.0, 'How much more closely than 1 the caption is followed; '
                       '1: off. Needs a run trained with arch.caption_dropout.')
    flags.DEFINE_integer('seed', 0, 'With caption and index it determines an image.')
    flags.DEFINE_integer('first', 0, 'Index of the first candidate: with --n 1, image --first is '
                         'drawn alone.')
    flags.DEFINE_integer('batch', 0, 'Images drawn at once; 0: as many as fit into the memory.')
    flags.DEFINE_string('mesh', '', "How the devices are used, such as 'tensor=2'; empty: each has "
                        'a copy of the parameters and draws its share. See dalle_jax.load.')
    flags.DEFINE_string('image_prompt', None, 'Image of which --rows and --columns are kept.')
    flags.DEFINE_integer('rows', 0, "Token rows kept of the image prompt's top.")
    flags.DEFINE_integer('columns', 0, 'Token columns kept of its left.')
    runs.start(main)
