import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import lora, nf4
from qlora_jax.config import PROJECTIONS
from qlora_jax.errors import UserError
from qlora_jax.lora_config import LoraConfig

L, D, F, V = 3, 64, 96, 50
ATTENTION, MLP = PROJECTIONS[:4], PROJECTIONS[4:]


def abstract(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def base(*, tied=False, quantized=False):
    """Shapes of a small model, of arrays or packed leaves."""

    def linear(out, inner):
        if quantized:
            return {
                "weight": nf4.abstract(
                    (out, inner), double_quant=True, dtype="float32", leading=(L,)
                ),
                "bias": abstract(L, out),
            }
        return {"weight": abstract(L, out, inner)}

    tree = {
        "model": {
            "embed_tokens": {"weight": abstract(V, D)},
            "layers": {
                "input_layernorm": {"weight": abstract(L, D)},
                "post_attention_layernorm": {"weight": abstract(L, D)},
                "self_attn": {name: linear(D, D) for name in ATTENTION},
                "mlp": {
                    "gate_proj": linear(F, D),
                    "up_proj": linear(F, D),
                    "down_proj": linear(D, F),
                },
            },
            "norm": {"weight": abstract(D)},
        }
    }
    if not tied:
        tree["lm_head"] = {"weight": abstract(V, D)}
    return tree


PATH = "model.layers.3.self_attn.q_proj"


@pytest.mark.parametrize(
    "targets, path, selected",
    [
        (("q_proj",), PATH, True),
        (("self_attn.q_proj",), PATH, True),
        ((PATH,), PATH, True),
        (("_proj",), PATH, False),  # a suffix of whole path parts
        (("v_proj", "q_proj"), PATH, True),
        (("layers.3",), PATH, False),
        (("lm_head",), "lm_head", True),
        ("all-linear", PATH, True),
        ("all-linear", "lm_head", False),
        ("q_proj", PATH, False),  # a string is a pattern for the whole path
        (r".*q_proj", PATH, True),
        (r".*\.layers\.[12]\..*", PATH, False),
        (r"model\.layers\.3", PATH, False),
    ],
)
def test_modules_are_matched_as_peft_does(targets, path, selected):
    assert lora.matches(path, targets) is selected


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_linear_modules_are_the_projections_and_an_untied_head(tied, quantized):
    found = lora.linear_modules(base(tied=tied, quantized=quantized))
    stack = ("model", "layers")
    assert found[(*stack, "mlp", "down_proj")] == (D, F, L)
    assert found[(*stack, "self_attn", "k_proj")] == (D, D, L)
    assert (("lm_head",) in found) is not tied
    assert len(found) == 7 + (not tied)
    if not tied:
        assert found[("lm_head",)] == (V, D, None)


def test_targets_select_modules_in_all_layers():
    chosen = lora.targeted_modules(base(), LoraConfig(target_modules=("q_proj",)))
    assert list(chosen) == [("model", "layers", "self_attn", "q_proj")]
    everything = lora.targeted_modules(base(), LoraConfig(target_modules="all-linear"))
    assert {path[-1] for path in everything} == set(PROJECTIONS)
    head = lora.targeted_modules(base(), LoraConfig(target_modules=("lm_head",)))
    assert head == {("lm_head",): (V, D, None)}


def test_a_target_that_matches_nothing_names_its_neighbours():
    config = LoraConfig(target_modules=("q_projj",))
    message = "matches no linear module .* Did you mean .*q_proj"
    with pytest.raises(UserError, match=message):
        lora.targeted_modules(base(), config)
    config = LoraConfig(target_modules=("embed_tokens",))
    with pytest.raises(UserError, match="Linear modules here: down_proj, gate_proj"):
        lora.targeted_modules(base(), config)


@pytest.mark.parametrize("targets", [r".*\.layers\.(0|2)\..*q_proj", "layers"])
def test_a_target_in_some_layers_only_is_refused(targets):
    if targets == "layers":
        targets = ("layers.1.self_attn.q_proj",)
    config = LoraConfig(target_modules=targets)
    with pytest.raises(UserError, match=r"'q_proj' in [12] of 3 layers"):
        lora.targeted_modules(base(), config)


def test_targets_that_select_nothing_beside_others_are_listed():
    config = LoraConfig(target_modules=("q_proj", "c_attn", "lm_head"))
    assert lora.unmatched_targets(base(), config) == ("c_attn",)
    assert lora.unmatched_targets(base(tied=True), config) == ("c_attn", "lm_head")
    pattern = LoraConfig(target_modules=".*nothing")
    assert lora.unmatched_targets(base(), pattern) == ()


def test_paths_are_spelled_as_hugging_face_does():
    path = ("model", "layers", "mlp", "up_proj")
    assert lora.dotted(path, 2) == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert lora.dotted(("lm_head",), None) == ["lm_head"]


@pytest.mark.parametrize("quantized", [False, True])
def test_fresh_adapters_have_the_shapes_of_their_modules_and_b_is_zero(quantized):
    config = LoraConfig(r=4, target_modules=(*PROJECTIONS, "lm_head"))
    tree = lora.init_adapters(jax.random.key(0), base(quantized=quantized), config)
    down = tree["model"]["layers"]["mlp"]["down_proj"]
    assert down["lora_A"].shape == (L, 4, F) and down["lora_B"].shape == (L, D, 4)
    assert tree["lm_head"]["lora_A"].shape == (4, D)
    assert tree["lm_head"]["lora_B"].shape == (V, 4)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert leaf.dtype == jnp.float32
        assert bool(jnp.any(leaf)) == ("lora_A" in str(path[-1]))
    assert len(jax.tree.leaves(tree)) == 2 * 8


def test_a_is_uniform_up_to_one_over_the_root_of_its_inputs():
    config = LoraConfig(r=64, target_modules=("down_proj",))
    tree = lora.init_adapters(jax.random.key(1), base(), config)
    a = np.asarray(tree["model"]["layers"]["mlp"]["down_proj"]["lora_A"])
    bound = 1 / np.sqrt(F)
    assert np.abs(a).max() <= bound and np.abs(a).max() > 0.999 * bound
    # 18,432 draws: mean and deviation within five standard errors.
    assert abs(a.mean()) < 5 * bound / np.sqrt(3 * a.size)
    assert abs(a.std() / (bound / np.sqrt(3)) - 1) < 5 * 0.45 / np.sqrt(a.size)


def test_gaussian_is_normal_with_deviation_one_over_r():
    config = LoraConfig(
        r=64, target_modules=("down_proj",), init_lora_weights="gaussian"
    )
    tree = lora.init_adapters(jax.random.key(1), base(), config)
    a = np.asarray(tree["model"]["layers"]["mlp"]["down_proj"]["lora_A"])
    assert abs(a.mean()) < 5 / 64 / np.sqrt(a.size)
    assert abs(a.std() * 64 - 1) < 5 * 0.71 / np.sqrt(a.size)
    assert np.abs(a).max() > 3 / 64  # it has tails


def test_modules_and_layers_start_differently_and_by_their_name_alone():
    key = jax.random.key(3)
    few = LoraConfig(r=4, target_modules=("q_proj", "k_proj"))
    one = lora.init_adapters(key, base(), few)["model"]["layers"]["self_attn"]
    many = lora.init_adapters(key, base(), LoraConfig(r=4))["model"]["layers"]
    np.testing.assert_array_equal(
        one["q_proj"]["lora_A"], many["self_attn"]["q_proj"]["lora_A"]
    )
    assert not np.array_equal(one["q_proj"]["lora_A"], one["k_proj"]["lora_A"])
    assert not np.array_equal(one["q_proj"]["lora_A"][0], one["q_proj"]["lora_A"][1])
    again = lora.init_adapters(key, base(), few)["model"]["layers"]["self_attn"]
    jax.tree.map(np.testing.assert_array_equal, one, again)
    other = lora.init_adapters(jax.random.key(4), base(), few)
    other = other["model"]["layers"]["self_attn"]
    assert not np.array_equal(one["q_proj"]["lora_A"], other["q_proj"]["lora_A"])


def test_init_works_under_jit_and_eval_shape():
    config = LoraConfig(r=4)
    made = jax.eval_shape(
        lambda key: lora.init_adapters(key, base(), config), jax.random.key(0)
    )
    assert len(jax.tree.leaves(made)) == 14


# --- delta ---


def adapter(r=4, out=24, inner=40, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "lora_A": jnp.asarray(rng.standard_normal((r, inner)), jnp.float32),
        "lora_B": jnp.asarray(rng.standard_normal((out, r)), jnp.float32),
    }


def test_delta_is_scaling_times_b_a_x():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, 40)), jnp.float32)
    parts = adapter()
    got = lora.delta(x, parts, 0.37)
    a, b = (np.asarray(parts[k], np.float64) for k in ("lora_A", "lora_B"))
    want = 0.37 * np.asarray(x, np.float64) @ a.T @ b.T
    # Sums of 40 and 4 float32 terms of order one.
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_delta_in_bf16_keeps_float32_gradients_of_the_adapter():
    x = jnp.ones((3, 40), jnp.bfloat16)
    gradient = jax.grad(lambda p: lora.delta(x, p, 2.0).astype(jnp.float32).sum())(
        adapter()
    )
    assert lora.delta(x, adapter(), 2.0).dtype == jnp.bfloat16
    assert {g.dtype for g in gradient.values()} == {jnp.dtype("float32")}


