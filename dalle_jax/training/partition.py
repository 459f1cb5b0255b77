"""The mesh, in one place, and where arrays live on it.

Three axes, always present: 'replica' (slow links between slices or hosts), 'fsdp' (batch and
parameters sharded over fast links) and 'tensor' (heads and hidden units). A parameter says what
its dimensions are by logical names; rules say on which mesh axes a name lives.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ('replica', 'fsdp', 'tensor')
DATA = ('replica', 'fsdp')  # what the examples of a batch are divided over
BATCH = PartitionSpec(DATA)

# Logical axis -> mesh axes, unless MeshConfig.rules says otherwise. A name that is not listed is
# not divided.
RULES = {
    'batch': DATA,
    'copies': ('replica',),  # a batch that all devices need that share a copy of the parameters
    'embed': ('fsdp',),
    'vocab': ('fsdp',),
    'heads': ('tensor',),
    'mlp': ('tensor',),
}
OF_PARAMETERS = tuple(name for name in RULES if name not in ('batch', 'copies'))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The mesh and, where they differ from RULES, the rules.

    Attributes:
      replica, fsdp, tensor: extents of the mesh axes; one of them may be -1: all devices that are
        left.
      rules: such as 'embed=,heads=fsdp,mlp=fsdp+tensor': logical axis = mesh axes, comma
        separated. This example divides matrices as Ramesh et al. 2021, app. E.1, do.

    Raises:
      ValueError: a rule of an unknown axis.
    """

    replica: int = 1
    fsdp: int = -1
    tensor: int = 1
    rules: str = ''

    def __post_init__(self):
        parse_rules(self.rules)


def parse_rules(text: str) -> dict[str, tuple[str, ...]]:
    """RULES with those of MeshConfig.rules in place of their own.

    Raises:
      ValueError: names what is unknown, and what there is.
    """
    rules = dict(RULES)
    for part in filter(None, text.split(',')):
        name, equals, axes = (piece.strip() for piece in part.partition('='))
        axes = tuple(axis for axis in axes.split('+') if axis)
        if not equals or name not in OF_PARAMETERS:
            raise ValueError(f'mesh.rules has {part!r}; write AXIS=MESHAXIS+MESHAXIS or AXIS= with '
                             f'an AXIS of {", ".join(OF_PARAMETERS)}')
        if strangers := set(axes) - {'fsdp', 'tensor'}:
            raise ValueError(f'mesh.rules has {part!r}: parameters live on fsdp and tensor, not '
                             f'on {", ".join(sorted(strangers))}')
        rules[name] = axes
    return rules


def parse_mesh(text: str, default: MeshConfig = MeshConfig()) -> MeshConfig:
    """`default` with the extents that a text such as 'replica=2,tensor=4' names.

    Raises:
      ValueError: says what cannot be read, and how to write it.
    """
    extents = {}
    for part in filter(None, text.split(',')):
        name, _, number = (piece.strip() for piece in part.partition('='))
        if name not in AXES or name in extents or not number.removeprefix('-').isdecimal():
            raise ValueError(f'mesh {text!r}: {part!r}; write AXIS=EXTENT,... with each axis of '
                             f'{", ".join(AXES)} at most once, such as replica=2,tensor=4')
        extents[name] = int(number)
    return dataclasses.replace(default, **extents)


