"""Judges images: python -m dalle_jax.evaluate --config experiments/eval_coco.py --workdir DIR ...

Draws candidates for captions that were held out, or takes a folder or .npz of images, and measures
FID, IS and KID after several blurs and for the best of N candidates, CLIP's score, held-out losses
and, on scenes, what the oracle says. --workdir holds result.json, report.html and everything that
took long, so the same command continues where it was stopped; and

    python -m dalle_jax.evaluate --reproduce runs/eval/result.json --workdir runs/again

does all of it again and compares every number, to the last digit.
"""

import dataclasses
import functools
import json
import platform
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

from dalle_jax import config as config_lib
from dalle_jax import report, runs
from dalle_jax.evaluation import candidates, data as data_lib, page, scenes
from dalle_jax.evaluation.config import EvaluateConfig
from dalle_jax.generate import Model
from dalle_jax.metrics import quality
from dalle_jax.progress import Images
from dalle_jax.runs import say

SHOWN = 24  # images of the report
SOFTWARE = ('dalle_jax', 'jax', 'jaxlib', 'flax', 'numpy', 'pillow', 'sentencepiece')


def run(config, workdir: str | Path) -> dict[str, Any]:
    """Evaluates; returns what result.json holds, see there.

    Args:
      config: a ConfigDict of an experiment file, or a mapping of EvaluateConfig's values.

    Raises:
      ValueError, RunError, CheckpointError: before anything is drawn.
    """
    values = config.to_dict() if hasattr(config, 'to_dict') else dict(config)
    options = config_lib.build(EvaluateConfig, values, '')
    out, started = Path(workdir), time.monotonic()
    runs.start_jax()
    model = Model(options.run, options.clip or None, options.mesh) if options.run else None
    if model and model.run.experiment.model != 'dalle':
        raise runs.RunError(f'{options.run} is a {model.run.experiment.model} run; give a DALL-E '
                            'run, which can draw')
    judge = Model(options.judge, mesh=options.mesh) if options.judge else None
    network = data_lib.open_network(options.features, options.resize, options.feature_batch,
                                    options.mesh)
    given = data_lib.Given(options.images) if options.images else None
    size = given.side if given else model.image_run.config.image_size
    data = {split: data_lib.Real(options, split, size, model) for split in options.splits}
    if model:  # in the same batches when it is continued, whatever memory is free then
        options = dataclasses.replace(options, batch=_batch(out, options) or model.fit(
            options.sampling, options.captions or 10**6).batch)
    made_with = _made_with(model, judge, network)
    out.mkdir(parents=True, exist_ok=True)
    with runs.take(out, '--workdir'):
        made_with |= _begin(out, options, made_with)
        pairs = {split: real.choose(out / f'captions_{split}.json') for split, real in data.items()}
        for split, of_split in pairs.items():
            _check_count(network, split, min(len(given or of_split.ids), len(of_split.ids)))
        results = {split: _split(options, out, split, data[split], pairs[split], model, judge,
                                 network, given) for split in data}
        chosen = {split: {'captions': len(found.ids), 'hash': found.hash,
                          'file': f'captions_{split}.json', 'left_out': found.left_out_count,
                          'excluded': found.excluded}
                  for split, found in pairs.items()}
        if options.source == 'scenes' and options.reconstructions:
            results['tokenizer'] = scenes.tokenizer(model, options.reconstructions,
                                                    options.lookup_images, options.seed, out)
        written = json.dumps({
            'results': results, 'settings': dataclasses.asdict(options), 'captions': chosen,
            **made_with}, indent=2)
        _write_seconds(out, time.monotonic() - started)
        runs.write_atomic(out / 'result.json', written)
        write_report(out, out / 'report.html')
    say(f'wrote {out}/result.json and {out}/report.html')
    return json.loads(written)


def _check_count(network, split, count):
    if network and count <= network.size:
        raise ValueError(f'{split}: FID with the {network.size} features of {network.name} needs '
                         f'at least {network.size + 1} images, and there are {count}; take more '
                         "captions or images, or leave it out with --config.features=''")


