"""What only scenes can be asked: is the picture what its caption says, by an oracle."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dalle_jax import runs
from dalle_jax.data.scenes import SceneConfig, Scenes
from dalle_jax.evaluation.candidates import Candidates
from dalle_jax.evaluation.data import PARTS, decoded
from dalle_jax.metrics import scenes as score

PICTURES = 24  # reconstructions kept for the report


def samples(model: Any, captions: Sequence[str], drawn: Candidates, out: Path, split: str
            ) -> dict[str, float]:
    """The oracle's verdicts on all candidates; their images are written for the report."""
    count, n = drawn.logp.shape
    tokens = drawn.tokens(np.tile(np.arange(n), (count, 1)))
    images = np.concatenate(list(decoded(model, tokens.reshape(-1, *tokens.shape[2:]))))
    images = images.reshape(count, n, *images.shape[1:])
    config = SceneConfig(**model.run.experiment.data.scenes)
    verdicts = score.judge_candidates(config, images, captions)
    scores = drawn.logp if drawn.scores is None else drawn.scores
    runs.write_arrays(out / f'samples_{split}.npz', {
        'images': images, 'logp': drawn.logp, 'scores': scores, 'captions': np.array(captions),
        'right': verdicts['all']})
    found = score.accuracies(verdicts, scores)
    by_likelihood = score.accuracies(verdicts, drawn.logp)['accuracy_n']
    runs.say(f'{split}: one sample {found["accuracy_1"]:.1%} right, best of {n} '
             f'{found["accuracy_n"]:.1%}, by likelihood {by_likelihood:.1%}')
    return {'accuracy_1': found['accuracy_1'], f'accuracy_{n}': found['accuracy_n'],
            f'accuracy_{n}_by_likelihood': by_likelihood, f'accuracy_any_of_{n}': found['any_n'],
            **{name: found[name] for name in score.ATTRIBUTES}}


def tokenizer(model: Any, count: int, lookup_images: int, seed: int, out: Path
              ) -> dict[str, float]:
    """Reconstructions of new scenes, beside those of a k-means lookup with as many codes."""
    started = time.monotonic()
    config, dvae = SceneConfig(**model.run.experiment.data.scenes), model.image_run.config
    scenes = Scenes(config, 'combos', count, seed=1001 + seed)
    originals = scenes.images(np.arange(count))
    captions = [scenes.caption(i) for i in range(count)]
    ids = np.concatenate([model.encode(originals[i:i + PARTS]) for i in range(0, count, PARTS)])
    rebuilt = np.concatenate(list(decoded(model, ids)))
    training = Scenes(config, 'any', lookup_images).images(np.arange(lookup_images))
    looked_up = score.lookup(training, originals, dvae.factor, dvae.vocab)
    counts, used, perplexity = score.usage(ids, dvae.vocab)
    right = {name: score.judge_candidates(config, images[:, None], captions)['all'][:, 0]
             for name, images in (('rebuilt', rebuilt), ('lookup', looked_up))}
    runs.write_arrays(out / 'reconstructions.npz', dict(
        counts=counts, captions=np.array(captions[:PICTURES]), originals=originals[:PICTURES],
        rebuilt=rebuilt[:PICTURES], lookup=looked_up[:PICTURES],
        rebuilt_right=right['rebuilt'][:PICTURES], lookup_right=right['lookup'][:PICTURES]))
    found = {
        'reconstruction_accuracy': float(right['rebuilt'].mean()),
        'reconstruction_psnr': score.psnr(rebuilt, originals),
        'lookup_accuracy': float(right['lookup'].mean()),
        'lookup_psnr': score.psnr(looked_up, originals),
        'codebook_size': dvae.vocab, 'codebook_used': used / dvae.vocab,
        'codebook_perplexity': perplexity,
        'distinct_patches': score.distinct_patches(training, dvae.factor)}
    runs.say(f'reconstructions: {found["reconstruction_accuracy"]:.1%} right at '
             f'{found["reconstruction_psnr"]:.1f} dB (lookup {found["lookup_accuracy"]:.1%} at '
             f'{found["lookup_psnr"]:.1f} dB), {used} of {dvae.vocab} codes used, '
             f'{time.monotonic() - started:.0f} s')
    return found
