import os
import pickle
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_jax.interop import files

FIXTURES = Path(__file__).parent / 'fixtures'

KINDS = {'Float': np.float32, 'Double': np.float64, 'Half': np.float16, 'Long': np.int64,
         'BFloat16': ml_dtypes.bfloat16, 'Byte': np.uint8}


# -- a writer of torch.save's opcodes, protocol 2 --------------------------------------------------


def text(value):
    return b'X' + struct.pack('<I', len(value.encode())) + value.encode()


def number(value):
    return b'J' + struct.pack('<i', value)


def numbers(values):
    return b'(' + b''.join(map(number, values)) + b't'


def name(module, attribute):
    return b'c' + f'{module}\n{attribute}\n'.encode()


def tensor(kind, key, size, offset, shape, strides):
    storage = (b'(' + text('storage') + name('torch', f'{kind}Storage') + text(key) + text('cpu')
               + number(size) + b'tQ')
    return (name('torch._utils', '_rebuild_tensor_v2') + b'(' + storage + number(offset)
            + numbers(shape) + numbers(strides) + b'\x89' + name('collections', 'OrderedDict')
            + b')RtR')


def mapping(**values):
    return b'}(' + b''.join(text(key) + value for key, value in values.items()) + b'u'


def write(path, body, method=zipfile.ZIP_STORED, byteorder=b'little', **storages):
    with zipfile.ZipFile(path, 'w', method) as archive:
        archive.writestr('archive/data.pkl', b'\x80\x02' + body + b'.')
        archive.writestr('archive/byteorder', byteorder)
        for key, array in storages.items():
            archive.writestr(f'archive/data/{key}', array.tobytes())
    return path


ONE = tensor('Float', 'a', 6, 0, (2, 3), (3, 1))
SIX = np.arange(6, dtype=np.float32)


# -- what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize('source', ['zoo.pth', 'legacy.pth'])
def test_what_torch_saves(source):
    """The arrays of parity.file_fixtures, which say what they hold; one saved as before 1.6."""
    found = files.read(FIXTURES / source)
    base = np.arange(24, dtype=np.float32)
    thirds = np.arange(4, dtype=np.float32) / 3
    expected = {
        'half': np.arange(4, dtype=np.float16) / np.float16(3),
        'bfloat16': thirds.astype(ml_dtypes.bfloat16),
        'double': np.arange(4) / 3, 'long': np.array([2**40, -1]), 'bool': np.array([True, False]),
        'scalar': np.float32(2.5), 'empty': np.zeros((0, 3), np.float32),
        'transposed': base.reshape(4, 6).T, 'window': base.reshape(4, 6)[1:3, 2:5],
        'every_third': base[1::3], 'shared': base, 'parameter': base[:2], 'nested.inner': base[:1]}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        np.testing.assert_array_equal(found[key], value, err_msg=key)


def test_state_dict_and_torchscript_hold_the_same():
    """One with attributes on its OrderedDict, the other as nested modules."""
    state, script = (files.read(FIXTURES / f) for f in ('state_dict.pth', 'clip_openai.pt'))
    assert state.keys() == {'ln_final.weight', 'ln_final.bias'}
    for key in state:
        np.testing.assert_array_equal(state[key], script[key])
    assert script['visual.transformer.resblocks.8.attn.in_proj_weight'].shape == (48, 16)
    assert script['input_resolution'] == 12


@settings(max_examples=40, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)),
       shape=st.lists(st.integers(1, 4), max_size=3), offset=st.integers(0, 3))
def test_strides_and_offsets(tmp_path_factory, data, kind, shape, offset):
    size = int(np.prod(shape))
    order = data.draw(st.permutations(range(len(shape))))
    memory = np.arange(offset + size).astype(KINDS[kind])
    expected = memory[offset:].reshape(shape).transpose(order)
    strides = [np.empty(shape, np.int8).transpose(order).strides[i] for i in range(len(shape))]
    path = write(tmp_path_factory.getbasetemp() / 'strides.pth', mapping(
        x=tensor(kind, '0', len(memory), offset, expected.shape, strides)), **{'0': memory})
    found = files.read(path)['x']
    assert found.dtype == memory.dtype
    np.testing.assert_array_equal(found, expected)


