"""The collectives of a compiled XLA program: which, over which mesh axes, how often, what bytes.

Reads the text of an optimised program, `compiled.as_text()`, as the compilers for CPU, TPU and GPU
write it. What a device sends is counted for rings, with n devices to a group: all-gather n - 1
times its operand, reduce-scatter and all-to-all (n - 1) / n of it, all-reduce 2 (n - 1) / n, a
permute its operand.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from dalle_jax.planning import hlo

# What a device sends as a multiple of its operand's bytes, given the devices of a group.
SENT = {
    'all-reduce': lambda n: 2 * (n - 1) / n,
    'reduce-scatter': lambda n: (n - 1) / n,
    'all-gather': lambda n: n - 1,
    'all-to-all': lambda n: (n - 1) / n,
    'collective-permute': lambda n: 1,
    'collective-broadcast': lambda n: 1,
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of the program.

    Attributes:
      name: the instruction's, to find it in the text.
      kind: key of SENT.
      operands: (dtype, shape) on one device; several where the compiler combined operations.
      group: devices that take part together; of a permute, devices along its axes.
      axes: mesh axes along which devices of a group differ, in the mesh's order.
      between: whether some group has devices of several slices or nodes.
      count: how often the program executes it.
      bytes: that one device sends each time.
    """

    name: str
    kind: str
    operands: tuple[tuple[str, tuple[int, ...]], ...]
    group: int
    axes: tuple[str, ...]
    between: bool
    count: int

    @property
    def bytes(self) -> float:
        return SENT[self.kind](self.group) * sum(
            math.prod(shape) * hlo.bits(dtype) / 8 for dtype, shape in self.operands)


class Total(NamedTuple):
    """Executions, and bytes that one device sends in all of them."""

    count: int
    bytes: float


def parse(text: str, mesh: Any, node: int | None = None) -> list[Collective]:
    """The collectives that one run of a program executes, in the order of its schedule.

    Args:
      text: of the optimised program.
      mesh: that the program was compiled for; only its shape and its devices' ids are read.
      node: how many devices, which follow each other in the mesh, form a slice or a node. None:
        those that the program itself tells from others, as it does for several TPU slices.

    An operation that the compiler splits, fuses or wraps to run beside others is listed once, in a
    loop with the loop's trips as a factor. Of a conditional all branches are listed.

    Raises:
      ValueError: the mesh has another number of devices; or a loop with collectives in it whose
        trips do not follow from constants, which is named.
    """
    partitions = re.search(r'num_partitions=(\d+)', text.partition('\n')[0])
    partitions = int(partitions[1]) if partitions else 1
    size = math.prod(mesh.shape.values())
    if size % partitions:
        raise ValueError(f'the program is for {partitions} devices and the mesh {dict(mesh.shape)} '
                         f'has {size}; give the mesh it was compiled for')
    found = []
    for run in hlo.executed(text, _kind):
        groups = _groups(run.instruction, mesh, partitions)
        found.append(_collective(run, groups, mesh.shape, node or partitions))
    return [c for c in found if c.group > 1]


def summary(collectives: Iterable[Collective]) -> dict[tuple[str, tuple[str, ...]], Total]:
    """(kind, axes) -> Total."""
    totals = {}
    for c in collectives:
        count, size = totals.get((c.kind, c.axes), Total(0, 0.0))
        totals[c.kind, c.axes] = Total(count + c.count, size + c.count * c.bytes)
    return totals


def _kind(instruction):
    """Key of SENT, or None for what is no collective, or not the one instruction that counts."""
    opcode = instruction.opcode.removesuffix('-start')
    if opcode == 'send':  # between TPU slices, by their hosts
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)
        opcode = kind[1].lower().replace('_', '-') if kind else ''
        opcode = 'collective-permute' if opcode == 'one-to-one' else opcode
    return opcode if opcode in SENT else None


