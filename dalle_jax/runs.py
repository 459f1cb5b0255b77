"""A run's directory: lock, resolved config, console, JSON lines, TensorBoard; loading it back.

    <workdir>/config.json      the resolved experiment: `config.resolve` rebuilds it
              checkpoints/     orbax steps
              logs/            of the processes, where a launcher started several
              metrics.jsonl    one JSON object a line: kind, step, time, values
              tensorboard/     the same scalars
              tokenizer.model  the BPE, where the run reads captions
              snapshot.npz     arrays of the latest snapshot; report.html the page drawn from it
              done.json        written last: the run is finished
"""

import fcntl
import json
import os
import sys
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from dalle_jax import config as config_lib
from dalle_jax.report import read_metrics

# Keys in which a continued run may differ from what its directory was started with.
FREE_KEYS = ('loop.steps', 'loop.log_every', 'loop.valid_every', 'loop.snapshot_every',
             'loop.save_every', 'loop.keep', 'loop.microbatches', 'data.workers', 'data.path',
             'mesh.replica', 'mesh.fsdp', 'mesh.tensor', 'mesh.rules', 'cpu_devices')


class RunError(RuntimeError):
    """A run's directory cannot be used; the message names it and the remedy."""


class Run:
    """The directory of a run in progress, held by a lock that dies with the process.

    Of several processes that train together the first one has it; the others' Run writes and says
    nothing.
    """

    def __init__(self, workdir: str | Path, experiment: config_lib.Experiment,
                 started: float | None = None, primary: bool = True):
        """Takes the directory; `started` is the time.monotonic() at which the session began."""
        self.path = Path(workdir)
        self._primary = primary
        self._lock = self._metrics = self._tensorboard = None
        # Moved back by earlier sessions in start_log.
        self._start = time.monotonic() if started is None else started
        if primary:
            self._lock = take(self.path, '--workdir')
            self._check(experiment)
            write_atomic(self.path / 'config.json', config_lib.to_json(experiment))

    def _check(self, experiment):
        if (self.path / 'model.safetensors').exists():
            raise RunError(f'{self.path} is an exported run, which stays as it is; give another '
                           'directory')
        stored = self.path / 'config.json'
        if not stored.exists():
            strangers = sorted(p.name for p in self.path.iterdir()
                               if p.name not in ('lock', 'logs') and p.suffix != '.tmp')
            if strangers:
                raise RunError(f'{self.path} is not empty (it holds {", ".join(strangers[:5])}) '
                               'and has no config.json, so it is no run; give another --workdir')
            return
        if not has_checkpoint(self.path):  # nothing would be lost or mixed
            return
        old = read_config(self.path)
        changed = {key: values for key, values in config_lib.differences(old, experiment).items()
                   if key not in FREE_KEYS}
        if old.data.source == 'tokens':  # it only decodes: the codes are those of data.tokenizer
            changed.pop('frozen.image', None)
        was, now = ({key: pair[i] for key, pair in changed.items()} for i in (0, 1))
        check_same(was, now, f'{self.path} holds a run of another experiment', 'Give another '
                   '--workdir, or start from its parameters with --config.init_from=RUN')

    def start_log(self, step: int) -> None:
        """Opens the metric files for a run that continues after `step`, dropping later lines."""
        if not self._primary:
            return
        (self.path / 'done.json').unlink(missing_ok=True)
        path = self.path / 'metrics.jsonl'
        kept = [line for line in read_metrics(path) if line['step'] <= step]
        write_atomic(path, ''.join(json.dumps(line) + '\n' for line in kept))
        self._start -= kept[-1]['time'] if kept else 0.0
        self._metrics = open(path, 'a', buffering=1)
        self._tensorboard_step = step

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Appends one line of metrics; non-finite values are kept as JSON's NaN."""
        if not self._primary:
            return
        values = {name: float(value) for name, value in values.items()}
        line = {'kind': kind, 'step': step, 'time': round(self.elapsed(), 3), **values}
        self._metrics.write(json.dumps(line) + '\n')
        writer = self._writer()
        for name, value in values.items():
            writer.add_scalar(f'{kind}/{name}', value, step)

    def _writer(self):
        if self._tensorboard is None:
            from tensorboardX import SummaryWriter
            self._tensorboard = SummaryWriter(str(self.path / 'tensorboard'),
                                              purge_step=self._tensorboard_step + 1)
        return self._tensorboard

    def say(self, text: str) -> None:
        """A line on the console."""
        if self._primary:
            say(text)

    def elapsed(self) -> float:
        """Seconds of training, earlier sessions of the same run included."""
        return time.monotonic() - self._start

    def snapshot(self, step: int, arrays: Mapping[str, Any], captions: list[str],
                 boundary: int | None) -> None:
        """Stores the arrays of a snapshot, and draws the report.

        Args:
          captions: one for each picture of the batch.
          boundary: where the image begins in attention matrices.
        """
        from dalle_jax import report

        if not self._primary:
            return
        write_arrays(self.path / 'snapshot.npz', arrays)
        write_atomic(self.path / 'snapshot.json', json.dumps(
            {'step': step, 'captions': captions, 'boundary': boundary}))
        report.write(self.path / 'report.html', report.run_page(self.path))

    def finished(self, steps: int) -> bool:
        """Whether the run has reached this many steps."""
        done = self.path / 'done.json'
        return done.exists() and json.loads(done.read_text())['step'] >= steps

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Marks the run as finished."""
        if self._primary:
            write_atomic(self.path / 'done.json', json.dumps(dict(facts), indent=2))

    def close(self) -> None:
        """Closes the files and gives the lock back."""
        if self._metrics:
            self._metrics.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._lock:
            self._lock.close()


class Loaded(NamedTuple):
    """A trained run, read from its directory.

    `params` are the averaged parameters where the run keeps averages; `tokenizer` is None for
    runs without text.
    """

    path: Path
    experiment: config_lib.Experiment
    module: Any
    config: Any
    params: Any
    step: int
    tokenizer: Any


def load(path: str | Path, place: Callable[[Any, Any], Any] | None = None) -> Loaded:
    """Reads a finished run's config, parameters and tokenizer.

    Args:
      place: (module, config) -> where the parameters live, one sharding or a tree of them, to which
        they are read directly; None: numpy arrays.

    Raises:
      RunError: no run there, or it is not finished. CheckpointError: nothing usable saved.
    """
    from dalle_jax.training.checkpoint import restore_params

    path = Path(path)
    experiment = read_config(path)
    if not (path / 'done.json').exists():
        raise RunError(f'{path} has not finished training; run its train command again, it '
                       'continues where it stopped')
    module = config_lib.model_module(experiment.model)
    # Before reading, whose errors are taken for those of a damaged checkpoint.
    shardings = place(module, experiment.arch) if place else None
    if (path / 'model.safetensors').exists():
        step, params = _read_exported(path, module, experiment.arch, shardings)
    else:
        step, params = restore_params(path / 'checkpoints', shardings)
    return Loaded(path, experiment, module, experiment.arch, params, step, load_tokenizer(path))


def _read_exported(path, module, config, shardings):
    """(step, parameters) of what `export` wrote."""
    import jax

    from dalle_jax.interop import files
    from dalle_jax.training.partition import named_leaves

    file = path / 'model.safetensors'
    arrays = files.read(file)
    shapes = jax.eval_shape(lambda: module.init(config, jax.random.key(0))[0])
    expected = {name: leaf.shape for name, leaf in named_leaves(shapes)}
    found = {name: array.shape for name, array in arrays.items()}
    if wrong := sorted(n for n in expected | found if expected.get(n) != found.get(n)):
        raise RunError(f'{file} and config.json beside it are of different models: {len(wrong)} '
                       f'arrays differ, the first is {wrong[0]}: {found.get(wrong[0])} instead of '
                       f'{expected.get(wrong[0])}')
    leaves = [arrays[name] for name, _ in named_leaves(shapes)]
    params = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    noted, now = files.read_notes(file).get('fingerprint'), fingerprint(params)
    if noted != now:
        raise RunError(f'{file} has changed since it was exported (fingerprint {noted}, now '
                       f'{now}); copy it or export it again')
    if shardings is not None:
        params = jax.device_put(params, jax.tree.broadcast(shardings, params))
    return json.loads((path / 'done.json').read_text())['step'], params


def named_by(path: str | Path, run: str | Path) -> Path:
    """Where a run that `run` names by `path` is: there, or, if both were moved, beside `run`.

    An exported run names another by its bare name, which is the one beside it.
    """
    beside = Path(run).resolve().parent / Path(path).name
    bare = str(path) == Path(path).name
    return beside if beside.exists() and (bare or not Path(path).exists()) else Path(path)


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Of each absolute path as many of its last parts as no other one ends with."""
    names = []
    for path in paths:
        others = [other.parts for other in paths if other != path]
        count = next(n for n in range(1, len(path.parts) + 1)
                     if all(other[-n:] != path.parts[-n:] for other in others))
        names.append(str(Path(*path.parts[-count:])))
    return names


