# Random small configurations of every family, both ways. What transformers builds and
# saves is read here and computes the same, for plain, left-padded and packed rows, with
# and without an adapter of PEFT; what is written here is read by transformers and PEFT,
# with no tensor missing or left over, and computes the same.
#
# A configuration is a config.json, in either generation's spelling of the rotary
# fields, with fields left out at random. transformers says what it means. The seed is
# in the name of a test and the configuration in its captured output.

import copy
import json
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import convert
from qlora_jax.lora import functional as lora_lib
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models.families import FAMILIES
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.models.vocabulary import add_tokens
from tests.lora.reference import draw as draw_adapters
from tests.peer.test_random_configs import REFUSED, SAID, broken, pick, some

pytestmark = [
    pytest.mark.peer,
    # PEFT and transformers say much that is no news here.
    pytest.mark.filterwarnings("ignore"),
]

# Of the largest logit or 1: the spread of the reference between float32 and float64, as
# in tests/test_golden_families.py.
TOLERANCE = 3e-5
VOCAB, WIDTH, LAYERS, LENGTH = 96, 32, 3, 12
TYPES = list(FAMILIES)
SEEDS = range(9 * len(TYPES))


# --- What is drawn ---


def maybe(rng, fields, name, values, p=0.5):
    if rng.random() < p:
        fields[name] = pick(rng, values)


