"""Judges trained runs: python -m dalle_jax.evaluate --config experiments/evaluate.py:scenes ...

Samples held-out captions, lets the CLIP choose, lets the oracle judge, compares reconstructions
with a plain lookup, and writes metrics.json and report.html into --workdir. Finished parts are
kept there, so the same command continues where it was stopped.
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from dalle_jax import config as config_lib
from dalle_jax import report, runs
from dalle_jax.runs import say


PICTURES = 24  # reconstructions kept for the report


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What is judged.

    Attributes:
      run, clip: directories of a DALL-E run trained on scenes and of the CLIP that chooses.
      captions: how many of the splits 'combos' and 'pairs' each.
      candidates, temperature, top_k, top_p, seed, batch: see generate.Sampling.
      images: scenes of the split 'combos' that are encoded and decoded.
      lookup_images: training scenes the plain k-means lookup is made from.
    """

    run: str
    clip: str
    captions: int = 256
    candidates: int = 8
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    batch: int = 256
    images: int = 400
    lookup_images: int = 2048


def run(config, workdir: str, mesh: str = '') -> dict[str, Any]:
    """Evaluates; returns what metrics.json holds.

    Args:
      mesh: see dalle_jax.load.

    Raises:
      ConfigError, RunError, CheckpointError: before anything is drawn.
    """
    from dalle_jax.data.scenes import SceneConfig, Scenes
    from dalle_jax.generate import Model, Sampling
    from dalle_jax.metrics import scenes as score

    values = config.to_dict() if hasattr(config, 'to_dict') else dict(config)
    options = config_lib.build(EvaluateConfig, values, '')
    out = Path(workdir)
    sampling = Sampling(options.candidates, options.temperature, options.top_k, options.top_p,
                        options.seed, options.batch)
    model = Model(options.run, options.clip, mesh)
    data = model.run.experiment.data
    if data.source != 'scenes' or model.run.experiment.model != 'dalle':
        raise runs.RunError(f'{options.run} is a {model.run.experiment.model} run on '
                            f'{data.source!r} data; this evaluation needs a DALL-E run on scenes, '
                            'whose pictures the oracle can read')
    out.mkdir(parents=True, exist_ok=True)
    _check_workdir(out, options, model)
    scene_config = SceneConfig(**data.scenes)

    # -- reconstructions, beside a lookup with as many codes ----------------------------------
    started = time.monotonic()
    dvae = model.image_run.config
    scenes = Scenes(scene_config, 'combos', options.images, seed=1001 + options.seed)
    originals = scenes.images(np.arange(options.images))
    captions = [scenes.caption(i) for i in range(options.images)]
    ids = np.concatenate([model.encode(part) for part in _chunks(originals, 100)])
    rebuilt = np.concatenate([model.decode(part) for part in _chunks(ids, 100)])
    training = Scenes(scene_config, 'any', options.lookup_images).images(
        np.arange(options.lookup_images))
    looked_up = score.lookup(training, originals, dvae.factor, dvae.vocab)
    counts, used, perplexity = score.usage(ids, dvae.vocab)
    judged = {name: score.judge_candidates(scene_config, images[:, None], captions)['all']
              for name, images in (('rebuilt', rebuilt), ('lookup', looked_up))}
    runs.write_arrays(out / 'reconstructions.npz', dict(
        counts=counts, captions=np.array(captions[:PICTURES]), originals=originals[:PICTURES],
        rebuilt=rebuilt[:PICTURES], lookup=looked_up[:PICTURES],
        rebuilt_right=judged['rebuilt'][:PICTURES, 0],
        lookup_right=judged['lookup'][:PICTURES, 0]))
    metrics = {
        'reconstruction_accuracy': float(judged['rebuilt'].mean()),
        'reconstruction_psnr': score.psnr(rebuilt, originals),
        'lookup_accuracy': float(judged['lookup'].mean()),
        'lookup_psnr': score.psnr(looked_up, originals),
        'codebook_size': dvae.vocab, 'codebook_used': used / dvae.vocab,
        'codebook_perplexity': perplexity,
        'distinct_patches': score.distinct_patches(training, dvae.factor),
    }
    say(f'reconstructions: {metrics["reconstruction_accuracy"]:.1%} right at '
        f'{metrics["reconstruction_psnr"]:.1f} dB (lookup {metrics["lookup_accuracy"]:.1%} at '
        f'{metrics["lookup_psnr"]:.1f} dB), {used} of {dvae.vocab} codes used, '
        f'{time.monotonic() - started:.0f} s')

    # -- samples of captions never trained on -------------------------------------------------
    for split, prefix in (('combos', 'caption'), ('pairs', 'pair')):
        source = Scenes(scene_config, split, options.captions, seed=1002 + options.seed)
        wanted = [source.captions(i)[i % scene_config.templates] for i in range(options.captions)]
        drawn = _samples(model, wanted, sampling, out / f'samples_{split}.npz', split)
        verdicts = score.judge_candidates(scene_config, drawn['images'], wanted)
        runs.write_arrays(out / f'samples_{split}.npz', drawn | {
            'captions': np.array(wanted), 'right': verdicts['all']})
        result = score.accuracies(verdicts, drawn['scores'])
        by_likelihood = score.accuracies(verdicts, drawn['logp'])['accuracy_n']
        metrics |= {
            f'{prefix}_accuracy_1': result['accuracy_1'],
            f'{prefix}_accuracy_{options.candidates}': result['accuracy_n'],
            f'{prefix}_accuracy_{options.candidates}_by_likelihood': by_likelihood,
            f'{prefix}_accuracy_any_of_{options.candidates}': result['any_n'],
            **{f'{prefix}_{name}': result[name] for name in score.ATTRIBUTES}}
        say(f'{split}: one sample {result["accuracy_1"]:.1%} right, best of {options.candidates} '
            f'by CLIP {result["accuracy_n"]:.1%}, by likelihood {by_likelihood:.1%}')

    # -- held-out losses, as the run measured them at its end ---------------------------------
    done = json.loads((Path(options.run) / 'done.json').read_text())
    metrics |= {'text_loss': done['text'], 'image_loss': done['image']}
    runs.write_atomic(out / 'metrics.json', json.dumps(metrics, indent=2))
    write_report(out, out / 'report.html')
    say(f'wrote {out}/metrics.json and {out}/report.html')
    return metrics


