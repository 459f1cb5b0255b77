"""From nothing to pictures: python -m dalle_jax.quickstart [--short] [--workdir DIR]

Runs the ordinary verbs in order on the scenes experiments: trains the dVAE, the BPE and the
transformer, the CLIP that ranks candidates, and a network whose features stand in for Inception's;
then samples held-out captions, scores them and writes report.html and metrics.json. A second call
continues where the first was stopped.
"""

import json
import time
from pathlib import Path

from absl import app, flags

from dalle_jax import config as config_lib
from dalle_jax import evaluate, runs, train
from dalle_jax.evaluation import scenes_page
from dalle_jax.runs import say

# Reduced so that every stage is exercised in about a minute; the pictures are noise.
SHORT = {'dvae': 'steps=60', 'dalle': 'steps=60', 'clip': 'steps=40', 'features': 'steps=20'}
# FID needs more images than features.
SHORT_EVALUATION = {'captions': 132, 'splits': ('combos',), 'candidates': 2, 'rerank': (1,),
                    'reconstructions': 40, 'lookup_images': 256}


def run(workdir: str, short: bool = False, seed: int = 0) -> dict:
    """Runs all stages; returns what metrics.json holds.

    Each stage is skipped if `workdir` holds its finished run, and continued if it holds a part.
    """
    root = Path(workdir)
    started = time.monotonic()
    seconds = _read(root / 'seconds.json')
    names = ('dvae', 'dalle', 'clip', 'features', 'evaluate')
    for number, name in enumerate(names, start=1):
        say(f'== stage {number} of {len(names)}: {name}')
        begin = time.monotonic()
        if name == 'evaluate':
            if (root / name / 'result.json').exists():
                continue
            config = config_lib.load('experiments/evaluate.py:scenes', {
                'run': str(root / 'dalle'), 'clip': str(root / 'clip'),
                'features': str(root / 'features'), 'seed': seed,
                **(SHORT_EVALUATION if short else {})})
            evaluate.run(config, root / name)
            seconds[name] = seconds.get(name, 0.0) + time.monotonic() - begin
        else:
            train.run(_experiment(name, root, short, seed), root / name)
            # The run's own clock, which adds up its sessions.
            seconds[name] = _read(root / name / 'done.json')['seconds']
        runs.write_atomic(root / 'seconds.json', json.dumps(seconds))
    metrics = {**scenes_page.flat(_read(root / 'evaluate' / 'result.json')),
               'seconds': {name: round(s, 1) for name, s in seconds.items()},
               'seconds_total': round(sum(seconds.values()), 1), 'seed': seed, 'short': short}
    runs.write_atomic(root / 'metrics.json', json.dumps(metrics, indent=2))
    evaluate.write_report(root / 'evaluate', root / 'report.html', seconds)
    say(f'finished after {time.monotonic() - started:.0f} s: open {root}/report.html')
    return metrics


def _experiment(name, root, short, seed):
    spec = f'experiments/{name}.py:scenes' + (f',{SHORT[name]}' if short else '')
    overrides = {'seed': seed}
    if name == 'dalle':
        overrides['frozen.image'] = str(root / 'dvae')
    if name in ('clip', 'features'):
        overrides['frozen.text'] = str(root / 'dalle')
    return config_lib.load(spec, overrides)


def _read(path):
    return json.loads(path.read_text()) if path.exists() else {}


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'unexpected argument {argv[1]!r}')
    run(flags.FLAGS.workdir, flags.FLAGS.short, flags.FLAGS.seed)


if __name__ == '__main__':
    flags.DEFINE_string('workdir', 'runs/quickstart', 'Directory everything is written to.')
    flags.DEFINE_bool('short', False, 'A reduced run that only shows that every stage works.')
    flags.DEFINE_integer('seed', 0, 'Seed of all stages.')
    runs.start(main)