def _split(options, out, split, real, pairs, model, judge, network, given):
    """The numbers of one split."""
    values = {}
    drawn = None
    if model:
        drawn = candidates.draw(model, pairs.captions, options.sampling, out / f'drawn_{split}',
                                split)
        best = {n: drawn.best_of(n) for n in options.conditions}

    def images(n, done):
        parts = given.parts() if given else data_lib.decoded(model, drawn.tokens(best[n]))
        return _told(parts, len(given or pairs.ids), split, done)

    def real_images(done):
        return _told(real.parts(), len(pairs.ids), split, done)

    most = max(options.conditions)
    shown = out / f'shown_{split}.npz'
    if not shown.exists():
        _write_shown(shown, real, images(most, 'shown'), pairs.captions, given)
    if network:
        values |= _quality(options, out, split, real, network, real_images, images)
    if drawn is not None:
        chosen = np.arange(len(pairs.captions)), best[most]
        values['log_likelihood'] = float(drawn.logp[chosen].mean())
        if drawn.scores is not None and not judge:
            values['clip_score'] = 100 * float(drawn.scores[chosen].mean())
    if judge:
        captions = given.captions if given else pairs.captions
        values |= _kept(out / 'measured' / f'{split}_clip_score.json', lambda: _clip_score(
            judge, captions, images(most, 'scored'), split))
    if model and options.losses:
        values |= _kept(out / 'measured' / f'{split}_losses.json', lambda: _losses(
            model, pairs.captions, real_images('read by the transformer'), split))
    if options.source == 'scenes':
        values |= scenes.samples(model, pairs.captions, drawn, out, split)
    return values


def _told(parts, total, split, done):
    """The same parts; the console learns how far their user is."""
    told = Images(total, split, done)
    for part in parts:
        yield part
        told(len(part))


def _kept(path, measure):
    """What `measure` returns, or has returned before it was stopped elsewhere."""
    if not path.exists():
        found = measure()
        path.parent.mkdir(exist_ok=True)
        runs.write_atomic(path, json.dumps(found))
    return json.loads(path.read_text())


def _quality(options, out, split, real, network, real_images, images):
    """FID, IS and KID of every condition; what has been measured is kept in files."""
    # Numbers of another network than Inception are called by its name, so that none is mistaken.
    suffix = '' if network.name == 'inception' else f'_{network.name}'

    def measured(side, parts, radii, keep=False):
        """radius -> Measured; those that are missing in one pass over the images."""
        files = {r: out / 'measured' / f'{split}_{side}_blur{r:g}.npz' for r in radii}
        missing = [radius for radius, file in files.items() if not file.exists()]
        if missing:
            at = ', '.join(f'{radius:g}' for radius in missing)
            found = quality.measure(network.of, parts(f'of {side} measured at blur {at}'), missing,
                                    options.score_splits, keep)
            (out / 'measured').mkdir(exist_ok=True)
            for radius, one in found.items():
                quality.write(runs.write_arrays, files[radius], one)
        return {radius: quality.read(file) for radius, file in files.items()}

    def compared(found, with_real):
        entry = quality.compare(found, with_real, options.kid_subsets, options.kid_size)
        return {key if key in ('images', 'kid_subset') else key + suffix: value
                for key, value in entry.items()}

    values, most = {}, max(options.conditions)
    of_real = (measured('real', real_images, options.conditions[most], keep=True)
               if options.reference == 'pairs' else {0: quality.read(Path(options.reference))})
    for n, radii in options.conditions.items():
        found = measured(f'best_of_{n}', functools.partial(images, n),
                         [radius for radius in radii if radius in of_real], keep=n == most)
        for radius, one in found.items():
            entry = values[f'best_of_{n}_blur_{radius:g}'] = compared(one, of_real[radius])
            say(f'{split}: best of {n}, blur {radius:g}: FID{suffix} {entry["fid" + suffix]:.4g}, '
                f'IS{suffix} {entry["inception_score" + suffix]:.4g}')
    if real.scenes and 0 in of_real:
        others = measured('others', lambda done: real.others(), [0], keep=True)
        values['other_scenes'] = compared(others[0], of_real[0])
    for radius, found in of_real.items():
        if found.inception_score:  # statistics files have none
            values[f'real_blur_{radius:g}'] = dict(zip(
                (f'inception_score{suffix}', f'inception_score_std{suffix}'),
                found.inception_score))
    return {'quality': values, 'network': network.name}


def _write_shown(path, real, judged, captions, given):
    """The first images of both sides, for the report."""
    arrays = {'real': next(real.parts())[:SHOWN], 'judged': next(judged)[:SHOWN]}
    if given:  # they need not belong to each other, nor be as many
        fewer = min(map(len, arrays.values()))
        arrays = {name: images[:fewer] for name, images in arrays.items()}
    else:
        arrays['captions'] = np.array(captions[:len(arrays['real'])])
    runs.write_arrays(path, arrays)