def rotary(rng, kind, rotated):
    """Random fields of a rope type, as `rope_parameters` and `rope_scaling` have it."""
    native = int(pick(rng, [4, 8, 16]))
    factor = pick(rng, [1.5, 2, 4.0])
    if kind == "linear":
        return {"rope_type": kind, "factor": factor}
    if kind == "llama3":
        return {
            **dict(rope_type=kind, factor=factor, low_freq_factor=pick(rng, [0.5, 1])),
            **dict(high_freq_factor=pick(rng, [2.0, 4])),
            "original_max_position_embeddings": native,
        }
    if kind == "yarn":
        out = {"rope_type": kind, "factor": factor}
        maybe(rng, out, "original_max_position_embeddings", [native], 0.8)
        maybe(rng, out, "attention_factor", [1.1, 0.7], 0.3)
        maybe(rng, out, "beta_fast", [8, 32.0, 2.5], 0.4)
        maybe(rng, out, "beta_slow", [1, 0.5], 0.4)
        maybe(rng, out, "truncate", [True, False], 0.4)
        if rng.random() < 0.3:
            out |= {"mscale": pick(rng, [0.7, 1.0])}
            maybe(rng, out, "mscale_all_dim", [1.0, 0.5], 0.8)
        return out
    if kind == "longrope":
        short, long = rng.uniform(1, 4, (2, rotated // 2)).round(3).tolist()
        out = {"rope_type": kind, "short_factor": short, "long_factor": long}
        maybe(rng, out, "original_max_position_embeddings", [native], 0.9)
        maybe(rng, out, "factor", [factor], 0.4)
        maybe(rng, out, "attention_factor", [1.2, 0.8], 0.3)
        return out
    return {"rope_type": "default"}


def draw_rope(rng, raw, family, head_dim):
    """Adds the rotary fields in one of the spellings of config.json files."""
    partial = 1.0
    if "partial_rotary_factor" in family.fields and rng.random() < 0.6:
        partial = pick(rng, [0.5, 0.75, 1.0])
    rotated = int(head_dim * partial)
    kind = pick(rng, ["default", "default", *family.rope_types])
    fields = rotary(rng, kind, rotated)
    theta = pick(rng, [10000.0, 500, 1e6])
    has_theta = rng.random() < 0.8 or kind == "llama3"
    native = fields.get("original_max_position_embeddings")
    if family.default("original_max_position_embeddings") and native:
        # Phi has the field beside the object, where it counts before.
        if rng.random() < 0.7:
            del fields["original_max_position_embeddings"]
            raw["original_max_position_embeddings"] = native
    if family.ropes_by_layer_type:
        local = {"rope_type": "default", "rope_theta": pick(rng, [1e4, 300.0])}
        if rng.random() < 0.5:
            if has_theta:
                fields["rope_theta"] = theta
            raw["rope_parameters"] = {"full_attention": fields}
            if rng.random() < 0.8:
                raw["rope_parameters"]["sliding_attention"] = local
            return
        if has_theta:
            raw["rope_theta"] = theta
        maybe(rng, raw, "rope_local_base_freq", [local["rope_theta"]], 0.7)
        if kind != "default":
            raw["rope_scaling"] = fields
        return
    form = pick(rng, ["5", "4"])
    if form == "5":
        if has_theta:
            fields["rope_theta"] = theta
        if partial != 1:
            where = pick(rng, [raw, fields])
            where["partial_rotary_factor"] = partial
        if fields != {"rope_type": "default"} or rng.random() < 0.5:
            raw["rope_parameters"] = fields
        return
    if has_theta:
        raw["rope_theta"] = theta
    if partial != 1:
        raw["partial_rotary_factor"] = partial
    if kind != "default":
        if rng.random() < 0.4:
            fields["type"] = fields.pop("rope_type")
            if family.rope_aliases:
                fields["type"] = pick(rng, ["longrope", *family.rope_aliases])
                # Under the older names transformers 5 misses it beside the object.
                fields["original_max_position_embeddings"] = native or 8
        raw["rope_scaling"] = fields
    elif rng.random() < 0.5:
        raw["rope_scaling"] = None


def draw_windows(rng, raw, model_type, family):
    window = pick(rng, [3, 5, 8])
    kinds = [pick(rng, ["full_attention", "sliding_attention"]) for _ in range(LAYERS)]
    if family.window_is_optional:
        uses = bool(rng.random() < 0.6)
        maybe(rng, raw, "use_sliding_window", [uses], 0.9)
        maybe(rng, raw, "sliding_window", [window], 0.9)
        if family.layer_kinds == "qwen":
            maybe(rng, raw, "max_window_layers", [0, 1, 2, 9], 0.8)
        else:
            maybe(rng, raw, "no_rope_layer_interval", [2, 3, 4], 0.4)
            flags = [int(rng.random() < 0.6) for _ in range(LAYERS)]
            maybe(rng, raw, "no_rope_layers", [flags], 0.4)
        effective = raw.get("use_sliding_window") and raw.get(
            "sliding_window", family.default("sliding_window")
        )
        if effective:
            maybe(rng, raw, "layer_types", [kinds], 0.4)
        return
    if "sliding_window" not in family.fields:
        return
    # Of its Ministral and Gemma, transformers builds none without a window.
    needs = model_type == "ministral" or family.layer_kinds == "alternating"
    maybe(rng, raw, "sliding_window", [window, window, None][: 3 - needs], 0.9)
    if raw.get("sliding_window", 1) is not None and "layer_types" in family.fields:
        maybe(rng, raw, "layer_types", [kinds], 0.4)
    if model_type == "gemma3_text" and "layer_types" not in raw:
        maybe(rng, raw, "sliding_window_pattern", [2, 3], 0.7)


def draw_config(rng, model_type) -> dict[str, Any]:
    """A random config.json."""
    family = FAMILIES[model_type]
    heads = 4
    raw: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [family.architectures[0]],
        **dict(vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48),
        **dict(num_hidden_layers=LAYERS, num_attention_heads=heads),
        **dict(bos_token_id=1, eos_token_id=2, pad_token_id=0),
    }
    default = family.default("num_key_value_heads")
    if rng.random() < 0.15:  # the class default, which heads must be a multiple of
        heads = raw["num_attention_heads"] = max(heads, default or 0)
    else:
        raw["num_key_value_heads"] = pick(rng, [1, 2, 4])
        if default is None or default == 4:
            maybe(rng, raw, "num_key_value_heads", [None], 0.1)
    if model_type.startswith("gemma") and raw.get("num_key_value_heads", 0) is None:
        raw["num_key_value_heads"] = 2  # no null in its classes
    draw_windows(rng, raw, model_type, family)
    maybe(rng, raw, "head_dim", [8, 16, 6], 0.85 if family.default("head_dim") else 0.4)
    if model_type == "ministral" or ("mistral" == model_type and "layer_types" in raw):
        raw.setdefault("head_dim", 8)  # transformers' Ministral fails without one
    head_dim = raw.get("head_dim", family.default("head_dim")) or WIDTH // heads
    if head_dim % 4:  # a quarter of it must be whole pairs
        head_dim = raw["head_dim"] = 8
    maybe(rng, raw, "max_position_embeddings", [32, 64], 0.8)
    maybe(rng, raw, "rms_norm_eps", [1e-5, 1e-3, 1e-6], 0.7)
    maybe(rng, raw, "tie_word_embeddings", [True, False], 0.7)
    for name in sorted({x for x in family.biases.values() if isinstance(x, str)}):
        maybe(rng, raw, name, [True, False], 0.6)
    acts = ["silu", "gelu", "gelu_pytorch_tanh", "swish"]
    maybe(rng, raw, family.activation_key, acts, 0.4)
    for name, values in {
        "embedding_multiplier": [12.0, 0.5],
        "attention_multiplier": [0.25, 0.0625],
        "residual_multiplier": [0.22, 1],
        "logits_scaling": [4.0, 0.5],
        "query_pre_attn_scalar": [8, 20],
        "attn_logit_softcapping": [2.0, 50.0, None],
        "final_logit_softcapping": [1.5, 30.0, None],
    }.items():
        if name in family.fields:
            maybe(rng, raw, name, values, 0.75)
    draw_rope(rng, raw, family, head_dim)
    return raw


NORMS = ["norm", "input_layernorm", "post_attention_layernorm", "model.norm"]
TABLES = ["embed_tokens", "lm_head"]


def draw_lora(rng, family):
    """Random arguments of PEFT's LoraConfig."""
    attention = ["qkv_proj"] if family.fused else ["q_proj", "k_proj", "v_proj"]
    mlp = ["gate_up_proj"] if family.fused else ["gate_proj", "up_proj"]
    linears = [*attention, "o_proj", *mlp, "down_proj"]
    norms = NORMS + ["q_norm", "k_norm"] * family.qk_norm
    norms += [
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ] * family.post_norms
    targets = pick(rng, ["all-linear", "all-linear", some(rng, linears)])
    a = dict(
        r=int(pick(rng, [1, 2, 5])),
        lora_alpha=pick(rng, [1, 3, 5]),
        target_modules=targets,
        use_rslora=bool(rng.random() < 0.3),
        use_dora=bool(rng.random() < 0.3),
        bias=str(rng.choice(["none", "lora_only", "all"], p=[0.7, 0.15, 0.15])),
    )
    if isinstance(targets, list):
        if rng.random() < 0.4:
            targets += some(rng, TABLES)
            a["ensure_weight_tying"] = bool(rng.random() < 0.5)
        if rng.random() < 0.4:
            a["layers_to_transform"] = pick(rng, [[0], [1, 3], 2])
    if rng.random() < 0.25:
        place = pick(rng, linears)
        a["rank_pattern"] = {pick(rng, [place, rf"layers\.[12]\..*{place}"]): 3}
    if rng.random() < 0.5:
        a["modules_to_save"] = some(rng, norms + TABLES, 3)
    if rng.random() < 0.25:
        a["trainable_token_indices"] = [5, 17, 3]
    return a


# --- Their side ---


@pytest.fixture(autouse=True)
def one_thread(torch):
    """Products of a few numbers are faster so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def build(torch, transformers, tmp_path):
    """A function: (seed, rng) -> (config.json, its directory, transformers' model)."""

    def run(seed, rng):
        model_type = TYPES[seed % len(TYPES)]
        family = FAMILIES[model_type]
        raw = draw_config(rng, model_type)
        print(json.dumps(raw))
        path = tmp_path / "base"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(raw))
        config = transformers.AutoConfig.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", dtype=torch.float32
        ).eval()
        # Logits of order one; norms, of which some start at 0, that are none's start.
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                start = 0.0 if family.norm_offset else 1.0
                is_norm = "norm" in key
                parameter.copy_(start + 0.2 * noise if is_norm else 0.15 * noise)
        model.save_pretrained(path)
        if rng.random() < 0.6:  # as a publisher wrote it
            (path / "config.json").write_text(json.dumps(raw))
        model.name_or_path = model.config._name_or_path = str(path)
        return raw, path, model

    return run


