"""Judges images: python -m dalle_jax.evaluate --config experiments/eval_coco.py --workdir DIR ...

Draws candidates for captions that were held out, or takes a folder or .npz of images, and measures
FID, IS and KID after several blurs and for the best of N candidates, CLIP's score, held-out losses
and, on scenes, what the oracle says. --workdir holds result.json, report.html and everything that
took long, so the same command continues where it was stopped; and

    python -m dalle_jax.evaluate --reproduce runs/eval/result.json --workdir runs/again

does all of it again and compares every number, to the last digit.
"""

import dataclasses
import json
import platform
import sys
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
from dalle_jax.runs import say
from dalle_jax.training.checkpoint import CheckpointError

SHOWN = 24  # images of the report
SOFTWARE = ('dalle_jax', 'jax', 'jaxlib', 'flax', 'numpy', 'pillow', 'sentencepiece')


def run(config, workdir: str | Path, mesh: str = '') -> dict[str, Any]:
    """Evaluates; returns what result.json holds, see there.

    Args:
      config: a ConfigDict of an experiment file, or a mapping of EvaluateConfig's values.
      mesh: see dalle_jax.load.

    Raises:
      ValueError, RunError, CheckpointError: before anything is drawn.
    """
    values = config.to_dict() if hasattr(config, 'to_dict') else dict(config)
    options = config_lib.build(EvaluateConfig, values, '')
    out, started = Path(workdir), time.monotonic()
    model = Model(options.run, options.clip or None, mesh) if options.run else None
    if model and model.run.experiment.model != 'dalle':
        raise runs.RunError(f'{options.run} is a {model.run.experiment.model} run; give a DALL-E '
                            'run, which can draw')
    judge = Model(options.judge, mesh=mesh) if options.judge else None
    network = data_lib.open_network(options.features, options.resize, options.feature_batch,
                                    mesh)
    given = data_lib.Given(options.images) if options.images else None
    size = given.side if given else model.image_run.config.image_size
    data = {split: data_lib.Real(options, split, size, model) for split in options.splits}
    if model:  # in the same batches when it is continued, whatever memory is free then
        options = dataclasses.replace(options, batch=_batch(out, options) or model.fit(
            options.sampling, options.captions or 10**6).batch)
    made_with = _made_with(model, judge, network)
    out.mkdir(parents=True, exist_ok=True)
    with runs.take(out, '--workdir'):
        _check_workdir(out, options, made_with)
        pairs = {split: real.choose(out / f'captions_{split}.json') for split, real in data.items()}
        for split, of_split in pairs.items():
            _check_count(network, split, min(len(given or of_split.ids), len(of_split.ids)))
        results = {split: _split(options, out, split, data[split], pairs[split], model, judge,
                                 network, given) for split in data}
        chosen = {split: {'captions': len(found.ids), 'hash': found.hash,
                          'file': f'captions_{split}.json', 'left_out': found.left_out_count}
                  for split, found in pairs.items()}
        if options.source == 'scenes' and options.reconstructions:
            results['tokenizer'] = scenes.tokenizer(model, options.reconstructions,
                                                    options.lookup_images, options.seed, out)
        written = json.dumps({
            'results': results, 'settings': dataclasses.asdict(options), 'mesh': mesh,
            'captions': chosen, **made_with}, indent=2)
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
        best = {n: drawn.best_of(n) for n in {n for n, _ in options.conditions}}

    def images(n):
        if given:
            return given.parts()
        return data_lib.decoded(model, drawn.tokens(best[n]))

    _write_shown(out / f'shown_{split}.npz', real, images(options.candidates), pairs.captions,
                 given)
    if network:
        values |= _quality(options, out, split, real, network, images)
    if drawn is not None:
        chosen = np.arange(len(pairs.captions)), best[options.candidates]
        values['log_likelihood'] = float(drawn.logp[chosen].mean())
        if drawn.scores is not None and not judge:
            values['clip_score'] = 100 * float(drawn.scores[chosen].mean())
    if judge:
        captions = given.captions if given else pairs.captions
        values['clip_score'] = _clip_score(judge, captions, images(options.candidates), split)
    if model and options.losses:
        values |= _losses(model, pairs, real, split)
    if options.source == 'scenes':
        values |= scenes.samples(model, pairs.captions, drawn, out, split)
    return values


