"""Writes the embedded data set: python -m dalle_jax.data scenes --out DIR [--sheet FILE.png].

With --out it is prepared for TensorFlow Datasets, coco_captions' layout; with --sheet one sees it.
"""

import argparse
import dataclasses
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dalle_jax.data.scenes import SPLITS, SceneConfig, Scenes

COLUMNS, ZOOM = 4, 3  # of the sheet: pictures a row, magnification
LINE, LETTER = 14, 6  # px that a line and a letter take in Pillow's own font


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        'python -m dalle_jax.data', description=__doc__.split('\n\n')[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    scenes = parser.add_subparsers(dest='dataset', required=True).add_parser(
        'scenes', help='captioned scenes of coloured shapes',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    scenes.add_argument('--out', type=Path, help='directory to write the data set into')
    scenes.add_argument('--sheet', type=Path, help='PNG file for examples of every split')
    for split, length in zip(SPLITS, (10_000, 1_000, 1_000, 0)):
        scenes.add_argument(f'--{split}', type=int, default=length, metavar='N',
                            help=f'records of split {split}, 0 for none')
    scenes.add_argument('--seed', type=int, default=0, help='of what is drawn')
    for field in dataclasses.fields(SceneConfig):
        scenes.add_argument(f'--{field.name}', type=field.type, default=field.default,
                            help='as in SceneConfig')
    args = parser.parse_args(argv)
    if not args.out and not args.sheet:
        scenes.error('give --out DIR, --sheet FILE.png or both')

    lengths = {split: getattr(args, split) for split in SPLITS if getattr(args, split)}
    try:
        config = SceneConfig(**{field.name: getattr(args, field.name)
                                for field in dataclasses.fields(SceneConfig)})
        if args.out:
            from dalle_jax.data.tfds import build_scenes
            target = build_scenes(args.out, config, lengths, args.seed)
            size = sum(file.stat().st_size for file in target.iterdir())
            print(f'{target}: {size / 2 ** 20:.1f} MiB, '
                  + ', '.join(f'{split} {n} records' for split, n in lengths.items()))
        if args.sheet:
            write_sheet(args.sheet, config, list(lengths), args.seed)
            print(f'{args.sheet}: examples of {", ".join(lengths)}')
    except (ValueError, OSError) as error:
        raise SystemExit(f'error: {error}') from error


def write_sheet(path: Path, config: SceneConfig, splits: list[str], seed: int,
                rows: int = 3) -> None:
    """Draws examples of each split with their captions, `rows` rows of COLUMNS a split."""
    side = config.size * ZOOM
    blocks = []
    for split in splits:
        source = Scenes(config, split, rows * COLUMNS, seed)
        for row in range(rows):
            block = Image.new('RGB', (COLUMNS * (side + LINE), side + 5 * LINE), 'white')
            draw = ImageDraw.Draw(block)
            for column in range(COLUMNS):
                index = row * COLUMNS + column
                record = source[index]
                left = column * (side + LINE) + LINE // 2
                image = Image.fromarray(record.image).resize((side, side), Image.Resampling.NEAREST)
                block.paste(image, (left, LINE // 2))
                draw.rectangle((left - 1, LINE // 2 - 1, left + side, LINE // 2 + side),
                               outline='lightgrey')
                text = record.captions[index % config.templates]
                text = textwrap.fill(f'{split}: {text}', side // LETTER)
                draw.text((left, side + LINE), text, 'black')
            blocks.append(np.asarray(block))
    Image.fromarray(np.concatenate(blocks)).save(path)


if __name__ == '__main__':
    main()
