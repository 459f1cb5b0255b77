"""Measures speed and memory: python -m dalle_jax.benchmark --what attention,train --preset 1.4b.

Prints a JSON object for each measurement, see measure.py, and a table. Every figure stands beside
the machine's own rates and beside the plain way of computing the same: attention with the whole
mask, drawing without a cache or with a cache of everything. Compare these ratios, not seconds of
different runs.

Reads no data, and needs of the dependencies only jax, flax, optax, numpy and absl.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from dalle_jax import machine
from dalle_jax.measure import Case, measure, table
from dalle_jax.models import attention, dalle, dalle_network, dvae, patterns, transformer
from dalle_jax.training import partition, step as step_lib
from dalle_jax.training.optimizer import OptimizerConfig

# The optimisers of the paper's recipes, as in experiments/, whose files need more libraries.
OPTIMIZERS = {
    dalle: OptimizerConfig(
        name='adamw', peak_lr=4.5e-4, schedule='halving', warmup=5_000,
        halve_at=(150_000, 220_000, 290_000, 350_000, 400_000), b1=0.9, b2=0.96, eps=1e-8,
        weight_decay=4.5e-2, decay=r'(qkv|out|up|down)(/kernel)?$', clip=4.0, variance_clip=5.0,
        average_decay=0.99, average_every=25),
    dvae: OptimizerConfig(
        name='adamw', peak_lr=1e-4, schedule='cosine', decay_updates=1_200_000, end_lr=1.25e-6,
        b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-4, average_decay=0.999),
}

# How attention is computed on a backend: the fastest first; what all are compared with last.
IMPLEMENTATIONS = {'cpu': ('blocked', 'dense'), 'gpu': ('pallas', 'blocked', 'dense'),
                   'tpu': ('splash', 'blocked', 'dense')}


# The big models' moments, and averages in the host's memory, which a step does not touch.
STORED = {'mean_format': '1-6-9', 'variance_format': '0-6-10', 'average_memory': 'host'}


@dataclasses.dataclass(frozen=True)
class Preset:
    """Models, examples of a training step, images drawn at once, how the transformer is stored."""

    dalle: dalle.Config
    dvae: dvae.Config
    train_batch: int = 4
    sample_batch: int = 2
    stored: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _small(depth, width, text, side, text_vocab, image_vocab, train_batch, sample_batch):
    config = dalle.Config(
        depth=depth, width=width, heads=width // 64, text_length=text, grid=(side, side),
        text_vocab=text_vocab, image_vocab=image_vocab, kernel=11, remat='none')
    return Preset(config, dvae.PRESETS['tiny'], train_batch, sample_batch)


PRESETS = {
    'bench_tiny': _small(4, 256, 32, 16, 2048, 1024, 16, 8),
    'bench_small': _small(8, 512, 64, 16, 8192, 8192, 8, 4),
    'paper_seq': _small(4, 512, 256, 32, 16_384, 8192, 4, 2),
    **{name: Preset(config, dvae.PRESETS['paper'], stored=STORED)
       for name, config in dalle.PRESETS.items()},
    '12b_one_gpu': Preset(dalle.PRESETS['12b'], dvae.PRESETS['paper'],
                          stored=STORED | {'params_format': 'bfloat16'}),
}


def chosen(name: str, layers: int = 0, remat: str = '', dvae_preset: str = '') -> Preset:
    """A preset; cut to its first `layers` layers and with another remat or dVAE, if given.

    Raises:
      ValueError: unknown names, or more layers than there are; says what there is.
    """
    for flag, given, known in (('preset', name, PRESETS),
                               ('dvae_preset', dvae_preset or 'paper', dvae.PRESETS)):
        if given not in known:
            raise ValueError(f'--{flag}={given}: choose one of {", ".join(known)}')
    preset, config = PRESETS[name], PRESETS[name].dalle
    if not 0 <= layers <= config.depth:
        raise ValueError(f'--layers={layers}: {name} has {config.depth} layers; give 1 to '
                         f'{config.depth}, or 0 for all')
    if layers:
        config = dataclasses.replace(config, depth=layers,
                                     patterns=config.blocks.patterns[:layers])
    config = dataclasses.replace(config, remat=remat or config.remat)
    return dataclasses.replace(preset, dalle=config,
                               dvae=dvae.PRESETS[dvae_preset] if dvae_preset else preset.dvae)


@dataclasses.dataclass(frozen=True)
class Bench:
    """What is measured, and how; the fields are the flags of the same names.

    Raises:
      ValueError: on values that do not fit together.
    """

    what: tuple[str, ...]
    name: str
    preset: Preset
    dtype: Any
    batch: int = 0
    candidates: int = 1
    with_dvae: bool = False
    repeats: int = 5
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self):
        for what in self.what:
            if what not in WHATS:
                raise ValueError(f'--what={what}: choose from {", ".join(WHATS)}')
        for name, least in (('repeats', 1), ('candidates', 1), ('batch', 0)):
            if getattr(self, name) < least:
                raise ValueError(f'--{name}={getattr(self, name)}: give at least {least}')
        devices, rows, columns = jax.device_count(), *self.preset.dalle.grid
        if self.batch % devices and {'train', 'dvae', 'precision'} & set(self.what):
            raise ValueError(f'--batch={self.batch} is not divisible by the {devices} devices that '
                             'train on it')
        if self.with_dvae and rows != columns:
            raise ValueError(f'--with_dvae: the dVAE draws squares, and {self.name} has a grid of '
                             f'{rows}x{columns}')


def run(bench: Bench, out: str | None = None) -> list[dict[str, Any]]:
    """Measures, prints and returns the JSON objects.

    Args:
      out: file to which they are appended, one a line, as soon as they are there.
    """
    lines = []
    for what in bench.what:
        for group, cases in WHATS[what](bench):
            common = {'name': group, 'preset': bench.name, 'device': machine.describe(),
                      'dtype': bench.dtype.name, 'jax': jax.__version__,
                      'date': time.strftime('%Y-%m-%d')}
            found = measure(cases, bench.dtype, bench.repeats, common, bench.clock)
            del cases  # and the arrays they hold, before others are made
            text = ''.join(json.dumps(line) + '\n' for line in found)
            print(text, end='', flush=True)
            if out:
                with open(out, 'a') as file:
                    file.write(text)
            lines += found
    print(f'\n{table(lines)}', flush=True)
    return lines


# -- what is measured: functions of a Bench that yield (name, cases) -------------------------------


def _attention(bench):
    """Forward and backward pass of each of the model's patterns, by each implementation."""
    config, batch = bench.preset.dalle, bench.batch or 2
    layout, size = config.blocks.layout, config.width // config.heads
    exact = [jax.random.normal(jax.random.key(i), (batch, config.heads, layout.length, size))
             for i in range(4)]
    inputs = [x.astype(bench.dtype) for x in exact]

    def both(pattern, implementation):
        def function(q, k, v, cotangent):
            out, pull = jax.vjp(lambda q, k, v: attention.attend(
                pattern, q, k, v, layout, implementation), q, k, v)
            return out, *pull(cotangent)
        return jax.jit(function)

    for pattern in sorted(set(config.blocks.patterns), key=patterns.PATTERNS.index):
        with jax.default_matmul_precision('highest'):
            right = both(pattern, 'dense')(*exact)

        def errors(compiled, right=right):
            """The largest, of the result and of three gradients, relative to the largest value."""
            found = [jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max()
                     for a, b in zip(compiled(*inputs), right)]
            return {'max_relative_error': float(max(found))}

        pairs = patterns.visible_pairs(pattern, layout)
        yield f'attention/{pattern}', [
            Case(implementation, functools.partial(both(pattern, implementation).lower, *inputs),
                 lambda compiled: compiled(*inputs), batch, 3 * 4 * batch * config.width * pairs,
                 tokens=layout.length, extra={'batch': batch}, check=errors)
            for implementation in IMPLEMENTATIONS[jax.default_backend()]]