def test_no_key_or_no_probability_means_no_dropout():
    x = jnp.ones((7, 40))
    plain = lora.delta(x, adapter(), 1.0)
    np.testing.assert_array_equal(lora.delta(x, adapter(), 1.0, dropout=0.5), plain)
    with_key = lora.delta(x, adapter(), 1.0, dropout=0.0, key=jax.random.key(0))
    np.testing.assert_array_equal(with_key, plain)


def test_dropout_drops_inputs_and_keeps_their_mean(getkey):
    # The identity as adapter shows the dropped input itself.
    eye = {"lora_A": jnp.eye(40), "lora_B": jnp.eye(40)}
    x = jnp.ones((2000, 40))
    y = np.asarray(lora.delta(x, eye, 1.0, dropout=0.25, key=getkey()))
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.75], rtol=1e-6)
    # 80,000 draws of deviation sqrt(0.25 / 0.75): five standard errors.
    assert abs(y.mean() - 1) < 5 * np.sqrt(0.25 / 0.75 / y.size)
    columns = (y == 0).mean(0)
    assert abs(columns - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 2000)


def test_dropout_depends_on_its_key_alone(getkey):
    x, key = jnp.ones((4, 40)), getkey()
    one = lora.delta(x, adapter(), 1.0, dropout=0.5, key=key)
    np.testing.assert_array_equal(
        one, lora.delta(x, adapter(), 1.0, dropout=0.5, key=key)
    )
    assert (one != lora.delta(x, adapter(), 1.0, dropout=0.5, key=getkey())).any()


def test_the_error_repeats_what_was_asked_for():
    config = LoraConfig(target_modules=("wq",))
    with pytest.raises(UserError, match=re.escape("`target_modules`=('wq',) matches")):
        lora.init_adapters(jax.random.key(0), base(), config)