@pytest.fixture
def adapt(torch, peft):
    """A function: (rng, family, model) -> (arguments that PEFT takes, its model)."""

    def run(rng, family, base, given=None):
        while True:
            a = given or draw_lora(rng, family)
            try:
                model = peft.get_peft_model(
                    copy.deepcopy(base), peft.LoraConfig(**copy.deepcopy(a))
                )
            except (ValueError, TypeError, AttributeError) as error:
                assert REFUSED.search(str(error)) and not given, (a, error)
                continue
            if given or not broken(base, model, a):
                break
        print(a)
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 30)))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if not parameter.requires_grad:
                    continue
                noise = torch.randn(parameter.shape, generator=generator)
                if "magnitude" in key:
                    parameter.mul_(1.0 + 0.2 * noise.clamp(-2, 2))
                elif ".lora_" in key:
                    parameter.copy_(0.1 * noise)
                else:
                    parameter.add_(0.1 * noise)
        return a, model

    return run


class Rows:
    """Two rows as they are, one that starts with pads, and one of two texts."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(3, VOCAB, (4, LENGTH)).astype(np.int32)
        self.tokens[0, :4] = [5, 17, 3, 5]  # rows that are trained alone
        self.segments = np.ones_like(self.tokens)
        self.segments[2, :5] = 0
        self.segments[3, 3:] = 2
        self.segments[3, 9:] = 0
        self.positions = np.zeros_like(self.tokens)
        for row, ids in enumerate(self.segments):
            for segment in set(ids.tolist()):
                where = ids == segment
                self.positions[row, where] = np.arange(where.sum())

    def unpacked(self):
        """All but the packed row, as it is called without segments."""
        return {
            "tokens": jnp.asarray(self.tokens[:3]),
            "attention_mask": jnp.asarray(self.segments[:3]),
            "positions": jnp.asarray(self.positions[:3]),
        }

    def packed(self):
        return {
            "tokens": jnp.asarray(self.tokens),
            "segment_ids": jnp.asarray(self.segments),
            "positions": jnp.asarray(self.positions),
        }


ROWS = Rows()


@pytest.fixture
def their_logits(torch):
    """A function: model -> logits of `ROWS`.

    Packed texts are computed apart, and the row with pads alone, for transformers
    gives all rows of a batch the LongRoPE frequencies of the longest.
    """

    def call(model, where, **more):
        ids = torch.from_numpy(ROWS.tokens[where].astype(np.int64))
        ids = ids if ids.ndim == 2 else ids[None]
        more = {k: torch.from_numpy(v[None].astype(np.int64)) for k, v in more.items()}
        return model(input_ids=ids, use_cache=False, **more).logits.numpy()

    def run(model):
        size = model.get_input_embeddings().weight.shape[0]
        out = np.zeros((*ROWS.tokens.shape, size), np.float32)
        model.eval()
        with torch.no_grad():
            out[:2] = call(model, np.s_[:2])
            pads = dict(attention_mask=ROWS.segments[2], position_ids=ROWS.positions[2])
            out[2] = call(model, np.s_[2], **pads)
            for where in (np.s_[3, :3], np.s_[3, 3:9]):
                out[where] = call(model, where)
        return out

    return run


@pytest.fixture
def reload(peft):
    """A function: (adapter directory, model) -> PEFT's; it has nothing to say."""

    def run(path, base):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = peft.PeftModel.from_pretrained(copy.deepcopy(base), path)
        assert not [w for w in said if not SAID.match(str(w.message))]
        return model

    return run


