"""TensorFlow Datasets directories of captioned images, read and written without TensorFlow.

Reading needs a prepared directory (one with dataset_info.json and features.json) in a format of
random access, array_record. Most data sets of the TFDS catalogue need TensorFlow to be prepared,
once and anywhere: `tfds build coco_captions --file_format=array_record`.
"""

import io
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from dalle_jax.data.records import BadRecord, Record
from dalle_jax.data.scenes import SceneConfig, Scenes

# Where several features could be the captions, the first of these names is taken.
CAPTION_NAMES = ('captions', 'caption', 'texts', 'text', 'sentences', 'sentence', 'description')


class TfdsSource:
    """One split of a prepared directory: `[i]` is a Record with the image file's bytes.

    The image is the Image feature (the one called 'image' if there are several). The captions are
    a text, a sequence of texts, or a sequence of dicts with one text each, as in coco_captions;
    one of CAPTION_NAMES, or whatever the only such feature is called.
    """

    def __init__(self, directory: str | Path, split: str):
        """Opens a split without reading records.

        Args:
          directory: the version's directory, such as tensorflow_datasets/coco_captions/2014/1.1.0.
          split: a name or a slice such as 'train[:90%]'.

        Raises:
          FileNotFoundError: nothing prepared there, or data files are missing.
          ValueError: no such split, a format that cannot be indexed, or no image or caption
            feature that could be told from the others; the message lists what there is.
        """
        import tensorflow_datasets as tfds

        directory = Path(directory)
        if not (directory / 'features.json').is_file():
            raise FileNotFoundError(_nothing_prepared(directory))
        builder = tfds.builder_from_directory(directory)
        self._image, self._captions = _find_features(builder.info.features, directory)
        try:
            info = builder.info.splits[split]
        except (KeyError, ValueError) as error:
            raise ValueError(f'{directory}: no split {split!r}; there are '
                             f'{", ".join(builder.info.splits)}, and slices of them such as '
                             f"'{next(iter(builder.info.splits), 'train')}[:90%]'") from error
        missing = [str(path) for path in info.filepaths if not Path(path).is_file()]
        if missing:
            raise FileNotFoundError(f'{directory}: {len(missing)} data files of split {split!r} '
                                    f'are missing, the first is {missing[0]}')
        try:
            self._data = builder.as_data_source(
                split, decoders={self._image: tfds.decode.SkipDecoding()})
        except NotImplementedError as error:
            raise ValueError(
                f'{directory}: prepared as {builder.info.file_format.value}, which cannot be read '
                'in random order; prepare it with --file_format=array_record, or convert it with '
                '`tfds convert_format`') from error
        self._name = f'{builder.info.name}/{split}'

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Record:
        """Reads a record. Raises BadRecord if its bytes are damaged or it has no caption."""
        name = f'{self._name}/{index}'
        if not 0 <= index < len(self):
            raise IndexError(f'{name}: there are {len(self)} records')
        try:
            example = self._data[int(index)]
            captions = example
            for key in self._captions:
                captions = captions[key]
            captions = [captions] if isinstance(captions, bytes) else captions
            captions = tuple(text for text in (c.decode().strip() for c in captions) if text)
        except (ValueError, RuntimeError) as error:  # also UnicodeDecodeError
            raise BadRecord(f'{name}: cannot be read: {error}') from error
        if not captions:
            raise BadRecord(f'{name}: no captions')
        return Record(example[self._image], captions, name)


def _nothing_prepared(directory: Path) -> str:
    found = sorted(str(path.parent) for depth in range(1, 4)
                   for path in directory.glob('*/' * depth + 'features.json'))
    if found:
        return f'{directory} is not itself a prepared data set, but contains: {", ".join(found)}'
    state = 'no dataset_info.json and features.json in it' if directory.is_dir() else 'not there'
    return (f'{directory}: {state}; give the version directory of a data set that TensorFlow '
            'Datasets has prepared, such as coco_captions/2014/1.1.0')


