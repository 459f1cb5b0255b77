"""Trains a model: python -m dalle_jax.train --config experiments/dalle.py:scenes --workdir DIR.

The same command continues a run that was stopped, bit-exactly. A finished run is named by its
directory in later stages (config.frozen) and in sample and evaluate.
"""

import contextlib
import dataclasses
import itertools
import logging
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import dalle_jax
from dalle_jax import config as config_lib
from dalle_jax import distributed, machine, runs
from dalle_jax.inputs import Inputs, make_task, open_inputs, pipeline
from dalle_jax.progress import Progress, Work, brief, clock
from dalle_jax.training import partition, precision, step as step_lib
from dalle_jax.training.checkpoint import Checkpoints, restore_subtree
from dalle_jax.training.partition import path_name

SNAPSHOT_EXAMPLES = 16


def run(config, workdir: str, processes: str = '', heartbeat: int = 100
        ) -> dict[str, float] | None:
    """Trains the experiment to its end, or continues it.

    Args:
      config: a ConfigDict of an experiment file, or a resolved Experiment.
      workdir: the run's directory; created, or continued if it holds this experiment. Several
        processes need it on a file system that all of them see.
      processes, heartbeat: see distributed.start.

    Returns:
      the final validation metrics and facts of the run, as stored in done.json; None if the run
      was finished already.

    Raises:
      ConfigError, RunError, CheckpointError, ProcessError, and ValueError of a mesh that divides
      something unevenly: before anything expensive starts.
    """
    started = time.monotonic()
    experiment = config if isinstance(config, config_lib.Experiment) else config_lib.resolve(config)
    runs.start_jax(experiment.cpu_devices)
    distributed.start(processes, heartbeat)
    distributed.agree({'dalle_jax': dalle_jax.__version__, 'jax': jax.__version__,
                       **config_lib.flat(experiment)})
    mesh = partition.make_mesh(experiment.mesh)
    make_task(experiment, mesh)  # an impossible one is an error before anything is opened

    inputs = open_inputs(experiment, workdir)
    with distributed.together(f'opening {workdir}'):
        log = runs.Run(workdir, inputs.experiment, started, distributed.primary())
    try:
        if distributed.from_primary(lambda: log.finished(experiment.loop.steps)):
            log.say(f'{workdir} is finished')
            return None
        if inputs.tokenizer and distributed.primary():
            inputs.tokenizer.save(log.path / 'tokenizer.model')
        return _train(inputs, mesh, log)
    finally:
        log.close()