def _clip_score(judge, captions, parts, split):
    """100 times the mean similarity (Nichol et al. 2021, sec. 5.2)."""
    if captions is None:
        raise runs.RunError(f'{split}: the images that are given have no captions, so there is no '
                            'CLIP score; leave judge away')
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


# -- what a result was made with -------------------------------------------------------------------


def _made_with(model, judge, network):
    device = jax.devices()[0]
    weights = dict(model.fingerprints) if model else {}
    if judge:
        weights['judge'] = judge.fingerprints['clip']
    if network:
        weights[network.name] = network.fingerprint
    return {'weights': weights,
            'software': {name: metadata.version(name) for name in SOFTWARE}
            | {'python': platform.python_version()},
            'device': f'{jax.device_count()} x {device.device_kind or device.platform}, '
                      f'{platform.machine()}'}


def _batch(out, options):
    """The batch that a directory was begun with, or that is asked for; 0: neither."""
    begun = out / 'evaluate.json'
    return options.batch or (json.loads(begun.read_text())['settings']['batch']
                             if begun.exists() else 0)


def _begin(out: Path, options: EvaluateConfig, made_with: Mapping[str, Any]) -> dict[str, Any]:
    """Writes down what a new directory is begun with.

    Returns:
      {}; 'begun_with', where a directory was begun with other software or on another device.

    Raises:
      RunError: it was begun with other settings or weights.
    """
    stored = out / 'evaluate.json'
    now = json.loads(json.dumps({'settings': dataclasses.asdict(options), **made_with}))
    if not stored.exists():
        runs.write_atomic(stored, json.dumps(now, indent=2))
        return {}
    old = json.loads(stored.read_text())
    runs.check_same(*({**one['settings'], **{f'weights of {name}': value for name, value
                                             in one['weights'].items()}} for one in (old, now)),
                    f'{out} holds an evaluation with other settings or weights',
                    'Give another --workdir, or remove it')
    begun_with = {key: old[key] for key in ('software', 'device') if old[key] != now[key]}
    if begun_with:
        say(f'{out} was begun with {json.dumps(begun_with)}; a part of its numbers comes from '
            'there')
        return {'begun_with': begun_with}
    return {}


def _write_seconds(out, seconds):
    """Adds a session's seconds; apart from the result, which is the same each time."""
    path = out / 'seconds.json'
    before = json.loads(path.read_text())['seconds'] if path.exists() else 0.0
    runs.write_atomic(path, json.dumps({'seconds': before + seconds}))


def write_report(workdir: str | Path, path: str | Path, seconds: Mapping[str, float] | None = None
                 ) -> None:
    """Draws the report of a finished evaluation from its files and those of its runs.

    Args:
      seconds: stage -> seconds, where the stages were run together.
    """
    report.write(path, page.page(Path(workdir), seconds or {}))


# -- again -----------------------------------------------------------------------------------------


def reproduce(path: str | Path, workdir: str | Path) -> list[str]:
    """Evaluates as a result.json says, in another directory; returns the numbers that differ.

    Raises:
      ValueError: the file is no result. RunError: weights or software are not those of the result;
        names them.
    """
    old = json.loads(Path(path).read_text())
    if not {'settings', 'results', 'weights', 'software'} <= old.keys():
        raise ValueError(f'{path} is no result of evaluate: it lacks settings, results, weights or '
                         'software')
    if 'begun_with' in old:
        say(f'{path} was begun with other software or on another device, so numbers may differ')
    new = run(old['settings'], workdir)
    for key in ('weights', 'software', 'device', 'captions'):
        if old[key] != new[key]:
            say(f'NOT the same: {key} were {json.dumps(old[key])} and are {json.dumps(new[key])}')
    before, after = (config_lib.flatten(r['results']) for r in (old, new))
    return [f'{key}: {before.get(key)} -> {after.get(key)}' for key in before | after
            if before.get(key) != after.get(key)]


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'unexpected argument {argv[1]!r}')
    if not FLAGS.reproduce:
        if CONFIG.value is None:
            raise ValueError('give --config, or --reproduce with a result.json')
        run(CONFIG.value, FLAGS.workdir)
        return 0
    differing = reproduce(FLAGS.reproduce, FLAGS.workdir)
    for line in differing:
        say(line)
    say(f'{len(differing)} numbers differ' if differing else 'every number is the same')
    return bool(differing)


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    CONFIG = config_lib.define_flag()
    flags.DEFINE_string('workdir', None, 'Directory the results are written to.', required=True)
    flags.DEFINE_string('reproduce', '', 'A result.json whose evaluation is done again.')
    runs.start(main)
