"""Environment variables for accelerators, each with its reason; the one place that names them.

XLA ends a process that names a flag it does not know: a flag stands here only after jaxlib 0.10.2
and 0.11.2 (XLA_FLAGS) or libtpu 0.0.42.1 (LIBTPU_INIT_ARGS) have accepted it. None has been timed
on a pod. What the user's own environment says wins.
"""

import shlex
from collections.abc import Mapping

# GPUs: the scheduler that moves collectives under the computation; not the default there.
XLA_GPU = '--xla_gpu_enable_latency_hiding_scheduler=true'
# GPUs: share of the memory that jax takes at once (its default is 0.75). The rest is for NCCL and
# the CUDA context, which allocate beside it: lower it where NCCL runs out of memory.
GPU_MEMORY = '0.95'
# TPUs: asynchronous collectives and the scheduler that hides them are defaults. Between slices,
# these two let the all-reduces of gradients over the data-centre network run under the backward
# pass.
LIBTPU_SLICES = ('--xla_tpu_enable_data_parallel_all_reduce_opt=true '
                 '--xla_tpu_data_parallel_opt_different_sized_ops=true')
FLAGS = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')


def environment(accelerator: str, slices: int = 1) -> dict[str, str]:
    """Variables for a rank.

    Args:
      accelerator: 'cuda', 'tpu' or 'cpu'.
      slices: of a TPU pod.
    """
    variables = {'PYTHONUNBUFFERED': '1'}  # the last lines before a death are the ones that matter
    if accelerator == 'cuda':
        variables |= {'XLA_FLAGS': XLA_GPU, 'XLA_CLIENT_MEM_FRACTION': GPU_MEMORY}
    if accelerator == 'tpu' and slices > 1:
        variables['LIBTPU_INIT_ARGS'] = LIBTPU_SLICES
    return variables


def exports(variables: Mapping[str, str]) -> str:
    """Lines of a shell script that set them where the user has not; the user's flags come last."""
    lines = []
    for name, value in variables.items():
        if name in FLAGS:
            lines.append(f'export {name}={shlex.quote(value)}"${{{name}:+ ${name}}}"')
        else:
            lines.append(f'export {name}="${{{name}:-{value}}}"')
    return ''.join(line + '\n' for line in lines)