def _train(inputs: Inputs, mesh, log):
    experiment, model = inputs.experiment, inputs.model
    loop, tokenizer = experiment.loop, inputs.tokenizer
    name = f'{experiment.model} {log.path}'

    # -- pipelines: a batch is a pure function of seed and step ------------------------------
    batches_of = {'training': pipeline(inputs, True, mesh),
                  'held-out': pipeline(inputs, False, mesh)}
    valid = batches_of['held-out']
    with distributed.together('reading held-out data'):
        valid.batch(0)  # what cannot be read is an error now, not after the first epoch
    examples = min(SNAPSHOT_EXAMPLES, experiment.data.batch_size)
    shown = pipeline(inputs, False, None, examples).batch(0)
    valid_batches = max(1, min(loop.valid_batches,
                               len(inputs.valid) // experiment.data.batch_size))

    # -- the state. Restore order: 1 this run's newest checkpoint, 2 init_from, 3 random ------
    task = make_task(experiment, mesh)
    abstract = step_lib.abstract_state(task)
    checkpoints = Checkpoints(log.path / 'checkpoints', keep=loop.keep)
    restored = checkpoints.restore(step_lib.abstract_saved(task, abstract))
    if restored:
        first, state = restored[0], step_lib.from_saved(task, restored[1])
        log.say(f'{name}: continues after step {first}')
    else:
        first, state = 0, step_lib.create_state(task, experiment.seed)
        if experiment.init_from:
            state = jax.device_put(_init_from(state, experiment.init_from, task, log),
                                   step_lib.shardings(abstract))
    prepare_at = model.prepare_step(experiment.arch) if hasattr(model, 'prepare_step') else None
    if prepare_at is not None and prepare_at % loop.group:
        raise config_lib.ConfigError(f'the model is prepared at step {prepare_at}, which is not a '
                                     f'multiple of loop.group={loop.group}')
    if prepare_at == 0 and not restored:
        state = _prepare(state, inputs, name, log)
    frozen_params = {role: jax.device_put(f.params, partition.replicated(mesh))
                     for role, f in inputs.frozen.items()}
    frozen_static = tuple((role, f.module, f.config) for role, f in inputs.frozen.items())
    train = step_lib.make_train(task, abstract, loop.group)
    validate, snapshot = step_lib.make_validate(task), step_lib.make_snapshot(task)
    resblocks = precision.names(state.scales.value) if state.scales else []
    log.start_log(first)
    count = sum(x.size for x in jax.tree.leaves(state.params))
    ways = ' x '.join(f'{axis} {n}' for axis, n in mesh.shape.items() if n > 1)
    log.say(f'{name}: {count:,} parameters, {len(inputs.train):,} training records, {mesh.size} '
            f'device(s){f" ({ways})" if ways else ""}, steps {first}..{loop.steps} of batch '
            f'{experiment.data.batch_size}')

    # -- the work that happens now and then --------------------------------------------------
    def run_validation(step):
        params = step_lib.best_params(state)
        parts = [validate(params, state.model_state, partition.put_batch(valid.batch(i), mesh),
                          state.updates, frozen_params, frozen_static)
                 for i in range(valid_batches)]
        values = step_lib.means(*step_lib.added(jax.device_get(parts)))
        values = {k: float(v) for k, v in values.items()}
        log.log('valid', step, values)
        log.say(f'{name}: validation at {step}: {brief(values)}')
        return values

    def take_snapshot(step):
        batch = jax.device_put(shown, partition.replicated(mesh))
        arrays = distributed.whole(snapshot(step_lib.best_params(state), state.model_state, batch,
                                            state.updates, frozen_params, frozen_static))
        captions = [tokenizer.decode(row) for row in shown['text']] if 'text' in shown else []
        log.snapshot(step, arrays, captions, getattr(experiment.arch, 'text_length', None))

    # -- the loop ----------------------------------------------------------------------------
    progress = Progress(name, first, loop.steps, loop.group, experiment.data.batch_size,
                        _work(experiment, model, task.dtype))
    window, pending, values, metrics, done, told = [], None, {}, {}, first, 0
    stack = contextlib.ExitStack()
    stack.callback(checkpoints.close)
    stop = stack.enter_context(distributed.StopSignal())
    batches = stack.enter_context(batches_of['training'].prefetch(
        first, loop.steps, group=loop.group, workers=experiment.data.workers))
    with stack:
        for step, batch in batches:
            done = step + loop.group
            progress.got_batch(batches.wait_seconds, device_idle=all(
                leaf.is_ready() for leaf in jax.tree.leaves(metrics)))
            averages = state.averages
            state, metrics = train(step_lib.on_device(task, state),
                                   partition.put_batch(batch, mesh, stacked=loop.group > 1),
                                   frozen_params, frozen_static)
            state = step_lib.with_averages(task, state, averages, done)
            if step == first:
                jax.block_until_ready(metrics)
                progress.start()
            window.append(metrics)
            if pending:  # fetched one dispatch late, so that the device never waits for the host
                _log_window(log, progress, resblocks, *pending)
                told = _tell_problems(name, batches_of['training'], told)
                pending = None
            if done == prepare_at:
                state = _prepare(state, inputs, name, log)
            last = done == loop.steps
            stopping = stop.after(done) and not last
            due = {what: last or every and done % every == 0 for what, every in (
                ('valid', loop.valid_every), ('snapshot', loop.snapshot_every),
                ('save', loop.save_every))}
            if stopping:  # the time until the machine is taken away may be short
                due = {'valid': False, 'snapshot': False, 'save': True}
            # A window ends at every save: a continued run then averages over the same steps.
            if done % loop.log_every == 0 or due['save']:
                pending, window = (done, window), []
            if any(due.values()) and pending:
                _log_window(log, progress, resblocks, *pending)
                pending = None
            with progress.paused():
                if due['valid']:
                    values = run_validation(done)
                if due['snapshot']:
                    take_snapshot(done)
                if due['save']:
                    checkpoints.save(done, step_lib.to_saved(task, state))
            if stopping:
                break
    if done < loop.steps:
        log.say(f'{name}: stopped by a signal after step {done}; everything is saved, the same '
                'command continues')
        raise SystemExit(143)
    if first >= loop.steps:  # restored after its last step: everything is there but the marker
        values = run_validation(first)
        take_snapshot(first)
    facts = {'step': max(done, first), 'seconds': log.elapsed(), 'parameters': count,
             'skipped_updates': int(state.step) - int(state.updates),
             'bad_records': 0, 'truncated_captions': 0, **values}
    for data, reader in batches_of.items():
        problems = reader.problems
        facts['bad_records'] += distributed.total(problems.replaced)
        facts['truncated_captions'] += distributed.total(problems.truncated)
        if problems.replaced or problems.truncated:
            runs.say(f'{name}: in the {data} data, {problems}')
    log.finish(facts)
    log.say(f'{name}: finished in {clock(log.elapsed())}; see {log.path}/report.html')
    return facts


def _work(experiment, model, dtype):
    """What training does; the machine's rate is measured before the data's workers share it."""
    arch, window = experiment.arch, experiment.data.image_size
    if window and hasattr(arch, 'image_size'):
        arch = dataclasses.replace(arch, image_size=window)
    blocks = getattr(arch, 'blocks', None)  # of a stack over tokens
    return Work(3 * model.flops(arch), machine.matmul_rate(dtype) * machine.devices(),
                blocks.layout.length if blocks else 0)


def donated(path: str) -> dict[str, np.ndarray]:
    """Name -> parameter of a run, finished or not, or of an exported one; averages if there are."""
    if (Path(path) / 'model.safetensors').exists():
        params = runs.load(path).params
    else:
        _, trees = restore_subtree(f'{path}/checkpoints', ('params', 'averages'))
        params = trees['averages'] or trees['params']
    return {path_name(p): x for p, x in jax.tree_util.tree_flatten_with_path(params)[0]}


def _init_from(state, path, task, log):
    """Starts from another run's parameters; whatever does not fit stays random and is named."""
    donor, kept = donated(path), []

    def one(path, mine):
        theirs = donor.pop(path_name(path), None)
        if theirs is None or theirs.shape != mine.shape:
            kept.append(path_name(path))
            return mine
        return jax.device_put(np.asarray(theirs, np.float32), mine.sharding)

    mine = jax.tree.map(lambda p: p.astype(jnp.float32), state.params)
    params = jax.tree_util.tree_map_with_path(one, mine)
    log.say(f'parameters from {path}; not in it or of another shape: {", ".join(kept) or "none"}; '
        f'in it but not used: {", ".join(donor) or "none"}')
    return step_lib.fresh_state(task, params, state.model_state,
                                jax.random.wrap_key_data(state.key, impl=task.prng))


def _prepare(state, inputs, name, log):
    """The model's initialisation from data, on whole training images, in the middle of a run."""
    started = time.monotonic()
    # All of every batch in every process: their results must agree.
    reader = pipeline(inputs._replace(valid=inputs.train), False, None)
    params, facts = inputs.model.prepare(state.params, inputs.experiment.arch,
                                         (reader.batch(i) for i in itertools.count()),
                                         jax.random.key(inputs.experiment.seed))
    params = jax.tree.map(lambda new, old: jax.device_put(new.astype(old.dtype), old.sharding),
                          params, state.params)
    log.say(f'{name}: prepared from data in {time.monotonic() - started:.1f} s: {brief(facts)}')
    # Averages start again: those of before describe another model.
    averages = state.averages and jax.tree.map(
        lambda p, a: jax.device_put(jnp.copy(p).astype(a.dtype), a.sharding), params,
        state.averages)
    return state._replace(params=params, averages=averages)


def _log_window(log, progress, resblocks, step, window):
    def stacked(name, ndim=0):
        return np.concatenate([np.array(jax.device_get(m[name]), ndmin=1 + ndim) for m in window])

    of_resblocks = ('log2_scale', 'overflow')
    values = {name: stacked(name).mean() for name in window[0] if name not in of_resblocks}
    values |= progress.rates(step)
    blocks = {}
    if resblocks:
        blocks = {f'log2_scale/{block}': value
                  for block, value in zip(resblocks, stacked('log2_scale', 1).mean(axis=0))}
        blocks |= {f'overflow/{block}': steps
                   for block, steps in zip(resblocks, stacked('overflow', 1).sum(axis=0)) if steps}
    log.log('train', step, values | blocks)
    log.say(progress.line(step, values))
    for name, value in values.items():
        if name.startswith('alarm/') and value > 0:
            logging.warning('%s at step %d: %s', progress.name, step, name)


def _tell_problems(name, pipeline, told):
    """Names the kinds of bad records that have come up since `told` of them were named."""
    examples = pipeline.problems.examples
    for example in examples[told:]:
        runs.say(f'{name}: left out {example}')
    return len(examples)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'unexpected argument {argv[1]!r}')
    run(CONFIG.value, WORKDIR.value, DISTRIBUTED.value, HEARTBEAT.value)


if __name__ == '__main__':
    CONFIG = config_lib.define_flag()
    WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run.')
    DISTRIBUTED, HEARTBEAT = distributed.define_flags()
    flags.mark_flags_as_required(['config', 'workdir'])
    runs.start(main)
