"""Rates, decays and schedules by parameter; the optimizers; the moving average."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import abstract_adapters
from qlora_jax.lora.targets import select
from qlora_jax.models.params import tree_bytes
from qlora_jax.planning.estimate import abstract_base, parameter_report
from qlora_jax.training import optimizer as adam8bit
from qlora_jax.training.config import ParameterGroup, TrainConfig
from qlora_jax.training.optimizer import (
    PART,
    SIGNED,
    UNSIGNED,
    Coded,
    _parts,
    averaged,
    decode,
    encode,
    make_optimizer,
    moving_average,
    scale_by_adam_8bit,
)
from qlora_jax.training.parameter_groups import (
    note_idle,
    optimizer_groups,
    rate_of,
    schedule,
)
from tests.models.reference import CONFIG as SMALL

CONFIG = dataclasses.replace(SMALL, num_hidden_layers=3, attention_bias=True)
EVERYTHING = LoraConfig(
    r=4,
    target_modules=("q_proj", "down_proj"),
    modules_to_save=("embed_tokens", "norm"),
    trainable_token_indices={"lm_head": (3, 5)},
    use_dora=True,
    bias="lora_only",
)
Q = ("model", "layers", "self_attn", "q_proj")


def selection(lora=EVERYTHING):
    return select(abstract_base(CONFIG), lora)


def by_path(config, lora=EVERYTHING):
    groups = optimizer_groups(config, selection(lora))
    return {path: group for group in groups for path in group.paths}


def draw(like, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32)), like
    )


def tree(lora=EVERYTHING):
    """Random values in the shape of what is trained."""
    return draw(abstract_adapters(abstract_base(CONFIG), lora))


def updates(optimizer, gradients, state, parameters=None):
    with jax.numpy_dtype_promotion("standard"):
        return optimizer.update(gradients, state, parameters)


def taken(optimizer, steps, parameters, gradients=draw):
    """Parameters after so many steps, and the state."""
    state = optimizer.init(parameters)

    @jax.jit
    def step(parameters, state, gradients):
        moved, state = updates(optimizer, gradients, state, parameters)
        return optax.apply_updates(parameters, moved), state

    for i in range(steps):
        parameters, state = step(parameters, state, gradients(parameters, 100 + i))
    return parameters, state


def assert_equal(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(np.testing.assert_array_equal, one, two)


# --- Which parameter learns how fast ---


def test_without_groups_it_is_optax_adamw_bit_for_bit():
    plain = LoraConfig(r=4, target_modules=("q_proj", "down_proj"))
    config = TrainConfig(steps=9, learning_rate=0.1, warmup_steps=2, weight_decay=0.1)
    expected = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule(config, 9), weight_decay=0.1),
    )
    start = tree(plain)
    want = taken(expected, 4, start)
    assert_equal(taken(make_optimizer(config, 9), 4, start), want)
    # The state of a run with groups has the same structure.
    grouped = TrainConfig(steps=9, loraplus_lr_ratio=4.0)
    state = make_optimizer(grouped, 9).init(start)
    assert jax.tree.structure(state) == jax.tree.structure(want[1])


def test_rates_of_embeddings_and_of_lora_b():
    config = TrainConfig(
        steps=9, learning_rate=0.5, embedding_learning_rate=0.25, loraplus_lr_ratio=8.0
    )
    rates = {p: g.rule.learning_rate for p, g in by_path(config).items()}
    assert rates[*Q, "lora_A"] == rates[*Q, "lora_magnitude_vector"] == 0.5
    assert rates[*Q, "lora_B"] == 4.0
    assert rates["model", "embed_tokens", "weight"] == 0.25
    assert rates["lm_head", "trainable_tokens_delta"] == 0.25
    assert rates["model", "norm", "weight"] == 0.5
    tables = LoraConfig(r=4, target_modules=("embed_tokens", "lm_head", "q_proj"))
    rates = {p: g.rule.learning_rate for p, g in by_path(config, tables).items()}
    assert rates["model", "embed_tokens", "lora_embedding_A"] == 0.25
    assert rates["model", "embed_tokens", "lora_embedding_B"] == 2.0
    assert (rates["lm_head", "lora_A"], rates["lm_head", "lora_B"]) == (0.25, 2.0)


def test_decay_is_not_for_norms_biases_and_magnitudes():
    groups = by_path(TrainConfig(steps=9, weight_decay=0.1))
    decayed = {path[-2:] for path, g in groups.items() if g.rule.weight_decay}
    assert decayed == {
        *((module, f"lora_{n}") for module in ("q_proj", "down_proj") for n in "AB"),
        ("embed_tokens", "weight"),
        ("lm_head", "trainable_tokens_delta"),
    }
    left = {path[-2:] for path in groups} - decayed
    magnitude = ("q_proj", "lora_magnitude_vector")
    assert left >= {("norm", "weight"), ("q_proj", "bias"), magnitude}
    asked = ParameterGroup("norm", weight_decay=0.2)
    groups = by_path(TrainConfig(steps=9, weight_decay=0.1, groups=(asked,)))
    assert groups["model", "norm", "weight"].rule.weight_decay == 0.2


def test_the_first_group_that_matches_counts_and_the_rest_is_as_without():
    config = TrainConfig(
        steps=9,
        learning_rate=0.5,
        loraplus_lr_ratio=2.0,
        embedding_learning_rate=0.125,
        groups=(
            ParameterGroup(r"q_proj\.lora_A$", learning_rate=0.0),
            ParameterGroup(r"layers\.\d+\.self_attn", lr_scheduler="cosine"),
            ParameterGroup("embed_tokens", weight_decay=0.3, warmup_steps=4),
        ),
    )
    groups = by_path(config)
    assert groups[*Q, "lora_A"].rule.learning_rate == 0.0
    assert groups[*Q, "lora_A"].rule.lr_scheduler == "linear"
    assert groups[*Q, "lora_B"].rule.learning_rate == 1.0
    assert groups[*Q, "lora_B"].rule.lr_scheduler == "cosine"
    rule = groups["model", "embed_tokens", "weight"].rule
    assert (rule.learning_rate, rule.weight_decay, rule.warmup_steps) == (0.125, 0.3, 4)
    # Everything is in one group, and the counts are those of the selection.
    groups = optimizer_groups(config, selection())
    counted = sum(group.parameters for group in groups)
    assert counted == sum(selection().groups().values())
    found = by_path(config)[*Q, "lora_A"]
    report = found.report()
    assert report["name"] == r"q_proj\.lora_A$" and report["parameters"] == 3 * 4 * 64
    assert "learning rate 0 (linear, warm-up 3%), weight decay 0" in str(found)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["q_porj"],
            r"group 1 \(`match` = 'q_porj'\): it matches nothing that is trained\. "
            r"Near names: model\.layers\.0\.self_attn\.q_proj\.",
        ),
        (
            [r"layers\.1\."],
            r"would divide an array: it takes model\.layers\.1\.self_attn\.q_proj\."
            r"lora_A and not model\.layers\.0\.self_attn\.q_proj\.lora_A",
        ),
        (["proj", "lora_A"], r"group 2 .* an earlier group has all that it matches"),
    ],
)
def test_groups_that_cannot_be_are_refused(patterns, message):
    groups = tuple(ParameterGroup(name, learning_rate=1.0) for name in patterns)
    with pytest.raises(UserError, match=message):
        optimizer_groups(TrainConfig(steps=9, groups=groups), selection())


def test_what_a_rate_of_0_leaves_as_it_is_is_said():
    def note(**settings):
        config = TrainConfig(steps=9, **settings)
        return note_idle(optimizer_groups(config, selection()))

    total = sum(selection().groups().values())
    assert note() is None
    assert f"0, of all {total:,} trained parameters: this run will learn" in note(
        learning_rate=0.0
    )
    some = note(groups=(ParameterGroup(r"q_proj\.lora_A$", learning_rate=0.0),))
    assert f"of {3 * 4 * 64} of {total:,} trained parameters is 0" in some
    # The embeddings alone learn: no slip, but said.
    some = note(learning_rate=0.0, embedding_learning_rate=0.1)
    assert "(group 'default')" in some


def test_a_layer_that_alone_is_trained_can_be_named():
    lora = LoraConfig(r=4, target_modules=("q_proj",), layers_to_transform=(1,))
    group = ParameterGroup(r"layers\.1\.", learning_rate=1.0)
    config = TrainConfig(steps=9, groups=(group,))
    (found,) = optimizer_groups(config, selection(lora))
    assert found.parameters == 2 * 4 * 64
    with pytest.raises(UserError, match="would divide an array"):
        make_optimizer(config, 9).init(tree(lora))
    make_optimizer(config, 9, selection(lora)).init(tree(lora))


def test_all_that_contradicts_the_model_is_said_at_once():
    norm_alone = {"model": {"norm": {"weight": jnp.zeros(64)}}}
    config = TrainConfig(
        steps=9,
        embedding_learning_rate=1.0,
        loraplus_lr_ratio=2.0,
        groups=(ParameterGroup("q_proj", learning_rate=1.0),),
    )
    with pytest.raises(UserError) as caught:
        optimizer_groups(config, norm_alone)
    message = str(caught.value)
    assert message.startswith("3 problems with the [train] settings:\n- train: ")
    assert "and nothing of embed_tokens or lm_head is trained" in message
    assert "and no lora_B is trained" in message
    assert "Trained are, for example, model.norm.weight" in message


def test_groups_train_as_optimizers_of_their_own():
    """Against plain optax: one AdamW for each group behind one clip."""
    cosine = ParameterGroup("embed_tokens", learning_rate=0.02, lr_scheduler="cosine")
    settings = {"learning_rate": 0.1, "weight_decay": 0.1, "loraplus_lr_ratio": 4.0}
    config = TrainConfig(steps=9, groups=(cosine,), **settings)
    kinds = {
        "lora_A": (0.1, 0.1, "linear"),
        "lora_B": (0.4, 0.1, "linear"),
        "tables": (0.02, 0.1, "cosine"),
        "rows": (0.1, 0.1, "linear"),
        "vectors": (0.1, 0.0, "linear"),
    }

    def label(path, _):
        names = [key.key for key in path]
        if "embed_tokens" in names:
            return "tables"
        if names[-1] in kinds:
            return names[-1]
        return "rows" if names[-1] == "trainable_tokens_delta" else "vectors"

    def adamw(rate, decay, kind):
        plain = TrainConfig(steps=9, learning_rate=rate, lr_scheduler=kind)
        return optax.adamw(schedule(plain, 9), weight_decay=decay)

    start = tree()
    each = {name: adamw(*kind) for name, kind in kinds.items()}
    labels = jax.tree_util.tree_map_with_path(label, start)
    expected = optax.chain(
        optax.clip_by_global_norm(1.0), optax.multi_transform(each, labels)
    )
    got, _ = taken(make_optimizer(config, 9), 3, start)
    want, _ = taken(expected, 3, start)
    # The same operations, fused otherwise: an ulp of each of three updates.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6, 1e-6), got, want)


def test_rates_of_all_groups_at_a_step():
    config = TrainConfig(steps=8, learning_rate=1.0, loraplus_lr_ratio=4.0)
    groups = optimizer_groups(config, selection())
    at = {group.name: float(rate_of(group.rule, 8)(2)) for group in groups}
    assert at == {"default": 0.75, "lora_B": 3.0}


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"),
    [(0.03, 33, 0), (0.03, 100, 3), (0.29, 100, 29), (5, 100, 5), (0.0, 9, 0)],
)
def test_a_warmup_below_one_is_a_share_of_the_steps(warmup, steps, expected):
    config = TrainConfig(steps=steps, learning_rate=1.0, warmup_steps=warmup)
    rates = np.asarray(schedule(config, steps)(np.arange(steps)))
    assert rates.argmax() == expected and rates.max() == 1.0


# --- The optimizers ---


@pytest.mark.parametrize("name", ["adamw_8bit", "lion", "adafactor"])
def test_every_optimizer_finds_a_minimum(name):
    rng = np.random.default_rng(0)
    goal = {"w": jnp.asarray(rng.uniform(-1, 1, (64, 128)), jnp.float32)}
    rates = {"learning_rate": 0.05, "max_grad_norm": None}
    optimizer = make_optimizer(TrainConfig(steps=150, optimizer=name, **rates), 150)

    def gradients(parameters, _):
        return jax.tree.map(jnp.subtract, parameters, goal)

    start = jax.tree.map(jnp.zeros_like, goal)
    parameters, _ = taken(optimizer, 150, start, gradients)
    # From distances of up to 1; the rates fall linearly to 0. Lion's steps are of one
    # size, so that it goes to and fro by a few of the last ones.
    assert float(jnp.abs(parameters["w"] - goal["w"]).max()) < 0.05


def test_adafactor_clips_each_layer_by_itself():
    """A layer's update does not depend on what lies beside it in the stack."""
    config = TrainConfig(steps=9, optimizer="adafactor", max_grad_norm=None)
    optimizer = make_optimizer(config, 9)
    one, other = draw([jnp.zeros((2, 4, 8))] * 2)
    other = other.at[0].set(one[0]).at[1].multiply(100.0)
    moved = []
    for stack in (one, other):
        parameters = {"model": {"layers": {"w": jnp.zeros_like(stack)}}}
        state = optimizer.init(parameters)
        for scale in (1.0, 5.0):
            gradients = {"model": {"layers": {"w": scale * stack}}}
            update, state = updates(optimizer, gradients, state, parameters)
        moved.append(update["model"]["layers"]["w"])
    np.testing.assert_array_equal(moved[0][0], moved[1][0])
    # And it is clipped: to a root mean square of the learning rate of step 2 of 9.
    rms = float(jnp.sqrt(jnp.mean(jnp.square(moved[0][0]))))
    assert rms == pytest.approx(2e-4 * 8 / 9, rel=1e-5)


