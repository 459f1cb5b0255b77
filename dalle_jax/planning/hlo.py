"""Reads the text of an optimised XLA program: what it executes, and how often.

Trip counts of loops come from the compiler's notes where it left some (CPU, GPU), or else from
running the loop on nothing but the integers that its condition depends on.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

MOST_TRIPS = 100_000

_HEADER = re.compile(r'(?:ENTRY )?%?([\w.\-]+) \(.*\{$')
_LINE = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$')
_CALLED = re.compile(r'\b(?:calls|to_apply|body|(?:true|false)_computation)=%?([\w.\-]+)|'
                     r'\bbranch_computations=\{(.*?)\}')
_INTEGER = re.compile(r'(?:[su]\d+|pred)\[\]')
_ARITHMETIC = {'add': lambda a, b: a + b, 'subtract': lambda a, b: a - b,
               'multiply': lambda a, b: a * b, 'maximum': max, 'minimum': min,
               'and': lambda a, b: a & b}
_COMPARISON = {'LT': lambda a, b: a < b, 'LE': lambda a, b: a <= b, 'GT': lambda a, b: a > b,
               'GE': lambda a, b: a >= b, 'EQ': lambda a, b: a == b, 'NE': lambda a, b: a != b}
_SAME = {'copy', 'bitcast', 'convert', 'reshape', 'copy-start', 'copy-done', 'opt-barrier'}


class Instruction(NamedTuple):
    """A line: name, type as text, opcode, and the rest: operands, a parenthesis, attributes."""

    name: str
    type: str
    opcode: str
    rest: str


class Computation(NamedTuple):
    name: str
    instructions: dict[str, Instruction]
    root: str


class Executed(NamedTuple):
    """An instruction that the program executes.

    Attributes:
      kind: what the caller's function said of it.
      computation: name of the one it stands in.
      operands: (dtype, shape) of each array among its operands.
      count: how often.
    """

    instruction: Instruction
    kind: Any
    computation: str
    operands: tuple[tuple[str, tuple[int, ...]], ...]
    count: int


def executed(text: str, kind: Callable[[Instruction], Any]) -> Iterator[Executed]:
    """The instructions for which kind(instruction) is not None, in the order of the schedule.

    Raises:
      ValueError: such an instruction stands in a loop whose trips do not follow from constants.
    """
    program, entry = _parse(text)
    kinds = {name: {i.name: k for i in c.instructions.values() if (k := kind(i)) is not None}
             for name, c in program.items()}
    holds = {}

    def has(name):
        if name not in holds:
            holds[name] = bool(kinds[name]) or any(
                has(other) for i in program[name].instructions.values() for other in _called(i))
        return holds[name]

    def visit(name, arguments, count):
        computation = program[name]
        frame = _Frame(program, computation, arguments)
        counted = _begun(computation)
        for i in computation.instructions.values():
            if i.name in kinds[name] and i.name in counted:
                yield Executed(i, kinds[name][i.name], name, _arrays(computation, i), count)
            called = [other for other in _called(i) if has(other)]
            if called and i.opcode == 'while':
                start = frame.value(_operands(i)[0])
                trips = _trips(program, i, start)
                if trips is None:
                    raise ValueError(f'the loop {i.name} has collectives in it and no trip count '
                                     'that follows from constants')
                inside = [_unchanged(program, called[0], start)]
                yield from visit(called[0], inside, count * trips)
            else:
                # Branches of a conditional take one of its operands each, not all.
                values = [None if i.opcode == 'conditional' else frame.value(o)
                          for o in _operands(i)] if called else []
                for other in called:
                    yield from visit(other, values, count)

    yield from visit(entry, [None] * len(program[entry].instructions), 1)


def bits(dtype: str) -> int:
    """Of one number: 'bf16' -> 16, 'pred' -> 8, 'f8e4m3fn' -> 8."""
    return 8 if dtype == 'pred' else int(re.search(r'\d+', dtype)[0])


def _parse(text):
    """Name -> Computation, and the entry's name."""
    program, entry, current = {}, None, None
    for line in text.splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = header[1]
                entry = current if line.startswith('ENTRY') else entry
                instructions, root = {}, None
        elif line == '}' or line.startswith('}, execution_thread='):
            program[current] = Computation(current, instructions, root)
            current = None
        elif found := _LINE.match(line):
            is_root, name, kind, opcode, rest = found.groups()
            instructions[name] = Instruction(name, kind, opcode, rest)
            root = name if is_root else root
    if entry is None:
        raise ValueError('this is not the text of an XLA program: it has no ENTRY computation')
    return program, entry


