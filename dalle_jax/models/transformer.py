"""The residual stack that DALL-E, CLIP and priors share: declaration, forward pass, cached steps.

Pre-norm blocks of attention and MLP with one attention pattern a layer (Ramesh et al. 2021, app.
B.1; Child et al. 2019). The residual stream, layernorms and sums stay float32; the branches compute
in `dtype` (Ramesh et al. 2021, fig. 4).

Layers are stored as they are run. Groups of four are stacked and scanned, so that a program's size
does not grow with depth; one to four layers that end the stack, among them the last with its own
pattern, are unrolled. Up to eight layers are all unrolled, as one group would be by the compiler.

    {'body': {'0'..'3': layer with a leading axis [groups]}, 'tail': {'0'..: layer}, 'norm': ...}
    layer = {'attention': {'norm', 'qkv', 'out'}, 'mlp': {'norm', 'up', 'down'}}

B batch, L length, d width, H heads, D = d / H; N candidates of one caption.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dalle_jax.models import attention, scaling
from dalle_jax.models.context import unconstrained
from dalle_jax.models.layers import (
    Param, dense, dense_params, layer_norm, norm_params, stacked)
from dalle_jax.models.patterns import PATTERNS, Layout

PERIOD = 4  # layers of a group of the body


@jax.custom_vjp
def quick_gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x) (Child et al. 2019; CLIP); only x is kept for the gradient."""
    return x * jax.nn.sigmoid(1.702 * x)


def _quick_gelu_backward(x, cotangent):
    # The sigmoid by another formula: what the compiler sees twice it computes once, and keeps.
    s = 0.5 + 0.5 * jnp.tanh(0.851 * x)
    return (cotangent * (s + x * (1.702 * s * (1 - s))),)


quick_gelu.defvjp(lambda x: (quick_gelu(x), x), _quick_gelu_backward)

ACTIVATIONS = {
    'quick_gelu': quick_gelu,
    'gelu': jax.nn.gelu,
    'relu': jax.nn.relu,
}

