"""Token records: images as codes of an image tokenizer, with all their captions.

    DIR/meta.json               what the codes are, and how they were made; written last
        train/codes.npy         [N, K, h, w]: K crops an image; uint16, int32 above 65,536 codes
              captions.jsonl    one line a record: {"name": ..., "captions": [...]}
              offsets.npy       int64 [N + 1]: the bytes at which the lines begin, and the last ends
              left_out.txt      one line a bad record, which has no codes
        valid/                  the same with K = 1
        parts/                  shards, until all of them are there

Everything is memory-mapped, so that a data set may be larger than the memory. `encode` (the verb)
writes them; this file knows the format.
"""

import contextlib
import json
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dalle_jax.data.records import BadRecord, Record

FORMAT = 1
TOKEN_SPLITS = ('train', 'valid')
REMEDY = 'write token records with python -m dalle_jax.encode'


class ImageTokenizer(NamedTuple):
    """What made the codes.

    Attributes:
      run: directory of the run, as it was called then.
      fingerprint: checksum of its parameters.
      grid: (h, w), rows and columns of codes.
      vocab: codes lie in [0, vocab).
    """

    run: str
    fingerprint: str
    grid: tuple[int, int]
    vocab: int


class TokenSource:
    """One split of a directory of token records: `[i]` is a Record with codes, without an image.

    Attributes:
      image_tokenizer: the ImageTokenizer behind the codes.
    """

    def __init__(self, directory: str | Path, split: str, fingerprint: str = ''):
        """Opens a split without reading records.

        Args:
          directory: what `encode` wrote.
          split: one of TOKEN_SPLITS.
          fingerprint: of the image tokenizer that the codes must come from; '': of any.

        Raises:
          FileNotFoundError: no token records there, or a file is missing.
          ValueError: another split or fingerprint, or files that do not fit together.
        """
        if split not in TOKEN_SPLITS:
            raise ValueError(f'split {split!r} of token records is none of '
                             f'{", ".join(TOKEN_SPLITS)}')
        directory = Path(directory)
        meta = read_meta(directory)
        try:
            made_by, counts = meta['tokenizer'], meta['splits'][split]
            self.image_tokenizer = ImageTokenizer(
                made_by['run'], made_by['fingerprint'], tuple(made_by['grid']), made_by['vocab'])
            length, crops = counts['records'], counts['crops']
        except (KeyError, TypeError) as error:
            raise ValueError(f'{directory}/meta.json lacks {error}: {REMEDY}') from error
        if fingerprint not in ('', self.image_tokenizer.fingerprint):
            raise ValueError(
                f'{directory} holds codes of {self.image_tokenizer.run} with the fingerprint '
                f'{self.image_tokenizer.fingerprint}, and those of {fingerprint} are asked for '
                '(data.tokenizer); name the directory of these')
        self._where = directory / split
        self._vocab = self.image_tokenizer.vocab
        self._codes = _mapped(self._where / 'codes.npy', code_dtype(self._vocab),
                              (length, crops, *self.image_tokenizer.grid))
        self._offsets = _mapped(self._where / 'offsets.npy', np.dtype(np.int64), (length + 1,))
        file = self._where / 'captions.jsonl'
        size, wanted = _existing(file).stat().st_size, int(self._offsets[-1])
        if size != wanted:
            raise ValueError(f'{file} has {size} bytes, and its offsets want {wanted}: it is '
                             f'damaged; {REMEDY} again')
        self._lines = np.memmap(file, np.uint8, 'r').view(np.ndarray)

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of a record."""
        return self._line(index)[1]

    def __len__(self) -> int:
        return len(self._codes)

    def __getitem__(self, index: int) -> Record:
        """Reads a record. Raises BadRecord where its codes or its captions are damaged."""
        name, captions = self._line(index)
        codes = self._codes[index]
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self._vocab:
            raise BadRecord(f'{name}: record {index} of {self._where} holds the code '
                            f'{low if low < 0 else high}, and there are {self._vocab}')
        return Record(None, captions, name, codes)

    def _line(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f'{self._where}: no record {index}, there are {len(self)}')
        try:
            start, end = self._offsets[index:index + 2]
            line = json.loads(self._lines[start:end].tobytes().decode('utf-8', 'surrogatepass'))
            return line['name'], tuple(line['captions'])
        except (ValueError, TypeError, KeyError) as error:
            raise BadRecord(f'record {index} of {self._where}: its captions are damaged') from error


def read_meta(directory: Path) -> dict[str, Any]:
    """What meta.json says.

    Raises:
      FileNotFoundError: no directory, no token records in it, or not all of them yet.
      ValueError: it cannot be read, or is of another format.
    """
    file = directory / 'meta.json'
    if not file.exists() and (directory / 'parts').is_dir():
        raise FileNotFoundError(f'{directory} is not finished: run its encode command again, it '
                                'continues where it stopped')
    if not file.exists():
        state = 'has no meta.json' if directory.is_dir() else 'is not there'
        raise FileNotFoundError(f'{directory} {state}: {REMEDY}, or give another path')
    try:
        meta = json.loads(file.read_text())
        found = meta['format']
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f'{file} cannot be read: {REMEDY} again') from error
    if found != FORMAT:
        raise ValueError(f'{file} is of format {found}, and this version reads {FORMAT}: {REMEDY} '
                         'again')
    return meta


def code_dtype(vocab: int) -> np.dtype:
    """How codes below `vocab` are stored."""
    return np.dtype(np.uint16 if vocab <= 2**16 else np.int32)


def _existing(file):
    if not file.is_file():
        raise FileNotFoundError(f'{file} is missing: {REMEDY} again, or copy it too')
    return file


def _mapped(file, dtype, shape):
    """A .npy file as an array that is read where it is used."""
    try:
        array = np.load(_existing(file), mmap_mode='r').view(np.ndarray)
    except (ValueError, EOFError) as error:  # shorter than its header says, or no header
        raise ValueError(f'{file} is cut short or damaged ({error}): {REMEDY} again') from error
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f'{file} holds {array.dtype} {list(array.shape)}, and meta.json says '
                         f'{dtype} {list(shape)}: {REMEDY} again')
    return array


# --- writing --------------------------------------------------------------------------------------

def caption_line(record: Record) -> bytes:
    """A record's line of captions.jsonl."""
    line = json.dumps({'name': record.name, 'captions': record.captions}, ensure_ascii=False)
    return line.encode('utf-8', 'surrogatepass') + b'\n'  # a file's name may be no Unicode


