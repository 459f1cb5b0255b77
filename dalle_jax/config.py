"""Experiments: from an ml_collections file and its overrides to one frozen dataclass.

An experiment file defines `get_config(arg=None) -> ConfigDict`. Its sections become the frozen
dataclasses of the modules that use them, so inside the package no ConfigDict travels and a
misspelt key is an error at start. This file is the only home of ml_collections.
"""

import dataclasses
import difflib
import importlib
import importlib.util
import json
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from dalle_jax.data.sources import DataConfig
from dalle_jax.training.compression import CompressionConfig
from dalle_jax.training.optimizer import OptimizerConfig
from dalle_jax.training.partition import MeshConfig

EXPERIMENTS = Path(__file__).resolve().parent.parent / 'experiments'


def define_flag():
    """Declares the flag --config FILE.py:ARG with its overrides --config.key=value."""
    from ml_collections import config_flags

    if str(EXPERIMENTS.parent) not in sys.path:  # experiment files import experiments.common
        sys.path.append(str(EXPERIMENTS.parent))
    return config_flags.DEFINE_config_file(
        'config', None, 'Experiment file, such as experiments/dalle.py:scenes', lock_config=True)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and the remedy."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """The training loop: how long, and how often it looks up from its work.

    Attributes:
      steps: batches to train on.
      group: steps in one dispatch to the device (a scan); every interval is a multiple of it.
        1 on CPU, where XLA is slow inside loops (see training.step.make_train).
      log_every, valid_every, snapshot_every, save_every: intervals in steps; 0 switches it off,
        except that a run always validates and saves at its end.
      valid_batches: number of fixed held-out batches a validation averages over.
      microbatches: gradient accumulation; must divide the batch size.
      keep: checkpoints kept on disk, at least 2 so that a damaged one has a predecessor.
      prng: 'threefry2x32' (the same numbers on every backend) or 'rbg' (faster).
    """

    steps: int
    group: int = 1
    log_every: int = 100
    valid_every: int = 1000
    valid_batches: int = 8
    snapshot_every: int = 0
    save_every: int = 1000
    microbatches: int = 1
    keep: int = 2
    prng: str = 'threefry2x32'

    def __post_init__(self):
        if self.steps < 1:
            raise ConfigError(f'loop.steps is {self.steps}; it must be at least 1')
        for name in ('group', 'log_every', 'valid_batches', 'microbatches'):
            if getattr(self, name) < 1:
                raise ConfigError(f'loop.{name} is {getattr(self, name)}; it must be at least 1')
        for name in ('steps', 'log_every', 'valid_every', 'snapshot_every', 'save_every'):
            if getattr(self, name) % self.group:
                raise ConfigError(
                    f'loop.{name}={getattr(self, name)} is not a multiple of '
                    f'loop.group={self.group}, the steps of one dispatch; change one of them')
        if self.keep < 2:
            raise ConfigError(f'loop.keep is {self.keep}; keep at least 2 checkpoints')
        if self.prng not in ('threefry2x32', 'rbg'):
            raise ConfigError(f"loop.prng is {self.prng!r}; choose 'threefry2x32' or 'rbg'")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that defines a training run.

    Attributes:
      model: module name in dalle_jax.models.
      arch: that module's Config.
      precision: of matrix products: 'auto' (bfloat16 on TPU and GPU, float32 on CPU), 'float32',
        'bfloat16', or 'float16' with gradient scales of the resblocks (Ramesh et al. 2021, sec.
        2.4), which DALL-E has. The residual stream, layernorms and logits stay float32.
      frozen: role -> path of a finished run; 'image' is the tokenizer of stage 2, 'text' a run
        whose BPE is shared.
      init_from: path of a run whose parameters are the starting point, or ''.
      cpu_devices: number of devices the host's CPU is split into (data parallel on one machine).
    """

    model: str
    arch: Any
    data: DataConfig
    optimizer: OptimizerConfig
    loop: LoopConfig
    mesh: MeshConfig = MeshConfig()
    compression: CompressionConfig = CompressionConfig()
    seed: int = 0
    precision: str = 'auto'
    frozen: Mapping[str, str] = dataclasses.field(default_factory=dict)
    init_from: str = ''
    text_vocab: int = 16384
    cpu_devices: int = 1

    def __post_init__(self):
        if self.precision not in ('auto', 'float32', 'bfloat16', 'float16'):
            raise ConfigError(f"precision is {self.precision!r}; choose 'auto', 'float32', "
                              "'bfloat16' or 'float16'")
        every = self.optimizer.average_every
        if self.optimizer.average_memory == 'host' and every % self.loop.group:
            raise ConfigError(f'optimizer.average_every={every} is not a multiple of '
                              f'loop.group={self.loop.group}, the steps of one dispatch, which '
                              'averages on the host need')
        if self.data.batch_size % self.loop.microbatches:
            raise ConfigError(f'loop.microbatches={self.loop.microbatches} does not divide '
                              f'data.batch_size={self.data.batch_size}')


