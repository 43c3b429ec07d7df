import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  numpy knows bfloat16 by its name through it
import numpy as np
import pytest
from safetensors.numpy import load_file

import convert
from pallas_kernels import NF4_CODE
from qlora_jax import nf4
from qlora_jax.errors import UserError
from qlora_jax.nf4 import DYNAMIC_MAP, NF4Tensor, dequantize, quantize

SHAPES = [(8, 64), (3, 128), (4, 96), (7, 352), (3, 65), (5, 7), (1, 1), (1, 130)]
MIDPOINTS = (NF4_CODE[:-1] + NF4_CODE[1:]) / np.float32(2)
equal = np.testing.assert_array_equal
either_scales = pytest.mark.parametrize("double_quant", [False, True])


def reference_quantize(weight):
    """bitsandbytes' rule: codes (one a weight) and scales."""
    flat = np.asarray(weight).astype(np.float32).reshape(-1)
    full = flat.size // 64 * 64
    blocks, rest = flat[:full].reshape(-1, 64), flat[full:]
    scales, least = np.abs(blocks).max(1), np.float32(1e-38)
    normed = blocks * (np.float32(1) / np.maximum(scales, least))[:, None]
    if rest.size:  # the CPU kernel divides in a partial block, and keeps 1e-38
        last = np.maximum(np.abs(rest).max(), least)
        normed, scales = np.append(normed, rest / last), np.append(scales, last)
    return np.searchsorted(MIDPOINTS, normed.reshape(-1), side="left"), scales


def unpacked(tensor):
    """Codes one a weight, and flat scales."""
    flat = np.asarray(tensor.codes).reshape(-1)
    codes = np.stack([flat >> 4, flat & 15], -1).reshape(-1)
    return codes, np.asarray(tensor.absmax).reshape(-1)


def quantize_by_the_rule(weight):
    """The quantized weight, whose codes and scales are those of the rule."""
    tensor = quantize(weight, double_quant=False)
    codes, scales = reference_quantize(weight)
    got_codes, got_scales = unpacked(tensor)
    equal(got_codes[: codes.size], codes)
    equal(got_scales, scales)
    return tensor


def random_weight(shape, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return (0.05 * rng.standard_normal(shape)).astype(np.dtype(dtype))


def on_device(tensor):
    return jax.tree.map(jnp.asarray, tensor)


# --- quantize ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_follow_the_rule(shape, dtype):
    tensor = quantize_by_the_rule(random_weight(shape, dtype))
    if shape[0] * shape[1] % 2:
        assert unpacked(tensor)[0][-1] == 7  # the padding nibble is a zero
    assert (tensor.shape, tensor.dtype) == (shape, dtype)


@pytest.mark.parametrize("shape", [(700, 192), (513, 257), (1, 65537)])
def test_weights_of_several_chunks_equal_one_pass(shape):
    assert shape[0] * shape[1] > nf4._CHUNK
    quantize_by_the_rule(random_weight(shape))


@pytest.mark.parametrize("midpoint", range(15))
def test_a_tie_goes_to_the_lower_code_and_one_ulp_more_to_the_upper(midpoint):
    m = MIDPOINTS[midpoint]
    weight = np.zeros((1, 64), np.float32)
    weight[0, :4] = [1.0, m, np.nextafter(m, np.float32(2)), np.nextafter(m, -2)]
    codes, scales = unpacked(quantize(weight, double_quant=False))
    assert scales.tolist() == [1.0]
    assert codes[1:4].tolist() == [midpoint, midpoint + 1, midpoint]


def test_the_scale_itself_is_coded_as_one_of_the_ends():
    weight = np.array([[0.3] + [0.0] * 63, [-0.3] + [0.0] * 63], np.float32)
    tensor = quantize(weight, double_quant=False)
    codes, _ = unpacked(tensor)
    assert codes[[0, 1, 64, 65]].tolist() == [15, 7, 0, 7]
    equal(dequantize(tensor, "float32"), weight)


def test_a_zero_block_has_scale_zero_and_a_partial_one_the_smallest():
    tensor = quantize(np.zeros((1, 130), np.float32), double_quant=False)
    assert (np.asarray(tensor.codes) == 0x77).all()
    assert tensor.absmax.tolist() == [0.0, 0.0, np.float32(1e-38)]
    assert not np.asarray(dequantize(tensor, "float32")).any()


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1.2e-38, 1e-30, 1e30, 3.4e38])
def test_tiny_and_huge_weights_stay_finite_and_bounded(size):
    rng = np.random.default_rng(0)
    weight = (size * rng.uniform(-1, 1, (4, 64))).astype(np.float32)
    weight[:, 0] = np.float32(size)
    tensor = quantize_by_the_rule(weight)
    back = np.asarray(dequantize(tensor, "float32"), np.float64)
    assert np.isfinite(back).all() and (np.abs(back) <= size * (1 + 1e-6)).all()
    if size >= 1e-30:  # below, devices flush subnormal products to zero
        # Half the widest gap between two codes (-1 and -0.696), in units of absmax.
        assert (np.abs(back - weight) <= 0.152 * tensor.absmax.max()).all()


