"""Where records come from: the `data` section of an experiment, and folders of own images.

A source has len() and [i] -> Record (see `records`). Four kinds can be named:

    scenes   scenes.Scenes: drawn on demand; splits train, combos, pairs, any
    folder   FolderSource: a directory of images with captions beside them; splits train, valid, all
    tfds     tfds.TfdsSource: a prepared TensorFlow Datasets directory; splits as it names them
    tokens   tokens.TokenSource: image tokens that `encode` wrote; splits train, valid
"""

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dalle_jax.data.images import CROPS
from dalle_jax.data.records import BadRecord, Record, Source
from dalle_jax.data.tokens import TOKEN_SPLITS, TokenSource

SOURCES = ('scenes', 'folder', 'tfds', 'tokens')

IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp')
FOLDER_SPLITS = ('train', 'valid', 'all')
VALID_SHARE = 0.05
LEAST_VALID = 8  # unless that were more than a quarter
FOLDER_LAYOUT = ('expected images (png, jpg, jpeg, webp) in it or in its subfolders, each with its '
                 'captions beside it: x.txt for x.jpg, one caption a line')


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run reads and how it is prepared. Invalid values raise ValueError.

    Attributes:
      source: one of SOURCES.
      path: the directory of 'folder', 'tfds' and 'tokens'.
      train_split, valid_split: the source's names for what is trained and validated on.
      batch_size: images a step, over all processes together.
      crop: how training images are cut to size, one of images.CROPS. Of no effect on 'tokens',
        whose images were cut when they were encoded; neither is valid_crop.
      valid_crop: the same for validation: 'center', or 'none' where the images fit already.
      image_size: side of a training image where it is smaller than the model's; needs crop
        'window'. 0: the model's.
      tokenizer: fingerprint of the dVAE that made the 'tokens'; '' is filled in at start, so that a
        run is not continued on the codes of another one.
      bpe_dropout: probability of dropping a merge in training captions.
      train_length, valid_length: number of records of 'scenes'.
      scenes: options of scenes.SceneConfig.
      min_images: opening a folder with fewer usable images in the split is an error.
      workers: threads that prepare batches.
    """

    source: str
    batch_size: int
    path: str = ''
    train_split: str = 'train'
    valid_split: str = 'valid'
    crop: str = 'none'
    valid_crop: str = 'none'
    image_size: int = 0
    tokenizer: str = ''
    bpe_dropout: float = 0.1
    train_length: int = 0
    valid_length: int = 0
    scenes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    min_images: int = 1
    workers: int = 2

    def __post_init__(self):
        def check(key, ok, allowed):
            if not ok:
                raise ValueError(f'data.{key} is {getattr(self, key)!r}; it must be {allowed}')

        check('source', self.source in SOURCES, f'one of {", ".join(SOURCES)}')
        if self.source == 'scenes':
            check('train_length', self.train_length > 0, 'positive: the number of scenes')
            check('valid_length', self.valid_length > 0, 'positive: the number of scenes')
        else:
            check('path', self.path, f'the directory that source {self.source!r} reads')
            check('scenes', not self.scenes, "empty unless source is 'scenes'")
        check('tokenizer', not self.tokenizer or self.source == 'tokens',
              "empty unless source is 'tokens'")
        if self.source == 'tokens':
            for key in ('train_split', 'valid_split'):
                check(key, getattr(self, key) in TOKEN_SPLITS, f'one of {", ".join(TOKEN_SPLITS)}')
            check('image_size', not self.image_size, "0 where source is 'tokens'")
        if self.source == 'folder':
            splits = f'one of {", ".join(FOLDER_SPLITS)}'
            check('train_split', self.train_split in FOLDER_SPLITS, splits)
            check('valid_split', self.valid_split in FOLDER_SPLITS, splits)
        check('batch_size', self.batch_size > 0, 'positive')
        check('crop', self.crop in CROPS, f'one of {", ".join(CROPS)}')
        check('valid_crop', self.valid_crop in ('center', 'none'), "'center' or 'none'")
        check('image_size', self.image_size == 0 or self.image_size > 0 and self.crop == 'window',
              "0 (the model's), or a positive side together with crop 'window'")
        check('bpe_dropout', 0 <= self.bpe_dropout <= 1, 'a probability')
        check('min_images', self.min_images > 0, 'positive')
        check('workers', self.workers > 0, 'positive')


def open_source(config: DataConfig, split: str, captions_required: bool = True) -> Source:
    """Opens what a run trains or validates on.

    Args:
      config: names the source.
      split: 'train' or 'valid', translated to the source's own name by the config.
      captions_required: False for models of images alone; a folder then may lack captions.

    Raises:
      FileNotFoundError, ValueError: if the data are missing or too few.
    """
    if split not in ('train', 'valid'):
        raise ValueError(f"split {split!r} is neither 'train' nor 'valid'")
    name = config.train_split if split == 'train' else config.valid_split
    match config.source:
        case 'scenes':
            from dalle_jax.data.scenes import SceneConfig, Scenes
            known = [field.name for field in dataclasses.fields(SceneConfig)]
            for key in config.scenes:
                if key not in known:
                    raise ValueError(f'data.scenes.{key} is unknown; there are {", ".join(known)}')
            length = config.train_length if split == 'train' else config.valid_length
            # Two seeds, so that validating on the split one trains on still means new scenes.
            return Scenes(SceneConfig(**config.scenes), name, length, seed=int(split == 'valid'))
        case 'folder':
            return FolderSource(config.path, name, captions_required=captions_required,
                                min_images=config.min_images)
        case 'tfds':
            from dalle_jax.data.tfds import TfdsSource
            return TfdsSource(config.path, name)
        case 'tokens':
            return TokenSource(config.path, name, config.tokenizer)


def captions(source: Source, limit: int) -> Iterator[str]:
    """Captions of up to `limit` records, evenly spaced over the source; bad records are left out.

    Uses the source's `captions(i)` where it has one, which saves reading or drawing the images.
    """
    of_record = getattr(source, 'captions', lambda i: source[i].captions)
    for i in range(0, len(source), -(-len(source) // limit)):
        try:
            yield from of_record(i)
        except BadRecord:
            continue


class FolderSource:
    """A directory of images, nested at will, with captions beside them.

    `a/x.jpg` has its captions in `a/x.txt`: UTF-8, one a line, blank lines ignored. Names that
    begin with a dot and links to directories are skipped. The files are listed once, sorted by
    name, and read only when indexed. An image is in 'valid' by a hash of its name, so that adding
    images leaves the others where they are; twins such as x.jpg and x.png share captions and split.

    Attributes:
      images: the split's images relative to the directory, sorted.
    """

    def __init__(self, path: str | Path, split: str = 'all', captions_required: bool = True,
                 min_images: int = 1):
        """Lists the directory; reads no file.

        Args:
          path: the directory.
          split: 'train', 'valid' (about 5 %, at least a few images) or 'all'.
          captions_required: whether an image without captions is a bad record. Where it is not,
            captions are not read at all: the records have none.
          min_images: how many usable images the split must have.

        Raises:
          FileNotFoundError, ValueError: naming the directory, what was found and what is expected.
        """
        if split not in FOLDER_SPLITS:
            raise ValueError(f'split {split!r} of a folder is none of {", ".join(FOLDER_SPLITS)}')
        self._root = Path(path)
        if not self._root.is_dir():
            raise FileNotFoundError(f'no directory {self._root}: {FOLDER_LAYOUT}')
        self._split = split
        self._captions_required = captions_required
        everything, texts = _list(self._root)
        stems = Counter(_stem(image) for image in everything)
        self._texts = {stem: text for stem, text in texts.items() if stem in stems}
        valid = _valid_stems(stems, self._texts)
        self.images = [image for image in everything
                       if split == 'all' or (_stem(image) in valid) == (split == 'valid')]
        self._counts = {
            'images': len(everything),
            f'in split {split}': len(self.images),
            'without a caption file': sum(_stem(image) not in texts for image in everything),
            'caption files without an image': len(texts) - len(self._texts),
            'images that share their name with another': len(everything) - len(stems),
        }
        usable = len(self.images)
        if captions_required:
            usable = sum(_stem(image) in texts for image in self.images)
        if usable < max(min_images, 1):
            raise ValueError(f'{self.summary()}; {usable} are usable and at least '
                             f'{max(min_images, 1)} needed: {FOLDER_LAYOUT}')

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of an image, without reading the image."""
        return self._captions(self.images[index])

    def summary(self) -> str:
        """One line: the directory and what was found in it."""
        return f'{self._root}: ' + ', '.join(f'{n} {what}' for what, n in self._counts.items())

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        """Reads an image's bytes and its captions; the bytes are decoded elsewhere.

        Raises BadRecord if a file cannot be read, or captions are required and there are none.
        """
        name = self.images[index]
        captions = ()
        if self._captions_required:
            captions = self._captions(name)
            if not captions:
                raise BadRecord(f'{name}: no captions; write them to {_stem(name)}.txt, one a line')
        try:
            return Record((self._root / name).read_bytes(), captions, name)
        except OSError as error:
            raise BadRecord(f'{name}: {error.strerror}') from error

    def _captions(self, name: str) -> tuple[str, ...]:
        text = self._texts.get(_stem(name))
        if text is None:
            return ()
        try:
            lines = (self._root / text).read_text('utf-8-sig').splitlines()
        except UnicodeDecodeError as error:
            raise BadRecord(f'{name}: {text} is not UTF-8 at byte {error.start}') from error
        except OSError as error:
            raise BadRecord(f'{name}: {text}: {error.strerror}') from error
        return tuple(line.strip() for line in lines if line.strip())


def _list(root: Path) -> tuple[list[str], dict[str, str]]:
    """The images under a directory, sorted, and its caption files as stem -> file."""
    images, texts = [], {}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith('.')]
        prefix = Path(folder).relative_to(root)
        for file in sorted(files):
            suffix = os.path.splitext(file)[1].lower()
            if file.startswith('.') or suffix not in (*IMAGE_SUFFIXES, '.txt'):
                continue
            name = (prefix / file).as_posix()
            if suffix == '.txt':
                texts[_stem(name)] = name
            else:
                images.append(name)
    return sorted(images), texts


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _valid_stems(stems: Iterable[str], captioned: Container[str]) -> set[str]:
    """The names held out for validation: hashes in the lowest 5 %, with captions at least a few."""
    hashes = {stem: int.from_bytes(hashlib.sha256(os.fsencode(stem)).digest()[:8])
              for stem in stems}
    lowest = {stem for stem, value in hashes.items() if value < VALID_SHARE * 2**64}
    order = sorted(hashes, key=hashes.get)
    order = [stem for stem in order if stem in captioned] or order
    return lowest.union(order[:min(LEAST_VALID, max(1, len(order) // 4))])
