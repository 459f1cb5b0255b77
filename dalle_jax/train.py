"""Trains a model: python -m dalle_jax.train --config experiments/dalle.py:scenes --workdir DIR.

The same command continues a run that was stopped, bit-exactly. A finished run is named by its
directory in later stages (config.frozen) and in sample and evaluate.
"""

import contextlib
import dataclasses
import itertools
import logging
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from dalle_jax import config as config_lib
from dalle_jax import machine, runs
from dalle_jax.data import sources
from dalle_jax.data.pipeline import Pipeline
from dalle_jax.models.context import Context, Frozen
from dalle_jax.progress import Progress, Work, brief, clock
from dalle_jax.runs import say
from dalle_jax.training import partition, step as step_lib
from dalle_jax.training.checkpoint import Checkpoints, restore_subtree
from dalle_jax.training.partition import path_name

SNAPSHOT_EXAMPLES = 16
BPE_CAPTIONS = 200_000  # sentencepiece's vocabulary hardly changes beyond this many


def run(config, workdir: str) -> dict[str, float] | None:
    """Trains the experiment to its end, or continues it.

    Args:
      config: a ConfigDict of an experiment file, or a resolved Experiment.
      workdir: the run's directory; created, or continued if it holds this experiment.

    Returns:
      the final validation metrics and facts of the run, as stored in done.json; None if the run
      was finished already.

    Raises:
      ConfigError, RunError, CheckpointError: before anything expensive starts.
    """
    started = time.monotonic()
    experiment = config if isinstance(config, config_lib.Experiment) else config_lib.resolve(config)
    runs.start_jax(experiment.cpu_devices)
    model = config_lib.model_module(experiment.model)

    # -- what the run stands on: frozen runs, data, tokenizer --------------------------------
    loaded = _load_frozen(experiment)
    frozen = {role: Frozen(r.module, r.config, r.params) for role, r in loaded.items()
              if role == 'image'}
    for role, f in frozen.items():
        if not hasattr(f.module, 'decode'):
            raise runs.RunError(f'frozen.{role}={experiment.frozen[role]!r} is a '
                                f'{loaded[role].experiment.model} run; name an image tokenizer, '
                                'such as a dVAE run')
    spec = _batch_spec(experiment, model, frozen)
    if experiment.data.source == 'tokens' and 'codes' not in spec:
        raise runs.RunError(f"the {experiment.model} is trained on images, and source 'tokens' has "
                            'only codes of them; give the images they were made of')
    if experiment.data.source != 'tokens' and 'image' not in spec:
        raise runs.RunError(f'the {experiment.model} reads images through a tokenizer: name a '
                            'finished dVAE run with --config.frozen.image=RUN')
    needs_text = 'text' in spec
    source, valid_source = (sources.open_source(experiment.data, split, needs_text)
                            for split in ('train', 'valid'))
    image_tokenizer = frozen['image'].config if frozen else None
    if experiment.data.source == 'tokens':
        image_tokenizer = source.image_tokenizer
        _check_codes(experiment, loaded, image_tokenizer)
        experiment = dataclasses.replace(experiment, data=dataclasses.replace(
            experiment.data, tokenizer=image_tokenizer.fingerprint))
    tokenizer = _tokenizer(experiment, loaded, source, workdir) if needs_text else None
    if hasattr(model, 'fit'):
        experiment = dataclasses.replace(experiment, arch=model.fit(
            experiment.arch, text_vocab=tokenizer.vocab_size,
            image_tokenizer_config=image_tokenizer))
    log = runs.Run(workdir, experiment, started)
    try:
        if log.finished(experiment.loop.steps):
            say(f'{workdir} is finished')
            return None
        if tokenizer:
            tokenizer.save(log.path / 'tokenizer.model')
        return _train(experiment, model, frozen, source, valid_source, tokenizer, log)
    finally:
        log.close()


