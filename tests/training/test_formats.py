"""Storage formats against their definition: tables of all values in float64, by ldexp."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis.extra import numpy as arrays

from dalle_jax.training import formats

PAPER = ('1-6-9', '0-6-10')
BITS = {'1-6-9': 9, '0-6-10': 10}
NUMPY = {'bfloat16': ml_dtypes.bfloat16, 'float16': np.float16}
INFINITY = {'1-6-9': 0x7e00, '0-6-10': 0xfc00}

encode = jax.jit(formats.encode, static_argnums=1)
decode = jax.jit(formats.decode, static_argnums=1)
random_bits = jax.jit(formats.random_bits, static_argnums=(1, 2))


@functools.cache
def values(format):
    """What the codes 0, 1, ... of non-negative finite values mean; last 16, where infinity is."""
    significand_bits = BITS[format]
    found = []
    for code in range(INFINITY[format]):
        exponent, significand = divmod(code, 2**significand_bits)
        if exponent == 0:
            found.append(math.ldexp(significand, 1 - 59 - significand_bits))
        else:
            found.append(math.ldexp(2**significand_bits + significand,
                                    exponent - 59 - significand_bits))
    return np.array([*found, 16.0])


def midpoints(format):
    return (values(format)[:-1] + values(format)[1:]) / 2


def nearest(x, format):
    """Codes of float32 x that are no NaN: how many midpoints lie below, ties to the even code."""
    magnitude, middle = np.abs(x.astype(np.float64)), midpoints(format)
    code = np.searchsorted(middle, magnitude, side='left')
    tie = (code < len(middle)) & (middle[np.minimum(code, len(middle) - 1)] == magnitude)
    code = code + (tie & (code % 2 == 1))
    negative = np.signbit(x)
    return np.where(negative, code + 2**15 if format == '1-6-9' else 0, code).astype(np.uint16)


def words(array):
    return np.asarray(array).view(np.uint16)


@pytest.mark.parametrize('format', PAPER)
def test_all_codes(format):
    codes = np.arange(2**16, dtype=np.uint16)
    found = np.asarray(decode(codes, format))
    assert found.dtype == np.float32
    sign = (1, -1) if format == '1-6-9' else (1,)
    magnitudes = np.full(2**16 // len(sign), np.nan)
    magnitudes[:INFINITY[format]] = values(format)[:-1]
    magnitudes[INFINITY[format]] = np.inf
    expected = np.concatenate([s * magnitudes for s in sign])
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found)[~np.isnan(expected)],
                                  np.signbit(expected)[~np.isnan(expected)])

    again = np.asarray(encode(found, format))
    assert again.dtype == formats.storage_dtype(format) == np.uint16
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(again[number], codes[number])
    assert np.isnan(expected[again[~number]]).all()
    for extreme in (0, 2**32 - 1):  # exact values never move, whatever the random word
        bits = np.full(2**16, extreme, np.uint32)
        np.testing.assert_array_equal(encode(found, format, bits)[number], codes[number])


@pytest.mark.parametrize('format', PAPER)
def test_nearest_around_all_midpoints(format):
    middle = midpoints(format).astype(np.float32)
    np.testing.assert_array_equal(middle, midpoints(format))
    x = np.concatenate([middle, np.nextafter(middle, np.float32(0)),
                        np.nextafter(middle, np.float32(np.inf))])
    x = np.concatenate([x, -x])
    np.testing.assert_array_equal(encode(x, format), nearest(x, format))


@pytest.mark.parametrize('format', PAPER)
@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(x=arrays.arrays(np.float32, 64))
def test_nearest_is_nearest(format, x):
    found = np.asarray(encode(x, format))
    number = ~np.isnan(x)
    np.testing.assert_array_equal(found[number], nearest(x, format)[number])
    assert np.isnan(decode(found, format)[~number]).all()


@pytest.mark.parametrize('format', PAPER)
def test_relative_error_and_order(format):
    rng = np.random.default_rng(0)
    x = np.sort(np.exp2(rng.uniform(-58, 3.99, 2**16)).astype(np.float32))
    rounded = np.asarray(decode(encode(x, format), format), np.float64)
    error = np.max(np.abs(rounded - x) / x)
    bound = 2.0**-(BITS[format] + 1)
    assert 0.9 * bound < error <= bound
    assert (np.diff(rounded) >= 0).all()
    subnormal = np.sort(rng.uniform(-2.0**-57, 2.0**-57, 2**16).astype(np.float32))
    assert (np.diff(decode(encode(subnormal, format), format)) >= 0).all()


def test_boundaries_of_1_6_9():
    tiny, top = 2.0**-67, 15.984375

    def just(x, towards):
        return np.nextafter(np.float32(x), np.float32(towards))

    cases = [
        (0.0, 0x0000), (-0.0, 0x8000), (2.0**-149, 0x0000),
        (tiny, 0x0001), (tiny / 2, 0x0000), (just(tiny / 2, 1), 0x0001), (1.5 * tiny, 0x0002),
        (2.0**-58 - tiny, 0x01ff), (2.0**-58 - tiny / 2, 0x0200),
        (just(2.0**-58 - tiny / 2, 0), 0x01ff), (2.0**-58, 0x0200), (2.0**-58 + tiny, 0x0201),
        (1.0, 59 << 9), (top, 0x7dff), (just(top + 2.0**-7, 0), 0x7dff), (top + 2.0**-7, 0x7e00),
        (16.0, 0x7e00), (3e38, 0x7e00), (np.inf, 0x7e00), (-np.inf, 0xfe00), (-top, 0xfdff)]
    x, codes = (np.array(column) for column in zip(*cases))
    np.testing.assert_array_equal(encode(x.astype(np.float32), '1-6-9'), codes)


def test_largest_and_clamped():
    assert formats.largest('1-6-9') == 15.984375
    assert formats.largest('0-6-10') == 15.9921875
    for format, dtype in {**NUMPY, 'float32': np.float32}.items():
        assert formats.largest(format) == float(ml_dtypes.finfo(dtype).max)
        assert formats.storage_dtype(format) == dtype
    x = np.array([np.inf, -np.inf, 16, 1, np.nan], np.float32)
    for format in formats.FORMATS:
        top = formats.largest(format)
        found = formats.clamped(x, format)
        np.testing.assert_array_equal(found, [top, -top, min(16, top), 1, np.nan])
        assert np.isfinite(decode(encode(found, format), format)[:4]).all()


def test_no_sign_has_no_negative_values():
    x = np.array([-1, -0.0, -np.inf, -1e-30, np.inf, -np.nan], np.float32)
    np.testing.assert_array_equal(decode(encode(x, '0-6-10'), '0-6-10'),
                                  [0, 0, 0, 0, np.inf, np.nan])
    always_up = np.zeros(6, np.uint32)
    assert (np.asarray(encode(x, '0-6-10', always_up))[:4] == 0).all()


@pytest.mark.parametrize('format', NUMPY)
def test_known_formats_equal_astype(format):
    high = np.arange(2**16, dtype=np.uint32)[:, None] << 16
    low = np.array([0, 1, 0xfff, 0x1000, 0x1001, 0x3000, 0x7fff, 0x8000, 0x8001, 0xffff],
                   np.uint32)
    x = (high + low).reshape(-1).view(np.float32)
    found = encode(x, format)
    with np.errstate(over='ignore', invalid='ignore'):
        expected = x.astype(NUMPY[format])
    number = ~np.isnan(x)
    np.testing.assert_array_equal(words(found)[number], words(expected)[number])
    assert np.isnan(np.asarray(found)[~number].astype(np.float32)).all()
    # Codes of float32's own subnormals are exact; arithmetic on their values may flush them.
    np.testing.assert_array_equal(decode(found, format), np.asarray(found).astype(np.float32))


def test_float32_is_left_alone():
    x = np.array([1e-45, 1.1, -np.inf], np.float32)
    np.testing.assert_array_equal(encode(x, 'float32', np.zeros(3, np.uint32)), x)
    np.testing.assert_array_equal(decode(x, 'float32'), x)


@pytest.mark.parametrize('format', [*PAPER, *NUMPY])
def test_stochastic_rounding_is_exactly_unbiased(format):
    """Over all values of the upper 16 random bits the mean is x: no more bits are discarded."""
    every = np.arange(2**16, dtype=np.uint32) << 16
    tiny = {'1-6-9': 2.0**-67, '0-6-10': 2.0**-68, 'bfloat16': 2.0**-133, 'float16': 2.0**-24}
    # Normal, one discarded bit from a code, subnormal, below the smallest subnormal.
    magnitudes = [1.2345, 1 + 2.0**-13, 2 - 2.0**-13, 77.125 * tiny[format], 0.4375 * tiny[format]]
    for sign in (1,) if format == '0-6-10' else (1, -1):
        for x in sign * np.float32(magnitudes):
            codes = np.asarray(encode(np.full(2**16, x), format, every))
            first, second = np.unique(words(codes))
            assert second == first + 1
            drawn = codes if format in NUMPY else np.asarray(decode(codes, format))
            assert drawn.astype(np.float64).mean() == x


@pytest.mark.parametrize('format,smallest', [('1-6-9', -67), ('0-6-10', -68), ('float16', -24)])
def test_far_below_the_smallest_subnormal(format, smallest):
    """2^-j of it is rounded up by 2^(32-j) of the 2^32 words; from j = 32 on by none."""
    j = np.arange(1, 32)
    x = np.ldexp(np.float32(1), smallest - j)
    last = (2**(32 - j) - 1).astype(np.uint32)
    np.testing.assert_array_equal(words(encode(x, format, last)), 1)
    np.testing.assert_array_equal(words(encode(x, format, last + 1)), 0)
    never = np.float32([2.0**(smallest - 32), 2.0**(smallest - 40), 2.0**-126, 2.0**-149])
    np.testing.assert_array_equal(words(encode(never, format, np.zeros(4, np.uint32))), 0)


@pytest.mark.parametrize('format', PAPER)
def test_stochastic_rounding_with_hashed_bits(format):
    """The mean of many draws is x within 5 standard errors; only the two neighbours occur."""
    rng = np.random.default_rng(1)
    x = np.exp2(rng.uniform(-72, 3.9, 64)).astype(np.float32)
    bits = random_bits(3, 1, (64, 4096))
    drawn = np.asarray(decode(encode(np.tile(x[:, None], (1, 4096)), format, bits), format),
                       np.float64)
    above = np.searchsorted(values(format), x, side='right')
    low, high = values(format)[above - 1], values(format)[above]
    assert ((drawn == low[:, None]) | (drawn == high[:, None])).all()
    p = (x - low) / (high - low)
    error = (high - low) * np.sqrt(p * (1 - p) / 4096)
    assert (np.abs(drawn.mean(1) - x) <= 5 * error).all()


def test_small_steps_add_up_only_if_stochastic():
    """4096 times + 2^-12 of itself: nearest stays at 1, the expectation is close to e."""
    def grow(stochastic):
        def body(step, code):
            bits = formats.random_bits(step, 0, (1024,)) if stochastic else None
            x = formats.decode(code, '1-6-9')
            return formats.encode(x * (1 + 2.0**-12), '1-6-9', bits)

        code = formats.encode(jnp.ones(1024), '1-6-9')
        return formats.decode(jax.lax.fori_loop(0, 4096, body, code), '1-6-9')

    np.testing.assert_array_equal(jax.jit(grow, static_argnums=0)(False), 1)
    x = np.asarray(jax.jit(grow, static_argnums=0)(True))
    error = x.std() / math.sqrt(1024)
    assert 0 < error < 0.01
    assert abs(x.mean() - (1 + 2.0**-12)**4096) < 5 * error


@pytest.mark.parametrize('format', [*PAPER, 'bfloat16'])
def test_update_is_one_loop_without_a_float32_copy(format):
    def update(code, step):
        x = 0.9 * formats.decode(code, format) + 0.1
        return formats.encode(x, format, formats.random_bits(step, 0, code.shape))

    code = jax.ShapeDtypeStruct((1024, 1024), formats.storage_dtype(format))
    compiled = jax.jit(update).lower(code, jax.ShapeDtypeStruct((), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**12
    assert compiled.cost_analysis()['bytes accessed'] < 3 * code.size * 2


def signs(bits):
    """+-1 of each of 32 bits, [entries, 32]."""
    bits = np.asarray(bits).reshape(-1, 1)
    return (bits >> np.arange(32, dtype=np.uint32) & 1).astype(np.float32) * 2 - 1


def test_random_bits_are_balanced_and_uncorrelated():
    shape = (128, 512)
    bits = np.asarray(random_bits(7, 3, shape))
    each, limit = signs(bits), 6 / math.sqrt(bits.size)
    assert np.abs(each.mean(0)).max() < limit
    assert abs(bits.mean() / 2**32 - 0.5) < limit
    counts = np.bincount(bits.reshape(-1) >> 24, minlength=256) * 256 / bits.size
    assert 0.7 < np.sum((counts - 1)**2) * bits.size / 256 / 255 < 1.3  # chi squared / freedom
    within = each.T @ each / bits.size
    assert np.abs(within - np.eye(32)).max() < limit
    neighbours = {'column': np.roll(bits, 1, 1), 'row': np.roll(bits, 1, 0),
                  'step': random_bits(8, 3, shape), 'leaf': random_bits(7, 4, shape),
                  'diagonal': random_bits(8, 2, shape)}
    for name, other in neighbours.items():
        between = each.T @ signs(other) / bits.size  # each bit with each
        assert np.abs(between).max() < limit, name


def test_random_bits_of_a_large_array():
    """Rows 2^32 entries apart differ; the loop computes only what is kept."""
    def corners():
        return formats.random_bits(jnp.int32(0), 0, (5, 2**15, 2**15, 2))[::2, 0, 0]

    compiled = jax.jit(corners).lower().compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**12
    assert len(np.unique(compiled())) == 6


def test_random_bits_do_not_depend_on_the_mesh():
    mesh = jax.make_mesh((2,), ('x',))
    for spec in (jax.P('x'), jax.P(None, 'x')):
        sharded = jax.jit(formats.random_bits, static_argnums=(1, 2),
                          out_shardings=jax.NamedSharding(mesh, spec))(5, 1, (16, 8))
        assert len(sharded.sharding.device_set) == 2
        np.testing.assert_array_equal(sharded, formats.random_bits(5, 1, (16, 8)))


def test_errors():
    for call in (formats.storage_dtype, formats.largest):
        with pytest.raises(ValueError, match=r"'1-5-10'; choose .* 1-6-9, 0-6-10"):
            call('1-5-10')
    with pytest.raises(ValueError, match='choose'):
        formats.encode(jnp.ones(2), '1-5-10')
    with pytest.raises(ValueError, match='x is bfloat16; encode takes float32'):
        formats.encode(jnp.ones(2, jnp.bfloat16), '1-6-9')
