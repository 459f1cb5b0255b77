"""What the machine can do: rates by an injected clock, free memory from systems made up."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax import machine


class Clock:
    """A clock that is `step` seconds further at every reading."""

    def __init__(self, step):
        self.step, self.now = step, 0.0

    def __call__(self):
        self.now += self.step
        return self.now


def test_rates_are_work_by_time():
    assert machine.matmul_rate(jnp.float32, 8, clock=Clock(0.5)) == 2 * 8**3 / 0.5
    copy = machine.copy(1000)
    seconds, = machine.timed([copy.run], 3, Clock(0.25))
    assert copy.work / statistics.median(seconds) == 2 * 4 * 1000 / 0.25
    # 1/128 s is short: six calls are timed together.
    assert machine.matmul_rate(jnp.bfloat16, 8, clock=Clock(1 / 128)) == 2 * 8**3 * 128 * 6


def test_the_product_does_what_is_counted():
    probe = machine.matmul(jnp.float32, 48)
    assert probe.work == jax.jit(jnp.matmul).lower(
        jnp.ones((48, 48)), jnp.ones((48, 48))).compile().cost_analysis()['flops']
    product = np.asarray(probe.run())
    # Random entries, not zeros: those of the product have variance 48.
    assert product.shape == (48, 48) and 40 < product.var() < 56


def test_the_copy_reads_and_writes_all_in_place():
    probe = machine.copy(1024)
    address = probe.run().unsafe_buffer_pointer()
    after = probe.run()
    assert after.unsafe_buffer_pointer() == address
    np.testing.assert_array_equal(after, np.full(1024, 2.0))
    assert probe.work == 2 * after.nbytes == 2 * probe.peak_bytes


def test_runs_take_turns():
    """By the order of the calls, and by a clock on which each call takes longer than the last."""
    order = []
    runs = [lambda name=name: order.append(name) or jnp.zeros(()) for name in 'abc']
    found = machine.timed(runs, 3, lambda: 2.0 * len(order)**2)
    assert ''.join(order) == 'abc' * 4  # once to warm up
    # Call n is between the readings 2 (n - 1)^2 and 2 n^2.
    assert found == [[4.0 * n - 2 for n in (first, first + 3, first + 6)] for first in (4, 5, 6)]


def system(root, available, groups=(), version=2):
    """Files of a system; groups: (path, limit, used, cached) from the outermost on."""
    def write(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    write(root / 'proc/meminfo', f'MemTotal: 999 kB\nMemAvailable:  {available // 1024} kB\n')
    base = root / ('sys/fs/cgroup' if version == 2 else 'sys/fs/cgroup/memory')
    names = (('memory.max', 'memory.current', 'inactive_file') if version == 2 else
             ('memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_inactive_file'))
    for path, limit, used, cached in groups:
        for name, text in zip((names[0], names[1], 'memory.stat'),
                              (limit, used, f'anon 5\n{names[2]} {cached}')):
            write(base / path / name, f'{text}\n')
    innermost = groups[-1][0] if groups else ''
    write(root / 'proc/self/cgroup', f'0::/{innermost}\n' if version == 2 else
          f'9:cpu,cpuacct:/other\n4:memory:/{innermost}\n0::/\n')
    return root


@pytest.mark.parametrize('version', [1, 2])
def test_memory_is_what_the_tightest_limit_leaves(tmp_path, version):
    unlimited = 'max' if version == 2 else 2**63 - 4096

    def free(name, groups):
        return machine.memory(system(tmp_path / name, 2**30, groups, version))

    assert free('none', []) == 2**30
    assert free('open', [('', unlimited, 5, 0), ('job', unlimited, 5, 0)]) == 2**30
    assert free('job', [('', unlimited, 5, 0), ('job', 1000_000, 400_000, 0)]) == 600_000
    assert free('files', [('job', 1000_000, 400_000, 300_000)]) == 900_000
    assert free('above', [('a', 500_000, 400_000, 0), ('a/b', 900_000, 400_000, 0)]) == 100_000
    assert free('over', [('a', 500_000, 600_000, 0)]) == 0
    assert free('wide', [('a', 2**40, 5, 0)]) == 2**30


def test_memory_of_this_machine():
    with open('/proc/meminfo') as file:
        total = int(file.readline().split()[1]) * 1024
    assert 0 < machine.memory() <= total


def test_memory_of_an_accelerator(monkeypatch):
    class Device:
        platform, device_kind = 'gpu', 'H200'
        stats = {'bytes_limit': 1000, 'bytes_in_use': 300}

        def memory_stats(self):
            return self.stats

    monkeypatch.setattr(jax, 'local_devices', lambda: [Device()])
    assert machine.memory() == 700
    Device.stats = None
    with pytest.raises(RuntimeError, match='H200 does not tell'):
        machine.memory()


def test_virtual_devices_share_the_cores():
    assert jax.device_count() == 2 and machine.devices() == 1


def test_compute_dtype():
    assert machine.compute_dtype('auto') == jnp.float32  # on a CPU
    assert machine.compute_dtype('bfloat16') == jnp.bfloat16


def test_describe_names_cores():
    count, times, name = machine.describe().split(' ', 2)
    assert int(count) >= 1 and times == 'x' and name