def _train(experiment, model, frozen, source, valid_source, tokenizer, log):
    loop = experiment.loop
    name = f'{experiment.model} {log.path}'

    # -- pipelines: a batch is a pure function of seed and step ------------------------------
    spec = _batch_spec(experiment, model, frozen)
    pipeline = _pipeline(experiment, source, spec, tokenizer, train=True)
    valid = _pipeline(experiment, valid_source, spec, tokenizer, train=False)
    valid.batch(0)  # held-out data that cannot be read is an error now, not after the first epoch
    valid_batches = max(1, min(loop.valid_batches, len(valid_source) // experiment.data.batch_size))

    # -- mesh and state. Restore order: 1 this run's newest checkpoint, 2 init_from, 3 random -
    mesh = partition.make_mesh(experiment.mesh)
    task = step_lib.Task(model, experiment.arch, experiment.optimizer, loop.microbatches,
                         machine.compute_dtype(experiment.precision), loop.prng,
                         partition.Constrainer(mesh))
    abstract = jax.eval_shape(lambda: step_lib.init_state(task, experiment.seed))
    placed = partition.shardings(model.axes(experiment.arch), abstract.params, mesh)
    placed = partition.like_params(abstract, placed, abstract.params, mesh)
    abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
                            abstract, placed)
    checkpoints = Checkpoints(log.path / 'checkpoints', keep=loop.keep)
    restored = checkpoints.restore(abstract)
    if restored:
        first, state = restored
        say(f'{name}: continues after step {first}')
    else:
        first = 0
        state = jax.jit(lambda: step_lib.init_state(task, experiment.seed),
                        out_shardings=placed)()
        if experiment.init_from:
            state = _init_from(state, experiment.init_from, task)
    prepare_at = model.prepare_step(experiment.arch) if hasattr(model, 'prepare_step') else None
    if prepare_at is not None and prepare_at % loop.group:
        raise config_lib.ConfigError(f'the model is prepared at step {prepare_at}, which is not a '
                                     f'multiple of loop.group={loop.group}')
    if prepare_at == 0 and not restored:
        state = _prepare(state, experiment, model, source, spec, tokenizer, name)
    frozen_params = {role: jax.device_put(f.params, partition.replicated(mesh))
                     for role, f in frozen.items()}
    frozen_static = tuple((role, f.module, f.config) for role, f in frozen.items())
    train = step_lib.make_train(task, state, loop.group, placed)
    validate = step_lib.make_validate(task)
    log.start_log(first)
    count = sum(x.size for x in jax.tree.leaves(state.params))
    say(f'{name}: {count:,} parameters, {len(source):,} training records, {mesh.size} device(s), '
        f'steps {first}..{loop.steps} of batch {experiment.data.batch_size}')

    # -- the work that happens now and then --------------------------------------------------
    def run_validation(step):
        params = step_lib.best_params(state)
        parts = [validate(params, state.model_state, partition.put_batch(valid.batch(i), mesh),
                          state.updates, frozen_params, frozen_static)
                 for i in range(valid_batches)]
        values = step_lib.means(*step_lib.added(jax.device_get(parts)))
        values = {k: float(v) for k, v in values.items()}
        log.log('valid', step, values)
        say(f'{name}: validation at {step}: {brief(values)}')
        return values

    def take_snapshot(step):
        batch = {k: v[:SNAPSHOT_EXAMPLES] for k, v in valid.batch(0).items()}
        ctx = Context(experiment.arch, jax.random.key(0), state.updates, False,
                      step_lib.bind(frozen_static, frozen_params), task.dtype)
        arrays = model.snapshot(step_lib.best_params(state), state.model_state, batch, ctx)
        captions = [tokenizer.decode(row) for row in batch['text']] if 'text' in batch else []
        log.snapshot(step, arrays, captions, getattr(experiment.arch, 'text_length', None))
        _write_page(log.path)

    # -- the loop ----------------------------------------------------------------------------
    progress = Progress(name, first, loop.steps, loop.group, experiment.data.batch_size,
                        _work(experiment, model, task.dtype))
    window, pending, values, metrics, done, told = [], None, {}, {}, first, 0
    stack = contextlib.ExitStack()
    stack.callback(checkpoints.close)
    stop = stack.enter_context(_StopSignal())
    batches = stack.enter_context(pipeline.prefetch(
        first, loop.steps, group=loop.group, workers=experiment.data.workers))
    with stack:
        for step, batch in batches:
            done = step + loop.group
            progress.got_batch(batches.wait_seconds, device_idle=all(
                leaf.is_ready() for leaf in jax.tree.leaves(metrics)))
            state, metrics = train(state, partition.put_batch(batch, mesh, stacked=loop.group > 1),
                                   frozen_params, frozen_static)
            if step == first:
                jax.block_until_ready(metrics)
                progress.start()
            window.append(metrics)
            if pending:  # fetched one dispatch late, so that the device never waits for the host
                _log_window(log, progress, *pending)
                told = _tell_problems(name, pipeline, told)
                pending = None
            if done == prepare_at:
                state = _prepare(state, experiment, model, source, spec, tokenizer, name)
            last = done == loop.steps
            stopping = stop.requested and not last
            due = {what: last or every and done % every == 0 for what, every in (
                ('valid', loop.valid_every), ('snapshot', loop.snapshot_every),
                ('save', loop.save_every))}
            if stopping:  # the time until the machine is taken away may be short
                due = {'valid': False, 'snapshot': False, 'save': True}
            # A window ends at every save: a continued run then averages over the same steps.
            if done % loop.log_every == 0 or due['save']:
                pending, window = (done, window), []
            if any(due.values()) and pending:
                _log_window(log, progress, *pending)
                pending = None
            with progress.paused():
                if due['valid']:
                    values = run_validation(done)
                if due['snapshot']:
                    take_snapshot(done)
                if due['save']:
                    checkpoints.save(done, state)
            if stopping:
                break
    if done < loop.steps:
        say(f'{name}: stopped by a signal after step {done}; everything is saved, the same '
            'command continues')
        raise SystemExit(143)
    if first >= loop.steps:  # restored after its last step: everything is there but the marker
        values = run_validation(first)
        take_snapshot(first)
    facts = {'step': max(done, first), 'seconds': log.elapsed(), 'parameters': count,
             'bad_records': pipeline.problems.replaced + valid.problems.replaced,
             'truncated_captions': pipeline.problems.truncated, **values}
    for data, problems in (('training', pipeline.problems), ('held-out', valid.problems)):
        if problems.replaced or problems.truncated:
            say(f'{name}: in the {data} data, {problems}')
    log.finish(facts)
    say(f'{name}: finished in {clock(log.elapsed())}; see {log.path}/report.html')
    return facts


def _work(experiment, model, dtype):
    """What training does; the machine's rate is measured before the data's workers share it."""
    arch, window = experiment.arch, experiment.data.image_size
    if window and hasattr(arch, 'image_size'):
        arch = dataclasses.replace(arch, image_size=window)
    blocks = getattr(arch, 'blocks', None)  # of a stack over tokens
    return Work(3 * model.flops(arch), machine.matmul_rate(dtype) * machine.devices(),
                blocks.layout.length if blocks else 0)


def _load_frozen(experiment):
    """role -> Loaded of the runs that the experiment names."""
    loaded = {}
    for role, path in experiment.frozen.items():
        try:
            if path:
                loaded[role] = runs.load(path)
        except runs.RunError as error:
            if role != 'image' or experiment.data.source != 'tokens':
                raise
            raise runs.RunError(f'{error}. Token records need frozen.image for pictures only: '
                                '--config.frozen.image= trains without it') from None
    return loaded


def _check_codes(experiment, loaded, made_by):
    """Only the run that made the codes can turn them into pictures."""
    found = runs.fingerprint(loaded['image'].params) if 'image' in loaded else made_by.fingerprint
    if found != made_by.fingerprint:
        raise runs.RunError(
            f"frozen.image={experiment.frozen['image']!r} has the fingerprint {found}, but the "
            f'codes in {experiment.data.path} are those of {made_by.run} with '
            f'{made_by.fingerprint}: name that run, or encode the images with this one')


def _batch_spec(experiment, model, frozen):
    """One example; where the source has codes, no image is turned into them."""
    return model.batch_spec(experiment.arch, {} if experiment.data.source == 'tokens' else frozen)


def _pipeline(experiment, source, spec, tokenizer, train, shared=True):
    data = experiment.data
    size = spec['image'].shape[0] if 'image' in spec else None
    return Pipeline(
        source, batch_size=data.batch_size, seed=experiment.seed,
        image_size=(train and data.image_size) or size,
        grid=None if size else spec['codes'].shape,
        text_length=spec['text'].shape[0] if 'text' in spec else None, tokenizer=tokenizer,
        crop=data.crop if train else data.valid_crop,
        bpe_dropout=data.bpe_dropout if train else 0.0, shuffle=train,
        process_index=jax.process_index() if shared else 0,
        process_count=jax.process_count() if shared else 1)


def _tokenizer(experiment, loaded, source, workdir):
    """The BPE: this run's own if it is already there, another run's, or trained now."""
    from dalle_jax.data.text import Tokenizer

    if runs.has_checkpoint(workdir):
        return runs.load_tokenizer(workdir)
    if 'text' in loaded:
        if loaded['text'].tokenizer is None:
            raise runs.RunError(f"frozen.text={experiment.frozen['text']!r} is a run without a "
                                'tokenizer; name a run that was trained on captions')
        return loaded['text'].tokenizer
    started = time.monotonic()
    tokenizer = Tokenizer.train(sources.captions(source, BPE_CAPTIONS), experiment.text_vocab)
    say(f'BPE: {tokenizer.vocab_size} pieces from the training captions in '
        f'{time.monotonic() - started:.1f} s')
    return tokenizer


def _init_from(state, path, task):
    """Starts from another run's parameters; whatever does not fit stays random and is named."""
    _, trees = restore_subtree(f'{path}/checkpoints', ('params', 'averages'))
    donor = {path_name(p): x for p, x in jax.tree_util.tree_flatten_with_path(
        trees['averages'] or trees['params'])[0]}
    kept = []

    def one(path, mine):
        theirs = donor.pop(path_name(path), None)
        if theirs is None or theirs.shape != mine.shape:
            kept.append(path_name(path))
            return mine
        return jax.device_put(theirs, mine.sharding)

    params = jax.tree_util.tree_map_with_path(one, state.params)
    say(f'parameters from {path}; not in it or of another shape: {", ".join(kept) or "none"}; '
        f'in it but not used: {", ".join(donor) or "none"}')
    return step_lib.fresh_state(task, params, state.model_state,
                                jax.random.wrap_key_data(state.key, impl=task.prng))


def _prepare(state, experiment, model, source, spec, tokenizer, name):
    """The model's initialisation from data, on whole training images, in the middle of a run."""
    started = time.monotonic()
    # All of every batch in every process: their results must agree.
    pipeline = _pipeline(experiment, source, spec, tokenizer, train=False, shared=False)
    params, facts = model.prepare(state.params, experiment.arch,
                                  (pipeline.batch(i) for i in itertools.count()),
                                  jax.random.key(experiment.seed))
    params = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, state.params)
    say(f'{name}: prepared from data in {time.monotonic() - started:.1f} s: {brief(facts)}')
    # Averages start again: those of before describe another model.
    averages = jax.tree.map(jnp.copy, params) if state.averages else {}
    return state._replace(params=params, averages=averages)