def _training(bench, module, config, batch, dtype=None):
    """Makes cases of a training step from kind, config and model FLOPs of an example's forward.

    The state is that of a real run, and the same for all cases: each takes it and leaves the next.
    """
    mesh, size = partition.make_mesh(partition.MeshConfig()), len(jax.tree.leaves(batch)[0])
    optimizer = OPTIMIZERS[module]
    if module is dalle:
        optimizer = dataclasses.replace(optimizer, **bench.preset.stored)
    if optimizer.average_memory == 'host':
        optimizer = dataclasses.replace(optimizer, average_decay=0.0)
    task = step_lib.Task(module, config, optimizer, size, dtype=dtype or bench.dtype,
                         partition=partition.Partitioner(mesh))
    abstract = step_lib.abstract_state(task)
    held = [step_lib.create_state(task, 0)]
    batch = partition.put_batch(batch, mesh)

    def run(compiled):
        held[0], metrics = compiled(held[0], batch, {})
        return metrics

    def case(kind, config, **values):
        train = step_lib.make_train(task._replace(config=config), abstract)
        return Case(kind, lambda: train.lower(held[0], batch, {}, ()), run, size,
                    3 * size * module.flops(config), **values)

    return case


def _tokens(config, size):
    """Captions without padding and image tokens."""
    rng = np.random.default_rng(0)
    return {'text': rng.integers(1, config.text_vocab, (size, config.text_length - 1), np.int32),
            'codes': rng.integers(0, config.image_vocab, (size, *config.grid), np.int32)}