@pytest.mark.parametrize("where", [0, 63, 64, 100, 70000])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_and_infinity_are_refused_wherever_they_stand(where, bad, dtype):
    shape = (1, 70001) if where > 128 else (1, 101)  # 101: the last block is partial
    weight = np.ones(shape, np.dtype(dtype))
    weight[0, where] = bad
    with pytest.raises(UserError, match="contains NaN or infinity; the checkpoint is"):
        quantize(weight, double_quant=True)


@pytest.mark.parametrize(
    "shape, dtype, message",
    [
        *(
            (shape, "float32", r"non-empty matrix .* got shape \(")
            for shape in ((64,), (2, 4, 64), (), (0, 64), (3, 0))
        ),
        *(
            ((2, 64), dtype, f"or float16, got {dtype}")
            for dtype in ("float64", "int8", "complex64")
        ),
    ],
)
def test_what_is_no_matrix_of_floats_is_refused(shape, dtype, message):
    with pytest.raises(UserError, match=message):
        quantize(np.ones(shape, dtype), double_quant=False)


def test_a_weight_need_not_be_contiguous_and_is_left_as_it_was():
    weight = random_weight((192, 128))
    before = weight.copy()
    for view in (weight, weight.T, weight[::2], weight[:, ::-1]):
        a = quantize(view, double_quant=True)
        b = quantize(np.ascontiguousarray(view).copy(), double_quant=True)
        jax.tree.map(equal, a, b)
    equal(weight, before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantizing_again_what_was_dequantized_changes_nothing(shape, dtype):
    # In bf16 the largest of a block is already a bf16 number, and the other products
    # move by less than the distance to a midpoint.
    once = quantize(random_weight(shape, dtype), double_quant=False)
    again = quantize(np.asarray(dequantize(once)), double_quant=False)
    jax.tree.map(equal, once, again)


# --- Double quantization ---


def test_the_table_is_the_one_in_every_file(golden, shared_data):
    files = [golden / "llama32" / "nf4_dq" / "model.safetensors"]
    files += sorted(shared_data.glob("*dq*/*.safetensors"))
    files += sorted(shared_data.glob("bnb-fragments/*double_quant.safetensors"))
    items = [item for file in files for item in load_file(file).items()]
    tables = [value for key, value in items if key.endswith(".nested_quant_map")]
    assert len(files) >= 4 and len(tables) >= 50
    for table in tables:
        equal(table, DYNAMIC_MAP)
    assert DYNAMIC_MAP[127] == 0 and (np.diff(DYNAMIC_MAP) > 0).all()


def double_quantized_absmax(tensor):
    """`map[code] * scale + offset` in float64, and the scale of each block."""
    codes = np.asarray(tensor.absmax).reshape(-1)
    scale = np.repeat(np.asarray(tensor.nested_absmax), 256)[: codes.size]
    return DYNAMIC_MAP[codes].astype(np.float64), scale.astype(np.float64)


@pytest.mark.parametrize("shape", [(64, 64), (300, 128), (37, 333), (1, 1)])
def test_eight_bit_scales_are_the_nearest_table_entries(shape):
    weight = random_weight(shape)
    single, double = (quantize(weight, double_quant=d) for d in (False, True))
    equal(single.codes, double.codes)
    absmax = np.asarray(single.absmax).reshape(-1)
    offset = np.asarray(double.nested_offset)
    assert offset.shape == () and offset.dtype == np.float32
    # The mean, rounded once.
    assert offset == np.float32(absmax.astype(np.float64).mean())
    values, scale = double_quantized_absmax(double)
    centred = (absmax - offset).astype(np.float64)
    groups = np.split(np.abs(centred), range(256, centred.size, 256))
    equal(double.nested_absmax, np.float32([g.max() for g in groups]))
    safe = np.maximum(scale, 1e-38)
    distance = np.abs(values - centred / safe)
    best = np.abs(DYNAMIC_MAP[None].astype(np.float64) - (centred / safe)[:, None])
    # 2^-23: the multiplication by a rounded reciprocal may tip a tie.
    assert (distance <= best.min(1) + 2.0**-23).all()


def test_double_quantization_moves_a_scale_by_half_a_gap_of_the_table():
    # In each group of 256 the largest deviation from the mean is the unit; the table's
    # widest gap is 0.0141, at its ends.
    weight = random_weight((256, 512))
    single, tensor = (quantize(weight, double_quant=d) for d in (False, True))
    exact = np.asarray(single.absmax).reshape(-1).astype(np.float64)
    values, scale = double_quantized_absmax(tensor)
    got = values * scale + float(tensor.nested_offset)
    assert (np.abs(got - exact) <= np.diff(DYNAMIC_MAP).max() / 2 * scale + 1e-8).all()
    # For normal weights that is well below one percent of a scale.
    assert np.abs(got / exact - 1).max() < 0.01
    assert tensor.double_quant and not single.double_quant
    assert tensor.nbytes < 0.516 * exact.size * 64 + 1100  # the table: 1,024 bytes
    assert single.nbytes == 0.5625 * exact.size * 64


def test_constant_scales_are_coded_without_dividing_by_zero():
    tensor = quantize(np.ones((4, 64), np.float32), double_quant=True)
    assert tensor.nested_absmax.tolist() == [0.0]
    equal(dequantize(tensor), np.ones((4, 64), np.float32))


# --- bitsandbytes' own files ---


@pytest.mark.golden
@pytest.mark.parametrize(
    "dense, packed",
    [
        ("golden/llama32/fp32", "golden/llama32/nf4"),
        ("golden/llama2/fp32_sharded", "golden/llama2/nf4"),
        ("data/stories260K", "data/stories260K-bnb-nf4"),
    ],
)
def test_quantized_weights_equal_bitsandbytes_byte_for_byte(shared, dense, packed):
    _, ours = convert.load_llama(shared / dense, quantization="nf4")
    _, theirs = convert.load_llama(shared / packed)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(equal, ours, theirs)


@pytest.mark.golden
@pytest.mark.parametrize(
    "dense, packed",
    [
        ("golden/llama32/fp32", "golden/llama32/nf4_dq"),
        ("data/stories260K", "data/stories260K-bnb-nf4-dq"),
        ("data/babyllama-char105", "data/babyllama-char105-bnb-nf4-dq"),
    ],
)
def test_double_quantization_is_no_worse_than_that_of_bitsandbytes(
    shared, dense, packed
):
    # Its CPU kernel looks the codes up in 65,536 bins: up to 3e-5 of the block's
    # largest scale from the nearest entry. Its offset is a float32 sum in another
    # order: an ulp (2e-7 of the largest scale here), which may tip a tie.
    _, single = convert.load_llama(shared / dense, quantization="nf4")
    _, ours = convert.load_llama(shared / dense, quantization="nf4_dq")
    _, theirs = convert.load_llama(shared / packed)
    leaf = functools.partial(jax.tree.leaves, is_leaf=lambda n: hasattr(n, "codes"))
    total = different = 0
    for exact, our, their in zip(leaf(single), leaf(ours), leaf(theirs), strict=True):
        if not isinstance(our, NF4Tensor):
            equal(our, their)
            continue
        equal(our.codes, their.codes)
        equal(our.nested_quant_map, their.nested_quant_map)
        # ulp(0.5) covers the offsets here.
        close = np.testing.assert_allclose
        close(our.nested_offset, their.nested_offset, rtol=2**-22, atol=0)
        for layer in range(our.codes.shape[0]):
            pair = our[layer], their[layer]
            absmax = exact[layer].absmax.reshape(-1).astype(np.float64)
            ulp = abs(float(pair[0].nested_offset)) * 2.0**-23
            close(*(tensor.nested_absmax for tensor in pair), atol=2 * ulp)
            errors = []
            for tensor in pair:
                values, scale = double_quantized_absmax(tensor)
                got = values * scale + float(tensor.nested_offset)
                errors.append(np.abs(got - absmax))
            slack = 3e-5 * scale + 4 * ulp
            assert (np.abs(errors[0] - errors[1]) <= slack).all()
            total += absmax.size
            different += int((pair[0].absmax != pair[1].absmax).sum())
    # 0.2 % of codes differed over 106,784 (the bins) and one in 1e5 (the offset).
    assert different <= 0.005 * total, f"{different} of {total}"


# --- dequantize, and the leaf in trees ---


def stacked(shape, *, double_quant=True):
    """A stack of three weights, and each of them."""
    weights = (random_weight(shape, seed=seed) for seed in range(3))
    parts = [on_device(quantize(w, double_quant=double_quant)) for w in weights]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts), parts