# What a layer keeps for its backward pass, beside its input: per state, 'dots' 9 d values,
# 'all-but-mlp' 5 d, for a ninth more work, 'full' none, for a third more.
REMAT = {
    'none': None,
    'dots': jax.checkpoint_policies.save_only_these_names('qkv', 'attended', 'out', 'up'),
    'all-but-mlp': jax.checkpoint_policies.save_only_these_names('qkv', 'attended', 'out'),
    'full': jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """A stack of layers.

    Attributes:
      depth: layers, each an attention and an MLP block.
      width: d.
      heads: H.
      patterns: attention pattern of each layer, see attention.py; or 'bidirectional'. Within the
        body they repeat with period 4.
      layout: of the states; None where all patterns are 'causal' or 'bidirectional'.
      mlp_ratio: hidden units of an MLP block, in widths.
      activation: a key of ACTIVATIONS.
      eps: of the layernorms.
      std: of the initial matrices.
      attention: how attention under a pattern is computed, one of attention.IMPLEMENTATIONS.
      residual_std: of the matrices that write into the residual stream; None: std / sqrt(2 depth),
        so that the stream's variance does not grow with depth (Child et al. 2019).

    Raises:
      ValueError: on values that do not fit together.
    """

    depth: int
    width: int
    heads: int
    patterns: tuple[str, ...]
    layout: Layout | None = None
    mlp_ratio: int = 4
    activation: str = 'quick_gelu'
    eps: float = 1e-5
    std: float = 0.02
    residual_std: float | None = None
    attention: str = 'auto'

    def __post_init__(self):
        for name in ('depth', 'width', 'heads', 'mlp_ratio'):
            if getattr(self, name) < 1:
                raise ValueError(f'transformer: {name}={getattr(self, name)} must be at least 1')
        if self.width % self.heads:
            raise ValueError(f'transformer: width={self.width} is not divisible by '
                             f'heads={self.heads}; change one of them')
        if self.activation not in ACTIVATIONS:
            raise ValueError(f'transformer: activation={self.activation!r}; choose one of '
                             f'{tuple(ACTIVATIONS)}')
        if self.attention not in attention.IMPLEMENTATIONS:
            raise ValueError(f'transformer: attention={self.attention!r}; choose one of '
                             f'{attention.IMPLEMENTATIONS}')
        if len(self.patterns) != self.depth:
            raise ValueError(f'transformer: {len(self.patterns)} patterns for depth={self.depth}; '
                             'give one a layer')
        for pattern in self.patterns:
            if pattern not in (*PATTERNS, 'bidirectional'):
                raise ValueError(f'transformer: pattern {pattern!r}; choose from '
                                 f"{(*PATTERNS, 'bidirectional')}")
        body = self.patterns[:PERIOD * self.groups]
        if body != body[:PERIOD] * self.groups:
            raise ValueError(f'transformer: patterns={self.patterns}: the first {len(body)} layers '
                             f'run in groups of {PERIOD} and must repeat with that period')

    @property
    def groups(self) -> int:
        """Groups of four layers in the body; 0, or 2 and more."""
        groups = (self.depth - 1) // PERIOD
        return groups if groups > 1 else 0

    @property
    def tail(self) -> int:
        """Layers behind the body: 1 to 4, or all of up to 8."""
        return self.depth - PERIOD * self.groups


def dalle_patterns(depth: int) -> tuple[str, ...]:
    """Row, column, row, row, and so on; the last layer is convolutional (app. B.1)."""
    return tuple('conv' if i == depth else 'column' if (i - 2) % 4 == 0 else 'row'
                 for i in range(1, depth + 1))


def declare(config: BlockConfig) -> dict[str, Any]:
    """The stack's parameters, for layers.Declared.

    The qkv kernel's columns are [H, 3, D], so that a division of them divides heads. The down
    kernel is [d, mlp], transposed: with the shorter side first its gradient is 1.5 times as fast
    on CPUs, and low-rank compression of gradients needs no transpose.
    """
    d, hidden = config.width, config.mlp_ratio * config.width
    residual_std = config.residual_std
    if residual_std is None:
        residual_std = config.std / (2 * config.depth) ** 0.5
    layer = {
        'attention': {
            'norm': norm_params(d),
            'qkv': dense_params(d, 3 * d, ('embed', 'heads'), config.std),
            'out': dense_params(d, d, ('heads', 'embed'), residual_std),
        },
        'mlp': {
            'norm': norm_params(d),
            'up': dense_params(d, hidden, ('embed', 'mlp'), config.std),
            'down': {'kernel': Param((d, hidden), ('embed', 'mlp'), residual_std),
                     'bias': Param((d,), (None,))},
        },
    }
    stack = {'tail': {str(i): layer for i in range(config.tail)}, 'norm': norm_params(d)}
    if config.groups:
        stack['body'] = {str(i): stacked(layer, config.groups) for i in range(PERIOD)}
    return stack


def flops(config: BlockConfig, states: int, pairs: int) -> int:
    """Model FLOPs of the stack on one sequence, forward.

    Multiplications and additions of the matrix products and of attention; no elementwise work.

    Args:
      states: of the sequence.
      pairs: of a query and a key that attention allows, over all layers.
    """
    d = config.width
    return 2 * ((4 + 2 * config.mlp_ratio) * d * d * config.depth * states + 2 * d * pairs)


def forward(params: Any, config: BlockConfig, x: jax.Array, *, dtype: Any = jnp.float32,
            remat: str = 'none', constrain: Callable = unconstrained, scales: Any = None
            ) -> jax.Array:
    """All layers and the final layernorm.

    Args:
      params: as declared by `declare`.
      x: [B, L, d].
      dtype: of the branches.
      remat: what is recomputed in the backward pass. 'none': nothing; 'dots': all but the results
        of the matrix products; 'all-but-mlp': the hidden units of the MLP too; 'full': each layer
        from its input.
      constrain: Context.constrain.
      scales: gradient scales of the branches, like `branches`, or None.

    Returns:
      float32 [B, L, d].
    """
    def attend(kind, place, layer, q, k, v):
        del place, layer
        return attention.attend(kind, q, k, v, config.layout, config.attention, constrain), None

    x, _ = run_layers(params, config, x, attend, dtype, remat, constrain, scales)
    return layer_norm(x, params['norm'], config.eps)


def attention_maps(params: Any, config: BlockConfig, x: jax.Array) -> dict[str, jax.Array]:
    """Attention weights in the first layer of each pattern, averaged over heads.

    Args:
      x: [B, L, d].

    Returns:
      pattern -> float32 [B, L, L], queries by keys.
    """
    first = {}
    for part, places in by_place(config, lambda place, kind: kind).items():
        for name, kind in places.items():
            first.setdefault(kind, (part, name))

    def attend(kind, place, layer, q, k, v):
        del layer
        seen = attention.weights(kind, q, k, config.layout).mean(1) if place == first[kind] else ()
        return attention.attend(kind, q, k, v, config.layout), seen

    _, kept = run_layers(params, config, x, attend, jnp.float32)
    return {kind: kept[part][name][0] if part == 'body' else kept[part][name]
            for kind, (part, name) in first.items()}


def by_place(config, function):
    """{'body': {'0'..'3'}, 'tail': {'0'..}} of function((part, name), pattern)."""
    def part(name, patterns):
        return {str(i): function((name, str(i)), kind) for i, kind in enumerate(patterns)}

    tail = {'tail': part('tail', config.patterns[PERIOD * config.groups:])}
    return {'body': part('body', config.patterns[:PERIOD]), **tail} if config.groups else tail


def branches(config: BlockConfig, function: Callable) -> dict[str, Any]:
    """A tree of function(shape) of the stack's branches: two a layer, in the body stacked."""
    def layer(place, kind):
        del kind
        shape = (config.groups,) if place[0] == 'body' else ()
        return {'attention': function(shape), 'mlp': function(shape)}
    return by_place(config, layer)


def run_layers(params, config, x, attend, dtype, remat='none', constrain=unconstrained,
               scales=None):
    """All layers.

    Args:
      attend: (pattern, place, layer, q, k, v) -> output like q, and a tree to keep. A place is
        ('body' or 'tail', name); layer is (its traced index in the body's stack,) or () in the
        tail.

    Returns:
      x, and what the layers kept, in the body stacked: {'body': {'0'..'3'}, 'tail': {'0'..}}.
    """
    def runner(place, kind):
        def run(layer_params, layer_scales, layer, x):
            return _layer(layer_params, layer_scales, config, x,
                          functools.partial(attend, kind, place, layer), dtype, constrain)

        if remat == 'none':
            return run
        # Forward and backward of a scan are different loops: CSE cannot undo the recomputing.
        return jax.checkpoint(run, policy=REMAT[remat], prevent_cse=place[0] == 'tail')

    def group(x, scanned):
        group_params, group_scales, index = scanned
        kept = {}
        for name, run in runners['body'].items():
            x, kept[name] = run(group_params[name], group_scales[name], (index,), x)
        return x, kept

    runners = by_place(config, runner)
    scales = scales or branches(config, lambda shape: None)
    x, kept = constrain(x, ('batch', None, None)), {'tail': {}}
    if config.groups:
        x, kept['body'] = lax.scan(
            group, x, (params['body'], scales['body'], jnp.arange(config.groups)))
    for name, run in runners['tail'].items():
        x, kept['tail'][name] = run(params['tail'][name], scales['tail'][name], (), x)
    return x, kept


def _layer(params, scales, config, x, attend, dtype, constrain):
    """One layer on the residual stream [B, L, d], float32."""
    batch, length, d = x.shape
    scale = scales['attention']
    p = scaling.parameters(params['attention'], scale)
    h = layer_norm(scaling.enter(x, scale), p['norm'], config.eps)
    qkv = checkpoint_name(dense(h, p['qkv'], dtype), 'qkv')
    qkv = qkv.reshape(batch, length, config.heads, 3, d // config.heads)
    # A split, because its gradient is a concatenation: slices would be padded and added.
    q, k, v = (constrain(part[:, :, :, 0].swapaxes(1, 2), ('batch', 'heads', None, None))
               for part in lax.split(qkv, (1, 1, 1), axis=3))
    out, kept = attend(q, k, v)
    out = checkpoint_name(dense(out.swapaxes(1, 2).reshape(batch, length, d), p['out'], dtype),
                          'out')
    x = constrain(x + scaling.leave(out, scale), ('batch', None, None))

    scale = scales['mlp']
    p = scaling.parameters(params['mlp'], scale)
    h = layer_norm(scaling.enter(x, scale), p['norm'], config.eps)
    hidden = checkpoint_name(dense(h, p['up'], dtype), 'up')
    hidden = ACTIVATIONS[config.activation](constrain(hidden, ('batch', None, 'mlp')))
    x = x + scaling.leave(dense(hidden, p['down'], dtype, transposed=True), scale)
    return constrain(x, ('batch', None, None)), kept