def _train(bench):
    """A training step on token records, with attention as a run chooses it and otherwise."""
    config, size = bench.preset.dalle, bench.batch or bench.preset.train_batch
    case = _training(bench, dalle, config, _tokens(config, size))
    yield 'train', [
        case(kind, dataclasses.replace(config, attention=kind), tokens=config.blocks.layout.length,
             extra={'batch': size, 'remat': config.remat})
        for kind in ('auto', *IMPLEMENTATIONS[jax.default_backend()][1:])]


def _precision(bench):
    """A training step in bfloat16, and in float16 with gradient scales."""
    config, size = bench.preset.dalle, bench.batch or bench.preset.train_batch
    batch = _tokens(config, size)
    yield 'train/precision', [
        _training(bench, dalle, config, batch, jnp.dtype(name))(
            name, config, tokens=config.blocks.layout.length,
            extra={'batch': size, 'remat': config.remat}) for name in ('bfloat16', 'float16')]


def _sample(bench):
    """Drawing images with our caches, with a cache of everything, and by recomputing all."""
    config, captions = bench.preset.dalle, bench.batch or bench.preset.sample_batch
    images = captions * bench.candidates
    params = jax.jit(lambda: dalle.init(config, jax.random.key(0))[0])()
    text = jnp.asarray(_tokens(config, captions)['text'])
    keys = jax.random.split(jax.random.key(1), (captions, bench.candidates))
    decoder, decode = _decoder(bench) if bench.with_dvae else ({}, lambda params, ids: ids)

    def draw(kind, config, **values):
        def function(params, decoder, text, keys):
            ids, logp = dalle.generate(params, config, text, keys=keys, dtype=bench.dtype)
            return decode(decoder, ids.reshape(images, *config.grid)), logp

        given = params, decoder, text, keys
        cache = dalle.sample_bytes(config, captions, bench.candidates, bench.dtype)
        return Case(kind, lambda: jax.jit(function).lower(*given),
                    lambda compiled: compiled(*given), images,
                    tokens=config.image_length, extra=extra | {'cache_bytes': cache}, **values)

    def recomputed(params, x):
        x = transformer.forward(params['transformer'], config.blocks, x, dtype=bench.dtype)
        return dalle_network.logits(params, x[:, -1:], 'image', bench.dtype)

    extra = {'captions': captions, 'candidates': bench.candidates, 'with_dvae': bench.with_dvae}
    states = jax.random.normal(
        jax.random.key(2), (images, config.blocks.layout.length, config.width))
    yield 'sample', [
        draw('cached', config, bytes=config.image_length * token_bytes(
            params, config, captions, bench.candidates, bench.dtype)),
        draw('dense_cache', dataclasses.replace(config, patterns=('causal',) * config.depth)),
        Case('recompute', lambda: jax.jit(recomputed).lower(params, states),
             lambda compiled: compiled(params, states), images, tokens=config.image_length,
             runs=config.image_length, extra=extra | {'with_dvae': False})]


def token_bytes(params: Any, config: dalle.Config, captions: int, candidates: int, dtype: Any
                ) -> float:
    """Bytes that one token of every image moves at least: a mean over an image's tokens.

    Weights of the layers and of the image head, once; keys and values of each caption, once; those
    of the image states that the newest one sees, which itself is written instead of read.
    """
    layout, image = config.blocks.layout, config.image_length
    weights = sum(x.size for x in jax.tree.leaves(
        (params['transformer'], params['heads']['image'])))
    with_text = layout.text * (layout.text + 1) // 2 + image * layout.text
    seen = sum(patterns.visible_pairs(pattern, layout) - with_text
               for pattern in config.blocks.patterns) / image
    states = captions * (config.depth * layout.text + candidates * seen)
    return jnp.dtype(dtype).itemsize * (weights + 2 * config.width * states)