@either_scales
@pytest.mark.parametrize("shape", [(24, 64), (5, 33)])
def test_a_stack_is_its_layers(shape, double_quant):
    stack, parts = stacked(shape, double_quant=double_quant)
    whole = dequantize(stack)
    assert whole.shape == (3, *shape) and whole.dtype == jnp.float32
    twice = jax.tree.map(lambda a: a[None], stack)
    equal(dequantize(twice)[0], whole)
    x = jnp.asarray(random_weight((2, shape[1]), seed=9))
    dx = jax.jit(jax.grad(lambda x, t: (nf4.matmul(x, t) ** 2).sum()))
    for i, part in enumerate(parts):
        equal(whole[i], dequantize(part))
        equal(whole[i], dequantize(stack[i]))
        one = dataclasses.replace(stack, layer=jnp.int32(i))
        equal(dequantize(one), dequantize(part))
        equal(nf4.matmul(x, one), nf4.matmul(x, part))
        equal(dx(x, one), dx(x, part))


def test_the_default_dtype_is_the_one_before_quantization():
    tensor = quantize(random_weight((2, 64), "bfloat16"), double_quant=False)
    wide = dequantize(tensor, "float32")
    assert dequantize(tensor).dtype == jnp.bfloat16 and wide.dtype == jnp.float32
    equal(dequantize(tensor), wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("shape", [(3, 64), (3, 65)])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_values_of_the_dtype_before_quantization(shape, stored, dtype):
    weight = random_weight(shape)
    weight[1] *= 1e-6  # subnormal in float16
    tensor = quantize(weight.astype(stored), double_quant=False)
    exact = np.asarray(dequantize(dataclasses.replace(tensor, dtype="float32")))
    want = exact.astype(stored).astype(dtype)
    # Compiled: a compiler may remove a cast there and back.
    got = jax.jit(lambda t: dequantize(t, dtype))(tensor)
    equal(got, want)
    x = jnp.eye(shape[1], dtype=dtype)
    equal(jax.jit(nf4.matmul)(x, tensor), want.T)


def test_it_is_a_pytree_that_keeps_its_static_fields():
    tensor = quantize(random_weight((4, 64)), double_quant=True)
    leaves, tree = jax.tree.flatten(tensor)
    again = jax.tree.unflatten(tree, leaves)
    assert (again.shape, again.dtype) == ((4, 64), "float32")
    single = quantize(random_weight((4, 64)), double_quant=False)
    assert (len(leaves), len(jax.tree.leaves(single))) == (5, 2)
    assert hash(tree) == hash(jax.tree.structure(again))
    other = quantize(random_weight((2, 128)), double_quant=True)
    assert jax.tree.structure(other) != tree


@either_scales
def test_it_goes_through_jit_scan_vmap_and_grad(double_quant):
    stack, parts = stacked((64, 64), double_quant=double_quant)
    x = jnp.asarray(random_weight((2, 64), seed=9))

    def through_layers(x, stack):
        return jax.lax.scan(lambda x, w: (x + nf4.matmul(x, w), None), x, stack)[0]

    def plain(x):
        for part in parts:
            x = x + x @ dequantize(part).T
        return x

    # float32 sums of 64 terms of 0.05 * 0.05 through three layers.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    close(jax.jit(through_layers)(x, stack), plain(x))
    dx = jax.jit(jax.grad(lambda x: through_layers(x, stack).sum()))(x)
    close(dx, jax.grad(lambda x: plain(x).sum())(x))
    mapped = jax.jit(jax.vmap(nf4.matmul, (None, 0)))(x, stack)
    for y, part in zip(mapped, parts, strict=True):
        close(y, nf4.matmul(x, part))


def test_stacks_are_lifted_out_of_a_tree_and_the_rest_stays():
    stack, (single, second, _) = stacked((24, 64))
    norm = jnp.ones((3, 64))
    layers = {"q_proj": {"weight": stack}, "norm": {"weight": norm}}
    tree = {"layers": layers, "head": {"weight": single}}
    left, stacks = nf4.lift_stacks(tree)
    only = {"layers": {"q_proj": {"weight": stack}}}
    assert jax.tree.structure(stacks) == jax.tree.structure(only)
    assert stacks["layers"]["q_proj"]["weight"] is stack
    assert left["layers"]["norm"]["weight"] is norm
    assert left["head"]["weight"] is single
    mark = left["layers"]["q_proj"]["weight"]
    assert mark.layer.tolist() == [0, 1, 2] and mark.layer.dtype == jnp.int32
    assert jax.tree.leaves(mark) == [mark.layer] and mark.shape == (24, 64)
    # What a scan makes of it, put together again.
    one = nf4.with_stack(jax.tree.map(lambda a: a[1], mark), stack)
    equal(dequantize(one), dequantize(second))
    assert nf4.lift_stacks(left) == (left, {})
    assert tree["layers"]["q_proj"]["weight"] is stack  # what was given is unchanged


def test_it_may_be_an_argument_of_a_gradient_and_gets_none():
    tensor = on_device(quantize(random_weight((4, 64)), double_quant=True))
    product = lambda x, t: nf4.matmul(x, t).sum()  # noqa: E731
    gradient = jax.grad(product, argnums=(0, 1), allow_int=True)
    dx, dt = gradient(jnp.ones((1, 64)), tensor)
    assert dx.shape == (1, 64)
    assert dt.codes.dtype == jax.dtypes.float0
    assert not np.asarray(dt.nested_absmax).any()


@either_scales
@pytest.mark.parametrize("shape", SHAPES)
def test_abstract_states_what_quantize_gives(shape, double_quant):
    tensor = quantize(random_weight(shape), double_quant=double_quant)
    state = functools.partial(
        nf4.abstract, shape, double_quant=double_quant, dtype="float32"
    )
    assert jax.tree.structure(state()) == jax.tree.structure(tensor)
    for leading in ((), (2, 3)):
        stated = state(leading=leading)
        for want, leaf in zip(*map(jax.tree.leaves, (stated, tensor)), strict=True):
            assert (want.shape, want.dtype) == ((*leading, *leaf.shape), leaf.dtype)


def test_the_relative_error_is_that_of_nf4():
    # sqrt(mean (x - q(x))^2 / mean x^2) of normal weights in blocks of 64: 0.0919, with
    # a deviation of 0.0003 between draws of 65,536 weights.
    weight = random_weight((256, 256))
    back = np.asarray(dequantize(quantize(weight, double_quant=False)))
    error = np.sqrt(np.mean((back - weight) ** 2) / np.mean(weight**2))
    assert abs(error - 0.0919) < 0.0015
