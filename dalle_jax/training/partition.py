"""The mesh, in one place, and where arrays live on it.

Three axes, always present: 'replica' (slow links between slices or hosts), 'fsdp' (batch and
parameters sharded over fast links) and 'tensor' (heads and hidden units). A parameter says what
its dimensions are by logical names; RULES says on which mesh axis a name lives.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ('replica', 'fsdp', 'tensor')
BATCH = PartitionSpec(('replica', 'fsdp'))

# Logical axis -> mesh axis. A name that is not listed is replicated.
RULES = {
    'batch': ('replica', 'fsdp'),
    'embed': 'fsdp',
    'vocab': 'fsdp',
    'heads': 'tensor',
    'mlp': 'tensor',
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Extents of the mesh axes; one of them may be -1: all devices that are left."""

    replica: int = 1
    fsdp: int = -1
    tensor: int = 1


def path_name(path: Any) -> str:
    """A leaf's path in its tree, such as 'params/transformer/tail/0/mlp/up/kernel'."""
    return '/'.join(str(getattr(entry, 'key', getattr(entry, 'name', getattr(entry, 'idx', entry))))
                    for entry in path)


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """Builds the mesh over all devices.

    Raises:
      ValueError: the extents do not multiply to the number of devices; names both.
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
    return Mesh(np.asarray(devices).reshape(extents), AXES)


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, name: str = ''
         ) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes.

    Raises:
      ValueError: two dimensions on one mesh axis, or an extent that the mesh axis does not
        divide; names the array, its axes and its shape.
    """
    entries = [RULES.get(axis) if axis else None for axis in axes]
    used = [a for e in entries if e for a in ((e,) if isinstance(e, str) else e)]
    if len(used) != len(set(used)):
        raise ValueError(f'{name} {axes}: two dimensions live on the same mesh axis ({entries})')
    for size, axis, entry in zip(shape, axes, entries):
        if entry is None:
            continue
        ways = math.prod(mesh.shape[a] for a in ((entry,) if isinstance(entry, str) else entry))
        if size % ways:
            raise ValueError(f'{name} {shape} with axes {axes}: {axis!r} has {size} entries, which '
                             f'{ways} devices along {entry!r} do not divide; choose a mesh extent '
                             f'that divides {size}')
    return PartitionSpec(*entries)


def shardings(axes: Any, abstract: Any, mesh: Mesh) -> Any:
    """NamedShardings of a tree of arrays, given the tree of their logical axes."""
    def one(path, array, names):
        return NamedSharding(mesh, spec(names, array.shape, mesh, jax.tree_util.keystr(path)))
    return jax.tree_util.tree_map_with_path(one, abstract, axes)


@dataclasses.dataclass(frozen=True)
class Constrainer:
    """Context.constrain on this mesh: pins an activation's sharding by logical axes."""

    mesh: Mesh

    def __call__(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        return jax.lax.with_sharding_constraint(
            x, NamedSharding(self.mesh, spec(axes, x.shape, self.mesh, 'activation')))

    def divide(self, function: Callable, axes: tuple[str | None, ...]) -> Callable:
        """`function` of arrays that all have these axes, run on each device's part of them."""
        def run(*arrays):
            # Inside a shard_map that divides some of the axes already, the others are left.
            manual = set(jax.sharding.get_abstract_mesh().manual_axes)
            entries = [RULES.get(axis, ()) if axis else () for axis in axes]
            entries = [(e,) if isinstance(e, str) else e for e in entries]
            part = PartitionSpec(*(tuple(a for a in e if a not in manual) for e in entries))
            return jax.shard_map(function, mesh=None if manual else self.mesh, out_specs=part,
                                 in_specs=(part,) * len(arrays), check_vma=False,
                                 axis_names=set(AXES) - manual)(*arrays)
        return run


def like_params(tree: Any, params_shardings: Any, params: Any, mesh: Mesh) -> Any:
    """Shardings of any tree that holds copies of the parameters, such as a training state.

    A leaf whose path ends in a parameter's path and that has its shape lives where the parameter
    lives (moments, averages); everything else is replicated.
    """
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    placed = {path_name(path): (array.shape, sharding) for (path, array), sharding in
              zip(flat, jax.tree.leaves(params_shardings))}

    def one(path, array):
        keys = path_name(path).split('/')
        for start in range(len(keys)):
            shape, sharding = placed.get('/'.join(keys[start:]), (None, None))
            if shape == array.shape:
                return sharding
        return NamedSharding(mesh, PartitionSpec())
    return jax.tree_util.tree_map_with_path(one, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: Any, mesh: Mesh, stacked: bool = False) -> Any:
    """This process's rows of a global batch as arrays sharded over 'replica' and 'fsdp'.

    Args:
      batch: name -> numpy array, rows leading; with `stacked` a leading axis of steps before them.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, *BATCH) if stacked else BATCH)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x), dict(batch))