def take(path: Path, flag: str) -> IO:
    """Makes a directory and locks it: until the file returned is closed, or the process ends.

    Raises:
      RunError: another process holds it; names the flag that gives another one.
    """
    path.mkdir(parents=True, exist_ok=True)
    lock = open(path / 'lock', 'w')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise RunError(f'{path} is in use by another process; wait for it, or give another {flag}'
                       ) from None
    return lock


def check_same(was: Mapping[str, Any], now: Mapping[str, Any], what: str, remedy: str) -> None:
    """Raises RunError where a directory was begun with other values: names them, and the remedy."""
    changed = [f'{key} was {was.get(key)!r} and is now {now.get(key)!r}' for key in was | now
               if was.get(key) != now.get(key)]
    if changed:
        more = f'; and {len(changed) - 6} more' if len(changed) > 6 else ''
        raise RunError(f'{what}: {"; ".join(changed[:6])}{more}. {remedy}')


def has_checkpoint(path: str | Path) -> bool:
    """Whether a run has saved a step."""
    return any(Path(path).glob('checkpoints/[0-9]*'))


def fingerprint(params: Any) -> str:
    """A checksum of parameters, by which results tell what they were made with."""
    from dalle_jax.training.checkpoint import checksums

    return f'{sum(checksums(params).values()) % 2**32:08x}'


