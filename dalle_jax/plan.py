"""What a training needs: python -m dalle_jax.plan --config FILE.py:ARG --topology v5p:8x8x16

Compiles the real training step for accelerators that need not be there, and tells whether it fits
their memory, what it sends over the network, how long a step should take, and what to change:

    python -m dalle_jax.plan --config experiments/dalle.py:12b --topology v5e:16x16 \\
        --mesh replica=16,fsdp=16 --config.loop.microbatches=4

Compiling needs the extra 'tpu' (any machine will do) or 'cuda'. --mode analytic does without, takes
seconds, and estimates memory to 15 %. No data, no frozen run: what a step reads are the shapes of
token records, or of images where a model reads these. Ends with 0 if the step fits, 1 if it does
not, 2 on arguments that cannot be.

`python -m dalle_jax.plan --table` estimates the DALL-E family on all chips instead, in 2 minutes.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import app, flags
from jax.sharding import AbstractMesh

from dalle_jax import config as config_lib
from dalle_jax import machine, runs
from dalle_jax.inputs import make_task
from dalle_jax.models import dalle, flash
from dalle_jax.planning import (
    advice, ahead, duration, hardware, memory, network, table, text)
from dalle_jax.planning.hardware import Topology
from dalle_jax.training import partition, step as step_lib
from dalle_jax.training.step import State, Task

MODES = ('auto', 'compile', 'analytic')


def run(config, topology: str, mesh: str = '', mode: str = 'auto',
        say: Callable[[str], None] = print) -> dict[str, Any]:
    """Plans the training of an experiment.

    Args:
      config: a ConfigDict of an experiment file, or a resolved Experiment.
      topology: see hardware.topology.
      mesh: such as 'replica=64,fsdp=16', in place of the experiment's.
      mode: 'compile'; 'analytic'; or 'auto', to compile where there is a compiler.
      say: is told what takes long.

    Returns:
      the plan, values for JSON: bytes, seconds, FLOPs.

    Raises:
      ValueError: a topology that does not exist, a mesh that does not divide it or an array, a
        batch that it cannot split; before anything is compiled.
      NoCompiler: mode 'compile' without a compiler.
    """
    if mode not in MODES:
        raise ValueError(f'--mode={mode!r}; choose one of {", ".join(MODES)}')
    jax.config.update('jax_platforms', 'cpu')  # accelerators are not used, and may be busy
    target = hardware.topology(topology)
    experiment = _experiment(config, target, mesh)
    task, abstract = _abstract(experiment, target)
    program, why = None, 'as asked for'
    if mode != 'analytic':
        try:
            real = ahead.placed(task, experiment.mesh, target)
            say('compiling, which takes 1 to 5 minutes')
            program = ahead.compiled(real, target, experiment.loop.group, say)
            why = f'in {program.seconds:.0f} s'
        except hardware.NoCompiler as error:
            if mode == 'compile':
                raise
            why = str(error)
    return _plan(experiment, task, abstract, target, program, why)


def _experiment(config, target, mesh):
    """The experiment as it would be on the target: mesh, precision, kernels; without its data."""
    if not isinstance(config, config_lib.Experiment):
        config = config.to_dict()
        config['data'] |= {'path': config['data']['path'] or '-'}  # not read, but must be named
        config = config_lib.resolve(config)
    arch, precision = config.arch, config.precision
    precision = 'bfloat16' if precision == 'auto' else precision
    if getattr(arch, 'attention', '') == 'auto':
        arch = dataclasses.replace(arch, attention=_kernel(arch, precision, target.chip.platform))
    return dataclasses.replace(config, arch=arch, precision=precision,
                               mesh=partition.parse_mesh(mesh, config.mesh))


def _kernel(arch, precision, platform):
    """What attention 'auto' is on the target, if its kernel is faster there, see kernels.choose."""
    if platform == 'tpu':
        return 'splash'
    # GPUs are fast in float32 by rounding products, which the kernel does not.
    there_is = arch.width // arch.heads in flash.SIZES and precision != 'float32'
    return 'pallas' if there_is else 'blocked'


@dataclasses.dataclass(frozen=True)
class _Place:
    """Stands for a device where only the number of them matters."""

    id: int
    platform: str = 'none'


def _abstract(experiment: config_lib.Experiment, target: Topology) -> tuple[Task, State]:
    """Task and state on a mesh without devices."""
    mesh = partition.make_mesh(experiment.mesh, [_Place(i) for i in range(target.chips)])
    if target.chip.platform == 'tpu' and mesh.shape['replica'] % target.slices:
        raise ValueError(f'mesh {dict(mesh.shape)} on {target.slices} slices: mesh.replica must be '
                         f'a multiple of {target.slices}, so that fsdp and tensor stay inside')
    task = make_task(experiment, AbstractMesh(mesh.axis_sizes, mesh.axis_names),
                     machine.compute_dtype(experiment.precision))
    return task, step_lib.abstract_state(task)


def _plan(experiment, task, abstract, target, program, why):
    chip = target.chip
    if program:
        needs = memory.measured(program.peak, task, abstract, chip)
    else:
        needs = memory.estimate(task, abstract, chip)
    found = program.collectives if program else None
    if found is None:
        found = network.expected(task, abstract, target)
    links = network.links(found, target)
    time = duration.estimate(task, needs, links, target)
    fits = needs.peak <= chip.hbm
    change = (advice.least_recomputing if fits else advice.first_that_fits)(task, abstract, target)
    low, high = duration.efficiency(chip)
    return {
        'model': experiment.model, 'topology': str(target), 'chips': target.chips,
        'mesh': dict(task.partition.mesh.shape), 'batch': task.batch_size,
        'microbatches': task.microbatches, 'local_examples': memory.local_examples(task),
        'precision': experiment.precision, 'remat': getattr(task.config, 'remat', ''),
        'attention': getattr(task.config, 'attention', ''),
        'mode': 'compiled' if program else 'analytic', 'why': why,
        'compile_seconds': program and program.seconds,
        'parameters': sum(leaf.size for leaf in jax.tree.leaves(abstract.params)),
        'memory': {**needs._asdict(), 'state': needs.state, 'peak': needs.peak, 'hbm': chip.hbm},
        'network': [{**link._asdict(), 'seconds': link.seconds} for link in links],
        'summed_whole': program.summed_whole if program else [],
        'flops': time.model_flops, 'executed_flops': time.executed_flops,
        'time': {name: getattr(time, name) for name in (
            'products', 'elementwise', 'network', 'update', 'step', 'mfu', 'limit')},
        'steps': experiment.loop.steps,
        'assumptions': [
            f'matrix products at {100 * low:.0f} to {100 * high:.0f} % of {chip.flops / 1e12:.0f} '
            'TFLOP/s',
            f'memory and links at {100 * network.USED:.0f} % of their bandwidth, '
            f'{chip.hbm_bandwidth / 1e9:,.0f} GB/s and as above',
            f'the network hidden, or at worst {100 * duration.EXPOSED:.0f} % of it not; nothing '
            'waits for data'],
        'fits': fits,
        'change': change and {'flags': list(change.flags), 'peak': change.needs.peak},
    }


def tables() -> Iterator[str]:
    """The family of experiments/dalle.py on all chips, see planning/table.py; lines of Markdown."""
    jax.config.update('jax_platforms', 'cpu')
    experiments = {name: config_lib.load(f'experiments/dalle.py:{name}') for name in dalle.PRESETS}

    def make(config, chip):
        anywhere = Topology(chip, hardware.shapes(chip)[0] if chip.platform == 'tpu' else (1,))
        experiment = _experiment(config, anywhere, '')
        return make_task(experiment, AbstractMesh((1, 1, 1), partition.AXES),
                         machine.compute_dtype(experiment.precision))

    steps = experiments['12b'].loop.steps
    yield f'Fewest chips that train at batch 1,024: chip-days of {steps:,} updates'
    yield ''
    yield from table.table({name: functools.partial(make, config)
                            for name, config in experiments.items()}, steps)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'unexpected argument {argv[1]!r}')
    if FLAGS.table:
        for line in tables():
            print(line, flush=True)
        return 0
    if CONFIG.value is None or FLAGS.topology is None:
        raise ValueError('give --config and --topology, or --table')
    plan = run(CONFIG.value, FLAGS.topology, FLAGS.mesh, FLAGS.mode,
               lambda line: print(line, file=sys.stderr, flush=True))
    if FLAGS.json != '-':
        print('\n'.join(text.lines(plan)))
    if FLAGS.json:
        written = json.dumps(plan, indent=2)
        if FLAGS.json == '-':
            print(written)
        else:
            with open(FLAGS.json, 'w') as file:
                file.write(written + '\n')
    return 0 if plan['fits'] else 1


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    CONFIG = config_lib.define_flag()
    flags.DEFINE_string('topology', None, "Chips, such as 'v5p:8x8x16', '4*v5e:16x16' or "
                        "'h100:16x8'.")
    flags.DEFINE_string('mesh', '', "Short for config.mesh, such as 'replica=64,fsdp=16'.")
    flags.DEFINE_enum('mode', 'auto', MODES, "'auto' compiles where there is a compiler.")
    flags.DEFINE_string('json', '', 'File that the plan is written to as JSON; - for the console.')
    flags.DEFINE_bool('table', False, 'Estimate the DALL-E family on all chips.')
    runs.start(main)