# --- Moments of 8 bits ---


@pytest.mark.parametrize("table", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
def test_codes_are_those_of_the_nearest_values(table):
    assert table.shape == (256,) and (np.diff(table) > 0).all()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((9, 256)) * 10 ** rng.uniform(-7, 2, (9, 256))
    x = (x if table[0] < 0 else np.abs(x)).astype(np.float32)
    x[0] = 0  # a block of zeros
    coded = encode(jnp.asarray(x), table)
    assert coded.codes.dtype == jnp.uint8 and coded.absmax.shape == (9,)
    got = np.asarray(decode(coded, table))
    scale = np.abs(x).max(axis=1, keepdims=True)
    scaled = x / np.where(scale > 0, scale, 1)
    nearest = np.abs(scaled[..., None] - table).min(axis=-1) * scale
    # Of the second moment, what is not 0 is never coded as 0.
    lifted = (x > 0) & (scaled < (table[0] + table[1]) / 2) & (table[0] == 0)
    # Rounding of the quotient and of the product.
    assert (np.abs(got - x) <= nearest + 1e-6 * scale)[~lifted].all()
    assert (got[0] == 0).all()
    if table[0] == 0:
        assert lifted.any() and (got[x > 0] > 0).all()


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (16, (1, 16)),
        (PART, (1, PART)),
        (2 * PART, (2, PART)),
        (2_052_096, (128, 16_032)),  # the embedding of an 8B model
        (16_411, (2, PART)),  # a prime number: the last part is filled up
    ],
)
def test_parts_come_out_even_where_they_can(blocks, expected):
    count, size = _parts(blocks)
    assert (count, size) == expected and count * size >= blocks


