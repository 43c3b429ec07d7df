import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax import nf4
from qlora_jax.data.encoding import IGNORE
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.init import init_adapters
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.models.params import tree_bytes
from qlora_jax.planning.step import Step, abstract_arguments, lower
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.objectives import NEXT_TOKEN, loss_sum
from qlora_jax.training.optimizer import make_optimizer
from qlora_jax.training.parameter_groups import schedule
from qlora_jax.training.step import eval_step, init_state, train_step
from tests.models import reference
from tests.models.reference import CONFIG, dequantized, equations, rows

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "down_proj"))
DROPOUT = dataclasses.replace(LORA, lora_dropout=0.3)


def llama(lora=LORA, config=CONFIG, **compute):
    return Llama(config, Compute(**{"dtype": "float32", **compute}, lora=lora))


def base():
    return reference.base(packed=True)


def adapters(lora=LORA):
    return reference.adapters(lora)


def moved(state):
    """What a step has added to the adapters."""
    return jax.tree.map(jnp.subtract, state.adapters, adapters())


def window(micro, count, seed=0):
    """Rows cut into `micro` micro-batches: [A, B, T]."""
    flat = rows(micro * count, seed=seed)
    return jax.tree.map(lambda a: a.reshape(micro, count, -1), flat)


@functools.cache
def step_of(model, optimizer):
    """The jitted step; one for each model and optimizer, so compilations are shared."""
    return jax.jit(
        functools.partial(train_step, model=model, optimizer=optimizer),
        donate_argnums=0,
    )


ADAM = make_optimizer(TrainConfig(steps=20, learning_rate=1e-2), 20)
SGD = optax.sgd(1.0)  # an update is then the gradient itself


def begin(optimizer=ADAM, tree=None, seed=0):
    tree = jax.tree.map(jnp.copy, adapters() if tree is None else tree)
    return init_state(tree, optimizer, jax.random.key(seed))


def first_step(optimizer=SGD, batch=None, **model):
    """State and metrics after one step on four rows."""
    step = step_of(llama(**model), optimizer)
    return step(begin(optimizer), base(), batch or window(1, 4))


@functools.partial(jax.jit, static_argnames="model")
def loss_and_gradients(tree, batch, key=None, *, model):
    return jax.value_and_grad(loss_sum)(tree, base(), batch, model=model, key=key)


def all_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def all_close(a, b, tolerance):
    """Within `tolerance` of the largest element of each leaf."""

    def leaf(x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.abs(x - y).max() <= tolerance * max(np.abs(y).max(), 1e-3)

    jax.tree.map(leaf, a, b)


# Gradients are float32 sums over some 100 tokens and through two layers, in another
# order: measured below 2e-6 of the largest element.
GRADIENT = 1e-5


# --- Laws of a step ---


def test_eight_steps_on_one_batch():
    step = jax.jit(
        functools.partial(train_step, model=llama(), optimizer=ADAM),
        donate_argnums=0,
        compiler_options={  # as in use, not as other tests compile
            "xla_backend_optimization_level": 3,
            "xla_llvm_disable_expensive_passes": False,
        },
    )
    before = jax.tree.map(np.array, base())
    state, losses = begin(), []
    first = jax.tree.leaves(state.adapters)[0]
    for _ in range(8):
        state, metrics = step(state, base(), window(1, 4))
        assert metrics["finite"]
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0]
    assert step._cache_size() == 1
    # The state is donated; the base is not, and stays as it is.
    assert first.is_deleted()
    all_equal(base(), before)
    assert state.step == 8
    all_equal(jax.random.key_data(state.key), jax.random.key_data(jax.random.key(0)))


@pytest.mark.parametrize("target", ["down_proj", "lm_head"])
def test_the_optimizer_covers_exactly_the_trained_leaves(target):
    tree = adapters(LoraConfig(r=4, target_modules=("q_proj", target)))
    state = jax.tree.leaves(begin(tree=tree).opt_state)
    moments = [(a.shape, a.dtype) for a in state if a.ndim]  # the others are counts
    trained = [(leaf.shape, jnp.float32) for leaf in jax.tree.leaves(tree)]
    assert moments == 2 * trained


