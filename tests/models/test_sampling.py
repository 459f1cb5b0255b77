"""Drawing token by token: against the full forward pass, closed forms and exact frequencies."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_jax.models import dalle, dalle_network, sampling
from dalle_jax.planning import collectives
from dalle_jax.training import partition
from tests.models.test_dalle import CONFIG, DEEP, TEXT, codes, likelihood, parameters, shapes


@functools.partial(jax.jit, static_argnums=1)
def image_logits(params, config, text, ids):
    """From the full forward pass, [B, I, V]."""
    _, states = dalle._states(params, config, text, ids.reshape(len(ids), -1), jnp.float32,
                              lambda x, axes: x)
    return dalle_network.logits(params, states, 'image', jnp.float32)


def keys(*shape, seed=0):
    return jax.random.split(jax.random.key(seed), shape)


def generate(config, params, text, temperature=1.0, **options):
    static = ('top_k', 'keep')
    run = jax.jit(dalle.generate, static_argnums=1, static_argnames=static)
    return run(params, config, text, temperature=temperature, **options)


@pytest.mark.parametrize('config', [CONFIG, DEEP, dataclasses.replace(
    CONFIG, depth=2, grid=(5, 3), patterns=('conv', 'causal'))])
def test_likelihood_of_what_is_drawn(config):
    """Each step's distribution is that of the full forward pass, for C = 2 and N = 3."""
    params = parameters(config)
    ids, logp = generate(config, params, TEXT, keys=keys(2, 3))
    assert ids.shape == (2, 3, *config.grid) and ids.dtype == jnp.int32
    assert len({tuple(np.ravel(x)) for x in np.asarray(ids).reshape(6, -1)}) == 6
    for candidate in range(3):
        want = likelihood(params, config, TEXT, ids[:, candidate])[1]
        np.testing.assert_allclose(logp[:, candidate], want, rtol=1e-4)


def test_temperature_zero_takes_the_best_token():
    params = parameters(CONFIG)
    ids, _ = generate(CONFIG, params, TEXT, keys=keys(2, 3), temperature=0.0)
    np.testing.assert_array_equal(ids[:, 0], ids[:, 1])
    logits = image_logits(params, CONFIG, TEXT, ids[:, 0])
    np.testing.assert_array_equal(ids[:, 0].reshape(2, -1), logits.argmax(-1))
    filtered = dalle.filter_logits(logits, 0.0, 3, jnp.float32(0.9))
    np.testing.assert_array_equal(np.isfinite(filtered), logits == logits.max(-1, keepdims=True))


def test_an_image_depends_on_its_key_alone():
    params, many = parameters(CONFIG), keys(2, 3)
    ids, logp = generate(CONFIG, params, TEXT, keys=many)
    alone, alone_logp = generate(CONFIG, params, TEXT[1:], keys=many[1:, 2:])
    np.testing.assert_array_equal(alone[0, 0], ids[1, 2])
    np.testing.assert_allclose(alone_logp[0, 0], logp[1, 2], rtol=1e-5)


@pytest.mark.parametrize('keep', [(1, 2), (0, 0)])
def test_an_image_prompt_is_kept_and_continued(keep):
    """A rectangle at the bottom right is drawn, as the full forward pass would have it."""
    params, image = parameters(CONFIG), codes()
    ids, logp = generate(CONFIG, params, TEXT, keys=keys(2, 3), image=image, keep=keep)
    kept = np.ones((3, 4), bool)
    kept[keep[0]:, keep[1]:] = False
    np.testing.assert_array_equal(np.asarray(ids)[..., kept],
                                  np.repeat(image[:, None], 3, 1)[..., kept])
    assert all(len(np.unique(column)) > 1 for column in np.asarray(ids)[..., ~kept].reshape(6, -1).T)
    for candidate in range(3):
        want = likelihood(params, CONFIG, TEXT, ids[:, candidate])[1]
        np.testing.assert_allclose(logp[:, candidate], want, rtol=1e-4)
    # The greedy continuation is that of the full forward pass.
    ids, _ = generate(CONFIG, params, TEXT, keys=keys(2, 3), temperature=0.0, image=image, keep=keep)
    best = image_logits(params, CONFIG, TEXT, ids[:, 0]).argmax(-1).reshape(2, 3, 4)
    np.testing.assert_array_equal(np.asarray(ids)[:, 0][:, ~kept], np.asarray(best)[:, ~kept])


@pytest.mark.parametrize('options,message', [
    (dict(keep=(1, 0)), r'keep=\(1, 0\) without an image'),
    (dict(image=np.zeros((2, 3, 4), int), keep=(3, 0)), r'keep=\(3, 0\).*grid of \(3, 4\)'),
    (dict(image=np.zeros((2, 3, 4), int), keep=(0, -1)), r'keep=\(0, -1\)'),
    (dict(image=np.zeros((1, 3, 4), int)), r'tokens \[1, 3, 4\].*expected \[2, 3, 4\]'),
    (dict(top_k=14), 'top_k=14; there are 13 image tokens')])
