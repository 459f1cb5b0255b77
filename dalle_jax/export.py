"""Runs to give away: python -m dalle_jax.export --run runs/dalle --out DIR

Writes DIR/dalle with model.safetensors (the averaged parameters, where a run keeps them),
config.json, tokenizer.model and a model card, README.md; and beside it the image tokenizer that a
DALL-E was trained with, DIR/dvae. dalle_jax.load('DIR/dalle'), sample, evaluate and --config.frozen
take these directories, wherever they are moved together, and draw the same images.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

import dalle_jax
from dalle_jax import config as config_lib
from dalle_jax import runs
from dalle_jax.interop import files
from dalle_jax.runs import Loaded, say
from dalle_jax.training.partition import named_leaves

# Of done.json, what a card tells: what was measured.
FACTS = ('loss', 'image', 'text', 'text_nats_per_real_token', 'psnr_hard',
         'accuracy', 'bad_records')


def run(path: str | Path, out: str | Path) -> Path:
    """Exports a finished run, and the image tokenizer that it names; returns the run's directory.

    Raises:
      RunError: no finished run there, or something is in the way. CheckpointError: damaged.
    """
    runs.start_jax()
    loaded = [runs.load(path)]
    named = loaded[0].experiment.frozen.get('image')
    if named:
        loaded.append(runs.load(runs.named_by(named, path)))
    targets = [Path(out) / found.path.resolve().name for found in loaded]
    if len({str(target) for target in targets}) < len(targets):
        raise runs.RunError(f'{path} and its image tokenizer are both called {targets[0].name}; '
                            'rename the directory of one of them')
    exports = dict(zip(targets, loaded))
    if named and _holds(targets[1], loaded[1]):  # it came with another DALL-E
        say(f'{targets[1]} is there already')
        del exports[targets[1]]
    for target in exports:
        if target.exists():
            raise runs.RunError(f'{target} exists; remove it or give another --out')
    for target, found in reversed(exports.items()):  # what is named before what names it
        _write(found, target, targets[-1].name if named else '')
        size = (target / 'model.safetensors').stat().st_size
        say(f'{target}: {found.experiment.model} of step {found.step:,}, {size:,} bytes')
    return targets[0]


def _holds(target: Path, found: Loaded) -> bool:
    """Whether a directory is this run, exported."""
    return (target / 'model.safetensors').exists() and (
        runs.fingerprint(runs.load(target).params) == runs.fingerprint(found.params))


def _write(found: Loaded, target: Path, tokenizer: str) -> None:
    part = target.with_name(target.name + '.part')
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    experiment = found.experiment
    if experiment.model == 'dalle' and tokenizer:
        experiment = dataclasses.replace(experiment, frozen={'image': tokenizer})
    else:
        experiment = dataclasses.replace(experiment, frozen={})
    # Not where on the author's machine they are.
    experiment = dataclasses.replace(experiment, data=dataclasses.replace(
        experiment.data, path=Path(experiment.data.path).name))
    done = json.loads((found.path / 'done.json').read_text())
    for source in done.get('sources', {}).values():
        source['file'] = Path(source['file']).name
    fingerprint = runs.fingerprint(found.params)
    files.write(part / 'model.safetensors', dict(named_leaves(found.params)), {
        'format': 'dalle_jax', 'model': experiment.model, 'fingerprint': fingerprint})
    (part / 'config.json').write_text(config_lib.to_json(experiment))
    (part / 'done.json').write_text(json.dumps(done, indent=2))
    if found.tokenizer:
        shutil.copyfile(found.path / 'tokenizer.model', part / 'tokenizer.model')
    (part / 'README.md').write_text(_card(found, done, fingerprint, tokenizer))
    os.replace(part, target)


def _card(found: Loaded, done: dict, fingerprint: str, tokenizer: str) -> str:
    experiment = found.experiment
    data = experiment.data
    count = sum(np.size(x) for x in jax.tree.leaves(found.params))
    name = found.path.resolve().name
    use = ['```python', 'import dalle_jax', '', f"model = dalle_jax.load('{name}')", {
        'dalle': "model.sample(['a caption'], n=8, seed=0)",
        'clip': 'model.score(captions, images)'}.get(experiment.model, 'model.encode(images)'),
        '```']
    if experiment.model == 'words':
        use = [f'`evaluate --config.features={name}` measures images through it.']
    sizes = [f'| {key} | {json.dumps(value)} |'
             for key, value in json.loads(json.dumps(dataclasses.asdict(found.config))).items()]
    facts = [f'| {key} | {done[key]:.6g} |' for key in FACTS if key in done]
    beside = f'\nIts image tokenizer is `../{tokenizer}`, which must lie beside it.\n'
    author = ('What the data are, who may use this model and for what, and what it should not be '
              'used for, is for its author to say here.')
    if 'sources' in done:
        origin = 'converted from published weights by'
        training = [
            'Where these weights are from:', '', '| file | SHA-256 |', '| --- | --- |',
            *(f'| {source["file"]} | {source["sha256"]} |' for source in done['sources'].values()),
            '', author]
    else:
        origin = 'trained with'
        training = [
            f'Data: `{data.source}`{f" {Path(data.path).name}" if data.path else ""}, batches of '
            f'{data.batch_size}, {experiment.loop.steps:,} steps, seed {experiment.seed}. {author}',
            '', 'Measured on held-out data at the end of training:', '',
            '| | |', '| --- | --- |', *facts]
    return '\n'.join([
        f'# {name}', '',
        f'A `{experiment.model}` of {count:,} parameters, {origin} dalle_jax '
        f'{dalle_jax.__version__} and exported from step {found.step:,}.',
        beside if experiment.model == 'dalle' and tokenizer else '',
        *use, '', '## Training', '', *training, '', '## Sizes', '',
        '| | |', '| --- | --- |', *sizes, '',
        f'Weights: `model.safetensors`, fingerprint {fingerprint}. `config.json` is the whole '
        'experiment.', ''])


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'unexpected argument {argv[1]!r}')
    run(flags.FLAGS.run, flags.FLAGS.out)


if __name__ == '__main__':
    flags.DEFINE_string('run', None, 'Directory of a finished run.', required=True)
    flags.DEFINE_string('out', None, 'Directory in which those of the exported runs are made.',
                        required=True)
    runs.start(main)
