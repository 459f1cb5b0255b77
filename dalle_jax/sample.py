"""Draws pictures: python -m dalle_jax.sample --run runs/dalle --out DIR 'a red circle' ...

Writes DIR/<caption number>-<rank>.png for the kept candidates, DIR/grid.png with one row a
caption, and DIR/samples.jsonl with one line an image.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

from dalle_jax.runs import say


def run(model, captions: Sequence[str], sampling, keep: int, out: str | Path) -> None:
    """Draws, ranks and writes.

    Args:
      model: generate.Model of a DALL-E run, with a CLIP for ranking or without (then by
        log-likelihood).
      sampling: generate.Sampling.
      keep: best candidates written per caption.
    """
    from PIL import Image

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    started, rows = time.monotonic(), []
    with open(out / 'samples.jsonl', 'w') as lines:
        for number, drawn in enumerate(model.draw(captions, sampling)):
            kept = drawn.order()[:keep]
            for rank, index in enumerate(kept):
                name = f'{number:05}-{rank:03}.png'
                Image.fromarray(drawn.images[index]).save(out / name)
                lines.write(json.dumps({
                    'file': name, 'caption': drawn.caption, 'rank': rank, 'seed': sampling.seed,
                    'index': int(index), 'logp_image': float(drawn.logp[index]),
                    'clip_score': None if drawn.scores is None else float(drawn.scores[index]),
                    'truncated': drawn.truncated}) + '\n')
            lines.flush()
            rows.append(drawn.images[kept])
            count = (number + 1) * sampling.candidates
            rate = count / (time.monotonic() - started)
            left = (len(captions) - number - 1) * sampling.candidates / rate
            say(f'{number + 1}/{len(captions)} captions, {rate:.1f} images/s, left {left:.0f} s'
                + (f'  (cut at the text limit: {drawn.caption!r})' if drawn.truncated else ''))
    Image.fromarray(grid(rows)).save(out / 'grid.png')
    say(f'wrote {sum(map(len, rows))} images, grid.png and samples.jsonl to {out}')


def grid(rows: Sequence[np.ndarray], gap: int = 2) -> np.ndarray:
    """A contact sheet, uint8 [H, W, 3]: one row per entry of `rows`, each uint8 [n, S, S, 3]."""
    size = rows[0].shape[1] + gap
    sheet = np.full((len(rows) * size + gap, max(map(len, rows)) * size + gap, 3), 255, np.uint8)
    for r, images in enumerate(rows):
        for c, image in enumerate(images):
            top, left = r * size + gap, c * size + gap
            sheet[top:top + size - gap, left:left + size - gap] = image
    return sheet


def read_captions(arguments: Sequence[str], file: str | None) -> list[str]:
    """Captions from the command line, or one a line from a file ('-': standard input)."""
    if file == '-':
        lines = sys.stdin.read().splitlines()
    elif file:
        lines = Path(file).read_text().splitlines()
    else:
        lines = list(arguments)
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                raise app.UsageError(f'caption {number} is empty; every caption needs a word')
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise app.UsageError('no captions: give them as arguments, or --captions FILE')
    return captions


def main(argv):
    from dalle_jax.generate import Model, Sampling

    captions = read_captions(argv[1:], FLAGS.captions)
    sampling = Sampling(FLAGS.n, FLAGS.temperature, FLAGS.top_k, FLAGS.top_p, FLAGS.seed,
                        FLAGS.batch)
    run(Model(FLAGS.run, FLAGS.clip), captions, sampling, FLAGS.keep or FLAGS.n, FLAGS.out)


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    flags.DEFINE_string('run', None, 'Directory of a finished DALL-E run.', required=True)
    flags.DEFINE_string('clip', None, 'Directory of a finished CLIP run that ranks the candidates.')
    flags.DEFINE_string('out', None, 'Directory the images are written to.', required=True)
    flags.DEFINE_string('captions', None, "File with one caption a line; '-': standard input.")
    flags.DEFINE_integer('n', 8, 'Candidates drawn per caption.')
    flags.DEFINE_integer('keep', 0, 'Best candidates written per caption; 0: all.')
    flags.DEFINE_float('temperature', 1.0, 'Divides the logits; 0: the most probable token.')
    flags.DEFINE_integer('top_k', 0, 'Draw from this many most probable tokens; 0: off.')
    flags.DEFINE_float('top_p', 1.0, 'Draw from the tokens that reach this probability; 1: off.')
    flags.DEFINE_integer('seed', 0, 'With caption and index it determines an image.')
    flags.DEFINE_integer('batch', 64, 'Images drawn at once.')
    app.run(main)