# --- Ours ---


def our_logits(
    config, base, inputs, lora=None, adapters=None, attention: Any = "eager"
):
    model = Llama(config, Compute(dtype="float32", attention=attention, remat="none"))
    base = jax.tree.map(jnp.asarray, base)
    variables = {"params": base}
    if lora is not None:
        adapters = jax.tree.map(jnp.asarray, adapters)
        variables["lora"] = lora_lib.bind(adapters, base, lora)
    # Each configuration would be a program of its own to compile; step by step they
    # share theirs.
    with jax.disable_jit():
        return np.asarray(model.apply(variables, **inputs))


def close(got, want):
    bound = TOLERANCE * max(1, np.abs(want).max())
    for row, (a, b) in enumerate(zip(got, want, strict=False)):
        where = ROWS.segments[row] > 0
        assert np.abs(a[where] - b[where]).max() <= bound, f"row {row}"


def tensors(path):
    return safetensors.numpy.load_file(path / "adapter_model.safetensors")


@pytest.mark.parametrize("seed", SEEDS)
def test_we_load_what_they_save(build, adapt, reload, their_logits, tmp_path, seed):
    rng = np.random.default_rng([seed, 1])
    raw, path, model = build(seed, rng)
    config, base = convert.load_llama(path, quantization=None)
    attention = pick(rng, ["eager", "eager", "xla"])
    plain = their_logits(model)
    close(our_logits(config, base, ROWS.unpacked(), attention=attention), plain)
    close(our_logits(config, base, ROWS.packed(), attention=attention), plain)

    _, model_with_adapter = adapt(rng, config.family, model)
    adapter = tmp_path / "adapter"
    model_with_adapter.save_pretrained(adapter)
    want = their_logits(model_with_adapter)
    np.testing.assert_array_equal(their_logits(reload(adapter, model)), want)
    assert np.abs(want - plain).max() > 100 * TOLERANCE
    lora, adapters = convert.load_adapter(adapter, base)
    close(our_logits(config, base, ROWS.packed(), lora, adapters, attention), want)


