"""Files of weights -> arrays by name: safetensors, NumPy's .npz, PyTorch's files, TorchScript.

Nothing in a file is executed: see pickles.py. PyTorch is not needed.
"""

import functools
import io
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dalle_jax.interop import pickles

STORAGES = {
    'DoubleStorage': np.float64, 'FloatStorage': np.float32, 'HalfStorage': np.float16,
    'BFloat16Storage': ml_dtypes.bfloat16, 'LongStorage': np.int64, 'IntStorage': np.int32,
    'ShortStorage': np.int16, 'CharStorage': np.int8, 'ByteStorage': np.uint8,
    'BoolStorage': np.bool_,
}

# What reading a broken file raises. RuntimeError: encrypted, an unknown compression, or modules
# that contain themselves; MemoryError: an array that claims to be larger than any machine.
DAMAGED = (ValueError, OSError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)

MAX_PICKLE = 1 << 26  # bytes; that of a model of 1000 tensors has 200 thousand

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

FORMATS = '.safetensors, .npz, or a file of PyTorch (.pt, .pth, .bin, .pkl), TorchScript too'


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a file of weights, with the dtypes they are stored in.

    The format is told by the first bytes, not by the name. The names of nested modules are joined
    by dots, as in a PyTorch state dict; what is no tensor is left out.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is none of the formats, or truncated or damaged, or asks for code; the message
        names the file and the remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such file; name a file of weights: {FORMATS}')
    with open(path, 'rb') as file:
        start = file.read(16)
    try:
        if start[:4] == b'PK\x03\x04':
            return _read_zip(path)
        if start[8:9] == b'{':
            return _read_safetensors(path)
        if start[:1] == b'\x80':
            return _read_legacy(path)
    except DAMAGED as error:
        raise ValueError(f'{path}: {error or type(error).__name__}') from error
    raise ValueError(f'{path}: not a file of weights: it begins with {start[:8]!r}; {FORMATS}')


def write(path: str | Path, arrays: Mapping[str, Any], notes: Mapping[str, str]) -> None:
    """Writes arrays and notes as .safetensors."""
    from safetensors.numpy import save_file

    save_file({name: np.asarray(array, order='C') for name, array in arrays.items()}, path,
              dict(notes))


def read_notes(path: str | Path) -> dict[str, str]:
    """What `write` noted in a .safetensors file that can be read."""
    from safetensors import safe_open

    with safe_open(path, 'np') as file:
        return file.metadata() or {}


def _read_safetensors(path):
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f'truncated or damaged safetensors file, download it again: {error}'
                         ) from error
    except (AttributeError, KeyError) as error:  # such as 8-bit floating point
        raise ValueError(f'numbers of a kind that NumPy does not have: {error}') from error


def _read_zip(path):
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError('a truncated zip file: its table of contents, which stands at the end, is '
                         f'missing; download it again ({error})') from error
    with archive:
        names = archive.namelist()
        pickled = [name for name in names if name.count('/') == 1 and name.endswith('/data.pkl')]
        if len(pickled) == 1:
            return _read_torch(archive, pickled[0].removesuffix('data.pkl'))
        if names and all(name.endswith('.npy') for name in names):
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
    raise ValueError(f'a zip file without weights: it holds {", ".join(names[:4]) or "nothing"}; '
                     f'{FORMATS}')


def _read_torch(archive, folder):
    """A zip file of PyTorch: data.pkl is the tree, data/<key> the memory of its tensors."""
    infos = {info.filename: info for info in archive.infolist()}
    if folder + 'byteorder' in infos and archive.read(folder + 'byteorder') != b'little':
        raise ValueError('its numbers are big-endian; save it again on a little-endian machine')

    @functools.cache
    def memory(storage):
        name, dtype = f'{folder}data/{storage.key}', _dtype(storage)
        if name not in infos:
            raise pickles.Refused(f'damaged: {name} is missing in it; download it again')
        if infos[name].compress_type != zipfile.ZIP_STORED:
            raise pickles.Refused(f'{name} is compressed, as PyTorch never writes it')
        if infos[name].file_size != storage.size * dtype.itemsize:
            raise pickles.Refused(f'damaged: {name} has {infos[name].file_size} bytes, not '
                                  f'{storage.size} x {dtype.itemsize}; download it again')
        return np.frombuffer(archive.read(name), dtype)

    if infos[folder + 'data.pkl'].file_size > MAX_PICKLE:
        raise ValueError(f'its data.pkl has more than {MAX_PICKLE} bytes: no list of tensors')
    tree = io.BytesIO(archive.read(folder + 'data.pkl'))
    return _flat(pickles.interpret(tree, lambda storage, *rest: _tensor(memory(storage), *rest)))


def _read_legacy(path):
    """A file of PyTorch before 1.6: five pickles (a number, a version, facts, the tree, the keys of
    the storages), then the size and the memory of each storage.
    """
    data = path.read_bytes()
    file = io.BytesIO(data)

    def plain():
        return pickles.interpret(file, lambda *of: None)

    if plain() != LEGACY_MAGIC:
        raise ValueError(f'a pickle, but none of PyTorch; {FORMATS}')
    _, facts = plain(), plain()
    if not isinstance(facts, dict) or not facts.get('little_endian'):
        raise ValueError('damaged, or its numbers are big-endian; save it again on a little-endian '
                         'machine')
    # The tree comes before the memory, and is read once to know its storages, and once with them.
    start, storages = file.tell(), set()
    pickles.interpret(file, lambda storage, *rest: storages.add(storage))
    by_key = {str(storage.key): storage for storage in storages}
    memory, keys = {}, plain()
    if not isinstance(keys, list) or {*map(str, keys)} != by_key.keys():
        raise ValueError('damaged: its storages are not those of its tensors; download it again')
    for storage in (by_key[str(key)] for key in keys):
        place, dtype = file.tell() + 8, _dtype(storage)
        size = int.from_bytes(data[place - 8:place], 'little')
        end = place + size * dtype.itemsize
        if end > len(data) or size != storage.size:
            raise ValueError(f'truncated or damaged: it has {len(data)} bytes, and {size} x '
                             f'{dtype.itemsize} of them belong at {place}; download it again')
        memory[storage] = np.frombuffer(data, dtype, size, place)
        file.seek(end)
    file.seek(start)
    return _flat(pickles.interpret(
        file, lambda storage, *rest: _tensor(memory[storage], *rest)))


def _dtype(storage):
    if storage.kind not in STORAGES:
        raise pickles.Refused(f'it has a {storage.kind}; known: {", ".join(STORAGES)}')
    return np.dtype(STORAGES[storage.kind])


def _tensor(memory, offset, shape, strides):
    """A view of a storage's elements; strides in elements."""
    if 0 in shape:
        return np.zeros(shape, memory.dtype)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    inside = min((offset, *shape, *strides)) >= 0 and last < len(memory)
    if not inside or math.prod(shape) > len(memory):
        raise pickles.Refused(f'damaged: a tensor {list(shape)} with strides {list(strides)} from '
                              f'{offset} on does not fit its {len(memory)} elements')
    return np.lib.stride_tricks.as_strided(
        memory[offset:], shape, [stride * memory.itemsize for stride in strides], writeable=False)


def _flat(tree):
    if not isinstance(tree, dict | pickles.Object):
        raise ValueError(f'it holds a {type(tree).__name__}, not weights by name')
    return pickles.flatten(tree)
