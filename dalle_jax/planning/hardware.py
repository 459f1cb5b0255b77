"""Accelerators that training can be planned for: what a chip can do, and which topologies exist.

One chip is one JAX device on all of them: the two cores of a v4 or v5p chip work as one.
"""

import dataclasses
import difflib
import functools
import itertools
import math
import os
import re
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip can do at most.

    Attributes:
      name: as topologies are written.
      hbm: bytes of memory that a program may use.
      flops: per second, dense, bfloat16.
      hbm_bandwidth: bytes per second.
      inside: bytes per second that it sends to the other chips of its slice or node, over all its
        links. A ring along one dimension of a slice has 1 / dimensions of them.
      between: bytes per second that its share of the network between slices or nodes sends.
      dimensions: of a slice; 1 for the GPUs of a node.
      largest: chips in a slice or node.
    """

    name: str
    hbm: int
    flops: float
    hbm_bandwidth: float
    inside: float
    between: float
    dimensions: int
    largest: int

    @property
    def platform(self) -> str:
        """JAX's name of what programs are lowered for."""
        return 'cuda' if self.dimensions == 1 else 'tpu'


# TPUs: hbm is what libtpu's compiler grants a program, and says when one needs more; the lower one
# of versions 0.0.42 and 0.0.51. The rest is of the pages 'TPU v4', 'v5e', 'v5p' and 'v6e' of the
# Cloud TPU documentation (Google, 2025), halved where it counts both directions of links, and
# divided by the chips where it is of a pod. That page is silent on networks of v4: inside are 6
# links of 50 GB/s (Jouppi et al. 2023, tab. 4), between 81 Tbit/s of 6,144 chips in use (Chowdhery
# et al. 2022, sec. 4).
# GPUs: data sheets 'H100 Tensor Core GPU' and 'H200 Tensor Core GPU' (NVIDIA, 2023 and 2024), the
# SXM boards; half of the FLOP/s given there, which are with sparsity, and of NVLink's 900 GB/s in
# both directions; data sheet 'DGX H100' (NVIDIA, 2023): a network card of 400 Gbit/s for each GPU.
# hbm is 95 % of the memory that the driver reports, which takes XLA_CLIENT_MEM_FRACTION=.95.
CHIPS = {chip.name: chip for chip in (
    # name, hbm, flops, hbm_bandwidth, inside, between, dimensions, largest
    Chip('v4', int(30.75 * GIB), 275e12, 1.2e12, 300e9, 1.6e9, 3, 4096),
    Chip('v5e', int(15.75 * GIB), 197e12, 819e9, 200e9, 3.125e9, 2, 256),
    Chip('v5p', int(95.73 * GIB), 459e12, 2.765e12, 600e9, 6.25e9, 3, 6144),
    Chip('v6e', int(31.24 * GIB), 918e12, 1.64e12, 400e9, 12.5e9, 2, 256),
    Chip('h100', int(0.95 * 84_942_979_072), 989e12, 3.35e12, 450e9, 50e9, 1, 8),
    Chip('h200', int(0.95 * 150_754_820_096), 989e12, 4.8e12, 450e9, 50e9, 1, 8),
)}

# Cloud TPU documentation: 'TPU v5e', 'TPU v6e'; and 'TPU types and topologies': AxBxC with
# A <= B <= C, all at most 4 or all multiples of 4.
SQUARES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
SMALL_CUBES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))

