"""What an evaluation reads: captions with real images, images that are given, a feature network."""

import dataclasses
import itertools
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dalle_jax import runs
from dalle_jax.data import images as images_lib
from dalle_jax.data.records import BadRecord
from dalle_jax.data.sources import DataConfig, FolderSource, open_source
from dalle_jax.evaluation import pairs as pairs_lib
from dalle_jax.evaluation.pairs import PARTS, Pairs, in_threads, short_hash


class Real:
    """A split of the source: which captions are taken, and their images.

    Attributes:
      scenes: the data.scenes.Scenes behind it, or None.
    """

    def __init__(self, options: Any, split: str, size: int, model: Any):
        """Opens the source; `size` is the side of the images it gives.

        Raises:
          RunError, FileNotFoundError, ValueError: as sources do; a run that was not trained on
            scenes; a file of names that is not there.
        """
        self._options, self._split, self._size = options, split, size
        self._exclude, self.scenes, self._pairs = set(), None, None
        if options.exclude:
            if not Path(options.exclude).is_file():
                raise FileNotFoundError(f'exclude: {options.exclude}: no such file; give one with '
                                        'a name a line')
            self._exclude = set(Path(options.exclude).read_text().split('\n')) - {''}
        if options.source == 'scenes':
            self.scenes = self._source = _scenes(model, split, options.captions, options.seed)
        else:
            config = DataConfig(options.source, 1, options.path, valid_split=split,
                                valid_crop=options.crop)
            self._source = open_source(config, 'valid')

    def choose(self, path: Path | None) -> Pairs:
        """The captions, chosen now, or read from `path` where they are written down."""
        if path and path.exists():
            stored = json.loads(path.read_text())
            self._pairs = Pairs(**{name: tuple(value) if isinstance(value, list) else value
                                   for name, value in stored['pairs'].items()})
            return self._pairs
        options = self._options
        if self.scenes:
            self._pairs = _pairs_of_scenes(self.scenes)
        else:
            runs.say(f'{self._split}: choosing captions of {len(self._source):,} records')
            self._pairs = pairs_lib.choose(self._source, options.captions, options.seed,
                                           options.crop, self._size, self._exclude, runs.say)
            if self._pairs.left_out_count:
                runs.say(f'{self._split}: {self._pairs.left_out_count} records left out: '
                         + '; '.join(self._pairs.left_out[:4]))
            if options.exclude:
                runs.say(f'{self._split}: {self._pairs.excluded} records have names that '
                         f'{options.exclude} excludes; taken are {self._pairs.ids[0]!r} and others')
        return self._pairs

    def others(self) -> Iterator[np.ndarray]:
        """As many other images of scenes: what FID and KID are of images that are perfect."""
        other = dataclasses.replace(self.scenes, seed=self.scenes.seed + 2**40)
        for begin in range(0, len(other), PARTS):
            yield other.images(np.arange(begin, min(begin + PARTS, len(other))))

    def parts(self) -> Iterator[np.ndarray]:
        """The images of the captions, uint8 [n, S, S, 3], PARTS at a time."""
        records = self._pairs.records
        if self.scenes:
            for begin in range(0, len(records), PARTS):
                yield self.scenes.images(np.asarray(records[begin:begin + PARTS]))
            return
        for part in in_threads(lambda n: pairs_lib.real_image(
                self._source, self._pairs, n, self._options.crop, self._size), len(records)):
            yield np.stack(part)


def decoded(model: Any, ids: np.ndarray) -> Iterator[np.ndarray]:
    """Images uint8 [n, S, S, 3] of tokens int32 [C, h, w], PARTS at a time."""
    for begin in range(0, len(ids), PARTS):
        yield model.decode(ids[begin:begin + PARTS])


def _scenes(model, split, length, seed):
    from dalle_jax.data.scenes import SceneConfig, Scenes

    data = model.run.experiment.data
    if data.source != 'scenes':
        raise runs.RunError(f'{model.run.path} is a run on {data.source!r} data; this evaluation '
                            'needs a DALL-E run on scenes, whose pictures the oracle can read')
    return Scenes(SceneConfig(**data.scenes), split, length, seed=1002 + seed)


def _pairs_of_scenes(scenes):
    """One caption of each scene, the wordings in turns."""
    told = [i % scenes.config.templates for i in range(len(scenes))]
    ids = tuple(f'scenes/{scenes.split}/{scenes.seed}/{i}#{k}' for i, k in enumerate(told))
    captions = tuple(scenes.captions(i)[k] for i, k in enumerate(told))
    return Pairs(ids, captions, tuple(range(len(scenes))))


