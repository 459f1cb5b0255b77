"""What experiment files share: the argument string, and sections written once."""

import dataclasses

from ml_collections import ConfigDict


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
        elif isinstance(defaults[key], bool):
            values[key] = {'true': True, 'false': False, '': True}[text.lower()]
        else:
            values[key] = type(defaults[key])(text)
    return variant, values


def section(preset, **changes):
    """A model's preset as a ConfigDict, with some values changed."""
    values = dataclasses.asdict(dataclasses.replace(preset, **changes))
    return ConfigDict({k: v for k, v in values.items() if v is not None}, allow_dotted_keys=False)


def scenes(size=60):
    """Options of the captioned scenes that the scenes experiments share."""
    return dict(size=size, colours=6, backgrounds=2, templates=1)