def path_name(path: Any) -> str:
    """A leaf's path in its tree, such as 'params/transformer/tail/0/mlp/up/kernel'."""
    return '/'.join(str(getattr(entry, 'key', getattr(entry, 'name', getattr(entry, 'idx', entry))))
                    for entry in path)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Names as of `path_name`, and leaves."""
    return [(path_name(path), leaf)
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """Builds the mesh over all devices.

    'tensor' and 'fsdp' lie along the links inside a slice (TPU), or inside a process and between
    neighbouring ones; only 'replica' crosses from slice to slice.

    Raises:
      ValueError: the extents do not multiply to the number of devices, or fsdp and tensor not to a
        part of a slice; names both.
    """
    devices = jax.devices() if devices is None else devices
    extents = [getattr(config, axis) for axis in AXES]
    if extents.count(-1) > 1 or any(e < 1 and e != -1 for e in extents):
        raise ValueError(f'mesh extents {dict(zip(AXES, extents))}: each is at least 1, and one '
                         'may be -1 for the devices that are left')
    known = math.prod(e for e in extents if e != -1)
    if -1 in extents:
        extents[extents.index(-1)] = max(len(devices) // known, 1)
    if math.prod(extents) != len(devices):
        raise ValueError(f'mesh {dict(zip(AXES, extents))} needs {math.prod(extents)} devices, '
                         f'but there are {len(devices)}; change mesh.replica, fsdp or tensor')
    # Mesh (unlike jax.make_mesh) has Auto axis types: shardings propagate by themselves.
    return Mesh(_arranged(devices, extents), AXES)


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """Where arrays live on a mesh. Called, it is Context.constrain: pins an activation's sharding.

    Attributes:
      mesh: with AXES.
      rules: as MeshConfig.rules.
    """

    mesh: Mesh
    rules: str = ''

    def __call__(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        manual = _manual_axes()
        spec = self._of_activation(axes, x.shape, manual)
        # Inside a shard_map the context's mesh knows which axes are divided already.
        return jax.lax.with_sharding_constraint(
            x, spec if manual else NamedSharding(self.mesh, spec))

    def divide(self, function: Callable, axes: tuple[str | None, ...], whole: Any = None
               ) -> Callable:
        """`function` of arrays that all have these axes, run on each device's part of them.

        Args:
          whole: handed to `function` before them, on each device the same; None: nothing is.
        """
        def run(*arrays):
            # Inside a shard_map that divides some of the axes already, the others are left.
            manual = _manual_axes()
            part = self._of_activation(axes, None, manual)
            first = () if whole is None else (whole,)
            return jax.shard_map(
                function, mesh=None if manual else self.mesh, out_specs=part,
                in_specs=(PartitionSpec(),) * len(first) + (part,) * len(arrays), check_vma=False,
                axis_names=set(AXES) - manual)(*first, *arrays)
        return run

    def spec(self, axes: tuple[str | None, ...], shape: tuple[int, ...], name: str = ''
             ) -> PartitionSpec:
        """The PartitionSpec of an array, such as a parameter, with these logical axes.

        Args:
          name: of the array, for errors.

        Raises:
          ValueError: two dimensions on one mesh axis, or an extent that the mesh axes do not
            divide; names the array, its axes and the nearest extents that would.
        """
        rules = parse_rules(self.rules)
        entries = [rules.get(axis, ()) for axis in axes]
        used = [a for entry in entries for a in entry]
        if len(used) != len(set(used)):
            raise ValueError(f'{name} {axes}: two dimensions live on the same mesh axis ({entries})'
                             '; change mesh.rules')
        return self._checked(axes, shape, name, entries)

    def _of_activation(self, axes, shape, manual):
        """The same of an activation (of any shape: None), without mesh axes that are divided
        already. Where the batch lives on an axis, nothing else can."""
        rules, used, entries = parse_rules(self.rules), set(manual), []
        for axis in axes:
            entries.append(tuple(a for a in rules.get(axis, ()) if a not in used))
            used.update(entries[-1])
        return self._checked(axes, shape or (), 'activation', entries)

    def _checked(self, axes, shape, name, entries):
        for size, axis, entry in zip(shape, axes, entries):
            ways = math.prod(self.mesh.shape[a] for a in entry)
            if size % ways:
                raise ValueError(
                    f'{name} {shape} with axes {axes}: {axis!r} has {size} entries, which '
                    f'{" x ".join(entry)} = {ways} does not divide; {_nearest(size, ways)} would, '
                    'or another place for it in mesh.rules')
        return PartitionSpec(*(entry if len(entry) > 1 else entry[0] if entry else None
                               for entry in entries))

    def shardings(self, axes: Any, abstract: Any) -> Any:
        """NamedShardings of a tree of arrays, given the tree of their logical axes."""
        def one(path, array, names):
            return NamedSharding(self.mesh, self.spec(names, array.shape, path_name(path)))
        return jax.tree_util.tree_map_with_path(one, abstract, axes)

    def like_params(self, tree: Any, params: Any, shardings: Any) -> Any:
        """Shardings of any tree that holds copies of the parameters, such as a training state.

        A leaf whose path ends in a parameter's path and that has its shape lives where the
        parameter lives (moments, averages); every device holds all of everything else.
        """
        flat = jax.tree_util.tree_flatten_with_path(params)[0]
        placed = {path_name(path): (array.shape, sharding) for (path, array), sharding in
                  zip(flat, jax.tree.leaves(shardings))}

        def one(path, array):
            keys = path_name(path).split('/')
            for start in range(len(keys)):
                shape, sharding = placed.get('/'.join(keys[start:]), (None, None))
                if shape == array.shape:
                    return sharding
            return replicated(self.mesh)
        return jax.tree_util.tree_map_with_path(one, tree)


def check_batch(mesh: Mesh, batch_size: int, microbatches: int) -> None:
    """Raises ValueError where the mesh cannot split the batch; names the nearest that it can."""
    ways = math.prod(mesh.shape[a] for a in DATA)
    if batch_size % (microbatches * ways):
        unit = microbatches * ways
        below, above = batch_size // unit * unit, -(-batch_size // unit) * unit
        near = f'{below} or {above}' if below else f'{above}'
        raise ValueError(
            f'data.batch_size={batch_size} cannot be split into loop.microbatches={microbatches} '
            f'parts over replica x fsdp = {ways} ways of the mesh; {near} can, or other extents')


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Rows of a global batch that this process's devices need, ascending."""
    size = batch_size // math.prod(mesh.shape[a] for a in DATA)
    return np.concatenate([np.arange(p * size, (p + 1) * size) for p in _local_parts(mesh)])