def _quality(options, out, split, real, network, images):
    """FID, IS and KID of every condition; what has been measured is kept in files."""
    name = 'fid' if network.name == 'inception' else f'fid_{network.name}'

    def measured(side, parts, radius, keep):
        path = out / 'measured' / f'{split}_{side}_blur{radius:g}.npz'
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            began = time.monotonic()
            found = quality.measure(network.of, parts(), radius, options.score_splits, keep)
            quality.write(runs.write_arrays, path, found)
            say(f'{split}: {found.count:,} images of {side} at blur {radius:g} measured in '
                f'{time.monotonic() - began:.0f} s')
        return quality.read(path)

    def compared(found, with_real):
        entry = quality.compare(found, with_real, options.kid_subsets, options.kid_size)
        entry[name] = entry.pop('fid')
        return entry

    values, of_real = {}, {}
    most = max(n for n, _ in options.conditions)
    for n, radius in options.conditions:
        keep = n == most and not radius  # for KID
        if radius not in of_real:
            of_real[radius] = (
                measured('real', real.parts, radius, not radius) if options.reference == 'pairs'
                else quality.read(Path(options.reference)) if not radius else None)
        if of_real[radius] is None:
            continue
        found = measured(f'best_of_{n}', lambda n=n: images(n), radius, keep)
        entry = compared(found, of_real[radius])
        values[f'best_of_{n}_blur_{radius:g}'] = entry
        say(f'{split}: best of {n}, blur {radius:g}: {name} {entry[name]:.4g}, IS '
            f"{entry.get('inception_score', float('nan')):.4g}")
    if real.scenes and 0 in of_real:
        values['other_scenes'] = compared(measured('others', real.others, 0, True), of_real[0])
    for radius, found in of_real.items():
        if found and found.inception_score:
            values[f'real_blur_{radius:g}'] = dict(zip(
                ('inception_score', 'inception_score_std'), found.inception_score))
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
    return 100 * float(np.concatenate(scores).mean())


def _losses(model, pairs, real, split):
    """Nats per token of held-out captions, and of their images given them."""
    nats, counts, begin = np.zeros(2), np.zeros(2), 0
    for part in real.parts():
        found = model.losses(pairs.captions[begin:begin + len(part)], part)
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


def _check_workdir(out: Path, options: EvaluateConfig, made_with: Mapping[str, Any]) -> None:
    stored = out / 'evaluate.json'
    wanted = json.loads(json.dumps({'settings': dataclasses.asdict(options),
                                    'weights': made_with['weights']}))
    if stored.exists():
        old = json.loads(stored.read_text())
        changed = [f'{key} was {old[part].get(key)!r} and is now {new.get(key)!r}'
                   for part, new in wanted.items() for key in old[part] | new
                   if old[part].get(key) != new.get(key)]
        if changed:
            raise runs.RunError(f'{out} holds an evaluation with other settings or weights: '
                                f'{"; ".join(changed[:6])}. Give another --workdir, or remove it')
    runs.write_atomic(stored, json.dumps(wanted, indent=2))


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
    new = run(old['settings'], workdir, old['mesh'])
    for key in ('weights', 'software', 'device', 'captions'):
        if old[key] != new[key]:
            say(f'NOT the same: {key} were {json.dumps(old[key])} and are {json.dumps(new[key])}')
    before, after = (config_lib.flatten(r['results']) for r in (old, new))
    return [f'{key}: {before.get(key)} -> {after.get(key)}' for key in before | after
            if before.get(key) != after.get(key)]


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'unexpected argument {argv[1]!r}')
    try:
        if not FLAGS.reproduce:
            if CONFIG.value is None:
                raise ValueError('give --config, or --reproduce with a result.json')
            run(CONFIG.value, FLAGS.workdir, FLAGS.mesh)
            return 0
        differing = reproduce(FLAGS.reproduce, FLAGS.workdir)
    except (ValueError, FileNotFoundError, runs.RunError, CheckpointError) as error:
        print(f'evaluate: {error}', file=sys.stderr)
        return 2
    for line in differing:
        say(line)
    say(f'{len(differing)} numbers differ' if differing else 'every number is the same')
    return bool(differing)


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    CONFIG = config_lib.define_flag()
    flags.DEFINE_string('workdir', None, 'Directory the results are written to.', required=True)
    flags.DEFINE_string('mesh', '', "How the devices are used, such as 'tensor=2'; empty: each has "
                        'a copy of the parameters. See dalle_jax.load.')
    flags.DEFINE_string('reproduce', '', 'A result.json whose evaluation is done again.')
    app.run(main)
