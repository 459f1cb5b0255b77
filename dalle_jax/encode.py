"""Writes token records: python -m dalle_jax.encode --run runs/dvae --config FILE.py:ARG --out DIR

Turns the images of an experiment's data section into codes of a finished image tokenizer, once, so
that training reads codes instead of decoding images and running the tokenizer:

    python -m dalle_jax.train --config experiments/dalle.py:folder,source=tokens,path=DIR ...

Both splits are written, each training image as --crops random crops. Stopped at any moment, the
same command continues. The files are described in data/tokens.py.
"""

import functools
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags

import dalle_jax
from dalle_jax import config as config_lib
from dalle_jax import machine, runs
from dalle_jax.data import images, sources, tokens
from dalle_jax.data.pipeline import EXAMPLES, Prefetch
from dalle_jax.data.records import BadRecord, Source
from dalle_jax.progress import clock
from dalle_jax.runs import say
from dalle_jax.training import partition

SHARD = 4096  # records; a killed process loses less than that
TELL_EVERY = 5.0  # seconds
DATA_KEYS = ('source', 'train_split', 'valid_split', 'crop', 'valid_crop', 'train_length',
             'valid_length', 'scenes')  # what decides about the records, besides the path


def run(config, tokenizer_run: str | Path, out: str | Path, crops: int = 1, batch: int = 64
        ) -> dict[str, Any]:
    """Encodes the training and the validation images, or continues.

    A code is the encoder's most probable entry, without noise, computed in the experiment's
    precision. Near ties may fall differently in another one, so meta.json tells it.

    Args:
      config: a ConfigDict of an experiment file, or a resolved Experiment.
      tokenizer_run: directory of a finished run of an image tokenizer.
      out: directory of the token records: new, empty, or begun by the same call.
      crops: K, random crops of each training image. Crop k of record i is a function of the
        experiment's seed, i and k. Validation images have one.
      batch: images encoded at once.

    Returns:
      what meta.json holds.

    Raises:
      ValueError, RunError, FileNotFoundError: before anything is encoded. ValueError also at the
        end, where all records of a split are bad.
    """
    experiment = config if isinstance(config, config_lib.Experiment) else config_lib.resolve(config)
    _check_arguments(experiment.data, crops, batch)
    runs.start_jax(experiment.cpu_devices)
    loaded = runs.load(tokenizer_run)
    if not hasattr(loaded.module, 'decode'):
        raise runs.RunError(f'{tokenizer_run} is a {loaded.experiment.model} run; name an image '
                            'tokenizer, such as a dVAE run, with --run')
    opened = {split: sources.open_source(experiment.data, split) for split in tokens.TOKEN_SPLITS}
    dtype = machine.compute_dtype(experiment.precision)
    settings = _settings(experiment, loaded, crops, dtype, opened)
    out = Path(out)
    _check_strangers(out)
    with runs.take(out, '--out'):
        if _begin(out, settings):
            say(f'{out} is finished')
            return tokens.read_meta(out)
        mesh = partition.make_mesh(experiment.mesh)
        params = jax.device_put(loaded.params, partition.replicated(mesh))

        def encode(pixels):
            placed = partition.put_batch({'image': pixels}, mesh)['image']
            return _encode(loaded.module, loaded.config, params, placed, dtype)

        counts = {}
        for split, source in opened.items():
            train = split == 'train'
            reader = Reader(
                source, kind=experiment.data.crop if train else experiment.data.valid_crop,
                crops=crops if train else 1, seed=experiment.seed, batch=batch,
                ways=mesh.shape['replica'] * mesh.shape['fsdp'], size=loaded.config.image_size)
            _encode_split(reader, encode, out, split, loaded.config.vocab, experiment.data.workers)
            counts[split] = tokens.join_shards(out, split, _shards(source))
        tokens.finish(out, {
            'tokenizer': {'run': str(tokenizer_run), 'fingerprint': settings['tokenizer'],
                          'step': loaded.step, 'grid': loaded.config.grid,
                          'vocab': loaded.config.vocab, 'image_size': loaded.config.image_size},
            'splits': counts, 'settings': settings, 'batch': batch,
            'device': jax.devices()[0].device_kind,
            'versions': {'dalle_jax': dalle_jax.__version__, 'jax': jax.__version__,
                         'numpy': np.__version__}})
    size = sum(file.stat().st_size for file in out.rglob('*') if file.is_file())
    listed = '; '.join(f'{split}: {n["records"]:,} records x {n["crops"]}, {n["left_out"]} left out'
                       for split, n in counts.items())
    say(f'{out}: {listed}; {size / 2**20:.1f} MiB. Train with source=tokens,path={out}')
    return tokens.read_meta(out)


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def _encode(module, config, params, pixels, dtype):
    return module.encode(params, config, pixels, dtype)