class Given:
    """Images that were made elsewhere: a folder, or a .npz with `images` uint8 [n, S, S, 3].

    A folder is read in the order of its names; captions are the first lines of .txt files beside
    the images, those of a .npz its array `captions`.

    Attributes:
      side: S.
      captions: of each image, or None where there are none.
      fingerprint: of the pixels, the same for a folder and a .npz.
    """

    def __init__(self, path: str | Path):
        """Reads a .npz, or looks at every image of a folder.

        Raises:
          FileNotFoundError, ValueError: nothing there, files that cannot be read, sides that
            differ, or two images of one name; names them.
        """
        self._path = Path(path)
        if self._path.suffix == '.npz':
            self._images, self.captions = _read_npz(self._path)
            self._source, self.side = None, self._images.shape[1]
            self.fingerprint = _fingerprint(map(_digest, self._images))
        else:
            self._source = FolderSource(self._path, captions_required=False)
            self.captions = self._captions()
            self.side, self.fingerprint = self._check()

    def __len__(self) -> int:
        return len(self._images if self._source is None else self._source)

    def parts(self) -> Iterator[np.ndarray]:
        """uint8 [n, S, S, 3], PARTS at a time."""
        if self._source is None:
            for begin in range(0, len(self), PARTS):
                yield self._images[begin:begin + PARTS]
            return
        for part in in_threads(self._image, len(self)):
            yield np.stack(part)

    def _image(self, index):
        record = self._source[index]
        return images_lib.decode(record.image, record.name)

    def _look(self, index):
        """(height, width) and a digest, or why the image cannot be read."""
        try:
            image = self._image(index)
            return image.shape[:2], _digest(image)
        except BadRecord as error:
            return str(error)

    def _captions(self):
        found = []
        for i in range(len(self._source)):
            lines = self._source.captions(i)
            if not lines:
                return None
            found.append(lines[0])
        return tuple(found)

    def _check(self):
        """(the side of all images, their fingerprint)."""
        names, sides, bad, digests = self._source.images, {}, [], []
        stems = Counter(name.rpartition('.')[0] for name in names)
        twins = sorted(stem for stem, count in stems.items() if count > 1)
        if twins:
            raise ValueError(f'{self._path}: {len(twins)} names belong to several images, the '
                             f'first is {twins[0]}; remove or rename all but one')
        looks = itertools.chain.from_iterable(in_threads(self._look, len(names)))
        for name, found in zip(names, looks, strict=True):
            if isinstance(found, str):
                bad.append(found)
            else:
                sides.setdefault(found[0], name)
                digests.append(found[1])
        if bad:
            raise ValueError(f'{self._path}: {len(bad)} of {len(names)} images cannot be read: '
                             f'{"; ".join(bad[:4])}. Remove them: numbers of the others would '
                             'not be those of the folder')
        if len(sides) > 1 or (shape := next(iter(sides)))[0] != shape[1]:
            told = ', '.join(f'{name}: {w} x {h}' for (h, w), name in list(sides.items())[:4])
            raise ValueError(f'{self._path}: images must be squares of one size, and there are '
                             f'{told}')
        return shape[0], _fingerprint(digests)


def _digest(image):
    return short_hash(image.tobytes())


def _fingerprint(digests):
    return short_hash(' '.join(digests).encode())


def _read_npz(path):
    if not zipfile.is_zipfile(path):
        raise ValueError(f'{path}: there is no .npz file, or it is cut short')
    with np.load(path) as stored:
        if 'images' not in stored:
            raise ValueError(f'{path} has no array `images`; it has {", ".join(stored.files)}')
        try:
            images = stored['images']
            captions = tuple(map(str, stored['captions'])) if 'captions' in stored else None
        except (ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f'{path} cannot be read ({error}); save images as uint8, and captions '
                             'as an array of strings') from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size \
            or images.shape[1] != images.shape[2]:
        raise ValueError(f'{path}: images are {images.dtype} {list(images.shape)}; give uint8 '
                         '[n, side, side, 3], at least one')
    if captions is not None and len(captions) != len(images):
        raise ValueError(f'{path}: {len(captions)} captions and {len(images)} images; give one for '
                         'each')
    return images, captions


class Network(NamedTuple):
    """What FID, IS and KID look through.

    Attributes:
      name: 'inception', or 'words', a network of our own whose numbers are not those of others.
      of: uint8 images [B, H, W, 3] -> features float32 [B, D], logits float32 [B, C].
      size: D.
      side: of the images that it takes; 0: of any size.
      batch: images at once.
      fingerprint: of its parameters.
    """

    name: str
    of: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    size: int
    side: int
    batch: int
    fingerprint: str


def open_network(path: str, resize: str, batch: int, mesh: str) -> Network | None:
    """The published Inception of a file, a run of models/words.py of a directory, None of ''.

    Raises:
      ValueError, RunError: neither; names the path.
    """
    import jax

    from dalle_jax import generate
    from dalle_jax.models.context import unconstrained
    from dalle_jax.training import partition

    if not path:
        return None
    devices = generate.mesh_of(mesh)
    place = partition.replicated(devices)
    constrain = partition.Partitioner(devices) if devices.size > 1 else unconstrained
    batch += -batch % devices.size
    if Path(path).is_dir():
        run = runs.load(path, lambda *_: place)
        if run.experiment.model != 'words':
            raise runs.RunError(f'{path} is a {run.experiment.model} run; features need one of '
                                'experiments/features.py, or the file of Inception weights')
        from dalle_jax.metrics import features

        name, params = 'words', run.params
        network = features.Features(params, run.config, batch, constrain)
        names, size, side = ('features', 'logits'), run.config.features, run.config.image_size
    else:
        from dalle_jax.interop import files
        from dalle_jax.metrics import inception

        name, params = 'inception', jax.device_put(
            inception.from_published(files.read(path)), place)
        network = inception.Features(params, resize=resize, batch=batch, constrain=constrain)
        names, size, side = network.names, 2048, 0

    def of(images):
        found = network.of(images)
        return tuple(found[key] for key in names)
    return Network(name, of, size, side, batch, runs.fingerprint(params))