def _find_features(features, directory: Path) -> tuple[str, tuple[str, ...]]:
    """The image feature's name, and the keys that lead to the captions in an example."""
    import tensorflow_datasets as tfds

    def is_text(feature):
        return isinstance(feature, tfds.features.Text)

    images, captions = [], {}
    for name, feature in features.items():
        inner = feature.feature if isinstance(feature, tfds.features.Sequence) else None
        if isinstance(feature, tfds.features.Image):
            images.append(name)
        elif is_text(feature) or is_text(inner):
            captions[name] = (name,)
        elif isinstance(inner, tfds.features.FeaturesDict):
            texts = [key for key, value in inner.items() if is_text(value)]
            if len(texts) == 1:
                captions[name] = (name, texts[0])
    found = f'{directory} has the features ' + ', '.join(
        f'{name}: {type(feature).__name__}' for name, feature in features.items())
    if len(images) != 1 and 'image' not in images:
        raise ValueError(f'{found}; which is the image? There must be one of type Image, or one '
                         "of them called 'image'")
    named = [name for name in CAPTION_NAMES if name in captions]
    if not named and len(captions) != 1:
        raise ValueError(f'{found}; which are the captions? There must be one text or sequence of '
                         f'texts, or one of them called {", ".join(CAPTION_NAMES)}')
    image = 'image' if 'image' in images else images[0]
    return image, captions[(named or list(captions))[0]]


def build_scenes(directory: str | Path, config: SceneConfig, lengths: Mapping[str, int],
                 seed: int = 0) -> Path:
    """Writes scenes as a TFDS data set in the layout of coco_captions, images as PNG.

    Args:
      directory: where TFDS keeps data sets; this one goes to scenes/1.0.0 in it.
      config: what the scenes are like.
      lengths: number of records of each split of scenes.SPLITS that is wanted.
      seed: as of Scenes. Record i of a split is record i of Scenes(config, split, n, seed).

    Returns:
      The version's directory, which TfdsSource opens.

    Raises:
      FileExistsError: there is a data set already.
      ValueError: no split, a split that does not exist, a length below 1.
    """
    sources = {split: Scenes(config, split, n, seed) for split, n in lengths.items()}
    if not sources:
        raise ValueError('no split to write: give lengths such as {"train": 1000}')
    target = Path(directory) / 'scenes' / '1.0.0'
    if target.exists():
        raise FileExistsError(f'{target} exists; remove it or write to another directory')

    import numpy as np
    import tensorflow_datasets as tfds

    def examples(source):
        for i in range(len(source)):
            record = source[i]
            png = io.BytesIO()
            Image.fromarray(record.image).save(png, 'PNG')
            captions = [{'id': i * config.templates + t, 'text': text}
                        for t, text in enumerate(record.captions)]
            yield i, {'image': png.getvalue(), 'image/filename': f'{record.name}.png',
                      'image/id': i, 'captions': captions}

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = 'scenes'
        VERSION = tfds.core.Version('1.0.0')
        code_path = None  # TFDS 4.9 looks for checksums beside it, with a package it may not have

        def _info(self):
            text = tfds.features.Text()
            return tfds.core.DatasetInfo(
                builder=self,
                description=f'Captioned scenes of coloured shapes: {config}, seed {seed}.',
                disable_shuffling=True,  # else records come in the order of their keys' hashes
                features=tfds.features.FeaturesDict({
                    'image': tfds.features.Image(shape=(config.size, config.size, 3),
                                                 encoding_format='png'),
                    'image/filename': text, 'image/id': np.int64,
                    'captions': tfds.features.Sequence({'id': np.int64, 'text': text})}))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(source) for split, source in sources.items()}

        def _generate_examples(self, source):
            return examples(source)

    tfds.disable_progress_bar()
    # Encoded bytes, because TFDS would encode arrays with TensorFlow.
    Builder(data_dir=directory, file_format='array_record').download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return target