def load_tokenizer(path: str | Path):
    """The BPE of a run, or None if it has none."""
    from dalle_jax.data import clip_text

    file = Path(path) / 'tokenizer.model'
    return clip_text.load(file) if file.exists() else None


def read_config(path: str | Path) -> config_lib.Experiment:
    """The resolved experiment stored in a run's directory.

    Raises:
      RunError: there is none, or it cannot be read.
    """
    file = Path(path) / 'config.json'
    if not file.exists():
        raise RunError(f'{path} is not a run: it has no config.json. Train it first, or name the '
                       '--workdir of a finished training')
    try:
        return config_lib.resolve(json.loads(file.read_text()))
    except (json.JSONDecodeError, config_lib.ConfigError) as error:
        raise RunError(f'{file} cannot be read: {error}') from error


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes a .npz file so that a reader sees the old arrays or the new ones, never a part."""
    temporary = path.with_suffix('.tmp.npz')
    np.savez_compressed(temporary, **{name: np.asarray(a) for name, a in arrays.items()})
    os.replace(temporary, path)


def read_arrays(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Those of the named arrays that a .npz file has.

    Raises RunError where the file is damaged.
    """
    try:
        with np.load(path) as stored:
            return {name: stored[name] for name in names if name in stored}
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise RunError(f'{path} is damaged ({error}); remove it, and the same command makes it '
                       'again') from error


def write_atomic(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old text or the new one, never a part."""
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_text(text)
    os.replace(temporary, path)


def say(text: str) -> None:
    """A line on the console, at once."""
    print(text, file=sys.stdout, flush=True)


def start(main: Callable[[list[str]], int | None]) -> None:
    """Runs the main of a verb, after absl has read its flags, and ends the process.

    Input that this package refuses ends it with a line and status 2; other errors keep their
    traceback.
    """
    from absl import app

    try:
        app.run(main)
    except Exception as error:
        if not _refused(error):
            raise
        print(f'{Path(sys.argv[0]).stem}: {error}', file=sys.stderr)
        sys.exit(2)


def _refused(error):
    """Whether it tells of wrong input: what this package raises, unknown keys, unreadable files."""
    if type(error).__module__.startswith('dalle_jax.'):
        return True
    if isinstance(error, OSError) and error.filename:
        return True
    if getattr(error, '__notes__', ()):  # jax leaves one where it has cut the traceback
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    file = Path(frame.f_code.co_filename)
    if 'ml_collections' in file.parts:  # the flag --config
        return isinstance(error, AttributeError | KeyError | TypeError | ValueError)
    return isinstance(error, ValueError | OSError) and (
        file.is_relative_to(Path(__file__).parent) or file.is_relative_to(config_lib.EXPERIMENTS))


def start_jax(cpu_devices: int = 1) -> None:
    """Settings that hold for a whole process, made before jax touches a device.

    Compiled programs are kept in the user's cache directory (XDG_CACHE_HOME), so that a second
    run of the same experiment starts at once.
    """
    import jax
    from absl import logging

    from dalle_jax import machine

    machine.keep_freed_memory()
    logging.set_verbosity(logging.WARNING)  # orbax tells every step of a save otherwise
    cache = Path(os.environ.get('XDG_CACHE_HOME', Path.home() / '.cache')) / 'dalle_jax' / 'xla'
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update('jax_compilation_cache_dir', str(cache))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
    if cpu_devices > 1:
        try:
            jax.config.update('jax_num_cpu_devices', cpu_devices)
        except RuntimeError as error:
            raise RunError(f'cpu_devices={cpu_devices} cannot be set any more: jax has touched its '
                           'devices; start a new process') from error