def _log_window(log, progress, step, window):
    values = {name: np.concatenate([np.atleast_1d(jax.device_get(m[name])) for m in window]).mean()
              for name in window[0]}
    values |= progress.rates(step)
    log.log('train', step, values)
    say(progress.line(step, values))
    for name, value in values.items():
        if name.startswith('alarm/') and value > 0:
            logging.warning('%s at step %d: %s', progress.name, step, name)


def _tell_problems(name, pipeline, told):
    """Names the kinds of bad records that have come up since `told` of them were named."""
    examples = pipeline.problems.examples
    for example in examples[told:]:
        say(f'{name}: left out {example}')
    return len(examples)


class _StopSignal:
    """SIGTERM and SIGINT ask for a save and a clean end; a second one kills as usual."""

    def __enter__(self):
        self.requested = False
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number, frame):
        del frame
        self.requested = True
        signal.signal(number, self._previous[number])

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _write_page(path):
    from dalle_jax import report
    report.write(path / 'report.html', report.run_page(path))


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'unexpected argument {argv[1]!r}')
    run(CONFIG.value, WORKDIR.value)


if __name__ == '__main__':
    CONFIG = config_lib.define_flag()
    WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run.')
    flags.mark_flags_as_required(['config', 'workdir'])
    app.run(main)
