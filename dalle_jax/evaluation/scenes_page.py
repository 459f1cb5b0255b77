"""The report of a scenes evaluation, drawn from the files that runs and evaluation have written."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dalle_jax import report, runs
from dalle_jax.data import scenes_oracle
from dalle_jax.data.scenes import SceneConfig
from dalle_jax.metrics.scenes import ATTRIBUTES
from dalle_jax.report import Fact

TRAINED = {'dvae': 'dVAE', 'dalle': 'transformer', 'clip': 'CLIP',
           'features': 'network whose features stand in for Inception'}
SHOWN = 24  # samples of a split, the first ones: not selected
CANDIDATE_ROWS = 4

# metric -> (label, goal); shares are shown in percent.
GOALS = {
    'caption_accuracy_8': ('new combinations, best of 8', 0.97),
    'caption_accuracy_1': ('new combinations, single sample', 0.90),
    'pair_accuracy_8': ('new shape-colour pairs, best of 8', 0.80),
    'reconstruction_accuracy': ('reconstructions right', 0.97),
    'codebook_used': ('codes in use', 0.50),
}


def page(workdir: Path, result: Mapping, seconds: Mapping[str, float], more: Sequence[str],
         last: Sequence[str]) -> str:
    """The page of one evaluation.

    Args:
      workdir: the evaluation's directory.
      result: its result.json.
      seconds: stage -> seconds, or {} where the stages were not run together.
      more, last: sections behind those of samples, and at the end.
    """
    dalle = Path(result['settings']['run'])
    experiment = runs.read_config(dalle)
    paths = {'dvae': runs.named_by(experiment.frozen['image'], dalle), 'dalle': dalle}
    if result['settings']['clip']:
        paths['clip'] = Path(result['settings']['clip'])
    features = result['settings']['features']
    if features and Path(features).is_dir():
        paths['features'] = Path(features)
    config, metrics = SceneConfig(**experiment.data.scenes), flat(result)
    blocks = [report.facts(_tiles(metrics, seconds))]
    if seconds:
        blocks.append(report.section('Where the time went', '', report.stages(seconds)))
    chooser = ('The CLIP trained here' if result['settings']['clip'] else
               'The likelihood, there being no CLIP,')
    for split, title, text in (
            ('combos', 'Captions never trained on',
             'Every shape, colour and pair of the two is known; the combination is new. (The image '
             f'tokenizer has seen such pictures, without captions.) {chooser} chose one of the '
             "candidates of each caption, and the mark is the oracle's: right means that every "
             'word of the caption is right. The first ones, not a selection.'),
            ('pairs', 'Shape-colour pairs never trained on',
             'The transformer has seen neither these pairs nor their captions; the image '
             'tokenizer has seen such pictures, without captions.')):
        if split in result['results']:
            blocks.append(report.section(title, text, *_samples(workdir, split, config)))
    blocks += [
        *more,
        report.section('By attribute', 'Share of single samples in which it is right.',
                       _attributes(metrics)),
        *([report.section('The image tokenizer', _tokenizer_text(metrics), *_tokenizer(workdir))]
          if 'tokenizer' in result['results'] else []),
        *_training(paths),
        report.section('All numbers', '', report.table(
            [(name, value) for name, value in metrics.items()], ('metric', 'value'))),
        *last]
    subtitle = ('A discrete VAE, a transformer and a CLIP, trained from nothing on captioned '
                'scenes and judged on captions none of them has seen.')
    return report.page('DALL-E on scenes', subtitle, blocks)


def flat(result: Mapping) -> dict[str, float]:
    """The numbers of a result in one dict; of the images' quality only FID."""
    metrics = {}
    for split, prefix in (('combos', 'caption'), ('pairs', 'pair')):
        found = result['results'].get(split, {})
        metrics |= {f'{prefix}_{name}': value for name, value in found.items()
                    if isinstance(value, float)}
        for name, value in found.get('quality', {}).items():
            metrics |= {f'{prefix}_{name}_{key}': v for key, v in value.items()
                        if key.startswith('fid')}
    return metrics | result['results'].get('tokenizer', {})


def _tiles(metrics, seconds):
    tiles = {}
    if seconds:
        total = sum(seconds.values())
        tiles['all stages'] = Fact(report.duration(total), 'goal 10 min', total <= 600)
    for name, (label, goal) in GOALS.items():
        if name in metrics:
            tiles[label] = Fact(_percent(metrics[name]), f'goal {_percent(goal, 0)}',
                                metrics[name] >= goal)
    return tiles


