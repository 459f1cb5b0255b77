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
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from dalle_jax import config as config_lib
from dalle_jax import drawing, report, runs
from dalle_jax.evaluation import data as data_lib, numbers, page, scenes
from dalle_jax.evaluation.config import EvaluateConfig
from dalle_jax.evaluation.pairs import short_hash
from dalle_jax.generate import Model
from dalle_jax.metrics import quality
from dalle_jax.runs import say

SOFTWARE = ('dalle_jax', 'jax', 'jaxlib', 'flax', 'numpy', 'pillow', 'sentencepiece')


def run(config, workdir: str | Path) -> dict[str, Any]:
    """Evaluates; returns what result.json holds, see there.

    Args:
      config: a ConfigDict of an experiment file, or a mapping of EvaluateConfig's values.

    Raises:
      ValueError, OSError, RunError, CheckpointError: before anything is drawn.
    """
    values = config.to_dict() if hasattr(config, 'to_dict') else dict(config)
    out, started = Path(workdir), time.monotonic()
    runs.start_jax()
    opened = _open(config_lib.build(EvaluateConfig, values, ''), out)
    made_with, options = _made_with(opened), opened.options
    out.mkdir(parents=True, exist_ok=True)
    with runs.take(out, '--workdir'):
        sessions = _begun(out, {'settings': dataclasses.asdict(options), **made_with})
        files = {split: out / f'captions_{split}.json' for split in opened.real}
        opened = opened._replace(pairs={split: real.choose(files[split] if sessions else None)
                                        for split, real in opened.real.items()})
        numbers.check(opened)
        session = {key: made_with[key] for key in ('software', 'device')}
        sessions += [session] if session not in sessions else []
        runs.write_atomic(out / 'evaluate.json', json.dumps(
            {'settings': dataclasses.asdict(options), 'weights': made_with['weights'],
             'inputs': made_with['inputs'], 'sessions': sessions}, indent=2))
        for split, found in opened.pairs.items():
            runs.write_atomic(files[split], json.dumps(
                {'hash': found.hash, 'pairs': found._asdict()}, indent=1))
        results = {split: numbers.of_split(opened, split) for split in options.splits}
        if options.source == 'scenes' and options.reconstructions:
            results['tokenizer'] = scenes.tokenizer(opened.model, options.reconstructions,
                                                    options.lookup_images, options.seed, out)
        captions = {split: _of_captions(opened, found, files[split])
                    for split, found in opened.pairs.items()}
        written = json.dumps({
            'results': results, 'settings': dataclasses.asdict(options), 'captions': captions,
            **made_with, **({'sessions': sessions} if sessions[1:] else {})}, indent=2)
        # Apart from the result, which is the same each time.
        runs.write_atomic(out / 'seconds.json', json.dumps(time.monotonic() - started))
        runs.write_atomic(out / 'result.json', written)
        write_report(out, out / 'report.html')
    say(f'wrote {out}/result.json and {out}/report.html')
    return json.loads(written)


def _open(options, out):
    """Everything but the captions."""
    model = Model(options.run, options.clip or None, options.mesh) if options.run else None
    if model and model.run.experiment.model != 'dalle':
        raise runs.RunError(f'{options.run} is a {model.run.experiment.model} run; give a DALL-E '
                            'run, which can draw')
    judge = Model(options.judge, mesh=options.mesh) if options.judge else None
    if judge and not judge.clip_run:
        raise runs.RunError(f'judge: {options.judge} is a {judge.run.experiment.model} run; give a '
                            'CLIP run')
    network = data_lib.open_network(options.features, options.resize, options.feature_batch,
                                    options.mesh)
    given = data_lib.Given(options.images) if options.images else None
    size = given.side if given else model.image_run.config.image_size
    reference = None if options.reference == 'pairs' else quality.read(Path(options.reference))
    real = {split: data_lib.Real(options, split, size, model)
            for split in options.splits if options.source}
    stored = out / 'evaluate.json'
    if model and not options.batch:
        # In the same batches when it is continued, whatever memory is free then.
        options = dataclasses.replace(options, batch=(
            json.loads(stored.read_text())['settings']['batch'] if stored.exists() else
            model.fit(options.sampling, options.captions or 10**6).batch))
    return numbers.Opened(options, out, model, judge, network, given, reference, real, {})