def test_what_a_trainer_keeps_beside_its_weights(tmp_path):
    """Its classes are names, as keys too; what is in lists is no weight."""
    callback = name('pytorch_lightning.callbacks.model_checkpoint', 'ModelCheckpoint')
    path = write(tmp_path / 'last.ckpt', mapping(
        state_dict=mapping(w=ONE), callbacks=b'}' + callback + mapping(best=text('x')) + b's',
        optimizer_states=b'](' + ONE + b'e'), a=SIX)
    found = files.read(path)
    assert found.keys() == {'state_dict.w'}
    np.testing.assert_array_equal(found['state_dict.w'], SIX.reshape(2, 3))


def test_classes_that_trainers_keep(tmp_path):
    """Made by calls, of dict or list, with a state that is none; all inert."""
    attributes = name('pytorch_lightning.utilities.parsing', 'AttributeDict') + b')R' + (
        b'(' + text('lr') + b'K\x01u')
    scalar = name('numpy.core.multiarray', 'scalar') + b'(' + name('numpy', 'dtype') + (
        b'(' + text('f8') + b'tR(K\x03tb') + text('x') + b'tR'
    listed = name('omegaconf.listconfig', 'ListConfig') + b')\x81(K\x01K\x02e'
    half = name('torch', 'float16')
    path = write(tmp_path / 'last.ckpt', mapping(
        state_dict=mapping(w=ONE), hyper_parameters=attributes, best=scalar, more=listed,
        dtype=half), a=SIX)
    assert files.read(path).keys() == {'state_dict.w'}


def test_numpy_and_safetensors(tmp_path):
    from safetensors.numpy import save_file

    arrays = {'a.b': SIX.reshape(2, 3), 'c': np.array([1, 2]), 'h': SIX.astype(ml_dtypes.bfloat16)}
    save_file(arrays, tmp_path / 'x')  # the name says nothing
    found = files.read(tmp_path / 'x')
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in arrays.items()}
    for key in arrays:
        np.testing.assert_array_equal(found[key], arrays[key])
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / 'y.npz', **{'a.b': arrays['a.b']})
        np.testing.assert_array_equal(files.read(tmp_path / 'y.npz')['a.b'], arrays['a.b'])


# -- what is refused -------------------------------------------------------------------------------


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('function,arguments,named', [
    (os.system, ('touch {}',), 'posix.system'),
    (eval, ("open('{}', 'w')",), 'builtins.eval'),
    (getattr, (os, 'system'), 'getattr'),
    (open, ('{}', 'w'), 'io.open'),
])
@pytest.mark.parametrize('protocol', range(5))
def test_code_is_not_run(tmp_path, function, arguments, named, protocol):
    victim = tmp_path / 'ran'
    if function is getattr:
        payload = b'\x80\x02' + name('__builtin__', 'getattr') + b')R.'
    else:
        payload = pickle.dumps(Runs(function, *(a.format(victim) for a in arguments)), protocol)
    with zipfile.ZipFile(tmp_path / 'bad.pt', 'w') as archive:
        archive.writestr('bad/data.pkl', payload)
    with pytest.raises(ValueError, match=rf'bad\.pt: its pickle asks for .*{named.split(".")[-1]}'):
        files.read(tmp_path / 'bad.pt')
    if protocol > 1:  # an old file begins with a pickle, of which it gives the protocol first
        (tmp_path / 'bad.pt').write_bytes(payload)
        with pytest.raises(ValueError, match=r'bad\.pt: its pickle asks for'):
            files.read(tmp_path / 'bad.pt')
    assert not victim.exists()


