"""How replicas agree on a gradient: plain averaging, or PowerSGD (Vogels et al. 2019).

PowerSGD as in Ramesh et al. 2021, sec. 2.5 and app. E: the devices that hold the same shard of a
matrix, one in each replica, send two thin factors of its gradient instead of the gradient. What
the factors miss stays in an error buffer of each replica and is added to its next gradient, so
that nothing is lost, only delayed. Each shard is a factorisation of its own.

A reducer is a few pure functions; another way of compressing is another function returning one.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dalle_jax.training import formats
from dalle_jax.training.optimizer import EXCEPTIONS, matches
from dalle_jax.training.partition import AXES, path_name


@dataclasses.dataclass(frozen=True)
class CompressionConfig:
    """PowerSGD over the mesh axis 'replica'.

    Attributes:
      rank: of the factors of a whole matrix. One that is divided over m devices has factors of
        rank max(1, rank // m) on each. 0 is off.
      factor_format: format of the factors P and Q on the network.
      error_format: format of the error buffers.
      p_scale, q_scale: P and Q are multiplied by these before they are encoded, so that their
        values fit the format; an update in which some do not is skipped.
      seed: of the fixed Gaussian matrices that gradients are multiplied with.
      skip: regular expression on parameter paths; what matches is not compressed. Neither is what
        is no matrix (or stack of matrices) or has a dimension below its rank on a device.
    """

    rank: int = 0
    factor_format: str = '1-6-9'
    error_format: str = '1-6-9'
    p_scale: float = 1.0
    q_scale: float = 1.0
    seed: int = 0
    skip: str = EXCEPTIONS

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f'compression.rank is {self.rank}; it must be at least 1, or 0 for '
                             'none')
        for name in ('factor_format', 'error_format'):
            formats.storage_dtype(getattr(self, name))
            if getattr(self, name) == '0-6-10':
                raise ValueError(f"compression.{name} is '0-6-10', which has no sign; choose "
                                 "'1-6-9', 'bfloat16', 'float16' or 'float32'")
        for name in ('p_scale', 'q_scale'):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f'compression.{name} is {getattr(self, name)}; it must be a '
                                 'positive number')


class Reduced(NamedTuple):
    """What a reducer makes of the gradients of all replicas.

    Attributes:
      grads: their mean, or what stands for it, without the axis of replicas.
      norm: float32, global norm of `grads`; inf where `finite` is false.
      finite: bool; where it is false the caller must not apply `grads`.
      state: the reducer's next state, to be kept in either case.
    """

    grads: Any
    norm: jax.Array
    finite: jax.Array
    state: Any


class Reducer(NamedTuple):
    """Pure functions, and where the state lives.

    init() -> state: a dictionary of arrays with the replicas leading.
    shardings: NamedShardings of the state.
    reduce(grads, state) -> Reduced: `grads` the tree of gradients with the replicas leading, each
      already divided by its gradient scale.
    to_saved(state) -> what a checkpoint holds: of any number of replicas the same.
    from_saved(saved) -> state, for as many replicas as there are now.
    """

    init: Callable[[], Any]
    shardings: Any
    reduce: Callable[[Any, Any], Reduced]
    to_saved: Callable[[Any], Any]
    from_saved: Callable[[Any], Any]


def averaging() -> Reducer:
    """For gradients that the compiler has averaged over all devices, without an axis of replicas.

    No state. They stay in their dtype; the norm is float32.
    """
    def reduce(grads, state):
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32)))
                            for g in jax.tree.leaves(grads)))
        finite = jnp.isfinite(norm)
        return Reduced(grads, jnp.where(finite, norm, jnp.inf), finite, state)

    return Reducer(dict, {}, reduce, lambda state: state, lambda saved: saved)


def powersgd(config: CompressionConfig, params: Any, shardings: Any) -> Reducer:
    """PowerSGD with error feedback.

    Args:
      params: the parameters or their ShapeDtypeStructs.
      shardings: their NamedShardings, on one mesh with the axis 'replica', which none of them uses.

    Its state is name -> error buffer [replicas, *parameter's shape] in `error_format`, each device
    holding the part of its own replica.
    """
    plan = _plan(config, params, shardings)
    mesh = jax.tree.leaves(shardings)[0].mesh
    replicas = mesh.shape['replica']
    specs = [PartitionSpec('replica', *part.spec) for part in plan]
    state_specs = {part.name: s for part, s in zip(plan, specs) if part.rank}
    reduce_parts = jax.shard_map(
        functools.partial(_reduce_parts, config=config, plan=plan), mesh=mesh,
        in_specs=(specs, state_specs), check_vma=False,
        out_specs=Reduced([part.spec for part in plan], PartitionSpec(), PartitionSpec(),
                          state_specs))

    def init():
        return from_saved({part.name: formats.encode(jnp.zeros(part.shape), config.error_format)
                           for part in plan if part.rank})

    def reduce(grads, state):
        leaves, tree = jax.tree.flatten(grads)
        reduced = reduce_parts(leaves, state)
        return reduced._replace(grads=jax.tree.unflatten(tree, reduced.grads))

    def to_saved(state):
        # Errors enter later gradients through their mean alone. Not through their sum as in
        # app. E: that would change with the number of replicas.
        return {name: formats.encode(
                    jnp.mean(formats.decode(error, config.error_format), axis=0),
                    config.error_format)
                for name, error in state.items()}

    def from_saved(saved):
        if saved.keys() != state_specs.keys():
            raise ValueError(
                'the saved error buffers and the compressed parameters of this run differ in '
                f'{sorted(saved.keys() ^ state_specs.keys())}; restore with the same '
                'compression.rank, compression.skip and extents of fsdp and tensor')
        return {name: jnp.broadcast_to(mean, (replicas, *mean.shape))
                for name, mean in saved.items()}

    return Reducer(init, {name: NamedSharding(mesh, s) for name, s in state_specs.items()},
                   reduce, to_saved, from_saved)


def bytes_sent(config: CompressionConfig, params: Any, shardings: Any) -> dict[str, float]:
    """Bytes that one device sends to other replicas in an update, by kind.

    A shard [rows, columns] costs rank (rows + columns) numbers, so the rate depends on which
    dimension is divided. Of a block of width d on m devices Ramesh et al. 2021, app. E.1, send
    r (m + 2) / (2 d m) of the gradient: 5 r / 8 d for m = 8. Where 'embed' is divided instead, for
    which RULES has 'fsdp', it is r (3 m + 1) / (3 d m): 25 r / 24 d; but there the same r is four
    times as large a part of the full rank of the MLP's shards.

    Returns:
      'p', 'q': the factors; 'others': the float32 gradients of all that is not compressed;
      'matrices': what the compressed gradients would take as they are, in 16 bits.
    """
    mesh = jax.tree.leaves(shardings)[0].mesh
    replicas = mesh.shape['replica']
    width = jnp.dtype(formats.storage_dtype(config.factor_format)).itemsize
    # Of an array's bytes, those that a ring sends: all but its own part, and that twice.
    ring = 2 * (replicas - 1) / replicas
    sent = dict.fromkeys(('p', 'q', 'others', 'matrices'), 0.0)
    for part in _plan(config, params, shardings):
        size = math.prod(part.local)
        if not part.rank:
            sent['others'] += ring * size * 4
            continue
        stack, short, long = size // math.prod(part.local[-2:]), *sorted(part.local[-2:])
        padding = 1 if width == 4 else replicas
        for factor, rows in (('p', short), ('q', long)):
            numbers = math.ceil(stack * rows * part.rank / padding) * padding
            sent[factor] += ring * numbers * width
        sent['matrices'] += ring * size * 2
    return sent


def mean_in_format(x: jax.Array, format: str, scale: float, axis: str
                   ) -> tuple[jax.Array, jax.Array]:
    """The mean over a mesh axis, with numbers of this format on the network.

    No all-reduce adds codes, and one in a wider format would give up what the format saves. So
    this is a ring all-reduce's two halves with codes in both: every device receives all codes of
    its part (all-to-all), averages them in float32, and sends the encoded mean to all (all-gather).
    It sends the same 2 (M - 1) / M of the array as an all-reduce of M devices does. All devices
    get the same bits.

    Args:
      x: float32, any shape.
      scale: multiplies what is encoded, and divides what is decoded.

    Returns:
      the mean, float32, and whether this device's `x` was finite and fitted the format: values
      beyond the largest are clamped to it, which the mean does not show.
    """
    devices = jax.lax.axis_size(axis)
    scaled = x * scale
    fits = jnp.all(jnp.abs(scaled) <= formats.largest(format))  # false for NaN
    if format == 'float32':
        return jax.lax.pmean(scaled, axis) / scale, fits
    flat = jnp.pad(scaled.ravel(), (0, -x.size % devices))
    codes = formats.encode(formats.clamped(flat, format), format).reshape(devices, -1)
    codes = jax.lax.all_to_all(codes, axis, 0, 0, tiled=True)
    mean = jnp.mean(formats.decode(codes, format), axis=0)
    codes = jax.lax.all_gather(formats.encode(mean, format), axis, tiled=True)
    return formats.decode(codes, format)[:x.size].reshape(x.shape) / scale, fits


def orthonormal(p: jax.Array) -> jax.Array:
    """An orthonormal basis of p's columns, [..., rows, rank] with rows >= rank.

    Householder reflections: Gram-Schmidt was unstable (app. E.2), and a Cholesky factorisation
    fails where the rank is deficient. The multiple of the identity, app. E.2 as well, makes even
    the basis of p = 0 a definite one.
    """
    return jnp.linalg.qr(p + 1e-6 * jnp.broadcast_to(jnp.eye(*p.shape[-2:]), p.shape))[0]


class _Part(NamedTuple):
    """A parameter as one device sees it.

    Attributes:
      shape, local: of the whole, and of the part on a device.
      axes: mesh axes that it is divided over; ways: into how many parts.
      rank: of the part's factors; 0 where it is not compressed.
    """

    name: str
    shape: tuple[int, ...]
    local: tuple[int, ...]
    spec: PartitionSpec
    axes: tuple[str, ...]
    ways: int
    rank: int


def _plan(config, params, shardings):
    """The parameters' parts, in the order of jax.tree.leaves."""
    def one(path, array, sharding):
        name, local = path_name(path), sharding.shard_shape(array.shape)
        axes = tuple(a for entry in sharding.spec if entry
                     for a in ((entry,) if isinstance(entry, str) else entry))
        ways = math.prod(sharding.mesh.shape[a] for a in axes)
        rank = max(1, config.rank // ways)
        use = (config.rank and array.ndim in (2, 3) and min(local[-2:]) >= rank
               and not matches(config.skip, name))
        return _Part(name, array.shape, local, sharding.spec, axes, ways, rank if use else 0)

    placed = jax.tree_util.tree_map_with_path(one, params, shardings)
    return jax.tree.leaves(placed, is_leaf=lambda x: isinstance(x, _Part))


def _reduce_parts(grads, state, *, config, plan):
    """`reduce` on one device: app. E.2, steps 2 to 12 without the update."""
    within = tuple(axis for axis in AXES if axis != 'replica')
    grads = [g[0].astype(jnp.float32) for g in grads]

    # One grouped all-reduce.
    others = iter(jax.lax.pmean(tuple(g for g, part in zip(grads, plan) if not part.rank),
                                'replica'))
    results = []
    for index, (g, part) in enumerate(zip(grads, plan)):
        if part.rank:
            error = formats.decode(state[part.name][0], config.error_format)
            results.append(_compress(g, error, _gaussian(config, index, part), config))
        else:
            mean = next(others)
            results.append(_Result(mean, jnp.sum(mean**2), jnp.isfinite(mean).all(),
                                   jnp.array(True), None, None))

    # One device that finds something not finite is enough.
    usable = jnp.stack([r.usable for r in results]).all()
    fits = jnp.stack([r.fits for r in results]).all()
    usable, fits = jax.lax.pmin(jnp.stack([usable, fits]).astype(jnp.int32), AXES) == 1
    # A part that several devices of a replica hold counts once: each adds its share.
    devices = jax.lax.axis_size(within)
    norm = jnp.sqrt(jax.lax.psum(
        sum(r.square * (part.ways / devices) for r, part in zip(results, plan)), within))
    finite = usable & fits & jnp.isfinite(norm)
    state = {part.name: jnp.where(fits, r.error, r.error_if_unfit)[None]
             for r, part in zip(results, plan) if part.rank}
    return Reduced([r.mean for r in results], jnp.where(finite, norm, jnp.inf), finite, state)


class _Result(NamedTuple):
    """Of one part: its mean gradient and the sum of its squares, whether gradient and error were
    finite (`usable`), whether both factors fitted their format (`fits`), and the next error buffer
    where the factors of all devices do and where some do not."""

    mean: jax.Array
    square: jax.Array
    usable: jax.Array
    fits: jax.Array
    error: Any
    error_if_unfit: Any


def _compress(g, error, gaussian, config):
    """One part's gradient [..., rows, columns] by two factors; see _Result."""
    dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    finite = jnp.isfinite(g).all()
    total = error + jnp.where(finite, g, 0.0)
    held = jnp.all(jnp.abs(total) <= formats.largest(config.error_format))

    # Rows are the shorter dimension: the orthogonalisation is cheaper.
    transposed = total.shape[-2] > total.shape[-1]
    a = total.mT if transposed else total
    p, p_fits = mean_in_format(dot(a, gaussian), config.factor_format, config.p_scale, 'replica')
    p = orthonormal(p)
    q, q_fits = mean_in_format(dot(a.mT, p), config.factor_format, config.q_scale, 'replica')
    mean = dot(p, q.mT)
    mean = mean.mT if transposed else mean

    def stored(x):
        return formats.encode(formats.clamped(x, config.error_format), config.error_format)
    # P is orthonormal, so the norm of P Q^T is that of Q.
    return _Result(mean, jnp.sum(q**2), finite & held, p_fits & q_fits,
                   stored(total - mean), stored(jnp.where(held, total, 0.0)))


def _gaussian(config, index, part):
    """The fixed Gaussian [..., columns, rank] of a part; drawn again at each update, not stored.

    It depends on the parameter's index and on which part of it this is, and is the same in all
    replicas and on all devices that hold the same part.
    """
    key = jax.random.fold_in(jax.random.key(config.seed, impl='threefry2x32'), index)
    for axis in part.axes:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    return jax.random.normal(key, (*part.local[:-2], max(part.local[-2:]), part.rank))