def _operands(instruction):
    """Names of the operands."""
    depth = 1
    for found in re.finditer(r'[()]', instruction.rest):
        depth += 1 if found[0] == '(' else -1
        if not depth:
            return re.findall(r'%([\w.\-]+)', instruction.rest[:found.start()])
    return []


def _called(instruction):
    """Names of the computations that it runs; the end of an asynchronous call runs nothing."""
    if instruction.opcode.endswith(('-done', '-update')):
        return []
    return [name.strip().lstrip('%') for one, many in _CALLED.findall(instruction.rest)
            for name in (one or many).split(',')]


def _arrays(computation, instruction):
    types = ' '.join(computation.instructions[o].type for o in _operands(instruction))
    return tuple((dtype, tuple(int(n) for n in shape.split(',') if n))
                 for dtype, shape in re.findall(r'\b(pred|[a-z]+\d\w*)\[([\d,]*)\]', types))


def _begun(computation):
    """Names of the instructions that begin here.

    TPU compilers repeat a collective in each of the fusions that run beside it. Those that only
    carry it on are handed its semaphores, which live in memory space 2.
    """
    instructions = computation.instructions.values()
    if not any(i.opcode == 'parameter' and i.type == 'u32[]{:S(2)}'
               for i in instructions):
        return computation.instructions
    return {o for i in instructions if '"AsyncCollectiveStart"' in i.rest for o in _operands(i)}


class _Frame:
    """Values of a computation's instructions: integers, lists for tuples, or None: unknown."""

    def __init__(self, program, computation, arguments):
        self.program, self.computation, self.arguments = program, computation, arguments
        self.known = {}

    def value(self, name):
        if name not in self.known:
            self.known[name] = self._value(self.computation.instructions[name])
        return self.known[name]

    def root(self):
        return self.value(self.computation.root)

    def _value(self, i):
        if not _INTEGER.match(i.type) and not i.type.startswith('('):
            return None
        if i.opcode == 'constant':
            text = i.rest.partition(')')[0]
            return {'true': 1, 'false': 0}.get(text) if text.isalpha() else int(text)
        if i.opcode == 'parameter':
            return self.arguments[int(i.rest.partition(')')[0])]
        operands = [self.value(o) for o in _operands(i)]
        if i.opcode == 'tuple':
            return operands
        if i.opcode == 'get-tuple-element':
            index = int(re.search(r'index=(\d+)', i.rest)[1])
            return operands[0][index] if isinstance(operands[0], list) else None
        if i.opcode in _SAME:
            return operands[0]
        if i.opcode in ('fusion', 'call'):
            return _Frame(self.program, self.program[_called(i)[0]], operands).root()
        if i.opcode == 'compare':
            function = _COMPARISON[re.search(r'direction=(\w+)', i.rest)[1]]
        else:
            function = _ARITHMETIC.get(i.opcode)
        known = function and all(isinstance(value, int) for value in operands)
        return function(*operands) if known else None


def _trips(program, loop, state):
    """How often the loop's body runs, given the values that it starts with; None if unknown."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(noted[1])
    condition, body = (program[re.search(rf'\b{key}=%?([\w.\-]+)', loop.rest)[1]]
                       for key in ('condition', 'body'))
    for trips in range(MOST_TRIPS):
        again = _Frame(program, condition, [state]).root()
        if not again:
            return trips if again is not None else None
        state = _Frame(program, body, [state]).root()
    return None


def _unchanged(program, body, state):
    """What a loop starts with and never changes; None where it does."""
    if not isinstance(state, list):
        return None
    marks = [object() for _ in state]
    after = _Frame(program, program[body], [marks]).root()
    return [s if a is m else None for s, a, m in zip(state, after, marks)]
