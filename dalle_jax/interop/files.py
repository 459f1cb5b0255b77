"""Files of weights -> arrays by name: safetensors, NumPy's .npz, PyTorch's zip files, TorchScript.

Nothing in a file is executed: see pickles.py. PyTorch is not needed.
"""

import math
import zipfile
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np

from dalle_jax.interop import pickles

STORAGES = {
    'DoubleStorage': np.float64, 'FloatStorage': np.float32, 'HalfStorage': np.float16,
    'BFloat16Storage': ml_dtypes.bfloat16, 'LongStorage': np.int64, 'IntStorage': np.int32,
    'ShortStorage': np.int16, 'CharStorage': np.int8, 'ByteStorage': np.uint8,
    'BoolStorage': np.bool_,
}

# What reading a broken zip file raises. RuntimeError: encrypted, an unknown compression, or modules
# that contain themselves; MemoryError: an array that claims to be larger than any machine.
DAMAGED = (ValueError, OSError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)

MAX_PICKLE = 1 << 26  # bytes; that of a model of 1000 tensors has 200 thousand

FORMATS = '.safetensors, .npz, or a zip file of PyTorch (.pt, .pth, .bin, .pkl), TorchScript too'


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
    except DAMAGED as error:
        raise ValueError(f'{path}: {error or type(error).__name__}') from error
    if start[:1] == b'\x80':
        raise ValueError(f'{path}: a pickle of PyTorch before 1.6, which is no zip file; load it '
                         'with PyTorch and save it again: torch.save(torch.load(path), path)')
    raise ValueError(f'{path}: not a file of weights: it begins with {start[:8]!r}; {FORMATS}')


def _read_safetensors(path):
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f'truncated or damaged safetensors file, download it again: {error}'
                         ) from error


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
    storages = {}

    def member(storage):
        if storage.kind not in STORAGES:
            raise pickles.Refused(f'it has a {storage.kind}; known: {", ".join(STORAGES)}')
        name, dtype = f'{folder}data/{storage.key}', np.dtype(STORAGES[storage.kind])
        if name not in infos:
            raise pickles.Refused(f'damaged: {name} is missing in it; download it again')
        if infos[name].compress_type != zipfile.ZIP_STORED:
            raise pickles.Refused(f'{name} is compressed, as PyTorch never writes it')
        if infos[name].file_size != storage.size * dtype.itemsize:
            raise pickles.Refused(f'damaged: {name} has {infos[name].file_size} bytes, not '
                                  f'{storage.size} x {dtype.itemsize}; download it again')
        return np.frombuffer(archive.read(name), dtype)

    def tensor(storage, offset, shape, strides):
        if storage not in storages:
            storages[storage] = member(storage)
        memory = storages[storage]
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides,
                                                                         strict=True))
        inside = min((offset, *shape, *strides)) >= 0 and last < len(memory)
        if 0 in shape:
            return np.zeros(shape, memory.dtype)
        if not inside or math.prod(shape) > len(memory):
            raise pickles.Refused(f'damaged: a tensor {list(shape)} with strides {list(strides)} '
                                  f'from {offset} on does not fit its {len(memory)} elements')
        return np.lib.stride_tricks.as_strided(
            memory[offset:], shape, [stride * memory.itemsize for stride in strides],
            writeable=False)

    if infos[folder + 'data.pkl'].file_size > MAX_PICKLE:
        raise ValueError(f'its data.pkl has more than {MAX_PICKLE} bytes: no list of tensors')
    found = pickles.interpret(archive.read(folder + 'data.pkl'), tensor)
    if not isinstance(found, dict | pickles.Object):
        raise ValueError(f'it holds a {type(found).__name__}, not weights by name')
    return pickles.flatten(found)
