"""What experiment files share: the argument string, and sections written once."""

import dataclasses

from ml_collections import ConfigDict

from dalle_jax.config import Experiment, LoopConfig
from dalle_jax.data.sources import DataConfig
from dalle_jax.evaluation.config import EvaluateConfig
from dalle_jax.training.compression import CompressionConfig
from dalle_jax.training.optimizer import OptimizerConfig
from dalle_jax.training.partition import MeshConfig


def parse_arg(arg, *variants, **defaults):
    """Parses 'variant,key=value,...' into (variant, ConfigDict of typed values).

    Args:
      arg: the text behind the colon of --config file.py:ARG, or None.
      *variants: allowed first words; the first one is the default.
      **defaults: key -> default; a value gets the type of its default.

    Raises:
      ValueError: an unknown variant or key, or a value of another type; names the choices.
    """
    values = ConfigDict(defaults)
    variant = variants[0]
    for position, part in enumerate(filter(None, (arg or '').split(','))):
        key, equals, text = part.partition('=')
        if not equals and position == 0:
            if key not in variants:
                raise ValueError(f'unknown variant {key!r}; choose one of {", ".join(variants)}')
            variant = key
        elif key not in defaults:
            raise ValueError(f'unknown argument {key!r}; known: {", ".join(defaults) or "none"}')
        else:
            try:
                values[key] = type(defaults[key])(text)
            except ValueError:
                kind = type(defaults[key]).__name__
                raise ValueError(f'argument {key}={text!r} is no {kind}') from None
    return variant, values


def experiment(*, model, arch, data, optimizer, loop, **rest):
    """A training experiment's ConfigDict in which every key exists, so that any can be overridden.

    Args:
      model: module name in dalle_jax.models.
      arch: that module's Config, an instance.
      data, optimizer, loop: dicts of what differs from DataConfig, OptimizerConfig, LoopConfig.
      **rest: other keys of Experiment.
    """
    return ConfigDict({
        **_filled(Experiment, rest),
        'model': model,
        'arch': {k: v for k, v in dataclasses.asdict(arch).items() if v is not None},
        'data': _filled(DataConfig, data),
        'optimizer': _filled(OptimizerConfig, optimizer),
        'loop': _filled(LoopConfig, loop),
        'mesh': _filled(MeshConfig, rest.get('mesh', {})),
        'compression': _filled(CompressionConfig, rest.get('compression', {})),
    })


def evaluation(**values):
    """The ConfigDict of an evaluation in which every key exists: what differs from its defaults."""
    return ConfigDict(_filled(EvaluateConfig, values))


def _filled(cls, values):
    defaults = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
    return {**defaults, **values}


def own_data(args):
    """The data section's part for a user's own images: args.path of args.source."""
    train, valid = ('train[:95%]', 'train[95%:]') if args.source == 'tfds' else ('train', 'valid')
    return dict(source=args.source, path=args.path, train_split=train, valid_split=valid,
                valid_crop='center')


def scenes(size=60):
    """Options of the captioned scenes that the scenes experiments share."""
    return dict(size=size, colours=6, backgrounds=2, templates=1)