def _samples(workdir, split, config):
    with np.load(workdir / f'samples_{split}.npz') as stored:
        images, scores = stored['images'], stored['scores']
        captions, right = stored['captions'].tolist(), stored['right']
    rows = np.arange(len(images))
    chosen = scores.argmax(axis=1)
    best, best_right = images[rows, chosen], right[rows, chosen]
    blocks = [report.image_grid(best[:SHOWN], captions[:SHOWN], best_right[:SHOWN])]
    blocks += [report.candidates(captions[i], images[i], scores[i], right[i], chosen[i])
               for i in range(min(CANDIDATE_ROWS, len(images)))]
    wrong = np.flatnonzero(~best_right)[:SHOWN // 2]
    if len(wrong):
        seen = scenes_oracle.read(config, best[wrong])
        blocks += [report.note(f'What is wrong: {(~best_right).sum()} of {len(best)} choices. '
                               'Beneath each, what the oracle saw.'),
                   report.image_grid(best[wrong], [f'{captions[i]} — seen: {text}'
                                                   for i, (_, text) in zip(wrong, seen)],
                                     [False] * len(wrong))]
    return blocks


def _attributes(metrics):
    kinds = {prefix: title for prefix, title in (('caption', 'new combinations'),
                                                 ('pair', 'new pairs'))
             if f'{prefix}_count' in metrics}
    rows = [(name, *(_percent(metrics[f'{prefix}_{name}']) for prefix in kinds))
            for name in ATTRIBUTES]
    return report.table(rows, ('attribute', *kinds.values()))


def _tokenizer_text(metrics):
    return (
        'Trained in three steps that the paper does not have, because it has 3,000,000 updates: a '
        'warm-up as an autoencoder with a noisy bottleneck, k-means of its latents as the first '
        'codebook, and then the Gumbel-softmax with a falling temperature. '
        f"{metrics['codebook_size']} codes stand for the {metrics['distinct_patches']:,} "
        'different squares of pixels in a sample of the training images. Beside it a plain k-means '
        'lookup of pixel squares with as many codes, which learns nothing: '
        f"{metrics['reconstruction_psnr']:.1f} dB and "
        f"{_percent(metrics['reconstruction_accuracy'])} right for the dVAE, "
        f"{metrics['lookup_psnr']:.1f} dB and "
        f"{_percent(metrics['lookup_accuracy'])} for the lookup.")


def _tokenizer(workdir):
    with np.load(workdir / 'reconstructions.npz') as stored:
        arrays = dict(stored)
    columns = {'original': arrays['originals'], 'dVAE': arrays['rebuilt'],
               'lookup': arrays['lookup']}
    return [report.side_by_side(columns, arrays['captions'].tolist(),
                                {'dVAE': arrays['rebuilt_right'],
                                 'lookup': arrays['lookup_right']}),
            report.histogram(arrays['counts'])]


def _training(paths):
    """Curves of every run, and the attention of the transformer."""
    blocks = []
    for name, path in paths.items():
        records = report.read_metrics(path / 'metrics.jsonl')
        charts = []
        for metric in {'dvae': ('reconstruction', 'psnr', 'codes_used', 'temperature'),
                       'dalle': ('image', 'text'), 'clip': ('loss', 'accuracy'),
                       'features': ('words', 'precision')}[name]:
            series = {kind: tuple(zip(*[(r['step'], r[metric]) for r in records
                                        if r['kind'] == kind and metric in r]))
                      for kind in ('train', 'valid')}
            charts.append(report.curves({k: v for k, v in series.items() if v}, metric))
        blocks.append(report.section(f'Training of the {TRAINED[name]}', '', *charts))
    if (paths['dalle'] / 'snapshot.npz').exists():
        with np.load(paths['dalle'] / 'snapshot.npz') as stored:
            maps = {key.removeprefix('matrix/'): stored[key] for key in stored.files
                    if key.startswith('matrix/')}
        about = json.loads((paths['dalle'] / 'snapshot.json').read_text())
        blocks.append(report.section(
            'Attention', 'Weights of the first layer of each pattern for one caption and its '
            'image, averaged over heads: every image token sees the whole text, and the image '
            'tokens before it as its pattern allows.', report.matrix(maps, about['boundary'])))
    return blocks


def _percent(share, digits=1):
    return f'{100 * share:.{digits}f} %'