def load(spec: str, overrides: Mapping[str, Any] | None = None):
    """Loads an experiment file into a locked ConfigDict.

    Args:
      spec: 'path/to/file.py' or 'path/to/file.py:arg'; a path that does not exist here is looked
        for beside the package, so that 'experiments/dvae.py:scenes' works from any directory.
      overrides: dotted key -> value, such as {'loop.steps': 100}.

    Returns:
      an ml_collections.ConfigDict.

    Raises:
      ConfigError: no such file, or a key the experiment does not have.
    """
    name, _, arg = spec.partition(':')
    path = find_file(name)
    module = _import_file(path)
    config = module.get_config(arg) if arg else module.get_config()
    for key, value in (overrides or {}).items():
        section = config
        *parents, leaf = key.split('.')
        for parent in parents:
            _require_key(section, parent, key)
            section = section[parent]
        _require_key(section, leaf, key)
        section[leaf] = value
    return config.lock()


def find_file(name: str) -> Path:
    """The experiment file called `name`: as given, or in the package's experiments folder."""
    for path in (Path(name), EXPERIMENTS.parent / name, EXPERIMENTS / Path(name).name):
        if path.is_file():
            return path.resolve()
    known = ', '.join(sorted(p.name for p in EXPERIMENTS.glob('*.py') if p.name != '__init__.py'))
    raise ConfigError(f'no experiment file {name!r}; the experiments folder has: {known}')


def resolve(config) -> Experiment:
    """Turns a ConfigDict (or a plain nested dict, such as a stored one) into an Experiment.

    Raises:
      ConfigError: an unknown model or key (naming the nearest valid one), or a value out of range.
    """
    config = config.to_dict() if hasattr(config, 'to_dict') else dict(config)
    if 'model' not in config:
        raise ConfigError("the experiment has no key 'model', the name of a module in "
                          'dalle_jax.models')
    arch = build(model_module(config['model']).Config, config.pop('arch', {}), 'arch')
    return build(Experiment, {**config, 'arch': arch}, '')


def model_module(name: str) -> ModuleType:
    """The module dalle_jax.models.<name>."""
    try:
        return importlib.import_module(f'dalle_jax.models.{name}')
    except ModuleNotFoundError as error:
        if error.name != f'dalle_jax.models.{name}':
            raise
        raise ConfigError(f'model={name!r}: there is no module dalle_jax.models.{name}') from None


def build(cls: type, values: Mapping[str, Any], where: str):
    """Builds the frozen dataclass `cls` from a mapping, nested dataclasses included.

    Raises:
      ConfigError: a key `cls` does not have, or a missing one; names the section `where`.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    prefix = where + '.' if where else ''
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f'unknown key {prefix}{key}{_did_you_mean(key, fields)}')
        hint = hints[key]
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            value = build(hint, value, prefix + key)
        elif isinstance(value, list):
            value = tuple(value)
        arguments[key] = value
    missing = [name for name, field in fields.items() if name not in arguments
               and field.default is dataclasses.MISSING
               and field.default_factory is dataclasses.MISSING]
    if missing:
        raise ConfigError(f'missing key {prefix}{missing[0]}')
    return cls(**arguments)


def to_json(experiment: Experiment) -> str:
    """The experiment as JSON text that `resolve(json.loads(text))` turns back into an equal one."""
    return json.dumps(dataclasses.asdict(experiment), indent=2)


def differences(old: Experiment, new: Experiment) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ: key -> (old, new)."""
    flat_old, flat_new = flat(old), flat(new)
    return {key: (flat_old.get(key), flat_new.get(key))
            for key in sorted(flat_old.keys() | flat_new.keys())
            if flat_old.get(key) != flat_new.get(key)}


def flat(experiment: Experiment) -> dict[str, Any]:
    """Dotted keys -> values for JSON."""
    return flatten(json.loads(to_json(experiment)))


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Dotted keys -> values, of nested dicts."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f'{prefix}{key}.')
        else:
            flat[prefix + key] = value
    return flat


def _require_key(section, key, whole):
    if key not in section:
        raise ConfigError(f'unknown key {whole}{_did_you_mean(key, list(section))}')


def _did_you_mean(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    listed = ', '.join(sorted(known))
    return f'; did you mean {near[0]!r}?' if near else f'; known keys: {listed}'


def _import_file(path: Path) -> ModuleType:
    """Imports an experiment by path; `from experiments import common` works in it."""
    root = str(EXPERIMENTS.parent)
    if root not in sys.path:
        sys.path.append(root)
    spec = importlib.util.spec_from_file_location(f'experiment_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, 'get_config'):
        raise ConfigError(f'{path} defines no get_config(arg), so it is no experiment file')
    return module