def put_batch(batch: Any, mesh: Mesh, stacked: bool = False) -> Any:
    """A global batch, of which this process has its `local_rows`, sharded over the mesh.

    Args:
      batch: name -> numpy array, rows leading; with `stacked` a leading axis of steps before them.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, *BATCH) if stacked else BATCH)
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)
    axis, parts = int(stacked), _local_parts(mesh)
    ways = math.prod(mesh.shape[a] for a in DATA)

    def put(x):
        size = x.shape[axis] // len(parts)

        def part(index):
            start = parts.index((index[axis].start or 0) // size) * size
            return x[(slice(None),) * axis + (slice(start, start + size),)]
        shape = (*x.shape[:axis], size * ways, *x.shape[axis + 1:])
        return jax.make_array_from_callback(shape, sharding, part)
    return jax.tree.map(put, dict(batch))


def _local_parts(mesh):
    """Which of the equal parts of a batch this process's devices have, ascending.

    They need not follow each other, and with an extent of 'tensor' beyond one process several
    processes have the same.
    """
    here = jax.process_index()
    return sorted({place[0] * mesh.shape['fsdp'] + place[1]
                   for place, device in np.ndenumerate(mesh.devices)
                   if device.process_index == here})


def _arranged(devices, extents):
    """The devices as an array of these extents, so that neighbours in it have fast links."""
    if devices[0].platform != 'tpu':
        return np.asarray(devices).reshape(extents)
    replica, *inside = extents
    slices = len({getattr(device, 'slice_index', 0) for device in devices})
    if replica % slices:
        raise ValueError(f'mesh {dict(zip(AXES, extents))} on {slices} slices: mesh.replica must '
                         f'be a multiple of {slices}, so that fsdp and tensor stay inside a slice')
    if slices > 1:
        return mesh_utils.create_hybrid_device_mesh(
            (replica // slices, *inside), (slices, 1, 1), devices, allow_split_physical_axes=True)
    return mesh_utils.create_device_mesh(extents, devices, allow_split_physical_axes=True)


def _manual_axes():
    """Mesh axes that a shard_map around the code being traced divides."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def _nearest(size, ways):
    """The divisors of `size` next to `ways`."""
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    below, above = [n for n in divisors if n < ways], [n for n in divisors if n > ways]
    return ' or '.join(str(n) for n in below[-1:] + above[:1])
