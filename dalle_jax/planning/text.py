"""A plan as text for the console; see plan.run for what a plan holds."""

from collections.abc import Mapping, Sequence
from typing import Any

from dalle_jax.planning import advice
from dalle_jax.planning.hardware import GIB

DAY = 86_400


def lines(plan: Mapping[str, Any]) -> list[str]:
    """What was planned, memory, network, time, and the verdict."""
    mesh = ' x '.join(f'{axis} {n}' for axis, n in plan['mesh'].items() if n > 1) or 'one chip'
    kernels = f", attention {plan['attention']!r}" if plan['attention'] else ''
    remat = f", remat {plan['remat']!r}" if plan['remat'] else ''
    return [
        f"{plan['model']}, {plan['parameters']:,} parameters, on {plan['topology']}, "
        f"{plan['chips']:,} chips: {mesh}",
        f"batch {plan['batch']:,}: {plan['microbatches']} x {plan['local_examples']} examples a "
        f"chip, {plan['precision']}{remat}{kernels}",
        f"{plan['mode']}: {plan['why']}", '',
        *_memory(plan), '', *_network(plan), '', *_duration(plan), '', *verdict(plan)]


def verdict(plan: Mapping[str, Any]) -> list[str]:
    """'fits: ...' or 'does NOT fit: ...', and what to do about it."""
    memory, change = plan['memory'], plan['change']
    said = f"{memory['peak'] / GIB:.1f} of {memory['hbm'] / GIB:.2f} GiB"
    then = change and f"{' '.join(change['flags'])} (then about {change['peak'] / GIB:.1f} GiB)"
    if plan['fits']:
        close = plan['mode'] == 'analytic' and memory['peak'] > advice.SURELY * memory['hbm']
        said += ', by an estimate that is good to 15 %: compile to be sure' * close
        return [f'fits: {said}', *([f'there is room to recompute less: {then}'] if change else [])]
    if change:
        return [f'does NOT fit: {said}; add {then}']
    return [f'does NOT fit: {said}, nor with other remat, microbatches, fsdp, 16-bit state or '
            'batches: take more or larger chips']


def columns(rows: Sequence[Sequence[Any]], sides: str) -> list[str]:
    """Aligned; `sides` has 'l' or 'r' for each column."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ['  '.join(cell.rjust(width) if side == 'r' else cell.ljust(width)
                      for cell, width, side in zip(row, widths, sides)).rstrip() for row in cells]


def _memory(plan):
    sizes = {name: f'{size / GIB:.2f}' for name, size in plan['memory'].items()}
    state = f"parameters {sizes['params']}, moments {sizes['moments']}, others {sizes['others']}"
    gradients = 'of a microbatch, and their sum' if plan['microbatches'] > 1 else ''
    return columns([
        ['memory of a chip', 'GiB', ''],
        ['  state', sizes['state'], state],
        ['  gradients', sizes['gradients'], gradients],
        ['  activations', sizes['activations'], 'kept for the backward pass'],
        ['  working', sizes['working'], 'copies in 16 bits, gathered layers, the layer at hand'],
        ['  peak', sizes['peak'], f"of {sizes['hbm']}"]], 'lrl')


def _network(plan):
    if not plan['network']:
        return ['network: nothing is sent']
    rows = [['network of a chip and step', 'along', 'times', 'GB', 'GB/s', 's']]
    for link in plan['network']:
        along = '+'.join(link['axes']) + (' between slices or nodes' if link['between'] else '')
        rows.append([
            f"  {link['kind']}", along, f"{link['count']:,.0f}", f"{link['bytes'] / 1e9:.2f}",
            f"{link['bandwidth'] / 1e9:.0f}", f"{link['seconds']:.3f}"])
    found = columns(rows, 'llrrrr')
    if plan['summed_whole']:
        found.append('  gradients summed at full size: ' + ', '.join(plan['summed_whole']))
    return found


def _duration(plan):
    time = plan['time']
    rows = [['a step', 's'],
            ['  matrix products', _range(time['products'])],
            ['  memory bandwidth', f"{time['elementwise']:.3g}"],
            ['  network, if nothing hides it', f"{time['network']:.3g}"],
            ['  update', f"{time['update']:.3g}"],
            ['  all', _range(time['step'])]]
    mfu = '{:.0f} to {:.0f} %'.format(*(100 * share for share in time['mfu']))
    days = _range([plan['steps'] * seconds / DAY for seconds in time['step']])
    return [f"{plan['flops'] / 1e15:.4g} PFLOP of the model a step, "
            f"{plan['executed_flops'] / plan['flops']:.2f} times as many executed",
            *columns(rows, 'lr'),
            f"MFU {mfu}, limited by {time['limit']}; {days} days for {plan['steps']:,} steps",
            *(f'  assumed: {line}' for line in plan['assumptions'])]


def _range(values):
    return '{:.3g} - {:.3g}'.format(*values)
