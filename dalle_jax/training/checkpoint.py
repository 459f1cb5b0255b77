"""Checkpoints with orbax: saved with checksums, verified on restore, on any mesh.

Orbax commits a step by a rename, so a run killed while saving keeps its previous step. It does
not notice a flipped byte in array data, so every leaf carries a checksum of its bits, computed on
the device (sharding-independent) and checked after restore. This file is the only home of orbax.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.training.partition import path_name


class CheckpointError(RuntimeError):
    """No usable checkpoint; the message names the directory, what was found and the remedy."""


class Checkpoints:
    """The checkpoints of one run, in `directory`."""

    def __init__(self, directory: str | Path, keep: int = 2, read_only: bool = False):
        import orbax.checkpoint as ocp

        self.directory = Path(directory).absolute()
        self._ocp = ocp
        options = dict(max_to_keep=keep, cleanup_tmp_directories=True,
                       enable_async_checkpointing=True)
        if read_only:  # by this process for itself
            me = jax.process_index()
            options = dict(create=False, multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=me, active_processes={me}, barrier_sync_key_prefix=f'reader{me}'))
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={'state': ocp.PyTreeCheckpointHandler(),
                           'checksums': ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(**options))

    def save(self, step: int, state: Any) -> None:
        """Starts saving; returns when the state may be donated again."""
        ocp = self._ocp
        # Orbax writes in the background. On a CPU its "device to host copy" is no copy at all,
        # so donating the state to the next step would overwrite what is being written.
        if jax.default_backend() == 'cpu':
            state = jax.tree.map(jnp.copy, state)
        saved = self._manager.save(step, args=ocp.args.Composite(
            state=ocp.args.PyTreeSave(state), checksums=ocp.args.JsonSave(checksums(state))))
        if not saved:
            raise CheckpointError(f'step {step} was not saved in {self.directory}: step '
                                  f'{self._manager.latest_step()} is there already')

    def restore(self, abstract: Any) -> tuple[int, Any] | None:
        """The newest step that verifies, as (step, state), or None if there is none at all.

        Args:
          abstract: tree of ShapeDtypeStructs, with shardings where they matter.

        Raises:
          CheckpointError: there are checkpoints, but none can be used.
        """
        args = self._ocp.checkpoint_utils.construct_restore_args(abstract)
        found = self.newest(lambda step: self._verified(step, abstract, args))
        # Orbax saves no step below its newest one, so damaged ones must make way.
        for step in self._manager.all_steps() if found else ():
            if step > found[0]:
                self._manager.delete(step)
        return found

    def read(self, step: int, names: tuple[str, ...]) -> dict[str, Any]:
        """Some entries of a saved state as numpy arrays; those that it lacks as {}."""
        saved = self._manager.item_metadata(step)['state'].tree
        found = self._read(step, {name: saved[name] for name in names if saved.get(name)})
        return dict.fromkeys(names, {}) | found

    def read_params(self, step: int, shardings: Any = None) -> Any:
        """The averaged parameters, or where none are kept the parameters.

        Args:
          shardings: one, or a tree of them: the arrays are read to where they live, and none ever
            exists undivided. None: numpy arrays.
        """
        saved = self._manager.item_metadata(step)['state'].tree
        name = 'averages' if saved.get('averages') else 'params'
        return self._read(step, {name: saved[name]}, shardings)[name]

    def _read(self, step, wanted, shardings=None):
        abstract = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), wanted,
                                is_leaf=lambda m: hasattr(m, 'dtype'))
        if shardings is None:
            args = jax.tree.map(lambda a: self._ocp.RestoreArgs(restore_type=np.ndarray), abstract)
        else:
            abstract = {name: jax.tree.map(
                lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree,
                jax.tree.broadcast(shardings, tree)) for name, tree in abstract.items()}
            args = self._ocp.checkpoint_utils.construct_restore_args(abstract)
        return self._verified(step, abstract, args, partial=True)

    def newest(self, restore: Callable[[int], Any]) -> tuple[int, Any] | None:
        """(step, restore(step)) of the newest step for which that succeeds; see `restore`."""
        problems = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return step, restore(step)
            except Exception as error:  # whatever orbax raises for a damaged file
                first_line = (str(error).splitlines() or [''])[0]
                problems.append(f'step {step}: {type(error).__name__}: {first_line}')
                logging.warning('checkpoint %s cannot be used: %s', self.directory, problems[-1])
        if problems:
            raise CheckpointError(
                f'no usable checkpoint in {self.directory}: ' + '; '.join(problems)
                + '. Remove the directory and train again.')
        return None

    def _verified(self, step, abstract, restore_args, partial=False):
        ocp = self._ocp
        restored = self._manager.restore(step, args=ocp.args.Composite(
            state=ocp.args.PyTreeRestore(abstract, restore_args=restore_args,
                                         partial_restore=partial),
            checksums=ocp.args.JsonRestore()))
        state, stored = restored['state'], restored['checksums']
        if partial:
            stored = {name: value for name, value in stored.items() if name.split('/')[0] in state}
        wrong = mismatches(stored, checksums(state))
        if wrong:
            more = f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''
            raise CheckpointError(f'damaged data in {", ".join(wrong[:3])}{more}')
        return state

    def close(self) -> None:
        """Waits until everything is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()
        self._manager.close()


def restore_subtree(directory: str | Path, names: tuple[str, ...]) -> tuple[int, dict[str, Any]]:
    """Reads some entries of the newest usable state, as numpy arrays, without knowing its shapes.

    Args:
      directory: a run's checkpoint directory.
      names: fields of the saved State, such as ('params',).

    Returns:
      (step, name -> tree); a field that the checkpoint lacks comes back as {}.

    Raises:
      CheckpointError: no checkpoint, or none that verifies.
    """
    return _from_newest(directory, lambda checkpoints, step: checkpoints.read(step, names))


def restore_params(directory: str | Path, shardings: Any = None) -> tuple[int, Any]:
    """(step, what `Checkpoints.read_params` reads) of the newest usable state, like
    `restore_subtree`."""
    return _from_newest(
        directory, lambda checkpoints, step: checkpoints.read_params(step, shardings))


def _from_newest(directory, read):
    directory = Path(directory).absolute()
    if not directory.is_dir():
        raise CheckpointError(f'there are no checkpoints in {directory}. Train the run, or name '
                              'another one.')
    checkpoints = Checkpoints(directory, read_only=True)
    try:
        found = checkpoints.newest(functools.partial(read, checkpoints))
    finally:
        checkpoints.close()
    if found is None:
        raise CheckpointError(f'no step is saved in {directory}. Train the run, or name another '
                              'one.')
    return found


def checksums(tree: Any) -> dict[str, int]:
    """Leaf path -> checksum of its bits: any single damaged word changes it."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    # One after the other: they may live on different devices, and on virtual ones of a CPU two
    # programs that add up over devices may wait for each other for ever.
    return {path_name(path): int(_checksum(leaf)) for path, leaf in leaves}


def mismatches(stored: Mapping[str, int], found: Mapping[str, int]) -> list[str]:
    """Names of leaves whose checksums differ, or that only one side has."""
    return sorted(name for name in stored.keys() | found.keys()
                  if stored.get(name) != found.get(name))


@jax.jit
def _checksum(x):
    x = jax.device_put(x, jax.memory.Space.Device)  # averages may be in the host's memory
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    # Elementwise, so that each device sums up its own part.
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # Odd weights: a change of one word never cancels modulo 2^32, and a swap shows.
    return jnp.sum(bits * (index * jnp.uint32(2654435762) + jnp.uint32(1)))
