"""Pickles of tensors, read without running anything that is in them.

A pickle is a program, and Python's unpickler calls what it names. Here its opcodes build plain
data: a name that is called must be one of a handful that stand for tensors and containers, classes
of modules become inert objects with attributes, and every other name is refused.
"""

import itertools
import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import numpy as np

# Classes whose instances are kept as inert objects. None of them is looked up or run.
INERT = ('__torch__.', 'torch.nn.modules.', 'dall_e.')

# What trainers keep beside weights. Calls of these, too, give inert objects.
BESIDE = ('pytorch_lightning.', 'omegaconf.', 'argparse.Namespace', 'collections.defaultdict',
          'pathlib.', 'numpy.', '_codecs.encode')

DTYPES = {f'torch.{name}' for name in ('float16', 'bfloat16', 'float32', 'float64', 'bool',
                                       'uint8', 'int8', 'int16', 'int32', 'int64')}

MAX_NODES = 300_000  # containers of a file, counted wherever they are named; weights have thousands

# What may be called with arguments that are data, beside tensors (see _Machine.call).
FUNCTIONS = {
    'collections.OrderedDict': lambda items=(): _dict(items),
    '__builtin__.set': lambda items=(): list(items),
    'builtins.set': lambda items=(): list(items),
    'torch.device': lambda *where: None,
    'torch.Size': tuple,
    'torch._utils._rebuild_parameter': lambda tensor, *rest: tensor,
    'torch.jit._pickle.build_intlist': list,
    'torch.jit._pickle.build_doublelist': list,
    'torch.jit._pickle.build_boollist': list,
    'torch.jit._pickle.build_tensorlist': list,
    'torch.jit._pickle.restore_type_tag': lambda value, tag: value,
}
TENSOR = 'torch._utils._rebuild_tensor_v2'


class Name(NamedTuple):
    """A class or function that a pickle names: 'module.name'."""

    path: str


class Object:
    """An instance of an inert class: its name and its attributes."""

    def __init__(self, path: str):
        self.path, self.state = path, {}


class Storage(NamedTuple):
    """A tensor's memory: where it is kept, and as what."""

    kind: str  # such as 'FloatStorage'
    key: str
    size: int  # elements


class Refused(ValueError):
    """A pickle that holds more than tensors, or none of this library's tensors."""


def interpret(file: BinaryIO, tensor: Callable) -> Any:
    """The value of the pickle at a file's position, which ends up behind it.

    Args:
      file: holds one of protocol 0 to 4.
      tensor: (Storage, offset, shape, strides), strides in elements -> what stands for a tensor.

    Returns:
      dicts, lists, tuples, scalars, strings, `Object`s and what `tensor` returned.

    Raises:
      Refused: it names a class or function, or has an opcode, that no file of weights needs.
      ValueError: it is damaged.
    """
    machine = _Machine(tensor)
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == 'STOP':
                return machine.pop()
            machine.step(opcode.name, argument)
    except Refused:
        raise
    # What a damaged program asks of the stack, of the memo and of the containers.
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'truncated or damaged pickle, download it again: {error!r}') from error
    raise ValueError('truncated or damaged pickle, download it again: it has no end')


LITERALS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
# Opcodes whose argument is the value.
ARGUMENTS = {'INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'LONG4', 'FLOAT', 'BINFLOAT',
             'STRING', 'BINSTRING', 'SHORT_BINSTRING', 'UNICODE', 'BINUNICODE', 'SHORT_BINUNICODE',
             'BINUNICODE8', 'BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8'}