# Keep libtpu from asking a cloud machine's services what hardware it is on, and from insisting on
# being the only process that uses it.
ENVIRONMENT = {'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost',
               'TPU_ACCELERATOR_TYPE': 'v5litepod-4', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips, and how they are connected.

    Attributes:
      shape: chips of a slice along each of its dimensions; of a node its GPUs.
      slices: how many slices or nodes.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def per_slice(self) -> int:
        """Chips of a slice or node."""
        return math.prod(self.shape)

    @property
    def chips(self) -> int:
        return self.slices * self.per_slice

    def __str__(self):
        shape = 'x'.join(map(str, self.shape))
        if self.chip.platform == 'cuda':
            return f'{self.chip.name}:{self.slices}x{shape}'
        return f'{self.slices}*{self.chip.name}:{shape}'.removeprefix('1*')


class NoCompiler(RuntimeError):
    """There is no compiler for a topology on this machine; the message tells what to install."""


def topology(text: str) -> Topology:
    """Reads 'v5p:8x8x16'; '4*v5e:16x16', four slices; 'h100:16x8', 16 nodes of 8 GPUs; 'h200:1'.

    A plain number of GPUs is one node, or as many nodes of 8 as it takes.

    Raises:
      ValueError: there is no such chip or topology; names the nearest that exists.
    """
    found = re.fullmatch(r'(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)', text)
    if not found:
        raise ValueError(f"topology {text!r}: write CHIP:SHAPE, such as 'v5p:8x8x16', "
                         "'4*v5e:16x16' for four slices, or 'h100:16x8' for 16 nodes of 8 GPUs; "
                         f"chips are {', '.join(CHIPS)}")
    slices, name, shape = found.groups()
    if name not in CHIPS:
        near = difflib.get_close_matches(name, CHIPS, 1, cutoff=0)[0]
        raise ValueError(f"topology {text!r}: {name!r} is none of the chips {', '.join(CHIPS)}; "
                         f'did you mean {near!r}?')
    chip, shape = CHIPS[name], tuple(int(n) for n in shape.split('x'))
    if chip.platform == 'cuda':
        return _gpus(text, chip, shape, slices)
    if shape in shapes(chip) and slices != '0':
        return Topology(chip, shape, int(slices or 1))
    near = Topology(chip, _nearest(shape, chip))
    if slices == '0':
        why = 'there is at least one slice'
    elif len(shape) != chip.dimensions:
        why = f'a {name} slice has {chip.dimensions} dimensions, not {len(shape)}'
    elif math.prod(shape) > chip.largest:
        why = (f"a {name} slice has at most {chip.largest:,} chips, and several are written "
               f"'2*{near}'")
    elif chip.dimensions == 2:
        why = 'slices are ' + ', '.join(f'{a}x{b}' for a, b in SQUARES)
    else:
        why = 'slices are 2x2x1, 2x2x2, 2x2x4, 2x4x4, and AxBxC of multiples of 4, A <= B <= C'
    raise ValueError(f"topology {text!r} does not exist: {why}; the nearest is '{near}'")


@functools.cache
def shapes(chip: Chip) -> tuple[tuple[int, ...], ...]:
    """Of all TPU slices that exist."""
    if chip.dimensions == 2:
        return SQUARES
    fours = range(4, chip.largest // 16 + 1, 4)
    return SMALL_CUBES + tuple(s for s in itertools.combinations_with_replacement(fours, 3)
                               if math.prod(s) <= chip.largest)


def devices(target: Topology) -> list[Any]:
    """JAX devices of a topology, to compile for, on a machine that has none of them.

    Lower for them with `lowering_platforms=(target.chip.platform,)`.

    Raises:
      NoCompiler: libtpu, or JAX's plugin for CUDA, is not installed or does not answer.
    """
    from jax.experimental import topologies
    chip, options = target.chip, {}
    if chip.platform == 'cuda':
        extra, name = 'cuda', chip.name
        options = {'target_config': _description(chip),
                   'topology': f'1x{target.slices}x{target.per_slice}'}
    else:
        extra, name = 'tpu', f"{chip.name}:{'x'.join(map(str, target.shape))}"
        if chip.name == 'v4':
            options['chip_config_name'] = 'megacore'
        if target.per_slice == 1:
            options['chips_per_host_bounds'] = (1, 1, 1)
        if target.slices > 1:
            options['num_slices'] = target.slices
        for variable, value in ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
    try:
        return topologies.get_topology_desc(
            platform=chip.platform, topology_name=name, **options).devices
    except (RuntimeError, NotImplementedError) as error:
        raise NoCompiler(f'nothing here compiles for {target}: {error}. Install '
                         f"'dalle_jax[{extra}]'") from error


def _gpus(text, chip, shape, prefix):
    """The topology of so many nodes of so many GPUs."""
    count = math.prod(shape)
    nodes = shape[0] if len(shape) == 2 else max(1, count // chip.largest)
    if nodes and not prefix and len(shape) <= 2 and count in [nodes * n for n in (1, 2, 4, 8)]:
        return Topology(chip, (count // nodes,), nodes)
    each = 2 ** round(math.log2(min(max(count, 1), chip.largest)))
    near = Topology(chip, (each,), max(1, round(count / chip.largest)))
    raise ValueError(f"topology {text!r} does not exist: write the number of GPUs, or NODESxGPUS "
                     f"with 1, 2, 4 or 8 GPUs to a node; the nearest is '{near}'")


def _nearest(shape, chip):
    """The slice that differs least in its chips, then in its dimensions, then from a cube."""
    def difference(other):
        padded = sorted(shape) + [1] * max(0, len(other) - len(shape))
        return (abs(math.log(math.prod(other) / max(math.prod(shape), 1))),
                sum(abs(math.log(a / max(b, 1))) for a, b in zip(sorted(other), sorted(padded))),
                max(other))
    return min(shapes(chip), key=difference)


def _description(chip):
    """XLA's description of a Hopper GPU (GpuTargetConfigProto): what its code generators ask for.

    Of the data sheets and 'CUDA C++ Programming Guide' (NVIDIA), compute capability 9.0.
    """
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: 9 }}
          core_count: 132 fpus_per_core: 128 threads_per_warp: 32
          threads_per_block_limit: 1024 threads_per_core_limit: 2048
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          shared_memory_per_core: 233472 shared_memory_per_block: 49152
          shared_memory_per_block_optin: 232448
          l2_cache_size: 52428800 clock_rate_ghz: 1.98
          memory_bandwidth: {int(chip.hbm_bandwidth)} device_memory_size: {chip.hbm}
          runtime_version: "13.0.0"
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        device_description_str: "NVIDIA {chip.name.upper()}"
    """
