import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import lora, nf4
from qlora_jax.errors import UserError
from qlora_jax.linear import Compute, Linear, linear
from qlora_jax.lora_config import LoraConfig

OUT, IN = 24, 64


def draw(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


WEIGHT = 0.1 * draw(OUT, IN)
PACKED = jax.tree.map(jnp.asarray, nf4.quantize(np.asarray(WEIGHT), double_quant=True))
ADAPTER = {"lora_A": draw(4, IN, seed=1), "lora_B": draw(OUT, 4, seed=2)}
BIAS = draw(OUT, seed=3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("adapter", [None, ADAPTER])
def test_it_is_weight_plus_bias_plus_scaled_update(packed, bias, adapter):
    x = draw(2, 5, IN, seed=4)
    weight = PACKED if packed else WEIGHT
    got = linear(x, weight, bias, adapter, scaling=0.5)
    dense = np.asarray(nf4.dequantize(PACKED) if packed else WEIGHT, np.float64)
    wide = np.asarray(x, np.float64)
    want = wide @ dense.T
    if bias is not None:
        want = want + np.asarray(bias)
    if adapter is not None:
        a, b = (np.asarray(adapter[k], np.float64) for k in ("lora_A", "lora_B"))
        want = want + 0.5 * wide @ a.T @ b.T
    # float32 sums of 64 terms; the update is of order 20.
    np.testing.assert_allclose(got, want, atol=5e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_a_zero_adapter_changes_no_bit(packed):
    x = draw(3, IN, seed=5, dtype="bfloat16")
    weight = PACKED if packed else WEIGHT
    zero = {**ADAPTER, "lora_B": jnp.zeros_like(ADAPTER["lora_B"])}
    with_zero = linear(x, weight, BIAS, zero, scaling=2.0)
    np.testing.assert_array_equal(with_zero, linear(x, weight, BIAS))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("compute", ["bfloat16", "float16", "float32"])
def test_the_result_has_the_dtype_of_the_input_or_the_one_asked_for(packed, compute):
    x = draw(3, IN, dtype=compute)
    weight = PACKED if packed else WEIGHT
    assert linear(x, weight, BIAS, ADAPTER).dtype == compute
    assert linear(x, weight, BIAS, ADAPTER, dtype=jnp.float32).dtype == jnp.float32


def test_gradients_reach_input_and_adapter():
    x = draw(3, IN)
    dx, da = jax.grad(
        lambda x, a: linear(x, PACKED, None, a, scaling=0.5).sum(), argnums=(0, 1)
    )(x, ADAPTER)
    dense = nf4.dequantize(PACKED)
    a, b = ADAPTER["lora_A"], ADAPTER["lora_B"]
    # float32 sums of at most 64 terms, values of order ten.
    column = dense.sum(0) + 0.5 * b.sum(0) @ a
    np.testing.assert_allclose(dx, np.broadcast_to(column, (3, IN)), atol=5e-5)
    np.testing.assert_allclose(
        da["lora_B"], np.broadcast_to(0.5 * (x @ a.T).sum(0), (OUT, 4)), atol=5e-5
    )
    want = 0.5 * jnp.outer(b.sum(0), x.sum(0))
    np.testing.assert_allclose(da["lora_A"], want, atol=1e-4)


# --- The module ---


def test_the_module_reads_a_dense_a_packed_and_an_adapted_weight():
    x = draw(3, IN)
    module = Linear(OUT, Compute("float32", lora=LoraConfig(r=4, lora_alpha=2)))
    for weight in (WEIGHT, PACKED):
        params = {"weight": weight}
        np.testing.assert_array_equal(
            module.apply({"params": params}, x), linear(x, weight)
        )
        np.testing.assert_array_equal(
            module.apply({"params": params, "lora": ADAPTER}, x),
            linear(x, weight, None, ADAPTER, scaling=0.5),
        )


def test_a_fresh_module_makes_its_weight_in_file_orientation():
    module = Linear(OUT, use_bias=True, initializer_range=0.5)
    params = module.init(jax.random.key(0), draw(3, IN))["params"]
    assert params["weight"].shape == (OUT, IN) and params["bias"].shape == (OUT,)
    # 1,536 draws: five standard errors of a deviation.
    assert abs(float(params["weight"].std()) / 0.5 - 1) < 5 * 0.71 / np.sqrt(OUT * IN)


def test_an_adapter_without_its_configuration_is_refused():
    module = Linear(OUT, Compute("float32"))
    variables = {"params": {"weight": WEIGHT}, "lora": ADAPTER}
    with pytest.raises(UserError, match=r"has an adapter, .*Compute\(lora=lora_config"):
        module.apply(variables, draw(3, IN))


def test_dropout_is_active_with_a_key_only():
    config = LoraConfig(r=4, lora_dropout=0.5)
    module = Linear(OUT, Compute("float32", lora=config))
    variables = {"params": {"weight": WEIGHT}, "lora": ADAPTER}
    x = draw(3, IN)
    plain = module.apply(variables, x)
    np.testing.assert_array_equal(
        plain, linear(x, WEIGHT, None, ADAPTER, scaling=config.scaling)
    )
    keys = [{"dropout": jax.random.key(i)} for i in range(2)]
    one, two = (module.apply(variables, x, rngs=key) for key in keys)
    assert (one != plain).any() and (one != two).any()
    np.testing.assert_array_equal(one, module.apply(variables, x, rngs=keys[0]))
    # The base is not dropped: the average over many keys is the plain result.
    keys = jax.random.split(jax.random.key(9), 2000)
    mean = jax.vmap(lambda k: module.apply(variables, x, rngs={"dropout": k}))(
        keys
    ).mean(0)
    update = lora.delta(x, ADAPTER, config.scaling)
    spread = float(jnp.abs(update).max()) * 2
    assert jnp.abs(mean - plain).max() < 5 * spread / np.sqrt(2000)


@pytest.mark.parametrize(
    "field, value", [("dtype", "float64"), ("attention", "flash"), ("remat", "some")]
)
def test_a_way_of_computing_that_does_not_exist_is_refused(field, value):
    compute = Compute()
    object.__setattr__(compute, field, value)  # past the type checks of the tests
    with pytest.raises(UserError, match=rf"`{field}` must be one of .*, got '{value}'"):
        compute.__post_init__()


def test_compute_is_a_static_argument():
    assert hash(Compute(lora=LoraConfig())) == hash(Compute(lora=LoraConfig()))
