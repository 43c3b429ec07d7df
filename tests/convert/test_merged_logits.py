"""The law of merging: the merged checkpoint's logits are those of base and adapter.

float32 throughout, within the spread of the reference between float32 and float64.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import bind
from qlora_jax.lora.targets import select
from qlora_jax.models import params as model_params
from qlora_jax.models.block import Attention
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.layers import Compute, Linear
from qlora_jax.models.llama import Llama
from qlora_jax.tree import PROJECTIONS, at, put, walk
from tests.convert.reference import adapter_of, read

LOGITS = 3e-5
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 24, (2, 12)), jnp.int32)


class Gated(Attention):
    """An attention with a linear layer, with bias, that no Llama has."""

    @nn.compact
    def __call__(self, x, rope, segments, kv=None, cached=None):
        out, kv = super().__call__(x, rope, segments, kv, cached)
        linear = Linear(x.shape[-1], self.compute, use_bias=True, name="gate")
        return out * (1 + jnp.tanh(linear(x))), kv


@functools.partial(jax.jit, static_argnames="model")
def apply(model, variables, tokens):
    return model.apply(variables, tokens)


def logits(directory, tokens, adapter=None):
    """Of a directory; with an adapter, un-merged.

    Merged checkpoints of one configuration are one program. Adapters differ: each
    would be compiled for itself, which takes longer than its operations one by one.
    """
    config, base = convert.load_llama(directory, quantization=None)
    base = jax.tree.map(jnp.asarray, base)
    variables = {"params": base}
    if adapter is not None:
        lora, adapters = convert.load_adapter(adapter, base)
        variables["lora"] = bind(jax.tree.map(jnp.asarray, adapters), base, lora)
    compute = Compute(dtype="float32", remat="none")
    model = Llama(config, compute, Gated if config.extra_tensors else None)
    with jax.disable_jit(adapter is not None):
        return np.asarray(apply(model, variables, tokens))


# --- What PEFT made ---

GOLDEN = "plain rslora dora rank_alpha_pattern mts_embed_head emb_lora regex_targets "
GOLDEN += "layers_to_transform trainable_tokens qlora_plain"


@pytest.mark.golden
@pytest.mark.parametrize(
    "name", [*(f"llama32/{n}" for n in GOLDEN.split()), "llamabias/bias_lora_only"]
)
def test_golden_adapters(golden, tmp_path, name):
    adapter = golden / "adapters" / name
    base = golden / read(adapter, "adapter_config.json")["base_model_name_or_path"]
    onto = "dequantized" if "nf4" in base.name else "original"
    report = convert.merge(base, adapter, tmp_path / "out", onto=onto)
    stored = np.load(adapter / "logits.npz")
    tokens = jnp.asarray(stored["ids"], jnp.int32)
    merged = logits(tmp_path / "out", tokens)
    # `logits` are PEFT's un-merged ones; its merged ones are wrong where an embedding
    # is adapted, or the base is in 4 bit.
    assert np.abs(merged - stored["logits"]).max() <= LOGITS
    untied = name in ("llama32/mts_embed_head", "llama32/emb_lora")
    assert report["config_changes"] == (
        {"tie_word_embeddings": [True, False]} if untied else {}
    )
    assert report["tensors_added"] == untied
    assert (tmp_path / "out" / "merge_report.json").is_file()


# --- What can be asked for: corners, and at random ---

GATE = "model.layers.self_attn.gate"
BASES = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "attention biases": {"attention_bias": True, "tie_word_embeddings": True},
    "custom": {"extra_tensors": {f"{GATE}.weight": [64, 64], f"{GATE}.bias": [64]}},
}


def draw(rng, kind):
    """Fields of a configuration, which may contradict each other."""
    pick = lambda values: values[rng.integers(len(values))]  # noqa: E731
    chance = lambda p: bool(rng.random() < p)  # noqa: E731
    tables = ("embed_tokens", "lm_head")
    extra = ("gate",) if kind == "custom" else ()
    targets = [p for p in (*PROJECTIONS, *extra) if chance(0.4)] or ["q_proj"]
    targets += [t for t in tables if chance(0.35)]
    fields = dict(
        r=int(rng.integers(1, 5)),
        lora_alpha=int(rng.integers(1, 9)),
        target_modules=pick(
            [tuple(targets), tuple(targets), "all-linear", r".*\.[01]\..*(q|up)_proj"]
        ),
        use_rslora=chance(0.3),
        use_dora=chance(0.3),
        bias=pick(["none", "none", "all", "lora_only"]),
        ensure_weight_tying=chance(0.3),
    )
    fields["lora_bias"] = not fields["use_dora"] and chance(0.3)
    if chance(0.3):
        fields["rank_pattern"] = {"q_proj": 6, r"layers\.1\.mlp\.up_proj": 1}
        fields["alpha_pattern"] = {"lm_head": 5, r"layers\.0\..*": 7}
    if chance(0.2) and not isinstance(fields["target_modules"], str):
        fields["layers_to_transform"] = (1,)
    if chance(0.3):
        fields["modules_to_save"] = pick(
            [
                *[("embed_tokens",), ("lm_head",), tables, ("norm",)],
                *[("layers.0.mlp",), ("model.norm", "k_proj"), extra or ("o_proj",)],
            ]
        )
    if chance(0.3):
        fields["trainable_token_indices"] = pick(
            [(3, 17, 5), {"lm_head": (4, 2)}, {"embed_tokens": (1,), "lm_head": (2,)}]
        )
    if chance(0.2):
        fields["exclude_modules"] = (pick(PROJECTIONS),)
    return fields


def drawn(config, kind, rng):
    """A configuration that fits, drawn."""
    base = model_params.abstract_base(config)
    while True:
        fields = draw(rng, kind)
        try:
            selection = select(base, LoraConfig(**fields))
        except ValueError:
            continue  # settings that do not go together; tests of theirs say which
        # A Llama's head has no place for a bias; a test says so.
        if not any(a.lora_bias and a.path[-1] == "lm_head" for a in selection.adapted):
            return fields


def filled(config, lora, rng):
    """An adapter without zeros but for those of lower ranks."""
    adapters = adapter_of(config, lora, lambda shape: rng.standard_normal(shape) * 0.2)
    for path, leaf in walk(adapters):
        magnitude = path[-1] == "lora_magnitude_vector"
        leaf = np.abs(leaf) + 3 if magnitude else leaf
        put(adapters, path, leaf.astype(np.float32))
    for module in select(model_params.abstract_base(config), lora).adapted:
        for layer, rank in enumerate(module.ranks if module.layers else ()):
            at(adapters, module.path)["lora_A"][layer, rank:] = 0
            at(adapters, module.path)["lora_B"][layer, :, rank:] = 0
    return adapters


BOTH = ("embed_tokens", "lm_head")
TYING = {"target_modules": BOTH, "ensure_weight_tying": True}
LINEAR = {"lora_bias": True, "target_modules": "all-linear"}
CHOSEN = [
    ("tied", {"target_modules": ("lm_head",), "trainable_token_indices": (3, 17)}),
    ("tied", TYING),
    ("tied", {**TYING, "use_dora": True}),
    ("tied", {**TYING, "target_modules": BOTH[:1], "alpha_pattern": {"lm_head": 9}}),
    ("tied", {"modules_to_save": BOTH, "ensure_weight_tying": True}),
    ("tied", {"target_modules": BOTH, "use_dora": True}),
    ("untied", {"target_modules": BOTH, "use_dora": True}),
    ("untied", LINEAR),
    ("biases", {**LINEAR, "bias": "all"}),
    ("untied", {"target_modules": ("up_proj",), "modules_to_save": ("layers.0.mlp",)}),
]


def shrink(tensors):
    for value in tensors.values():
        value *= np.float32(0.2)


@pytest.mark.parametrize("case", range(len(CHOSEN) + 30))
def test_all_that_an_adapter_can_hold(make_model, tmp_path, case):
    rng = np.random.default_rng(case)
    fields = None
    if case < len(CHOSEN):
        kind, fields = CHOSEN[case]
    else:
        kind = list(BASES)[case % len(BASES)]
    base = make_model(shrink, **BASES[kind])
    config = LlamaConfig.from_hf(read(base))
    if fields is None:
        fields = drawn(config, kind, rng)
    print(kind, fields)
    lora = LoraConfig(**{"r": 3, "lora_alpha": 2, **fields})
    adapters = filled(config, lora, rng)
    convert.save_adapter(tmp_path / "adapter", lora, adapters, config)
    report = convert.merge(base, tmp_path / "adapter", tmp_path / "out")
    unmerged = logits(base, TOKENS, tmp_path / "adapter")
    merged = logits(tmp_path / "out", TOKENS)
    assert np.abs(merged - unmerged).max() <= LOGITS
    assert report["tensors_changed"] > 0