def write_report(workdir: str | Path, path: str | Path, seconds: Mapping[str, float] | None = None
                 ) -> None:
    """Draws the report of a finished evaluation from its files and those of its runs.

    Args:
      seconds: stage -> seconds, where the stages were run together.
    """
    from dalle_jax.data.scenes import SceneConfig
    from dalle_jax.metrics import scenes_page

    options = json.loads((Path(workdir) / 'evaluate.json').read_text())
    dalle = Path(options['run'])
    experiment = runs.read_config(dalle)
    paths = {'dvae': runs.named_by(experiment.frozen['image'], dalle), 'dalle': dalle,
             'clip': Path(options['clip'])}
    report.write(path, scenes_page.page(Path(workdir), paths, SceneConfig(**experiment.data.scenes),
                                        seconds or {}))


def _samples(model, captions, sampling, path, split) -> dict[str, np.ndarray]:
    """images, logp, scores of all captions; kept in `path` once drawn."""
    if path.exists():
        with np.load(path) as stored:
            return {name: stored[name] for name in ('images', 'logp', 'scores')}
    rows, started, told = [], time.monotonic(), time.monotonic()
    for drawn in model.draw(captions, sampling):
        rows.append(drawn)
        now = time.monotonic()
        if now - told > 5 or len(rows) == len(captions):
            rate = len(rows) * sampling.candidates / (now - started)
            left = (len(captions) - len(rows)) * sampling.candidates / rate
            say(f'{split}: {len(rows)}/{len(captions)} captions, {rate:.0f} images/s, '
                f'left {left:.0f} s')
            told = now
    arrays = {name: np.stack([getattr(row, name) for row in rows])
              for name in ('images', 'logp', 'scores')}
    runs.write_arrays(path, arrays)
    return arrays


def _check_workdir(out: Path, options: EvaluateConfig, model: Any) -> None:
    stored = out / 'evaluate.json'
    wanted = dataclasses.asdict(options) | {'weights': model.fingerprints,
                                            'mesh': dict(model.mesh.shape)}
    if stored.exists() and json.loads(stored.read_text()) != wanted:
        raise runs.RunError(f'{out} holds an evaluation with other settings or weights; give '
                            'another --workdir, or remove it')
    runs.write_atomic(stored, json.dumps(wanted, indent=2))


def _chunks(array, size):
    return [array[i:i + size] for i in range(0, len(array), size)]


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'unexpected argument {argv[1]!r}')
    run(CONFIG.value, WORKDIR.value, MESH.value)


if __name__ == '__main__':
    CONFIG = config_lib.define_flag()
    WORKDIR = flags.DEFINE_string('workdir', None, 'Directory the results are written to.')
    MESH = flags.DEFINE_string('mesh', '', "How the devices are used, such as 'tensor=2'; empty: "
                               'each has a copy of the parameters. See dalle_jax.load.')
    flags.mark_flags_as_required(['config', 'workdir'])
    app.run(main)