def shard_file(directory: Path, split: str, number: int) -> Path:
    """Where a shard is kept until all are there."""
    return directory / 'parts' / f'{split}-{number:06}.npz'


def write_shard(file: Path, codes: np.ndarray, lines: Sequence[bytes], left_out: Sequence[str]
                ) -> None:
    """Writes a shard so that a killed process leaves the whole of it or nothing.

    Args:
      codes: integers [n, K, h, w], of code_dtype.
      lines: n caption lines.
      left_out: one message a bad record.
    """
    with _replaced(file) as stream:
        np.savez(stream, codes=codes, lines=np.frombuffer(b''.join(lines), np.uint8),
                 lengths=np.array([len(line) for line in lines], np.int64),
                 left_out=np.array(left_out, np.str_))


def join_shards(directory: Path, split: str, shards: int) -> dict[str, int]:
    """Writes a split's files from its shards, holding one of them at a time.

    Returns:
      the counts 'records' (N), 'crops' (K) and 'left_out'.

    Raises:
      ValueError: a shard cannot be read, or there is no good record in any.
    """
    def parts(name):
        return (_member(shard_file(directory, split, number), name) for number in range(shards))

    target = directory / split
    target.mkdir(exist_ok=True)
    left_out = np.concatenate([*parts('left_out')])
    with _replaced(target / 'left_out.txt') as stream:
        stream.writelines(f'{message}\n'.encode() for message in left_out)
    lengths = np.concatenate([*parts('lengths')])
    if not lengths.size:
        raise ValueError(f'all {len(left_out)} records of split {split!r} are bad; the first: '
                         f'{left_out[0]}. The others are in {target}/left_out.txt; mend them, or '
                         'choose another crop, and give another --out')
    with _replaced(target / 'captions.jsonl') as stream:
        stream.writelines(part.tobytes() for part in parts('lines'))
    with _replaced(target / 'offsets.npy') as stream:
        np.save(stream, np.concatenate([[0], np.cumsum(lengths)]))
    with _replaced(target / 'codes.npy') as stream:
        for number, part in enumerate(parts('codes')):
            shape = len(lengths), *part.shape[1:]
            if number == 0:
                np.lib.format.write_array_header_1_0(stream, {
                    'descr': np.lib.format.dtype_to_descr(part.dtype), 'fortran_order': False,
                    'shape': shape})
            stream.write(part.tobytes())
    return {'records': shape[0], 'crops': shape[1], 'left_out': len(left_out)}


def finish(directory: Path, meta: dict[str, Any]) -> None:
    """Writes meta.json, which makes the directory readable, and removes the shards."""
    with _replaced(directory / 'meta.json') as stream:
        stream.write(json.dumps({'format': FORMAT} | meta, indent=2).encode())
    shutil.rmtree(directory / 'parts')


@contextlib.contextmanager
def _replaced(file):
    """A stream of bytes that takes the place of the file once it is complete."""
    temporary = file.with_name(file.name + '.tmp')
    with open(temporary, 'wb') as stream:
        yield stream
    os.replace(temporary, file)


def _member(file, name):
    try:
        with np.load(file) as arrays:
            return arrays[name]
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f'{file} is damaged ({error}); remove it and run the same command again'
                         ) from error