class Chunk(NamedTuple):
    """Records [first, last) of a shard: those of one batch of images."""

    shard: int
    first: int
    last: int


class Read(NamedTuple):
    """A chunk's good records.

    Attributes:
      pixels: uint8 [rows, S, S, 3], the K crops of each, then zeros.
      lines: their caption lines.
      left_out: messages about the bad ones.
    """

    pixels: np.ndarray
    lines: list[bytes]
    left_out: list[str]


class Reader:
    """Cuts the images of a source, chunk by chunk; `batch` is safe to call from several threads.

    Attributes:
      chunks: of the shards that are wanted, in order.
    """

    def __init__(self, source: Source, *, kind: str, crops: int, seed: int, batch: int, ways: int,
                 size: int):
        """Args:
          kind: of crop, one of images.CROPS.
          crops: K, of each image.
          batch: images in a chunk, or K where that is more.
          ways: the number of rows is a multiple of this.
          size: S.
        """
        self.source, self.crops, self.chunks = source, crops, []
        self._kind, self._seed, self._size = kind, seed, size
        self._records = getattr(source, 'records', None)
        self._each = max(1, batch // crops)
        self._rows = -(-self._each * crops // ways) * ways

    def want(self, shards: Iterable[int]) -> None:
        """Appends the chunks of these shards."""
        for shard in shards:
            end = min((shard + 1) * SHARD, len(self.source))
            self.chunks += [Chunk(shard, first, min(first + self._each, end))
                            for first in range(shard * SHARD, end, self._each)]

    def batch(self, number: int) -> Read:
        """Reads chunk `number`."""
        _, first, last = self.chunks[number]
        read = Read(np.zeros((self._rows, self._size, self._size, 3), np.uint8), [], [])
        records = self._records(range(first, last)) if self._records else [None] * (last - first)
        for index, record in zip(range(first, last), records):
            try:
                record = record or self.source[index]
                if not record.captions:
                    raise BadRecord(f'{record.name}: no captions')
                cut = self._cut(images.decode(record.image, record.name), index, record.name)
            except BadRecord as error:
                # In one line, and without what no console can print (names that are no Unicode).
                message = ' '.join(str(error).split())
                read.left_out.append(message.encode(errors='backslashreplace').decode())
                continue
            row = len(read.lines) * self.crops
            read.pixels[row:row + self.crops] = cut
            read.lines.append(tokens.caption_line(record))
        return read

    def _cut(self, image, index, name):
        return [images.crop(self._kind, image, self._size,
                            np.random.default_rng((self._seed, index, k)), name)
                for k in range(self.crops)]


def _shards(source: Source) -> int:
    return -(-len(source) // SHARD)


def _encode_split(reader: Reader, encode: Callable[[np.ndarray], jax.Array], out: Path, split: str,
                  vocab: int, workers: int) -> None:
    """Writes the shards of a split that are not there yet."""
    reader.want(shard for shard in range(_shards(reader.source))
                if not tokens.shard_file(out, split, shard).exists())
    progress = _Progress(f'{out} {split}', len(reader.source), reader)
    codes, lines, left_out = [], [], []
    with Prefetch(reader, 0, len(reader.chunks), 1, workers, workers + 1) as batches:
        for number, read, ids in _one_behind(batches, encode):
            kept = np.asarray(ids)[:len(read.lines) * reader.crops]
            codes.append(kept.reshape(-1, reader.crops, *kept.shape[1:]))
            lines += read.lines
            left_out += read.left_out
            progress.update(reader.chunks[number], read, batches.wait_seconds)
            shard = reader.chunks[number].shard
            if number + 1 == len(reader.chunks) or reader.chunks[number + 1].shard != shard:
                tokens.write_shard(tokens.shard_file(out, split, shard),
                                   np.concatenate(codes).astype(tokens.code_dtype(vocab)), lines,
                                   left_out)
                codes, lines, left_out = [], [], []


def _one_behind(batches: Iterable[tuple[int, Read]], encode: Callable[[np.ndarray], jax.Array]
                ) -> Iterator[tuple[int, Read, jax.Array]]:
    """Batches with their codes, each one fetched when the next one is under way."""
    pending = None
    for number, read in batches:
        ids = encode(read.pixels)
        if pending:
            yield pending
        pending = number, read, ids
    if pending:
        yield pending


class _Progress:
    """What the console says of a split: the rate does not count compilation."""

    def __init__(self, name, records, reader):
        self._name, self._records, self._crops = name, records, reader.crops
        self._done = records - sum(chunk.last - chunk.first for chunk in reader.chunks)
        self._left_out = 0
        self._start = None

    def update(self, chunk, read, waited):
        for message in read.left_out[:max(EXAMPLES - self._left_out, 0)]:
            say(f'{self._name}: left out {message}')
        self._left_out += len(read.left_out)
        self._done += chunk.last - chunk.first
        now = time.monotonic()
        if self._start is None:
            self._start, self._told, self._first, self._waited = now, now, self._done, waited
        if now - self._told < TELL_EVERY and self._done < self._records:
            return
        self._told, line = now, f'{self._done}/{self._records} records, {self._left_out} left out'
        rate = (self._done - self._first) / max(now - self._start, 1e-9)  # records a second
        if rate:  # none after a single batch
            line += (f'  {rate * self._crops:.0f} images/s  '
                     f'wait {(waited - self._waited) / (now - self._start):.1%}  '
                     f'left {clock((self._records - self._done) / rate)}')
        say(f'{self._name}: {line}')


def _check_arguments(data, crops, batch):
    for name, value in (('crops', crops), ('batch', batch)):
        if value < 1:
            raise ValueError(f'--{name} is {value}; give at least 1')
    if data.source == 'tokens':
        raise ValueError(f'{data.path} holds token records already; name images with source=folder '
                         'or source=tfds')
    if data.image_size:
        raise ValueError(f'data.image_size is {data.image_size}, and images are encoded at the '
                         "tokenizer's size: set it to 0")
    if crops > 1 and data.crop in ('none', 'center'):
        raise ValueError(f'--crops {crops} with data.crop={data.crop!r} would store the same codes '
                         f'{crops} times; choose a random crop, such as stage2, or --crops 1')


def _settings(experiment, loaded, crops, dtype, opened):
    """What the records are a function of: another command in the same directory is refused."""
    data = experiment.data
    settings = {
        'tokenizer': runs.fingerprint(loaded.params), 'dtype': str(dtype), 'crops': crops,
        'seed': experiment.seed, 'data.path': str(Path(data.path).resolve()) if data.path else '',
        **{f'data.{key}': getattr(data, key) for key in DATA_KEYS},
        **{f'images in {split}': len(source) for split, source in opened.items()}}
    return json.loads(json.dumps(settings))


def _check_strangers(out: Path) -> None:
    names = {file.name for file in out.iterdir()} if out.is_dir() else set()
    if names - {'lock'} and not names & {'parts', 'meta.json'}:
        raise runs.RunError(f'{out} is not empty (it holds {", ".join(sorted(names)[:5])}) and has '
                            'no token records; give another --out')


def _begin(out: Path, settings: dict[str, Any]) -> bool:
    """Prepares the directory; returns whether it is finished.

    Raises:
      RunError: it holds records that are made otherwise; names what differs.
    """
    parts = out / 'parts'
    finished = (out / 'meta.json').exists()
    stored = settings
    if finished:
        stored = tokens.read_meta(out)['settings']
        shutil.rmtree(parts, ignore_errors=True)  # where the last step was cut short
    elif any(parts.glob('*.npz')):
        stored = json.loads((parts / 'settings.json').read_text())
    runs.check_same(stored, settings, f'{out} holds token records of another kind',
                    'Give another --out')
    if not finished:
        parts.mkdir(exist_ok=True)
        runs.write_atomic(parts / 'settings.json', json.dumps(settings, indent=2))
    return finished


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'unexpected argument {argv[1]!r}')
    run(CONFIG.value, FLAGS.run, FLAGS.out, FLAGS.crops, FLAGS.batch)


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    CONFIG = config_lib.define_flag()
    flags.DEFINE_string('run', None, 'Directory of a finished dVAE run.', required=True)
    flags.DEFINE_string('out', None, 'Directory of the token records.', required=True)
    flags.DEFINE_integer('crops', 1, 'Random crops of each training image.')
    flags.DEFINE_integer('batch', 64, 'Images encoded at once.')
    flags.mark_flag_as_required('config')
    runs.start(main)