def _of_captions(opened, pairs, file):
    """What result.json says of the captions of a split."""
    batch = opened.model and drawing.batch_shape(opened.options.batch, len(pairs.ids),
                                                 opened.options.candidates)
    return {'captions': len(pairs.ids), 'hash': pairs.hash, 'file': file.name,
            'images_hash': pairs.images_hash, 'left_out': pairs.left_out_count,
            'excluded': pairs.excluded, 'drawn_at_once': batch}


# -- what a result was made with -------------------------------------------------------------------


def _made_with(opened):
    device = jax.devices()[0]
    weights = dict(opened.model.fingerprints) if opened.model else {}
    if opened.judge:
        weights['judge'] = opened.judge.fingerprints['clip']
    if opened.network:
        weights[opened.network.name] = opened.network.fingerprint
    inputs = {'images': opened.given.fingerprint} if opened.given else {}
    if opened.given and opened.judge:
        inputs['captions'] = short_hash(json.dumps(opened.given.captions).encode())
    if opened.reference:
        inputs['reference'] = short_hash(Path(opened.options.reference).read_bytes())
    return {'weights': weights, 'inputs': inputs,
            'software': {name: metadata.version(name) for name in SOFTWARE}
            | {'python': platform.python_version()},
            'device': f'{jax.device_count()} x {device.device_kind or device.platform}, '
                      f'{platform.machine()}'}


def _begun(out: Path, now: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The software and devices with which a directory was made so far; none if it is new.

    Raises:
      RunError: it was begun with other settings, weights or images, or it is none of an evaluation.
    """
    stored = out / 'evaluate.json'
    if not stored.exists():
        strangers = sorted(file.name for file in out.iterdir()
                           if file.name != 'lock' and '.tmp' not in file.suffixes)
        if strangers:
            raise runs.RunError(f'{out} is not empty (it holds {", ".join(strangers[:4])}) and has '
                                'no evaluate.json; give another --workdir, or remove it')
        return []
    old, now = json.loads(stored.read_text()), json.loads(json.dumps(now))
    runs.check_same(*({**one['settings'], **{
        f'hash of {name}': value for name, value in {**one['weights'], **one['inputs']}.items()}}
        for one in (old, now)), f'{out} holds an evaluation with other settings, weights or images',
        'Give another --workdir, or remove it')
    for key in ('software', 'device'):
        if old['sessions'][-1][key] != now[key]:
            say(f'{out} was made with another {key}, {json.dumps(old["sessions"][-1][key])}; a '
                'part of its numbers comes from there')
    return old['sessions']


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

    Other weights, inputs, software, devices or captions are told on the console.

    Raises:
      ValueError: the file is no result.
    """
    try:
        old = dict(json.loads(Path(path).read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f'{path} is no result of evaluate: {error}') from error
    made_with = ('weights', 'inputs', 'software', 'device', 'captions')
    if lacking := sorted({'settings', 'results', *made_with} - old.keys()):
        raise ValueError(f'{path} is no result of evaluate: it lacks {", ".join(lacking)}')
    if Path(workdir).resolve() == Path(path).resolve().parent:
        raise ValueError(f'{workdir} holds the numbers that are to be reproduced; give another '
                         '--workdir')
    if 'sessions' in old:
        say(f'{path} was made with several versions or on several devices, so numbers may differ')
    new = run(old['settings'], workdir)
    for key in made_with:
        if old[key] != new[key]:
            say(f'NOT the same: {key} were {json.dumps(old[key])} and are {json.dumps(new[key])}')
    before, after = (config_lib.flatten(r['results']) for r in (old, new))
    return [f'{key}: {before.get(key)} -> {after.get(key)}' for key in before | after
            if json.dumps(before.get(key)) != json.dumps(after.get(key))]  # nan is not nan


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'unexpected argument {argv[1]!r}')
    if not FLAGS.reproduce:
        if CONFIG.value is None:
            raise ValueError('give --config, or --reproduce with a result.json')
        run(CONFIG.value, FLAGS.workdir)
        return 0
    if CONFIG.value is not None:
        raise ValueError('--config and --reproduce: give one of them')
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