def _decoder(bench):
    """A dVAE of that grid and vocabulary: params, and (params, ids [B, R, C]) -> uint8 images."""
    side = bench.preset.dalle.grid[0] * bench.preset.dvae.factor
    config = dataclasses.replace(bench.preset.dvae, image_size=side,
                                 vocab=bench.preset.dalle.image_vocab)

    def decode(params, ids):
        return jnp.round(255 * dvae.decode(params, config, ids, bench.dtype)).astype(jnp.uint8)

    return jax.jit(lambda: dvae.init(config, jax.random.key(0))[0])(), decode


def _dvae(bench):
    """Training on images, encoding them, and decoding by lookup and by one-hot products."""
    config, size = bench.preset.dvae, bench.batch or 8
    side, extra = config.image_size, {'batch': bench.batch or 8}
    images = np.random.default_rng(0).integers(0, 256, (size, side, side, 3), np.uint8)
    case = _training(bench, dvae, config, {'image': images})
    yield 'dvae/train', [case('auto', config, extra=extra)]
    del case

    params = jax.jit(lambda: dvae.init(config, jax.random.key(0))[0])()
    ids = jax.random.randint(jax.random.key(1), (size, *config.grid), 0, config.vocab)

    def of(kind, function, given, part):
        return Case(kind, lambda: jax.jit(function).lower(params, given),
                    lambda compiled: compiled(params, given), size,
                    size * dvae.flops(config, [part]), extra=extra)

    def lookup(params, ids):
        return dvae.decode(params, config, ids, bench.dtype)

    def one_hot(params, ids):
        kernel, bias = params['codebook']['kernel'][0, 0], params['codebook']['bias']
        weights = jax.nn.one_hot(ids, config.vocab, dtype=bench.dtype)
        embedded = weights @ kernel.astype(bench.dtype) + bias[None, None, None]
        return dvae.read_out(dvae.decode_embedded(params, config, embedded, bench.dtype), config)

    yield 'dvae/encode', [of('auto', lambda params, images: dvae.encode(
        params, config, images, bench.dtype), jnp.asarray(images), 'encoder')]
    yield 'dvae/decode', [of('lookup', lookup, ids, 'decoder'),
                          of('one_hot', one_hot, ids, 'decoder')]


WHATS = {'attention': _attention, 'train': _train, 'sample': _sample, 'dvae': _dvae,
         'precision': _precision}


def main(argv):
    logging.set_verbosity(logging.WARNING)
    machine.keep_freed_memory()
    try:
        if len(argv) > 1:
            raise ValueError(f'unexpected argument {argv[1]!r}')
        preset = chosen(FLAGS.preset, FLAGS.layers, FLAGS.remat, FLAGS.dvae_preset)
        name = f'{FLAGS.preset}:{FLAGS.layers}' if FLAGS.layers else FLAGS.preset
        bench = Bench(tuple(FLAGS.what), name, preset, machine.compute_dtype(FLAGS.precision),
                      FLAGS.batch, FLAGS.candidates, FLAGS.with_dvae, FLAGS.repeats)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    failed = [f"{x['name']} {x['kind']}" for x in run(bench, FLAGS.out) if x.get('failed')]
    if failed:
        raise SystemExit(f'failed, see above: {", ".join(failed)}')


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    flags.DEFINE_list('what', ['attention', 'train', 'sample', 'dvae'],
                      f'What is measured: {", ".join(WHATS)}.')
    flags.DEFINE_string('preset', 'bench_tiny', f'Sizes: one of {", ".join(PRESETS)}.')
    flags.DEFINE_integer('layers', 0, 'Only so many of the first layers; 0: all.')
    flags.DEFINE_string('remat', '', 'What the backward pass recomputes, one of '
                        f'{", ".join(transformer.REMAT)}; empty: as the preset.')
    flags.DEFINE_string('dvae_preset', '', f'The dVAE: one of {", ".join(dvae.PRESETS)}; empty: '
                        'tiny with the small presets, paper with the others.')
    flags.DEFINE_integer('batch', 0, 'Examples of a step, images of the dVAE, captions drawn at '
                         "once; 0: the preset's, 8 images of the dVAE, 2 sequences of attention.")
    flags.DEFINE_integer('candidates', 1, 'Images drawn of each caption.')
    flags.DEFINE_bool('with_dvae', False, 'Whether drawing includes decoding the images.')
    flags.DEFINE_integer('repeats', 5, 'Times that each is run; the median counts.')
    flags.DEFINE_enum('precision', 'auto', ['auto', 'float32', 'bfloat16', 'float16'],
                      'Of the matrix products; auto: bfloat16 on accelerators, float32 on CPUs.')
    flags.DEFINE_string('out', None, 'File that the JSON objects are appended to.')
    app.run(main)