# Files come in two generations; of theirs, and what is left out, one form is written.
ROPE_FIELDS = {"rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq"}
ROPE_FIELDS |= {"partial_rotary_factor", "original_max_position_embeddings"}


def what_it_says(config):
    """The fields of transformers' configuration but where it was read, and by whom."""
    out = config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "architectures"):
        out.pop(name, None)
    for fields in (out["rope_parameters"], *out["rope_parameters"].values()):
        if isinstance(fields, dict):
            fields.pop("type", None)  # an older name of `rope_type`, kept beside it
    return out


@pytest.mark.parametrize("seed", SEEDS)
def test_they_load_what_we_save(
    build, adapt, reload, transformers, theirs, their_logits, tmp_path, seed
):
    rng = np.random.default_rng([seed, 2])
    raw, path, model = build(seed, rng)
    config, base = convert.load_llama(path, quantization=None)
    arguments, _ = adapt(rng, config.family, model)
    again = tmp_path / "again"
    convert.save_llama(again, config, base)
    written = json.loads((again / "config.json").read_text())
    read = json.loads((path / "config.json").read_text())
    assert {k for k in read if written.get(k) != read[k]} <= ROPE_FIELDS
    assert written.keys() - read.keys() <= ROPE_FIELDS | {"torch_dtype"}
    configs = [transformers.AutoConfig.from_pretrained(p) for p in (again, path)]
    ours, original = map(what_it_says, configs)
    assert {k: (v, original[k]) for k, v in ours.items() if v != original[k]} == {}
    assert ours.keys() == original.keys()
    close(their_logits(theirs(again)), their_logits(model))

    lora = LoraConfig.from_peft({"peft_type": "LORA", **arguments})
    adapters = draw_adapters(base, lora, seed, spread=0.1)
    adapter = tmp_path / "adapter"
    convert.save_adapter(adapter, lora, adapters, config)
    with_adapter = reload(adapter, model)
    want = their_logits(with_adapter)
    close(our_logits(config, base, ROWS.packed(), lora, adapters), want)
    convert.merge(again, adapter, tmp_path / "merged")
    close(their_logits(theirs(tmp_path / "merged")), want)