def test_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        generate(CONFIG, parameters(CONFIG), TEXT, keys=keys(2, 1), **options)


@pytest.mark.parametrize('guidance,keep', [(3.0, (0, 0)), (0.0, (1, 2))])
def test_guidance_is_its_formula(guidance, keep):
    """Greedy: the best token of u + s (c - u), both by the full forward pass; s = 0 drops c."""
    params, image = parameters(CONFIG), codes()
    options = dict(temperature=0.0, image=image, keep=keep)
    ids, logp = generate(CONFIG, params, TEXT, keys=keys(2, 1), guidance=guidance, **options)
    ids = ids[:, 0]
    with_text = image_logits(params, CONFIG, TEXT, ids)
    without = image_logits(params, CONFIG, 0 * TEXT, ids)
    best = (without + guidance * (with_text - without)).argmax(-1).reshape(2, 3, 4)
    rows, columns = keep
    np.testing.assert_array_equal(ids[:, rows:, columns:], best[:, rows:, columns:])
    np.testing.assert_allclose(logp[:, 0], likelihood(params, CONFIG, TEXT, ids)[1], rtol=1e-4)


def test_guidance_of_one_is_none():
    params = parameters(CONFIG)
    want = generate(CONFIG, params, TEXT, keys=keys(2, 2))
    got = generate(CONFIG, params, TEXT, keys=keys(2, 2), guidance=jnp.float32(1))
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5)


def test_bytes_of_the_caches():
    """Of the 12B model in bfloat16: 287 MB a candidate and 260 MB of text a caption."""
    config = dalle.PRESETS['12b']
    one, two = (sampling.sample_bytes(config, 1, n, jnp.bfloat16) for n in (1, 2))
    assert two - one == 2 * 3968 * 2 * (47 * 32 + 16 * 1024 + 191 + 64)
    assert 2 * one - two == 2 * 3968 * 2 * 64 * 256
    assert sampling.sample_bytes(config, 2, 3, guided=True) == 2 * sampling.sample_bytes(
        config, 2, 3)


def test_keys_whose_numbers_depend_on_the_batch_are_refused():
    with pytest.raises(ValueError, match='threefry2x32'):
        dalle.generate(parameters(CONFIG), CONFIG, TEXT,
                       keys=jax.random.split(jax.random.key(0, impl='rbg'), (2, 1)))


@pytest.mark.parametrize('temperature,top_k,top_p', [
    (1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (0.7, 0, 0.6)])
def test_frequencies_of_drawn_tokens(temperature, top_k, top_p):
    """4096 images of one token: within 5 standard deviations of the exact probabilities."""
    config = dataclasses.replace(CONFIG, depth=1, grid=(1, 1), image_vocab=6)
    params, draws = parameters(config), 4096
    ids, logp = generate(config, params, TEXT[:1], keys=keys(1, draws), temperature=temperature,
                         top_k=top_k, top_p=top_p if top_p == 1 else jnp.float32(top_p))
    logits = image_logits(params, config, TEXT[:1], np.zeros((1, 1, 1), int))
    logits = np.asarray(logits, np.float64)[0, 0]
    p = filtered_probabilities(logits, temperature, top_k, top_p)
    frequencies = np.bincount(np.ravel(ids), minlength=6) / draws
    assert (np.abs(frequencies - p) <= 5 * np.sqrt(p * (1 - p) / draws)).all()
    plain = logits - np.log(np.exp(logits).sum())
    np.testing.assert_allclose(logp[0], plain[np.ravel(ids)], atol=1e-5)


def filtered_probabilities(logits, temperature, top_k, top_p):
    """Closed form: sort, cut, renormalise; twice."""
    p = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-p)
    p[order[top_k or len(p):]] = 0
    p /= p.sum()
    nucleus = np.searchsorted(np.cumsum(p[order]), top_p) + 1
    p[order[nucleus:]] = 0
    return p / p.sum()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), temperature=st.floats(0.2, 3), top_k=st.integers(0, 8),
       top_p=st.floats(0.05, 0.99))
def test_filters(seed, temperature, top_k, top_p):
    logits = np.random.default_rng(seed).normal(size=(2, 8), scale=2).astype(np.float32)
    got = np.asarray(jax.nn.softmax(
        dalle.filter_logits(logits, temperature, top_k, jnp.float32(top_p)) / temperature))
    for row, probabilities in zip(logits.astype(np.float64), got):
        want = filtered_probabilities(row, temperature, top_k, top_p)
        if abs(np.cumsum(np.sort(want)[::-1]) - top_p).min() > 1e-5:  # not on the brink
            np.testing.assert_allclose(probabilities, want, atol=1e-5)


def test_traced_top_p_of_one_keeps_all():
    logits = jnp.array([[30.0, 0.0, -30.0, -60.0]])  # the last three vanish in the sum
    np.testing.assert_array_equal(dalle.filter_logits(logits, 1.0, 0, jnp.float32(1)), logits)