def _collective(run, groups, shape, node):
    places = np.stack(np.unravel_index(groups, tuple(shape.values())))
    differ = (places != places[..., :1]).any(axis=(1, 2))
    axes = tuple(axis for axis, d in zip(shape, differ) if d)
    kind = run.kind
    # What TPU compilers make of a reduce-scatter: an all-reduce fused with the slice of its result.
    if kind == 'all-reduce' and run.computation.startswith('all-reduce-scatter'):
        kind = 'reduce-scatter'
    group = groups.shape[1]
    if kind == 'collective-permute':
        group = math.prod(shape[axis] for axis in axes)
    nodes = groups // node
    return Collective(run.instruction.name, kind, run.operands, group, axes,
                      bool((nodes != nodes[:, :1]).any()), run.count)


def _groups(instruction, mesh, partitions):
    """Devices as places in the mesh: [groups, devices of a group]; of a permute [pairs, 2]."""
    text = instruction.rest
    if instruction.opcode == 'send':
        return _slice_groups(text, mesh, partitions)
    if pairs := re.search(r'source_target_pairs=\{(.*?)\}\}', text):
        return np.array(re.findall(r'(\d+),(\d+)', pairs[1]), int).reshape(-1, 2)
    listed = text.partition('replica_groups=')[2]
    if listed.startswith('mesh'):
        return _mesh_groups(listed)
    if listed.startswith('['):
        shape, iota = re.match(r'\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)', listed).groups()
        return _iota(iota).reshape(_ints(shape))
    groups = [_ints(g) for g in re.findall(r'\{([\d,]+)\}', listed.partition('}}')[0] + '}')]
    return np.array(groups or [range(partitions)])


def _mesh_groups(text):
    """`mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a':(1)2,'b'}`: a mesh of the compiler's own.

    The groups are along the axes at the end; 'a':(p)s is the part of size s of the axis 'a' that
    has p entries before it, its entries as [p, s, rest].
    """
    axes, order, along = re.match(
        r'mesh\[(.*?)\](?:, device_ids=\((\[.*?\](?:T\(.*?\))?|[\d,]+)\))? \{(.*?)\}',
        text).groups()
    sizes = {name: int(n) for name, n in re.findall(r"([^,=]+)=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values()))
    if order:
        ids = _iota(order) if order.startswith('[') else np.array(_ints(order))
    parts = [(name, int(before or 1), int(size or sizes[name])) for name, before, size in
             re.findall(r"([^,:]+)(?::\((\d+)\)(\d+))?(?:,|$)", along)]
    shape, inside = [], []
    for name, extent in sizes.items():
        done = 1
        for _, before, size in sorted(p for p in parts if p[0] == name):
            shape += [before // done, size]
            inside.append(len(shape) - 1)
            done = before * size
        shape.append(extent // done)
    outside = [i for i in range(len(shape)) if i not in inside]
    return ids.reshape(shape).transpose(outside + inside).reshape(
        -1, math.prod(shape[i] for i in inside))


def _slice_groups(text, mesh, partitions):
    """Of a transfer between slices; it tells devices by their ids."""
    target = re.search(r'_xla_megascale_target="?(.*?)"?,_xla_megascale_transfer', text)[1]
    if 'x' in target:  # "{1,2}x{0:3}": these slices, for each of the devices of a slice
        slices = np.array([_ints(g) for g in re.findall(r'\{([\d,]+)\}x', target)]) - 1
        return (np.arange(partitions)[:, None] + partitions * slices[:, None]).reshape(
            -1, slices.shape[1])
    place = {device.id: i for i, device in enumerate(mesh.devices.flat)}
    return np.array([[place[int(i)] for i in re.split('->|,', group)]
                     for group in re.findall(r'\{([\d,>-]+)\}', target)])


def _iota(text):
    """`[2,4]T(1,0)`: the numbers from 0 in this shape, transposed, in a row."""
    shape, order = re.match(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', text).groups()
    ids = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
    return (ids.transpose(_ints(order)) if order else ids).reshape(-1)


def _ints(text):
    return [int(n) for n in text.split(',')]