# --- Norms and tables ---

# Families with norms or embeddings of their own, and one without.
OWN_WAYS = ("llama", "qwen3", "granite", "gemma", "gemma2", "gemma3_text")
PARTS = {
    # PEFT goes by ends of names: all norms, of heads and after MLPs too.
    "norms": dict(target_modules=["o_proj"], modules_to_save=["norm"]),
    "table": dict(target_modules=["o_proj"], modules_to_save=["embed_tokens"]),
    "update of the table": dict(target_modules=["embed_tokens", "v_proj"]),
    "DoRA of the table": dict(target_modules=["embed_tokens", "v_proj"], use_dora=True),
    "both tables as one": dict(
        target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True
    ),
    "DoRA of the head": dict(target_modules=["lm_head"], use_dora=True),
    "rows": dict(target_modules=["o_proj"], trainable_token_indices=[5, 17, 3]),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("model_type", OWN_WAYS)
def test_norms_and_tables_are_adapted_as_peft_does(
    build, adapt, theirs, their_logits, tmp_path, model_type, part
):
    index = TYPES.index(model_type)
    rng = np.random.default_rng([index, 3])
    _, path, model = build(index, rng)
    config, base = convert.load_llama(path, quantization=None)
    given = {"r": 2, "lora_alpha": 3, **PARTS[part]}
    _, adapted = adapt(rng, config.family, model, given)
    adapted.save_pretrained(tmp_path / "adapter")
    want = their_logits(adapted)
    assert np.abs(want - their_logits(model)).max() > 100 * TOLERANCE
    lora, adapters = convert.load_adapter(tmp_path / "adapter", base)
    close(our_logits(config, base, ROWS.packed(), lora, adapters), want)
    convert.merge(path, tmp_path / "adapter", tmp_path / "merged")
    close(their_logits(theirs(tmp_path / "merged")), want)


@pytest.mark.parametrize("model_type", TYPES)
def test_added_tokens_are_rows_like_others(
    build, adapt, reload, theirs, their_logits, tmp_path, model_type
):
    index = TYPES.index(model_type)
    rng = np.random.default_rng([index, 4])
    _, path, model = build(index, rng)
    before = their_logits(model)
    config, base = convert.load_llama(path, quantization=None)
    config, base = add_tokens(config, base, tokenizer_size=VOCAB, count=2)
    grown = tmp_path / "grown"
    convert.save_llama(grown, config, jax.tree.map(np.asarray, base))
    model = theirs(grown)
    assert model.get_input_embeddings().weight.shape[0] == VOCAB + 2
    close(their_logits(model)[..., :VOCAB], before)
    rows = [VOCAB + 1, 5, VOCAB]
    given = dict(r=2, target_modules=["o_proj"], trainable_token_indices=rows)
    _, adapted = adapt(rng, config.family, model, given)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    want = their_logits(adapted)
    lora, adapters = convert.load_adapter(tmp_path / "adapter", base)
    close(our_logits(config, base, ROWS.packed(), lora, adapters), want)
    convert.save_adapter(tmp_path / "again", lora, adapters, config)
    again = their_logits(reload(tmp_path / "again", model))
    np.testing.assert_array_equal(again, want)