EMPTY = {'EMPTY_DICT': dict, 'EMPTY_LIST': list, 'EMPTY_SET': list, 'EMPTY_TUPLE': tuple}
TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self, tensor):
        self._tensor = tensor
        self._stack, self._marks, self._memo = [], [], {}

    def pop(self):
        return self._stack.pop()

    def _top(self, count):
        """Takes the last values, oldest first."""
        if len(self._stack) < count:
            raise IndexError('the stack is empty')
        values = self._stack[len(self._stack) - count:]
        del self._stack[len(self._stack) - count:]
        return values

    def _since_mark(self):
        return self._top(len(self._stack) - self._marks.pop())

    def step(self, name, argument):
        """One opcode."""
        push = self._stack.append
        if name in LITERALS:
            push(LITERALS[name])
        elif name in ARGUMENTS:
            push(argument)
        elif name in EMPTY:
            push(EMPTY[name]())
        elif name in TUPLES:
            push(tuple(self._top(TUPLES[name])))
        elif name in ('PROTO', 'FRAME'):
            pass
        elif name == 'MARK':
            self._marks.append(len(self._stack))
        elif name == 'POP':
            self.pop()
        elif name == 'POP_MARK':
            self._since_mark()
        elif name == 'TUPLE':
            push(tuple(self._since_mark()))
        elif name == 'LIST':
            push(self._since_mark())
        elif name == 'DICT':
            push(_pairs(self._since_mark()))
        elif name == 'APPEND':
            value = self.pop()
            self._container(list).append(value)
        elif name in ('APPENDS', 'ADDITEMS'):
            values = self._since_mark()
            self._container(list).extend(values)
        elif name == 'SETITEM':
            values = self._top(2)
            self._container(dict).update(_pairs(values))
        elif name == 'SETITEMS':
            values = self._since_mark()
            self._container(dict).update(_pairs(values))
        elif name in ('BINPUT', 'LONG_BINPUT', 'PUT'):
            self._memo[argument] = self._stack[-1]
        elif name == 'MEMOIZE':
            self._memo[len(self._memo)] = self._stack[-1]
        elif name in ('BINGET', 'LONG_BINGET', 'GET'):
            push(self._memo[argument])
        elif name == 'GLOBAL':
            push(_name('.'.join(argument.split(' '))))
        elif name == 'STACK_GLOBAL':
            push(_name('.'.join(self._top(2))))
        elif name == 'BINPERSID':
            what, kind, *rest = self.pop()
            if what == 'module':  # an old file's class, with its source code
                push(kind)
            else:
                key, _, size = rest[:3]
                push(Storage(kind.path.removeprefix('torch.'), key, size))
        elif name == 'NEWOBJ':
            cls, _ = self._top(2)
            push(Object(cls.path))
        elif name == 'REDUCE':
            function, arguments = self._top(2)
            push(self._call(function.path, arguments))
        elif name == 'BUILD':
            state = self.pop()
            # Attributes of a dict, and a state that is none, play no part.
            if isinstance(self._stack[-1], Object) and isinstance(state, dict):
                self._stack[-1].state.update(state)
        else:
            raise Refused(f'its pickle has the opcode {name}, which no file of weights needs')

    def _container(self, kind):
        top = self._stack[-1]
        if isinstance(top, Object):  # of a class made of dict or list
            return top.state if kind is dict else []
        if not isinstance(top, kind):
            raise TypeError(f'{type(top).__name__} in the place of a {kind.__name__}')
        return top

    def _call(self, path, arguments):
        if path == TENSOR:
            storage, offset, shape, strides, *_ = arguments
            if not isinstance(storage, Storage):
                raise TypeError('a tensor without a storage')
            return self._tensor(storage, offset, shape, strides)
        if path.startswith(BESIDE):
            return Object(path)
        if path not in FUNCTIONS:
            raise _unknown(path)
        return FUNCTIONS[path](*arguments)


def _name(path):
    storage = path.startswith('torch.') and path.endswith('Storage') and path.count('.') == 1
    if not (storage or path in FUNCTIONS or path in DTYPES or path == TENSOR
            or path.startswith(INERT + BESIDE)):
        raise _unknown(path)
    return Name(path)


def _unknown(path):
    return Refused(f'its pickle asks for {path}, which no file of weights needs and which could '
                   'run code; save the weights as .safetensors, and trust the file no further')


def _pairs(values):
    return _dict(zip(values[::2], values[1::2], strict=True))


def _dict(items):
    found = {}
    for key, value in items:
        if not isinstance(key, str | int | Name):  # a tuple of tuples could take forever
            raise TypeError(f'{type(key).__name__} as a name')
        found[key] = value
    return found


def flatten(value: Any) -> dict[str, np.ndarray]:
    """Dotted names -> the arrays of nested dicts and modules; what is no array is left out.

    Raises Refused where containers hold each other so often that it would take forever.
    """
    found, nodes = {}, itertools.count()

    def visit(value, prefix):
        if next(nodes) == MAX_NODES:
            raise Refused(f'it has more than {MAX_NODES} containers: no file of weights')
        if isinstance(value, Object):
            value = value.state
            parts = ('_parameters', '_buffers', '_modules')
            if '_modules' in value:  # of a module in Python; in TorchScript they are attributes
                value = {name: child for part in parts for name, child in value[part].items()}
        for name, child in value.items():
            if isinstance(child, np.ndarray):
                found[f'{prefix}{name}'] = child
            elif isinstance(child, dict | Object):
                visit(child, f'{prefix}{name}.')
    visit(value, '')
    return found