def test_accumulated_micro_batches_equal_one_large_batch():
    # The micro-batches hold different numbers of supervised tokens: the mean of their
    # means would be another number.
    labels = window(4, 2)["labels"]
    counts = [int((part[:, 1:] != IGNORE).sum()) for part in labels]
    assert len(set(counts)) > 1
    big, first = first_step(batch=window(1, 8))
    total, _ = loss_and_gradients(adapters(), rows(8), model=llama())
    assert first["supervised_tokens"] == sum(counts)
    np.testing.assert_allclose(first["loss"], total / sum(counts), rtol=1e-5)
    many, metrics = first_step(batch=window(4, 2))
    # Another order of the float32 sum over tokens.
    np.testing.assert_allclose(metrics["loss"], first["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], first["grad_norm"], rtol=1e-5)
    assert metrics["supervised_tokens"] == first["supervised_tokens"]
    all_close(moved(many), moved(big), GRADIENT)


def lift(self, variables):
    """Does as `Compute.arrange` for the Pallas kernels, here with XLA's."""
    params, stacks = nf4.lift_stacks(variables["params"])
    return {**variables, "params": params, "stacks": stacks}


@pytest.mark.parametrize(
    "more, remat",
    [
        ({}, "full"),
        ({}, "save_matmuls"),
        ({"use_dora": True}, "full"),
        ({"lora_dropout": 0.3}, "none"),
    ],
)
def test_lifted_stacks_train_the_same_and_are_never_copied(more, remat, monkeypatch):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **more)
    model, batch = llama(lora, remat=remat), window(2, 1)
    state = begin(tree=adapters(lora))
    temporaries, results = [], []
    for lifted in (False, True):
        if lifted:
            monkeypatch.setattr(Compute, "arrange", lift)
        step = functools.partial(train_step, model=model, optimizer=SGD)
        traced = jax.jit(step).trace(state, base(), batch)
        compiled = traced.lower().compile()
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
        after, metrics = compiled(state, base(), batch)
        results.append((after.adapters, metrics))
        found = equations(traced.jaxpr.jaxpr)
        loops = [equation for equation in found if equation.primitive.name == "scan"]
        written = [v.aval for loop in loops for v in loop.outvars]
        assert written
        # No packed stack leaves a loop, nor a weight of all layers dequantized.
        assert not [a for a in written if a.dtype == jnp.uint8]
        assert not [a for a in written if a.shape[:1] == (2,) and a.size >= 2 * 64 * 32]
    all_equal(*results)
    # The numbers of the layers, and what aligns their buffers.
    assert temporaries[1] <= temporaries[0] + 4096


JOINED = {"lora_products": "joined"}


@functools.cache
def plain_gradient():
    """The loss and the gradient of a loop that keeps everything."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    base()  # made before anything is traced
    model = llama(lora, attention="xla", remat="none")
    return loss_and_gradients(adapters(lora), rows(3), model=model)


@pytest.mark.parametrize(
    ("choice", "remat"),
    [
        *itertools.product(
            [{"scan_layers": False}, JOINED],
            ["none", "full", "save_attention", "save_matmuls"],
        ),
        (JOINED | {"norms": "fused"}, "none"),
        (JOINED | {"norms": "fused"}, "save_matmuls"),
        (JOINED | {"activation": "fused"}, "none"),
        (JOINED | {"norms": "fused", "activation": "fused"}, "save_matmuls"),
    ],
    ids=str,
)
def test_every_choice_gives_every_adapter_the_same_gradient(choice, remat):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    base()  # made before anything is traced
    choices = {"attention": "xla", "remat": remat}
    loss, gradients = loss_and_gradients(
        adapters(lora), rows(3), model=llama(lora, **choices, **choice)
    )
    want, want_gradients = plain_gradient()
    np.testing.assert_allclose(loss, want, rtol=1e-6)  # float32 sums
    all_close(gradients, want_gradients, GRADIENT)


def test_packed_documents_train_like_separate_rows():
    parts = [rows(1, n, seed=n) for n in (7, 5, 4)]
    # Nothing predicts the first token of a document.
    parts = [{**part, "labels": part["labels"].at[:, 0].set(IGNORE)} for part in parts]
    segments, positions = [1] * 7 + [2] * 5 + [3] * 4, [*range(7), *range(5), *range(4)]
    packed = {
        "segment_ids": jnp.asarray([segments], jnp.int32),
        "positions": jnp.asarray([positions], jnp.int32),
    }
    padded = {}  # the same documents as rows
    for key, fill in (("tokens", 0), ("labels", IGNORE)):
        texts = [part[key] for part in parts]
        packed[key] = jnp.concatenate(texts, axis=1)
        pads = [((0, 0), (0, 7 - text.shape[1])) for text in texts]
        texts = map(functools.partial(jnp.pad, constant_values=fill), texts, pads)
        padded[key] = jnp.concatenate(list(texts))
    loss, gradients = loss_and_gradients(adapters(), packed, model=llama())
    want, want_gradients = loss_and_gradients(adapters(), padded, model=llama())
    np.testing.assert_allclose(loss, want, rtol=1e-6)  # float32 sums
    all_close(gradients, want_gradients, GRADIENT)


def test_loss_and_gradients_are_those_of_plain_autodiff():
    # Through chunked loss, blockwise attention, packed products and recomputation, and
    # past all of them: eager attention, dense weights, logits of all tokens.
    lora = LoraConfig(r=4, target_modules=("lm_head", "v_proj"))
    tree, batch = adapters(lora), rows(3)
    value, got = loss_and_gradients(tree, batch, model=llama(lora))
    plain = llama(lora, attention="eager", remat="none")

    def loss(tree):
        variables = {"params": dequantized(base()), "lora": tree}
        logits = plain.apply(variables, batch["tokens"])
        logp = jax.nn.log_softmax(logits[:, :-1])
        targets = batch["labels"][:, 1:]
        picked = jnp.take_along_axis(logp, jnp.maximum(targets, 0)[..., None], -1)
        return -jnp.where(targets == IGNORE, 0.0, picked[..., 0]).sum()

    want_value, want = jax.jit(jax.value_and_grad(loss))(tree)
    np.testing.assert_allclose(value, want_value, rtol=1e-5)  # float32
    all_close(got, want, GRADIENT)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrow_step_keeps_adapters_moments_and_loss_in_float32(dtype):
    narrow, metrics = first_step(dtype=dtype)
    assert metrics["finite"] and metrics["loss"].dtype == jnp.float32
    trees = narrow.adapters, moved(narrow), moved(first_step()[0])
    for leaf, got, want in zip(*map(jax.tree.leaves, trees), strict=True):
        assert leaf.dtype == jnp.float32
        # Roundings of 2^-8 in some 20 operations of each layer, adding up at random.
        error, size = (np.linalg.norm(np.asarray(d)) for d in (got - want, want))
        assert error <= 0.05 * size


# --- Dropout ---


def test_dropout_changes_from_step_to_step_and_from_micro_batch_to_micro_batch():
    optimizer = optax.sgd(0.0)  # the adapters stay: only the masks can differ
    step = step_of(llama(DROPOUT), optimizer)
    batch = window(1, 4)
    twice = jax.tree.map(lambda a: jnp.concatenate([a, a]), batch)

    def losses(step, batch, seed=0):
        state = begin(optimizer, seed=seed)
        out = []
        for _ in range(3):
            state, metrics = step(state, base(), batch)
            out.append(float(metrics["loss"]))
        return out

    first = losses(step, batch)
    assert len(set(first)) == 3
    assert losses(step, batch) == first
    assert not set(losses(step, batch, seed=1)) & set(first)
    # Two equal micro-batches: with equal masks their mean would be that of one.
    assert abs(losses(step, twice)[0] - first[0]) > 1e-5


def test_evaluation_has_no_dropout():
    evaluate = jax.jit(eval_step, static_argnames="model")
    with_dropout = evaluate(adapters(), base(), rows(4), model=llama(DROPOUT))
    all_equal(with_dropout, evaluate(adapters(), base(), rows(4), model=llama()))


# --- Steps that are not finite or have no labels ---


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_only_the_step_number(bad):
    step = step_of(llama(), ADAM)
    state, _ = step(begin(), base(), window(1, 4))  # moments that are not zero
    kept = jax.tree.map(np.array, (state.adapters, state.opt_state))
    norm = base()["model"]["norm"]["weight"]
    model = {**base()["model"], "norm": {"weight": norm.at[3].set(bad)}}
    state, metrics = step(state, {**base(), "model": model}, window(1, 4))
    assert not metrics["finite"]
    assert state.step == 2
    all_equal((state.adapters, state.opt_state), kept)
    state, metrics = step(state, base(), window(1, 4))
    assert metrics["finite"]
    first = jax.tree.leaves(kept[0])[0]
    assert not np.array_equal(jax.tree.leaves(state.adapters)[0], first)
    assert step._cache_size() == 1


def test_a_finite_loss_with_a_gradient_that_is_not_changes_nothing():
    def steep(tree, *args, **keywords):
        # The derivative of a square root at 0 is infinite.
        return loss_sum(tree, *args, **keywords) + jnp.sqrt(
            0.0 * jax.tree.leaves(tree)[0].sum()
        )

    objective = NEXT_TOKEN._replace(loss_sum=steep)
    state, metrics = jax.jit(
        functools.partial(train_step, model=llama(), optimizer=SGD, objective=objective)
    )(begin(SGD), base(), window(1, 4))
    assert np.isfinite(metrics["loss"]) and not metrics["finite"]
    all_equal(state.adapters, adapters())


def test_a_window_without_supervision_is_a_step_of_zero():
    batch = window(1, 4)
    batch["labels"] = jnp.full_like(batch["labels"], IGNORE)
    state, metrics = first_step(batch=batch)
    assert metrics["finite"]
    for name in ("loss", "grad_norm", "supervised_tokens"):
        assert metrics[name] == 0
    all_equal(state.adapters, adapters())


# --- State ---


def test_a_restored_state_continues_bit_for_bit():
    step = step_of(llama(DROPOUT), ADAM)
    state = begin(seed=3)
    for i in range(2):
        state, _ = step(state, base(), window(1, 4, seed=i))
    stored = dataclasses.replace(state, key=jax.random.key_data(state.key))
    stored = jax.tree.map(np.array, stored)
    through, _ = step(state, base(), window(1, 4, seed=9))
    restored = jax.tree.map(jnp.asarray, stored)
    restored = dataclasses.replace(restored, key=jax.random.wrap_key_data(restored.key))
    again, _ = step(restored, base(), window(1, 4, seed=9))
    all_equal((through.adapters, through.opt_state), (again.adapters, again.opt_state))


# --- Weight decay and masks ---


def test_weight_decay_does_not_change_untrained_parts():
    lora = LoraConfig(
        r=4,
        target_modules=("q_proj", "layers.0.mlp.up_proj"),
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        use_dora=True,
        modules_to_save=("layers.1.input_layernorm",),
        trainable_token_indices=(3, 9),
    )
    # Which part of each array is trained, by the configuration above.
    q, up = np.zeros((2, 2, 4), bool), np.zeros((2, 2, 4), bool)
    q[:, 0], q[:, 1, :2], up[:, 0] = True, True, True
    both, first, second = np.asarray([[[1], [1]], [[1], [0]], [[0], [1]]], bool)
    used = {
        ("input_layernorm", "weight"): second,
        ("embed_tokens", "trainable_tokens_delta"): both,
    }
    for name, ranks, layers in (("q_proj", q, both), ("up_proj", up, first)):
        used[name, "lora_A"] = ranks[0][..., None]
        used[name, "lora_B"] = ranks[1][:, None]
        used[name, "lora_magnitude_vector"] = layers
    settings = TrainConfig(steps=6, learning_rate=1e-2, weight_decay=0.3)
    optimizer = make_optimizer(settings, 6)
    step = step_of(llama(lora), optimizer)
    start = init_adapters(jax.random.key(1), base(), lora)
    before = jax.tree.map(np.array, base())
    state, losses = begin(optimizer, start), []
    batch = window(1, 4)
    batch["tokens"] = batch["tokens"].at[:, :, :2].set(jnp.asarray([3, 9]))
    for _ in range(6):
        state, metrics = step(state, base(), batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.01
    for (path, new), old in zip(
        jax.tree_util.tree_leaves_with_path(state.adapters),
        jax.tree.leaves(start),
        strict=True,
    ):
        name = path[-2].key, path[-1].key
        new, old = np.asarray(new), np.asarray(old)
        mask = np.broadcast_to(used.pop(name), new.shape)
        assert not new[~mask].any() and not old[~mask].any(), name
        assert (new != old)[mask].mean() > 0.95, name
    assert not used
    all_equal(base(), before)


# --- Schedule and optimizer ---


def transformers_factor(kind, step, warmup, total):
    """`get_scheduler` of transformers: the factor of the learning rate."""
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    if kind == "linear":
        return max(0.0, (total - step) / max(1, total - warmup))
    if kind == "cosine":
        return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    return 1.0


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup, total", [(0, 10), (3, 10), (10, 10), (1, 1), (0, 1)])
def test_learning_rates_are_those_of_transformers(kind, warmup, total):
    config = TrainConfig(
        steps=total, learning_rate=3e-4, lr_scheduler=kind, warmup_steps=warmup
    )
    rate = schedule(config, total)
    got = [float(rate(jnp.asarray(s, jnp.int32))) for s in range(total)]
    want = [3e-4 * transformers_factor(kind, s, warmup, total) for s in range(total)]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-10)  # float32 cosine


def numpy_adamw(config, gradients, start):
    """Loshchilov and Hutter's AdamW with global-norm clipping, in float64."""
    w, m, v = np.array(start, np.float64), 0.0, 0.0
    for i, g in enumerate(gradients):
        g = np.array(g, np.float64)
        norm = np.linalg.norm(g)
        if config.max_grad_norm is not None and norm > config.max_grad_norm:
            g = g * config.max_grad_norm / norm
        m = config.adam_beta1 * m + (1 - config.adam_beta1) * g
        v = config.adam_beta2 * v + (1 - config.adam_beta2) * g**2
        rate = config.learning_rate * transformers_factor(
            config.lr_scheduler, i, config.warmup_steps, config.steps
        )
        step = (m / (1 - config.adam_beta1 ** (i + 1))) / (
            np.sqrt(v / (1 - config.adam_beta2 ** (i + 1))) + config.adam_epsilon
        )
        w = w - rate * (step + config.weight_decay * w)
    return w


@pytest.mark.parametrize("norm", [None, 1.0, 100.0])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_optimizer_is_adamw_with_clipping_before(norm, decay):
    # The epsilon is large so that clipping is not undone by the normalization.
    rates = {"learning_rate": 0.1, "warmup_steps": 2, "weight_decay": decay}
    config = TrainConfig(steps=6, max_grad_norm=norm, adam_epsilon=1e-3, **rates)
    rng = np.random.default_rng(0)
    start = rng.standard_normal(5).astype(np.float32)
    gradients = (3 * rng.standard_normal((6, 5))).astype(np.float32)
    optimizer = make_optimizer(config, 6)
    parameters = {"w": jnp.asarray(start)}
    state = optimizer.init(parameters)
    with jax.numpy_dtype_promotion("standard"):
        for g in gradients:
            updates, state = optimizer.update({"w": jnp.asarray(g)}, state, parameters)
            parameters = optax.apply_updates(parameters, updates)
    want = numpy_adamw(config, gradients, start)
    np.testing.assert_allclose(parameters["w"], want, rtol=1e-5)  # float32


def test_the_reported_norm_is_from_before_clipping():
    norms = []
    for optimizer in (SGD, optax.chain(optax.clip_by_global_norm(1e-3), SGD)):
        state, metrics = first_step(optimizer)
        norms.append(
            (float(metrics["grad_norm"]), float(optax.tree.norm(moved(state))))
        )
    (plain, unclipped_update), (reported, clipped_update) = norms
    assert plain == reported > 1e-3
    # The update is the difference of parameters of order 0.1: ulps of 1e-8 each.
    np.testing.assert_allclose(unclipped_update, plain, rtol=1e-4)
    np.testing.assert_allclose(clipped_update, 1e-3, rtol=1e-3)


# --- Noise on the embeddings ---


def test_noise_depends_on_the_key_and_step_and_is_absent_when_off():
    @functools.cache
    def jitted(alpha, remat):
        settings = {"model": llama(remat=remat), "neftune_noise_alpha": alpha}
        return jax.jit(functools.partial(train_step, optimizer=SGD, **settings))

    def step(alpha, remat="full", seed=0):
        start = begin(SGD, seed=seed)
        state, metrics = jitted(alpha, remat)(start, base(), window(2, 2))
        return float(metrics["loss"]), state

    plain, _ = step(None)
    noisy, state = step(5.0)
    assert abs(noisy - plain) > 1e-4
    # The key of the run and the number of the step make it, nothing else.
    again, same = step(5.0)
    assert again == noisy
    all_equal(same.adapters, state.adapters)
    assert step(5.0, seed=1)[0] != noisy
    # What is recomputed in the backward pass is computed from the same noise.
    other, kept = step(5.0, remat="none")
    assert other == pytest.approx(noisy, rel=1e-6)
    all_close(moved(kept), moved(state), GRADIENT)
    # When off, the program contains none of it.
    arguments = begin(SGD), base(), window(2, 2)
    texts = [jitted(alpha, "full").lower(*arguments).as_text() for alpha in (5.0, None)]
    assert ["_uniform" in text for text in texts] == [True, False]


# --- The structure of the compiled step: from shapes alone, nothing is allocated ---


def abstract_step(hidden, ffn, *, layers, tokens, remat="full"):
    """A step of a double-quantized model."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=hidden // 8,
        tie_word_embeddings=True,
    )
    compute = Compute("float32", lora=LoraConfig(r=8), remat=remat)
    return Step(config, compute, length=tokens)


def adapter_bytes(step):
    return tree_bytes(abstract_arguments(step)[0].adapters)


def temporary_bytes(step):
    return lower(step).compile().memory_analysis().temp_size_in_bytes


def test_a_step_holds_little_more_than_one_dequantized_layer():
    # With unrolled layers, or a derivative that keeps weights, this is 360 to 480 MB.
    hidden, ffn, layers, tokens = 1024, 2816, 8, 64
    step = abstract_step(hidden, ffn, layers=layers, tokens=tokens)
    layer = 4 * (3 * hidden * hidden + 3 * hidden * ffn)  # q, o, k and v by halves
    # Inputs of all layers; of the layer in hand six of the residual's width and four of
    # the MLP's, forward and backward; gradients and updates of the adapters.
    activations = 4 * tokens * (layers * hidden + 2 * (6 * hidden + 4 * ffn))
    bound = 1.5 * layer + activations + 2 * adapter_bytes(step)
    assert temporary_bytes(step) < bound < layers * layer / 4
    # The bound can tell: without recomputation more is held.
    kept = abstract_step(hidden, ffn, layers=layers, tokens=tokens, remat="none")
    assert temporary_bytes(kept) > bound


def test_memory_grows_with_layers_by_their_inputs_and_adapters_only():
    few, many = (abstract_step(256, 704, layers=n, tokens=64) for n in (8, 32))
    of_a_layer = (temporary_bytes(many) - temporary_bytes(few)) / 24
    # The input of the layer, and the gradient of its adapters.
    assert of_a_layer <= 1.2 * (4 * 64 * 256 + adapter_bytes(many) / 32)
    assert of_a_layer < 4 * (3 * 256 * 256 + 3 * 256 * 704) / 10  # no weights among it


def test_memory_grows_linearly_with_tokens():
    short, long = (
        temporary_bytes(abstract_step(128, 352, layers=4, tokens=tokens))
        for tokens in (2048, 8192)
    )
    # Four times the tokens: 4. It is 8 where the masks of all blocks are held, and 16
    # where scores are.
    assert long <= 4.2 * short


def test_the_program_does_not_grow_with_layers():
    steps = [abstract_step(64, 96, layers=n, tokens=16) for n in (4, 16, 64)]
    sizes = [len(lower(step).as_text()) for step in steps]
    # Only the digits of the shapes.
    assert max(sizes) <= 1.01 * min(sizes)
