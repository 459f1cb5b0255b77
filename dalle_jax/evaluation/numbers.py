"""The numbers of an evaluation, split by split; what takes long is kept in files.

    <workdir>/drawn_SPLIT/        candidates, see candidates.py
              measured/           of each set of images and blur the moments of features, statistics
                                  files for pytorch-fid; losses and CLIP's score
              shown_SPLIT.npz     the first images, for the report
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dalle_jax import runs
from dalle_jax.evaluation import candidates, scenes
from dalle_jax.evaluation.config import EvaluateConfig
from dalle_jax.evaluation.data import Given, Network, Real, decoded
from dalle_jax.evaluation.pairs import PARTS, Pairs
from dalle_jax.generate import Model, encode_captions
from dalle_jax.metrics import quality
from dalle_jax.metrics.blur import matrix
from dalle_jax.progress import Images
from dalle_jax.runs import say

SHOWN = 24  # images of the report


class Opened(NamedTuple):
    """What an evaluation works with.

    Attributes:
      options: with the batch in which is drawn.
      out: its directory.
      model: draws, or None.
      judge: gives the CLIP score, or None.
      network: FID's, or None.
      given: images to judge, or None.
      reference: what they are compared with in place of the images of the captions, or None.
      real: split -> captions and their images; {} where there is no source.
      pairs: split -> the captions that were chosen.
    """

    options: EvaluateConfig
    out: Path
    model: Model | None
    judge: Model | None
    network: Network | None
    given: Given | None
    reference: quality.Measured | None
    real: dict[str, Real]
    pairs: dict[str, Pairs]

    def count(self, split: str) -> int:
        """Images that are judged."""
        return len(self.given or self.pairs[split].ids)


def check(opened: Opened) -> None:
    """Raises ValueError or RunError where a number could not be had in the end."""
    options, network, given = opened.options, opened.network, opened.given
    if opened.judge and given:
        if given.captions is None:
            raise runs.RunError(f'{options.images} has no captions, so there is no CLIP score; '
                                'leave judge away')
        try:
            encode_captions(opened.judge.clip_run.tokenizer, given.captions, 1)
        except ValueError as error:
            raise ValueError(f'{options.images}: {error}') from error
    if not network:
        return
    side = given.side if given else opened.model.image_run.config.image_size
    if network.side not in (0, side):
        raise ValueError(f'images have {side} pixels a side, and {options.features} takes '
                         f'{network.side}; give features that were trained on such images')
    if opened.reference:
        _check_reference(opened)
    else:
        for radius in filter(None, options.blur):
            matrix(side, radius)
    for split in options.splits:
        counts = [opened.count(split)]
        if not opened.reference:
            counts.append(len(opened.pairs[split].ids))
        if min(counts) <= network.size:
            raise ValueError(
                f'{split}: FID with the {network.size} features of {network.name} needs at least '
                f'{network.size + 1} images, and there are {min(counts)}; take more captions or '
                "images, or leave it out with --config.features=''")
        if min(counts) < options.score_splits:
            raise ValueError(f'{split}: the Inception Score over {options.score_splits} parts '
                             f'needs as many images, and there are {min(counts)}; lower '
                             'score_splits')


def _check_reference(opened):
    """Raises ValueError where statistics are of other features."""
    options, network = opened.options, opened.network
    size = len(opened.reference.gaussian.mean)
    if size != network.size:
        raise ValueError(f'{options.reference} has statistics of {size} features, and '
                         f'{network.name} has {network.size}; give statistics of the same network')
    wanted, about = _about(opened, 0), quality.about(Path(options.reference))
    differing = [f'{key} {about[key]!r} in place of {value!r}' for key, value in wanted.items()
                 if about and about[key] != value]
    if differing:
        raise ValueError(f'{options.reference} has statistics of something else: '
                         f'{", ".join(differing)}')


def _about(opened, radius):
    """What statistics depend on besides the images."""
    network = opened.network
    return {'network': network.name, 'fingerprint': network.fingerprint,
            'resize': opened.options.resize if network.name == 'inception' else '',
            'blur': radius}


def of_split(opened: Opened, split: str) -> dict[str, Any]:
    """The numbers of one split."""
    options, out, model, given = opened.options, opened.out, opened.model, opened.given
    real, pairs = opened.real.get(split), opened.pairs.get(split)
    values, drawn, most = {}, None, max(options.conditions)
    if model:
        drawn = candidates.draw(model, pairs.captions, options.sampling, out / f'drawn_{split}',
                                split)
        best = {n: drawn.best_of(n) for n in options.conditions}

    def images(n, captions=None):
        return given.parts() if given else decoded(model, drawn.tokens(best[n][:captions]))

    def all_images(n, done):
        return _told(images(n), opened.count(split), split, done)

    def real_images(done):
        return _told(real.parts(), len(pairs.ids), split, done)

    shown = out / f'shown_{split}.npz'
    if not shown.exists():
        _write_shown(shown, real.parts() if real else None, images(most, PARTS),
                     pairs.captions if model else None)
    (out / 'measured').mkdir(exist_ok=True)
    if opened.network:
        values |= _quality(opened, split, real_images, all_images)
    if drawn is not None:
        chosen = np.arange(len(pairs.captions)), best[most]
        values['log_likelihood'] = float(drawn.logp[chosen].mean())
        if drawn.scores is not None and not opened.judge:
            values['clip_score'] = 100 * float(drawn.scores[chosen].mean())
    if opened.judge:
        values |= _kept(out / 'measured' / f'{split}_clip_score.json', lambda: _clip_score(
            opened.judge, given.captions if given else pairs.captions, all_images(most, 'scored')))
    if model and options.losses:
        values |= _kept(out / 'measured' / f'{split}_losses.json', lambda: _losses(
            model, pairs.captions, real_images('read by the transformer'), split))
    if options.source == 'scenes':
        values |= scenes.samples(model, pairs.captions, drawn, out, split)
    return values


def _in_batches(parts, size):
    """The same images in parts whose lengths `size` divides, but for the last."""
    waiting = []
    for part in parts:
        waiting.append(part)
        count = sum(map(len, waiting))
        if count >= size:
            images, whole = np.concatenate(waiting), count - count % size
            yield images[:whole]
            waiting = [images[whole:]] if whole < count else []
    if waiting:
        yield np.concatenate(waiting)


def _told(parts, total, split, done):
    """The same parts; the console learns how far their user is."""
    told = Images(total, split, done)
    for part in parts:
        yield part
        told(len(part))


def _kept(path, measure):
    """What `measure` returns, or has returned before a stop."""
    if not path.exists():
        runs.write_atomic(path, json.dumps(measure()))
    return json.loads(path.read_text())


def _quality(opened, split, real_images, images):
    """FID, IS and KID of every condition; what has been measured is kept in files."""
    options, network, real = opened.options, opened.network, opened.real.get(split)
    fid, score, deviation = (quality.named(key, network.name) for key in (
        'fid', 'inception_score', 'inception_score_std'))

    def measured(side, parts, radii, keep=False):
        """radius -> Measured; those that are missing in one pass over the images."""
        files = {radius: opened.out / 'measured' / f'{split}_{side}_blur{radius:g}.npz'
                 for radius in radii}
        missing = [radius for radius, file in files.items() if not file.exists()]
        if missing:
            at = ', '.join(f'{radius:g}' for radius in missing)
            found = quality.measure(
                network.of, _in_batches(parts(f'of {side} measured at blur {at}'), network.batch),
                missing, options.score_splits, keep)
            for radius, one in found.items():
                quality.write(runs.write_arrays, files[radius], one, _about(opened, radius))
        return {radius: quality.read(file) for radius, file in files.items()}

    def compared(found, with_real):
        entry = quality.compare(found, with_real, options.kid_subsets, options.kid_size)
        return {key if key in ('images', 'kid_subset') else quality.named(key, network.name): value
                for key, value in entry.items()}

    values, most = {}, max(options.conditions)
    if opened.reference and any(options.blur):
        say(f'{split}: {options.reference} is of images that are not blurred, so there is no blur')
    of_real = {0: opened.reference} if opened.reference else measured(
        'real', real_images, options.conditions[most], keep=True)
    for n, radii in options.conditions.items():
        found = measured(f'best_of_{n}', functools.partial(images, n),
                         [radius for radius in radii if radius in of_real], keep=n == most)
        for radius, one in found.items():
            entry = values[f'best_of_{n}_blur_{radius:g}'] = compared(one, of_real[radius])
            say(f'{split}: best of {n}, blur {radius:g}: '
                f'{quality.named("FID", network.name)} {entry[fid]:.4g}, '
                f'{quality.named("IS", network.name)} {entry[score]:.4g}')
    if options.source == 'scenes':
        others = measured('others', lambda done: real.others(), [0], keep=True)
        values['other_scenes'] = compared(others[0], of_real[0])
    for radius, found in of_real.items():
        if found.inception_score:  # statistics files have none
            values[f'real_blur_{radius:g}'] = dict(zip((score, deviation), found.inception_score))
    return {'quality': values, 'network': network.name}


def _write_shown(path, real, judged, captions):
    """The first images of both sides, for the report; captions only where they are of both."""
    arrays = {'real': next(real)} if real else {}
    arrays['judged'] = next(judged)
    fewer = min(SHOWN, *map(len, arrays.values()))
    arrays = {name: images[:fewer] for name, images in arrays.items()}
    if captions:
        arrays['captions'] = np.array(captions[:fewer])
    runs.write_arrays(path, arrays)


def _clip_score(judge, captions, parts):
    """100 times the mean similarity (Nichol et al. 2021, sec. 5.2)."""
    scores, begin = [], 0
    for part in parts:
        scores.append(judge.score(captions[begin:begin + len(part)], part))
        begin += len(part)
    return {'clip_score': 100 * float(np.concatenate(scores).mean())}


def _losses(model, captions, parts, split):
    """Nats per token of held-out captions, and of their images given them."""
    nats, counts, begin = np.zeros(2), np.zeros(2), 0
    for part in parts:
        found = model.losses(captions[begin:begin + len(part)], part)
        nats, counts, begin = nats + found[0].sum(0), counts + found[1].sum(0), begin + len(part)
    text, image = nats / np.maximum(counts, 1)
    say(f'{split}: {text:.4g} nats per text token, {image:.4g} per image token')
    return {'text_nats_per_token': text, 'image_nats_per_token': image}
