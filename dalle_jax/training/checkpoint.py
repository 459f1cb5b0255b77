"""Checkpoints with orbax: saved with checksums, verified on restore, on any mesh.

Orbax commits a step by a rename, so a run killed while saving keeps its previous step. It does
not notice a flipped byte in array data, so every leaf carries a checksum of its bits, computed on
the device (sharding-independent) and checked after restore. This file is the only home of orbax.
"""

import logging
from collections.abc import Mapping
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

    def __init__(self, directory: str | Path, keep: int = 2):
        import orbax.checkpoint as ocp

        self.directory = Path(directory).absolute()
        self._ocp = ocp
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={'state': ocp.PyTreeCheckpointHandler(),
                           'checksums': ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True))

    def save(self, step: int, state: Any) -> None:
        """Starts saving; returns when the state may be donated again."""
        ocp = self._ocp
        # Orbax writes in the background. On a CPU its "device to host copy" is no copy at all,
        # so donating the state to the next step would overwrite what is being written.
        if jax.default_backend() == 'cpu':
            state = jax.tree.map(np.array, state)
        self._manager.save(step, args=ocp.args.Composite(
            state=ocp.args.PyTreeSave(state), checksums=ocp.args.JsonSave(checksums(state))))

    def restore(self, abstract: Any) -> tuple[int, Any] | None:
        """The newest step that verifies, as (step, state), or None if there is none at all.

        Args:
          abstract: tree of ShapeDtypeStructs, with shardings where they matter.

        Raises:
          CheckpointError: there are checkpoints, but none can be used.
        """
        problems = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return step, self._restore_step(step, abstract)
            except Exception as error:  # whatever orbax raises for a damaged file
                problems.append(f'step {step}: {_first_line(error)}')
                logging.warning('checkpoint %s/%d cannot be used: %s', self.directory, step,
                                _first_line(error))
        if problems:
            raise CheckpointError(
                f'no usable checkpoint in {self.directory}: ' + '; '.join(problems)
                + '. Remove the directory to start the run again from nothing.')
        return None

    def _restore_step(self, step, abstract):
        ocp = self._ocp
        restored = self._manager.restore(step, args=ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)),
            checksums=ocp.args.JsonRestore()))
        wrong = mismatches(restored['checksums'], checksums(restored['state']))
        if wrong:
            raise CheckpointError(f'damaged data in {", ".join(wrong[:3])}'
                                  + (f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''))
        return restored['state']

    def latest_step(self) -> int | None:
        """The newest step on disk, verified or not."""
        return self._manager.latest_step()

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
    import orbax.checkpoint as ocp

    directory = Path(directory).absolute()
    steps = sorted((int(p.name) for p in directory.glob('[0-9]*') if p.name.isdigit()),
                   reverse=True) if directory.is_dir() else []
    problems = []
    for step in steps:
        try:
            return step, _read(ocp, directory / str(step), names)
        except Exception as error:
            problems.append(f'step {step}: {_first_line(error)}')
            logging.warning('checkpoint %s/%d cannot be used: %s', directory, step,
                            _first_line(error))
    raise CheckpointError(f'no usable checkpoint in {directory}: '
                          + ('; '.join(problems) or 'it holds no saved step')
                          + '. Train the run again or name another one.')


def _read(ocp, path, names):
    import json

    handler = ocp.PyTreeCheckpointer()
    tree = handler.metadata(path / 'state').item_metadata.tree
    wanted = {name: tree[name] for name in names if tree.get(name)}
    abstract = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), wanted,
                            is_leaf=lambda m: hasattr(m, 'dtype'))
    numpy_leaves = jax.tree.map(lambda a: ocp.RestoreArgs(restore_type=np.ndarray), abstract)
    state = handler.restore(path / 'state', args=ocp.args.PyTreeRestore(
        abstract, restore_args=numpy_leaves, partial_restore=True))
    stored = json.loads((path / 'checksums' / 'metadata').read_text())
    wrong = mismatches({name: value for name, value in stored.items()
                        if name.split('/')[0] in wanted}, checksums(state))
    if wrong:
        raise CheckpointError(f'damaged data in {", ".join(wrong[:3])}')
    return {name: state.get(name, {}) for name in names}


def checksums(tree: Any) -> dict[str, int]:
    """Leaf path -> checksum of its bits: any single damaged word changes it."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    # Leaf by leaf: they may live on different devices.
    values = jax.device_get([_checksum(leaf) for _, leaf in leaves])
    return {path_name(path): int(value) for (path, _), value in zip(leaves, values)}


def mismatches(stored: Mapping[str, int], found: Mapping[str, int]) -> list[str]:
    """Names of leaves whose checksums differ, or that only one side has."""
    return sorted(name for name in stored.keys() | found.keys()
                  if stored.get(name) != found.get(name))


@jax.jit
def _checksum(x):
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).reshape(-1)
    # Odd weights: a change of one word never cancels modulo 2^32, and a swap shows.
    weights = jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(2654435762) + jnp.uint32(1)
    return jnp.sum(bits * weights)


def _first_line(error):
    return f'{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ""}'
