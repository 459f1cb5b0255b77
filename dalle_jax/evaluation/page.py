"""The report of an evaluation, drawn from the files that it has written."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dalle_jax import report
from dalle_jax.evaluation import paper, scenes_page
from dalle_jax.metrics.quality import named

TITLES = {'fid': 'FID', 'inception_score': 'Inception Score', 'kid': 'KID',
          'fid_words': 'FID of word features', 'inception_score_words': 'IS of words',
          'kid_words': 'KID of word features'}


def page(workdir: Path, seconds: Mapping[str, float]) -> str:
    """The page of one evaluation.

    Args:
      seconds: stage -> seconds, where the stages were run together.
    """
    result = json.loads((workdir / 'result.json').read_text())
    if result['settings']['source'] == 'scenes':
        of_images = [block for split in result['settings']['splits']
                     for block in quality(result, split)]
        return scenes_page.page(workdir, result, seconds, of_images, [_made_with(workdir, result)])
    blocks = []
    for split in result['settings']['splits']:
        blocks += [_facts(result, split), *quality(result, split), *_shown(workdir, split)]
    what = result['settings']['run'] or result['settings']['images']
    return report.page(f'Evaluation of {what}', _subtitle(result),
                       [*blocks, _made_with(workdir, result)])


def quality(result: Mapping, split: str) -> list[str]:
    """Sections with FID, IS and KID: numbers, and curves over blur and candidates."""
    found = result['results'][split]
    if not found.get('quality'):
        return []
    fid, score, kid = (named(key, found['network']) for key in ('fid', 'inception_score', 'kid'))
    kept = {_condition(key): entry for key, entry in found['quality'].items()
            if key.startswith('best_of')}
    most = max(n for n, _ in kept)
    what = f'best of {most}' if result['settings']['run'] else 'the images'
    reference = result['settings']['reference']
    real = (f'{result["captions"][split]["captions"]:,} real ones, both blurred by a Gaussian'
            if reference == 'pairs' else f'the statistics in {reference}')
    text = f'{found["quality"][f"best_of_{most}_blur_0"]["images"]:,} images beside {real}. '
    if found['network'] == 'words':
        text += ('The features are those of a small network trained here on the same kind of '
                 'pictures. They stand in for Inception, and these numbers can be compared with '
                 'nothing else. ')
    if 'other_scenes' in found['quality']:
        text += ('The last row is what as many other real scenes come to. Their captions are '
                 'others; those of the samples are the captions of the real images, so that good '
                 'samples come nearer, and KID, which takes both for independent, falls below 0.')
    data = result['settings']['paper'] if found['network'] == 'inception' else ''
    charts = []
    for metric, of_paper in ((fid, paper.FID), (score, paper.IS)):
        by_radius = {what: sorted((r, entry[metric]) for (n, r), entry in kept.items()
                                  if n == most)}
        if metric == score:
            by_radius['real images'] = sorted(
                (float(key.rpartition('_')[2]), entry[metric])
                for key, entry in found['quality'].items() if key.startswith('real'))
        for model, values in of_paper.get(data, {}).items():
            by_radius[model] = list(zip(paper.RADII, values))
        if len(by_radius[what]) > 1:
            charts.append(report.curves(_series(by_radius), TITLES[metric], 'blur radius, pixels'))
        by_number = {what.replace(f' {most}', ' N'): sorted(
            (math.log2(n), entry[metric]) for (n, r), entry in kept.items() if not r)}
        if data == 'coco':
            values = paper.RERANKED[metric]
            by_number['DALL-E (paper)'] = [(math.log2(n), v)
                                           for n, v in zip(paper.NUMBERS, values)]
        if len(next(iter(by_number.values()))) > 1:
            charts.append(report.curves(_series(by_number), TITLES[metric],
                                        'candidates N, log2'))
    rows = [(f'best of {n}' if result['settings']['run'] else 'given', f'{radius:g}',
             entry[fid], entry[score], entry.get(kid))
            for (n, radius), entry in sorted(kept.items())]
    if 'other_scenes' in found['quality']:
        entry = found['quality']['other_scenes']
        rows.append(('other real scenes', '0', entry[fid], entry[score], entry[kid]))
    header = ('', 'blur', *(TITLES[key] for key in (fid, score, kid)))
    return [report.section(f'How good and how varied: {split}', text, *charts,
                           report.table(rows, header))]


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
    settings = result['settings']
    return f"Beside {settings['path']}: {of_splits}" if of_splits else (
        f"Beside the statistics in {settings['reference']}")


def _made_with(workdir, result):
    rows = [(f'{part}: {key}', json.dumps(value))
            for part in ('settings', 'weights', 'inputs', 'software')
            for key, value in result[part].items()]
    rows += [('device', result['device']), ('time of the last session', report.duration(
        json.loads((workdir / 'seconds.json').read_text())))]
    rows += [('all sessions', json.dumps(result['sessions']))] if 'sessions' in result else []
    rows += [(f'captions of {split}', json.dumps(found))
             for split, found in result['captions'].items()]
    return report.section('What this was made with', 'result.json holds it, too, and evaluate '
                          '--reproduce result.json does all of it again.',
                          report.table(rows, ('', '')))