@pytest.mark.parametrize('body,message', [
    (name('torch.nn.modules.linear', 'Linear') + b')R', 'asks for torch.nn.modules.linear.Linear'),
    (name('torch', 'load') + b')R', 'asks for torch.load'),
    (name('torch.x', 'FloatStorage'), 'asks for torch.x.FloatStorage'),
    (b'(' + text('x') + b'ios\nsystem\n', 'opcode INST'),
    (b'\x82\x01', 'opcode EXT1'),
    (name('collections', 'OrderedDict') + b'}b', 'holds a Name, not weights'),
    (text('x'), 'holds a str, not weights'),
    (b'R', 'damaged pickle'),
    (b'}' + text('a') + b's', 'damaged pickle'),
    (b'}h\x07', 'damaged pickle'),
    (b'X\xff\xff\xff\x7fab', 'damaged pickle'),
    (mapping(x=tensor('Complex', 'a', 6, 0, (6,), (1,))), 'ComplexStorage'),
    (mapping(x=tensor('Float', 'b', 6, 0, (6,), (1,))), 'archive/data/b is missing'),
    (mapping(x=tensor('Float', 'a', 7, 0, (7,), (1,))), 'has 24 bytes, not 7 x 4'),
    (mapping(x=tensor('Double', 'a', 6, 0, (6,), (1,))), 'has 24 bytes, not 6 x 8'),
    (mapping(x=tensor('Float', 'a', 6, 1, (2, 3), (3, 1))), 'does not fit its 6 elements'),
    (mapping(x=tensor('Float', 'a', 6, -1, (2,), (1,))), 'does not fit'),
    (mapping(x=tensor('Float', 'a', 6, 5, (2,), (-1,))), 'does not fit'),
    (mapping(x=tensor('Float', 'a', 6, 0, (10**9, 10**9), (0, 0))), 'does not fit'),
    (mapping(x=tensor('Float', 'a', 6, 0, (2,), (1, 1))), 'damaged pickle'),
    (name('torch.nn.modules.a', 'A') + b')\x81q\x00}' + text('a') + b'h\x00sb', 'recursion'),
    (b'}q\x00' + b''.join(  # each holds the one before twice
        b'}(' + text('a') + b'h' + bytes([i]) + text('b') + b'h' + bytes([i]) + b'uq' +
        bytes([i + 1]) for i in range(40)), 'more than 300000 containers'),
    (b'})' + text('x') + b's', 'damaged pickle.*tuple as a name'),
])
def test_bad_pickles(tmp_path, body, message):
    path = write(tmp_path / 'bad.pt', body, a=SIX)
    with pytest.raises(ValueError, match=message) as error:
        files.read(path)
    assert str(error.value).startswith(f'{path}: ')


def test_bad_archives(tmp_path):
    def refused(message, path=tmp_path / 'x.pt'):
        with pytest.raises(ValueError, match=message) as error:
            files.read(path)
        assert str(path) in str(error.value)

    write(tmp_path / 'x.pt', mapping(x=ONE), byteorder=b'big', a=SIX)
    refused('big-endian')
    write(tmp_path / 'x.pt', mapping(x=ONE), zipfile.ZIP_DEFLATED, a=SIX)
    refused('is compressed')
    with zipfile.ZipFile(tmp_path / 'x.pt', 'w') as archive:
        archive.writestr('readme.txt', 'hello')
    refused('without weights: it holds readme.txt')
    np.savez(tmp_path / 'x.npz', x=np.array([{}], object))
    refused('allow_pickle', tmp_path / 'x.npz')
    for value in (SIX.tolist(), {'little_endian': True}):
        (tmp_path / 'x.pt').write_bytes(pickle.dumps(value, 2))
        refused('a pickle, but none of PyTorch')
    old = (FIXTURES / 'legacy.pth').read_bytes()
    eight = b'{"w":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / 'x.pt').write_bytes(len(eight).to_bytes(8, 'little') + eight + b'ab')
    refused('of a kind that NumPy does not have')
    (tmp_path / 'x.pt').write_bytes(old.replace(b'little_endianq', b'little_indianq'))
    refused('big-endian')
    for content in (b'', b'<!DOCTYPE html>', b'version https://git-lfs.github.com/spec/v1'):
        (tmp_path / 'x.pt').write_bytes(content)
        refused('not a file of weights: it begins with')
    with pytest.raises(FileNotFoundError, match='absent.pt: no such file'):
        files.read(tmp_path / 'absent.pt')


@pytest.mark.parametrize('source', ['zoo.pth', 'legacy.pth', 'clip_huggingface.safetensors',
                                    'clip.npz'])
def test_truncated_files_are_named(tmp_path, source):
    whole = (FIXTURES / source).read_bytes()
    for size in (20, len(whole) // 2, len(whole) - 1):
        path = tmp_path / source
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f'{source}: .*(truncated|download)'):
            files.read(path)


@settings(max_examples=150, deadline=None)
@given(source=st.sampled_from(['zoo.pth', 'legacy.pth', 'clip.npz']), data=st.data())
def test_damage_never_surprises(tmp_path_factory, source, data):
    """Flipped bytes: arrays, or a ValueError that names the file."""
    whole = bytearray((FIXTURES / source).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(4, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / 'damaged'
    path.write_bytes(whole)
    try:
        assert all(isinstance(a, np.ndarray) for a in files.read(path).values())
    except ValueError as error:
        assert str(error).startswith(f'{path}: ')