def test_moments_of_8_bits_take_a_quarter_and_follow_adam():
    start = {"large": jnp.zeros((2, 16, 256)), "small": jnp.zeros((4, 100))}
    eight, adam = scale_by_adam_8bit(0.9, 0.999, 1e-8), optax.scale_by_adam()
    state, full = eight.init(start), adam.init(start)
    assert isinstance(state.mu["large"], Coded)
    assert state.nu["small"].dtype == jnp.float32
    numbers = start["large"].size
    held = tree_bytes((state.mu["large"], state.nu["large"]))
    assert held == 2 * numbers + 2 * 4 * numbers // 256
    for i in range(20):
        g = draw(start, i)
        want, full = updates(adam, g, full)
        got, state = updates(eight, g, state)
    np.testing.assert_allclose(got["small"], want["small"], rtol=1e-5)  # float32
    # Of updates of order one: the first moment is kept to 0.7 % of its block's largest
    # element and decays at 0.9 a step, so that ten such errors add up.
    error = jnp.abs(got["large"] - want["large"])
    assert 0 < float(error.mean()) < 0.02


def test_parts_change_nothing(monkeypatch):
    """100 blocks and a piece of one: at once, in even parts, in parts filled up."""
    start = {"w": jnp.zeros((33, 777))}
    eight, results = scale_by_adam_8bit(0.9, 0.999, 1e-8), []
    for size in (PART, 17, 16):
        monkeypatch.setattr(adam8bit, "PART", size)
        state = eight.init(start)
        assert state.mu["w"].absmax.shape == (101,)
        for _ in range(2):
            out, state = updates(eight, draw(start), state)
        results.append((out["w"], state.mu["w"], state.nu["w"]))
    for out, *moments in results[1:]:
        # Other programs round otherwise, and a number between two codes may go to
        # either: few do.
        assert np.isclose(out, results[0][0], rtol=1e-6).mean() > 0.999
        for one, two in zip(moments, results[0][1:], strict=True):
            assert (one.codes == two.codes).mean() > 0.999
            np.testing.assert_allclose(one.absmax, two.absmax, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "lion", "adafactor"])
