"""Makes a run of published weights: python -m dalle_jax.convert --kind clip --weights FILE ...

The directory it writes is taken by sample, evaluate, encode and dalle_jax.load like that of a run
trained here. The files are read without PyTorch, and nothing in them is executed.

    --kind clip --weights ViT-B-32.pt --tokenizer bpe_simple_vocab_16e6.txt.gz --out runs/clip-b32
    --kind clip --weights model.safetensors --tokenizer merges.txt --out runs/clip-b32
    --kind dvae --encoder encoder.pkl --decoder decoder.pkl --out runs/openai-dvae
    --kind vqgan --weights last.ckpt --out runs/vqgan-f16
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import app, flags

from dalle_jax import runs

FILES = {'clip': ('weights', 'tokenizer'), 'dvae': ('encoder', 'decoder'), 'vqgan': ('weights',)}


def run(kind: str, files: Mapping[str, str], out: str) -> dict[str, Any] | None:
    """Converts files of weights into the directory of a finished run.

    Args:
      kind: a key of FILES.
      files: role -> path, of the roles FILES[kind].
      out: the run's directory; created.

    Returns:
      the facts stored in done.json; None if the directory holds these weights already.

    Raises:
      ValueError: a file is damaged, or of another model. FileNotFoundError: there is none.
      RunError: the directory is in use, or holds something else.
    """
    started = time.monotonic()
    runs.start_jax()
    config, params, tokenizer = {'clip': _clip, 'dvae': _dvae, 'vqgan': _vqgan}[kind](**files)
    sources = {role: {'file': str(path), 'sha256': _sha256(path)} for role, path in files.items()}
    done = Path(out) / 'done.json'
    if done.exists():
        held = json.loads(done.read_text()).get('sources', {})
        if [s['sha256'] for s in held.values()] != [s['sha256'] for s in sources.values()]:
            raise runs.RunError(f'{out} holds other weights; give another --out')
        runs.say(f'{out} is finished')
        return None
    log = runs.Run(out, _experiment(kind, config, files), started)
    try:
        return _write(log, params, tokenizer, sources)
    finally:
        log.close()


def _write(log, params, tokenizer, sources):
    import jax

    from dalle_jax.training.checkpoint import Checkpoints

    shutil.rmtree(log.path / 'checkpoints', ignore_errors=True)  # of a session that was stopped
    checkpoints = Checkpoints(log.path / 'checkpoints')
    checkpoints.save(0, {'params': params})
    checkpoints.close()
    if tokenizer:
        tokenizer.save(log.path / 'tokenizer.model')
    facts = {'step': 0, 'seconds': log.elapsed(), 'sources': sources,
             'parameters': sum(math.prod(x.shape) for x in jax.tree.leaves(params))}
    log.finish(facts)
    log.say(f'{log.path}: {facts["parameters"]:,} parameters in {facts["seconds"]:.1f} s')
    return facts


def _clip(weights, tokenizer):
    from dalle_jax.data.clip_text import ClipTokenizer
    from dalle_jax.interop import clip, files

    arrays = files.read(weights)
    described = Path(weights).with_name('config.json')
    head_width = clip.HEAD_WIDTH
    if clip.layout_of(arrays) == 'huggingface' and described.exists():
        head_width = clip.read_description(described)
    try:
        config, params = clip.from_published(arrays, head_width)
    except ValueError as error:
        raise ValueError(f'{weights}: {error}') from error
    return config, params, ClipTokenizer.read(tokenizer, config.text_vocab)


def _dvae(encoder, decoder):
    from dalle_jax.interop import dvae, files

    arrays = files.read(encoder), files.read(decoder)
    try:
        return *dvae.from_published(*arrays), None
    except ValueError as error:
        raise ValueError(f'{encoder}, {decoder}: {error}') from error


def _vqgan(weights):
    from dalle_jax.interop import files, vqgan

    arrays = files.read(weights)
    try:
        return *vqgan.from_published(arrays), None
    except ValueError as error:
        raise ValueError(f'{weights}: {error}') from error


def _experiment(kind, config, files):
    """What the run's config.json says: the sizes. How the weights were trained is not known."""
    from dalle_jax.config import Experiment, LoopConfig
    from dalle_jax.data.sources import DataConfig
    from dalle_jax.training.optimizer import OptimizerConfig

    first = str(files[FILES[kind][0]])
    return Experiment(
        model=kind, arch=config, data=DataConfig('folder', 1, path=first, bpe_dropout=0.0),
        optimizer=OptimizerConfig(peak_lr=0.0, schedule='constant'), loop=LoopConfig(steps=1))


def _sha256(path):
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'unexpected argument {argv[1]!r}')
    wanted = FILES[FLAGS.kind]
    files = {role: getattr(FLAGS, role) for role in sum(FILES.values(), ()) if getattr(FLAGS, role)}
    if set(files) != set(wanted):
        raise app.UsageError(f'--kind {FLAGS.kind} needs --{" and --".join(wanted)}, and not the '
                             'others')
    run(FLAGS.kind, files, FLAGS.out)


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    flags.DEFINE_enum('kind', None, [*FILES], 'What the weights are.', required=True)
    flags.DEFINE_string('weights', '', "A CLIP's, in OpenAI's archive (.pt) or as transformers "
                        'stores them (model.safetensors, pytorch_model.bin); or a VQGAN checkpoint '
                        'of taming-transformers.')
    flags.DEFINE_string('tokenizer', '', 'Its merges: bpe_simple_vocab_16e6.txt.gz or merges.txt.')
    flags.DEFINE_string('encoder', '', "encoder.pkl of OpenAI's dVAE.")
    flags.DEFINE_string('decoder', '', 'decoder.pkl of it.')
    flags.DEFINE_string('out', None, 'Directory of the run that is written.', required=True)
    runs.start(main)