def test_filters_keep_ties_and_one_token():
    logits = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.1, 0.1]]))
    for options, kept in (((2, 1.0), 3), ((0, 0.1), 1), ((0, 0.5), 3), ((4, 1.0), 5)):
        assert jnp.isfinite(dalle.filter_logits(logits, 1.0, *options)).sum() == kept


# Caches [..., B, H, N, S, D] and keys of the text [..., B, H, T, D] of all candidates and heads.
WHOLE = re.compile(r'\b4,2,(3,\d+|5),64\]')


@pytest.fixture(scope='module')
def alone():
    """All options at once, and what one device draws with them."""
    config = dataclasses.replace(DEEP, width=128)
    options = dict(keys=keys(2, 3), temperature=0.9, top_p=jnp.float32(0.95),
                   guidance=jnp.float32(1.5), image=codes())
    params = parameters(config, scale=0.2)
    draw = jax.jit(functools.partial(dalle.generate, top_k=9, keep=(1, 1)), static_argnums=1,
                   static_argnames='constrain')
    program = draw.lower(params, config, TEXT, **options).compile()
    assert WHOLE.search(program.as_text())
    return draw, config, params, options, program(params, TEXT, **options)


@pytest.mark.parametrize('axis', partition.AXES)
def test_two_devices_draw_what_one_does(alone, axis):
    """And each has half of the caches; between copies a token takes no communication, and else of
    nothing but its own states."""
    draw, config, params, options, (ids, logp) = alone
    mesh = partition.make_mesh(partition.parse_mesh(f'{axis}=2', partition.MeshConfig(fsdp=1)))
    place = partition.Partitioner(mesh)
    params = jax.device_put(params, place.shardings(dalle.axes(config), params))
    program = draw.lower(params, config, TEXT, constrain=place, **options).compile()
    got = program(params, TEXT, **options)
    np.testing.assert_array_equal(got[0], ids)
    np.testing.assert_allclose(got[1], logp, rtol=1e-5)
    assert not WHOLE.search(program.as_text())
    sent = collectives.parse(program.as_text(), mesh)
    if axis == 'replica':
        assert not sent
        return
    each_token = [shape for c in sent if c.count >= 7 for _, shape in c.operands]  # 7 are drawn
    hidden = 2 * 6 * 4 * config.width  # units of 6 images, with and without their captions
    assert each_token and hidden < config.width ** 2 / 2  # half of the smallest matrix
    # Caches have five axes, states of some candidates up to four.
    assert all(len(shape) <= 4 and math.prod(shape) <= hidden for shape in each_token)


def test_filters_cost_nothing_when_off():
    def program(**options):
        return str(jax.make_jaxpr(lambda p, k: dalle.generate(
            p, CONFIG, TEXT, keys=k, temperature=0.7, **options))(parameters(CONFIG), keys(2, 1)))

    def count(text):
        return text.count('sort['), text.count('top_k[')

    assert count(program()) == (0, 1)  # top_k draws the token
    assert count(program(top_p=0.9)) == (1, 1)
    assert count(program(top_k=3)) == (0, 2)


def test_weights_are_read_in_bfloat16():
    """No step of the loop casts a weight: all are cast before, and nothing else is."""
    config = dataclasses.replace(DEEP, width=24)
    program = jax.jit(dalle.generate, static_argnums=1, static_argnames='dtype').lower(
        shapes(config), config, TEXT, keys=keys(2, 1), dtype=jnp.bfloat16).as_text()
    loop = program[program.index('stablehlo.while'):]
    casts = re.findall(r'convert.*tensor<(?:2x)?(?:24x72|24x24|24x96|24x13)xf32>', loop)
    assert not casts
    cast = jax.eval_shape(lambda p: sampling.matrices_in(p, jnp.bfloat16), shapes(config))
    assert {x.dtype.name for x in jax.tree.leaves((cast['text'], cast['image']))} == {'float32'}
    norms = cast['transformer']['body']['0']['mlp']
    assert (norms['up']['kernel'].dtype, norms['norm']['gain'].dtype) == (jnp.bfloat16, jnp.float32)


def test_matrices_cast_in_place_stay_where_they_are():
    mesh = partition.make_mesh(partition.MeshConfig())
    shardings = partition.Partitioner(mesh).shardings(dalle.axes(DEEP), shapes(DEEP))
    params = jax.device_put(parameters(DEEP), shardings)
    want = sampling.matrices_in(params, jnp.bfloat16)
    sampling.cast_matrices(params, jnp.bfloat16)
    for x, y, sharding in zip(*map(jax.tree.leaves, (params, want, shardings)), strict=True):
        assert x.dtype == y.dtype and x.sharding.is_equivalent_to(sharding, x.ndim)
        np.testing.assert_array_equal(x, y)


def test_image_logits_only():
    """A step multiplies by the image head alone, never by the text vocabulary's."""
    config = dataclasses.replace(CONFIG, text_vocab=997)
    text = jax.jit(dalle.generate, static_argnums=1).lower(
        shapes(config), config, TEXT, keys=keys(2, 1)).as_text()
    assert not [line for line in text.splitlines() if 'dot_general' in line and '997' in line]