def test_a_gradient_of_zeros_moves_nothing(name):
    """As of the rows and columns that fill up a lower rank."""
    optimizer = make_optimizer(TrainConfig(steps=9, optimizer=name), 9)
    parameters = {"w": jnp.ones((64, 128))}
    state = optimizer.init(parameters)
    g = {"w": jnp.ones((64, 128)).at[:, 64:].set(0.0)}
    for _ in range(2):
        update, state = updates(optimizer, g, state, parameters)
    assert (update["w"][:, 64:] == 0).all() and (update["w"][:, :64] < 0).all()


def test_bytes_of_each_optimizer_are_counted():
    lora = LoraConfig(r=64)  # arrays of 6,144 numbers and more

    def counted(name):
        train = TrainConfig(steps=1, optimizer=name)
        return parameter_report(CONFIG, lora, train=train).optimizer_bytes

    trained = parameter_report(CONFIG, lora).trainable_parameters
    assert counted("adamw") == 8 * trained + 8
    assert counted("lion") == 4 * trained + 8
    assert 2 * trained < counted("adamw_8bit") < 2.04 * trained


# --- The moving average ---


def test_the_moving_average_is_that_of_the_parameters_after_each_step():
    config = TrainConfig(steps=30, learning_rate=0.1, ema_decay=0.5)
    plain = TrainConfig(steps=30, learning_rate=0.1)
    start = draw({"w": jnp.zeros(5)})
    want = np.asarray(start["w"], np.float64)
    for t in range(1, 13):
        after, _ = taken(make_optimizer(plain, 30), t, start)
        decay = min(0.5, t / (t + 9))
        want = decay * want + (1 - decay) * np.asarray(after["w"], np.float64)
    parameters, state = taken(make_optimizer(config, 30), 12, start)
    np.testing.assert_array_equal(parameters["w"], after["w"])
    np.testing.assert_allclose(averaged(state)["w"], want, rtol=1e-5)  # float32
    assert averaged(make_optimizer(plain, 30).init(start)) is None
    # The step donates parameters and average: they share no buffer.
    state = moving_average(0.5).init(start)
    assert state.ema["w"].unsafe_buffer_pointer() != start["w"].unsafe_buffer_pointer()
