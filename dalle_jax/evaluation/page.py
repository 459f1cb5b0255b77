"""The report of an evaluation, drawn from the files that it has written."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dalle_jax import report
from dalle_jax.evaluation import paper, scenes_page

TITLES = {'fid': 'FID', 'fid_words': 'FID of word features', 'inception_score': 'Inception Score',
          'kid': 'KID'}


def page(workdir: Path, seconds: Mapping[str, float]) -> str:
    """The page of one evaluation.

    Args:
      seconds: stage -> seconds, where the stages were run together.
    """
    result = json.loads((workdir / 'result.json').read_text())
    if result['settings']['source'] == 'scenes':
        of_images = [block for split in result['settings']['splits']
                     for block in quality(result, split)]
        return scenes_page.page(workdir, result, seconds, of_images, [_made_with(result)])
    blocks = []
    for split in result['settings']['splits']:
        blocks += [_facts(result, split), *quality(result, split), *_shown(workdir, split)]
    what = result['settings']['run'] or result['settings']['images']
    return report.page(f'Evaluation of {what}', _subtitle(result), [*blocks, _made_with(result)])


def quality(result: Mapping, split: str) -> list[str]:
    """Sections with FID, IS and KID: numbers, and curves over blur and candidates."""
    found = result['results'][split]
    if not found.get('quality'):
        return []
    name = 'fid' if found['network'] == 'inception' else f"fid_{found['network']}"
    kept = {_condition(key): entry for key, entry in found['quality'].items()
            if key.startswith('best_of')}
    most = max(n for n, _ in kept)
    what = f'best of {most}' if result['settings']['run'] else 'the images'
    text = (f'{split}: {found["quality"][f"best_of_{most}_blur_0"]["images"]:,} images and as many '
            'real ones, both blurred by a Gaussian. ')
    if name == 'fid_words':
        text += ('The features are those of a small network trained here on the same kind of '
                 'pictures. They stand in for Inception, and these numbers can be compared with '
                 'nothing else.')
    data = result['settings']['paper'] if name == 'fid' else ''
    charts = []
    for metric, of_paper in ((name, paper.FID), ('inception_score', paper.IS)):
        by_radius = {what: sorted((r, entry[metric]) for (n, r), entry in kept.items()
                                  if n == most and metric in entry)}
        if metric == 'inception_score':
            by_radius['real images'] = sorted(
                (float(key.rpartition('_')[2]), entry[metric])
                for key, entry in found['quality'].items() if key.startswith('real'))
        for model, values in of_paper.get(data, {}).items():
            by_radius[model] = list(zip(paper.RADII, values))
        if len(by_radius[what]) > 1:
            charts.append(report.curves(_series(by_radius), TITLES[metric], 'blur radius, pixels'))
        by_number = {what.replace(f' {most}', ' N'): sorted(
            (math.log2(n), entry[metric]) for (n, r), entry in kept.items()
            if not r and metric in entry)}
        if data == 'coco':
            values = paper.RERANKED['fid' if metric == name else metric]
            by_number['DALL-E (paper)'] = [(math.log2(n), v)
                                           for n, v in zip(paper.NUMBERS, values)]
        if len(next(iter(by_number.values()))) > 1:
            charts.append(report.curves(_series(by_number), TITLES[metric],
                                        'candidates N, log2'))
    rows = [(f'best of {n}' if result['settings']['run'] else 'given', f'{radius:g}',
             entry[name], entry.get('inception_score'), entry.get('kid'))
            for (n, radius), entry in sorted(kept.items())]
    if 'other_scenes' in found['quality']:
        entry = found['quality']['other_scenes']
        rows.append(('other real scenes', '0', entry[name], entry['inception_score'], entry['kid']))
    header = ('', 'blur', TITLES[name], 'IS', 'KID')
    return [report.section('How good and how varied', text, *charts, report.table(rows, header))]


def _condition(key):
    """'best_of_8_blur_0.5' -> (8, 0.5)."""
    n, radius = key.removeprefix('best_of_').split('_blur_')
    return int(n), float(radius)


def _series(lines):
    return {name: tuple(zip(*points)) for name, points in lines.items() if points}


def _facts(result, split):
    found = result['results'][split]
    facts = {}
    if found.get('quality'):
        entries = {_condition(key): entry for key, entry in found['quality'].items()
                   if key.startswith('best_of')}
        best = entries[max(n for n, _ in entries), 0.0]
        for key, title in TITLES.items():
            if key in best:
                facts[title] = report.number(best[key])
    for key, title in (('clip_score', 'CLIP score'), ('text_nats_per_token', 'nats, text token'),
                       ('image_nats_per_token', 'nats, image token')):
        if key in found:
            facts[title] = report.number(found[key])
    return report.facts({f'{title}, {split}': value for title, value in facts.items()})


def _shown(workdir, split):
    file = workdir / f'shown_{split}.npz'
    if not file.exists():
        return []
    with np.load(file) as stored:
        arrays = dict(stored)
    captions = arrays.pop('captions').tolist() if 'captions' in arrays else None
    return [report.section('Images', 'The first ones, not a selection.',
                           report.side_by_side(arrays, captions))]


def _subtitle(result):
    of_splits = '; '.join(f"{found['captions']:,} captions of {split} (hash {found['hash']})"
                          for split, found in result['captions'].items())
    return f"Beside {result['settings']['path']}: {of_splits}"


def _made_with(result):
    rows = [(f'{part}: {key}', json.dumps(value)) for part in ('settings', 'weights', 'software')
            for key, value in result[part].items()]
    rows += [('device', result['device']), ('mesh', result['mesh'] or 'default')]
    rows += [(f'captions of {split}', json.dumps(found))
             for split, found in result['captions'].items()]
    return report.section('What this was made with', 'result.json holds it, too, and evaluate '
                          '--reproduce result.json does all of it again.',
                          report.table(rows, ('', '')))
