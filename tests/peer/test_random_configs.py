# Random PEFT configurations, both ways: what PEFT saves is read here and computes the
# same, what is saved here is read by PEFT, without a word about missing tensors, and
# computes the same. Everything PEFT's LoRA trains in a Llama is drawn, in any
# combination that PEFT itself carries through a save and a load, which is looked at as
# well; `broken` has those that it builds and does not get right, with the reasons.
#
# The seed is in the name of a test and the configuration in its captured output.

import copy
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import convert
from qlora_jax.lora import functional as lora_lib
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.targets import select
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.tree import PROJECTIONS
from tests.lora.reference import draw as draw_adapters

pytestmark = [
    pytest.mark.peer,
    # PEFT says much that is no news here; what counts is looked at in `reload`.
    pytest.mark.filterwarnings("ignore"),
]

TOLERANCE = 3e-5
VOCAB, WIDTH, LAYERS = 96, 64, 3
BASES = {
    "untied": dict(tie_word_embeddings=False),
    "tied": dict(tie_word_embeddings=True),
    "biases": dict(tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
}
# Whether PEFT warns of these is up to PEFT: each is said of a configuration, not of
# the tensors in a file.
SAID = re.compile(
    "Model has `tie_word_embeddings=True` and a tied layer"
    "|You have requested `ensure_weight_tying`"
    "|ensure_weight_tying=True but the model does not have tied weights"
    "|`lora_bias=True` was passed but the targeted layer"
    "|You have passed exclude_modules=.* but no modules were excluded"
    "|The following (rank|alpha)_pattern keys did not match any targeted module"
    "|.*is deprecated"
    "|unclosed file"
)
# As `self_attn.q_proj`.
PLACES = [f"{'self_attn' if p[0] in 'qkvo' else 'mlp'}.{p}" for p in PROJECTIONS]
RANKS = [1, 2, 5]  # few: each shape is compiled once


# --- What is drawn ---


def pick(rng, values):
    return values[rng.integers(len(values))]


def some(rng, values, most=None):
    """A few of these, in any order."""
    count = rng.integers(1, (most or len(values)) + 1)
    return [values[i] for i in rng.permutation(len(values))[:count]]


def name(rng):
    """What selects modules: a name, part of a path, a path."""
    place, layer = pick(rng, PLACES), rng.integers(LAYERS)
    spelled = [place.partition(".")[2], place]
    spelled += [f"layers.{layer}.{place}", f"model.layers.{layer}.{place}"]
    return spelled[rng.choice(4, p=[0.55, 0.15, 0.15, 0.15])]


EXPRESSIONS = [
    *(r".*\.(q|v|down)_proj", r"model\.layers\.[02]\.mlp\.\w+_proj"),
    *(r".*layers\.1\..*_proj", r"lm_head|.*\.up_proj", r".*(embed_tokens|k_proj)"),
    *(r"lm_head|model\.embed_tokens|.*o_proj", r"(?!.*mlp).*_proj"),
]


def targets(rng):
    kinds = ["list", "regex", "all-linear", "default"]
    kind = rng.choice(kinds, p=[0.6, 0.2, 0.1, 0.1])
    if kind == "default":
        return None
    if kind == "all-linear":
        return pick(rng, ["all-linear", "all-linear", "ALL-LINEAR"])
    if kind == "regex":
        return pick(rng, EXPRESSIONS)
    names = [name(rng) for _ in range(rng.integers(1, 5))]
    if rng.random() < 0.5:
        names += some(rng, ["lm_head", "embed_tokens", "model.embed_tokens"], 2)
    if rng.random() < 0.1:
        names.append("no_such_module")
    return names


def pattern(rng):
    place, layer = pick(rng, PLACES), rng.integers(LAYERS)
    last = place.partition(".")[2]
    spelled = [last, last, place, f"layers.{layer}.{place}"]
    spelled += [f"model.layers.{layer}.{place}", f"^model.layers.{layer}.{place}"]
    spelled += [rf"layers\.[{layer}2]\..*", r"(q|up)_proj"]
    spelled += [rf".*\.{layer}\.mlp\.(gate|down)_proj", "lm_head", "embed_tokens"]
    # The last matches nothing: a name is matched from a dot on.
    return pick(rng, [*spelled, "proj"])


def draw(rng):
    """Random arguments of PEFT's LoraConfig."""
    a = dict(
        r=pick(rng, RANKS),
        lora_alpha=pick(rng, [1, 2, 3, 5, 2.5]),
        target_modules=targets(rng),
        use_rslora=bool(rng.random() < 0.3),
        use_dora=bool(rng.random() < 0.35),
        bias=str(rng.choice(["none", "lora_only", "all"], p=[0.6, 0.2, 0.2])),
        ensure_weight_tying=bool(rng.random() < 0.5),
        init_lora_weights=pick(rng, [True, True, False, "gaussian"]),
        lora_dropout=pick(rng, [0.0, 0.25]),  # nothing without training
    )
    if not a["use_dora"] and a["init_lora_weights"] is True:
        a["lora_bias"] = bool(rng.random() < 0.3)
    if rng.random() < 0.25:
        names = [name(rng) for _ in range(rng.integers(1, 4))]
        patterns = [r".*layers\.[01]\.self_attn.*", r".*embed.*|.*gate_proj"]
        excluded = [names, ["lm_head", "layers.1"], *patterns, r"layers\.1"]
        a["exclude_modules"] = pick(rng, excluded)
    if not isinstance(a["target_modules"], str) and rng.random() < 0.3:
        a["layers_to_transform"] = pick(rng, [0, 2, [1], [0, 2], [2, 1], [0, 7], []])
        if a["layers_to_transform"] != [] and rng.random() < 0.4:
            a["layers_pattern"] = pick(rng, ["layers", ["layers"], ["h", "layers"]])
    if rng.random() < 0.4:
        ranks = [pick(rng, RANKS) for _ in range(rng.integers(1, 4))]
        a["rank_pattern"] = {pattern(rng): r for r in ranks}
    if rng.random() < 0.4:
        alphas = [pick(rng, [1, 2, 4, 0.5]) for _ in range(rng.integers(1, 4))]
        a["alpha_pattern"] = {pattern(rng): alpha for alpha in alphas}
    if rng.random() < 0.45:
        whole = ["norm", "model.norm", "input_layernorm", "layernorm", "mlp"]
        whole += ["layers.1.mlp", "self_attn.q_proj", "k_proj", "layers.2.self_attn"]
        whole += ["layers.0", "1.post_attention_layernorm"]
        tables = ["embed_tokens", "lm_head", "model.embed_tokens"]
        a["modules_to_save"] = pick(rng, [[], some(rng, tables, 2)])
        a["modules_to_save"] += some(rng, whole, 2)[: rng.integers(3)]
    if rng.random() < 0.3:
        first, second = rng.permutation(VOCAB)[:4].tolist(), [3, 1]
        rows = [first, [5], {"embed_tokens": first}, {"model.embed_tokens": first}]
        rows += [{"lm_head": second}, {"embed_tokens": first, "lm_head": first}]
        rows += [{"embed_tokens": first, "lm_head": second}]
        a["trainable_token_indices"] = pick(rng, rows)
    return a


def in_file_order(a):
    """PEFT sorts what it writes, and goes by the first pattern that matches."""
    for key in ("rank_pattern", "alpha_pattern"):
        a[key] = dict(sorted(a.get(key, {}).items()))
    return a


# What PEFT says of configurations that it cannot build.
REFUSED = re.compile(
    "Target modules .* not found"
    "|No modules were targeted"
    "|cannot be applied to modules of type"  # whole or by rows, and adapted
    "|The embedding layer is already marked to be trained fully"
    "|Cannot ensure weight tying when different token indices"
    "|lora_bias=True is not supported for Embedding"
    # An embedding that is excluded and is to share its update with a tied head.
    "|'Embedding' object has no attribute 'lora_embedding_A'"
)


# PEFT's names for the two states of a module that is trained whole.
WHOLE = re.compile(r"\.(?:original_module|modules_to_save)\b")


def broken(base, model, a):
    """Whether this is something that PEFT builds and does not get right."""
    ends = tuple(a.get("modules_to_save") or ())
    whole = [path for path, _ in base.named_modules() if ends and path.endswith(ends)]
    paths = [path for path, _ in model.named_parameters(remove_duplicate=False)]
    head = [path for path in paths if ".lm_head." in path]
    return (
        # A module trained whole within one trained whole: of what is directly in it,
        # the load raises a KeyError; all of it is refused here.
        any(path.startswith(f"{other}.") for path in whole for other in whole)
        # Rows of a module that is trained whole, each spelled in its own way, or of
        # the embedding that a whole head is tied to: its forward pass raises.
        or any("token_adapter" in path and WHOLE.search(path) for path in paths)
        # A head with DoRA that takes rows from its embedding: likewise.
        or (any("token_ad" in p for p in head) and any("magnitude" in p for p in head))
    )


# --- PEFT's side ---


@pytest.fixture(scope="module")
def bases(torch, transformers, tmp_path_factory):
    """(A directory, transformers' model of it) of each kind."""
    out = {}
    for seed, (kind, options) in enumerate(BASES.items()):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            **dict(vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=80),
            **dict(num_attention_heads=4, num_key_value_heads=2),
            **dict(num_hidden_layers=LAYERS, max_position_embeddings=64),
            **options,
        )
        model = transformers.LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "norm" in key:
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(0.0, 0.1)
        path = tmp_path_factory.mktemp(kind)
        model.save_pretrained(path)
        # Where PEFT looks whether the vocabulary was changed.
        model.name_or_path = model.config._name_or_path = str(path)
        out[kind] = path, model
    return out


@pytest.fixture(scope="module")
def prompts():
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 12)).astype(np.int32)
    tokens[0, :8] = np.arange(8)  # among them every row that is trained alone
    return tokens


@pytest.fixture
def logits(torch, prompts):
    def run(model):
        with torch.no_grad():
            ids = torch.from_numpy(prompts.astype(np.int64))
            return model.eval()(input_ids=ids, use_cache=False).logits.numpy()

    return run


@pytest.fixture
def build(torch, peft, bases):
    """A function: (seed, kind) -> (arguments that PEFT accepts, its random model)."""

    def arguments(rng, kind, ordered):
        while True:
            a = in_file_order(draw(rng)) if ordered else draw(rng)
            model = copy.deepcopy(bases[kind][1])
            try:
                model = peft.get_peft_model(model, peft.LoraConfig(**a))
            except (ValueError, TypeError, AttributeError) as error:
                assert REFUSED.search(str(error)), (a, error)
                continue
            if not broken(bases[kind][1], model, a):
                return a, model

    def run(seed, kind, ordered=True):
        a, model = arguments(np.random.default_rng(seed), kind, ordered)
        print(kind, a)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if not parameter.requires_grad:
                    continue
                noise = torch.randn(parameter.shape, generator=generator)
                if "magnitude" in key or "norm" in key:
                    parameter.copy_(1.0 + 0.2 * noise.clamp(-2, 2))
                elif ".lora_" in key:
                    parameter.copy_(0.1 * noise)
                else:
                    parameter.add_(0.1 * noise)
        return a, model

    return run


@pytest.fixture
def reload(peft, bases):
    """A function: (adapter directory, kind) -> PEFT's model; it has nothing to say."""

    def run(path, kind):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = copy.deepcopy(bases[kind][1])
            model = peft.PeftModel.from_pretrained(model, path)
        news = [str(w.message) for w in said if not SAID.match(str(w.message))]
        assert not news
        return model

    return run


def tensors(path):
    return safetensors.numpy.load_file(path / "adapter_model.safetensors")


KINDS = ["tied", "untied", "tied", "biases"]  # most can go wrong with tied tables
SEEDS = range(200)


@pytest.fixture(scope="module")
def ours(bases):
    """(Configuration, base) of each kind."""
    loaded = {
        k: convert.load_llama(p, quantization=None) for k, (p, _) in bases.items()
    }
    return {k: (c, jax.tree.map(jnp.asarray, base)) for k, (c, base) in loaded.items()}


@pytest.fixture
def our_logits(ours, prompts):
    """A function: (kind, lora, adapters) -> logits."""

    def run(kind, lora, adapters):
        config, base = ours[kind]
        compute = Compute(dtype="float32", attention="eager", remat="none")
        model = Llama(config, compute)
        adapters = jax.tree.map(jnp.asarray, adapters)
        variables = {"params": base, "lora": lora_lib.bind(adapters, base, lora)}
        # Each configuration would be a program of its own to compile; step by step
        # they share theirs.
        with jax.disable_jit():
            return np.asarray(model.apply(variables, jnp.asarray(prompts)))

    return run


def close(got, want, plain):
    assert np.abs(want - plain).max() > 100 * TOLERANCE  # the adapter does something
    assert np.abs(got - want).max() <= TOLERANCE


@pytest.mark.parametrize("seed", SEEDS)
def test_we_load_what_peft_saves(
    bases, build, reload, logits, ours, our_logits, tmp_path, seed
):
    kind = KINDS[seed % 4]
    _, model = build(seed, kind)
    model.save_pretrained(tmp_path)
    want = logits(model)
    np.testing.assert_array_equal(logits(reload(tmp_path, kind)), want)  # PEFT itself
    config, base = ours[kind]
    lora, adapters = convert.load_adapter(tmp_path, config)
    got = our_logits(kind, lora, adapters)
    close(got, want, logits(bases[kind][1]))
    trained = {  # by place in memory: PEFT's tied updates are two views of one array
        parameter.data_ptr(): parameter.numel()
        for key, parameter in model.named_parameters()
        if parameter.requires_grad and ".original_module." not in key
    }
    assert sum(select(base, lora).groups().values()) == sum(trained.values())
    # Nothing but copies of the base is left out when it is written again.
    again = tmp_path / "again"
    convert.save_adapter(again, lora, adapters, config)
    stored, written = tensors(tmp_path), tensors(again)
    left_out = {key for key in stored if key not in written}
    assert all(COPY.search(key) for key in left_out), left_out
    for key, value in written.items():
        np.testing.assert_array_equal(value, stored[key])


# What PEFT writes beside an adapter: the table that it adapts, and with bias="all" the
# biases of modules that are trained whole, in both states, under its internal names.
COPY = re.compile(
    r"(embed_tokens|lm_head)\.base_layer\.weight$"
    r"|\.(original_module|modules_to_save)\.(.+\.)?bias$"
)


@pytest.mark.parametrize("seed", SEEDS)
def test_peft_loads_what_we_save(
    peft, bases, build, reload, logits, ours, our_logits, tmp_path, seed
):
    kind = KINDS[seed % 4]
    arguments, _ = build(1000 + seed, kind, ordered=False)
    config, base = ours[kind]
    lora = LoraConfig.from_peft({"peft_type": "LORA", **arguments})
    adapters = draw_adapters(base, lora, seed, spread=0.1)
    path = tmp_path / "adapter"
    convert.save_adapter(path, lora, adapters, config)
    model = reload(path, kind)
    close(our_logits(kind, lora, adapters), logits(model), logits(bases[kind][1]))
    # PEFT keeps silent about tensors that it has no use for.
    used = peft.get_peft_model_state_dict(model)
    for key, value in tensors(path).items():
        np.testing.assert_array_equal(used[key].numpy(), value)
    read, again = convert.load_adapter(path, config)
    assert select(base, read) == select(base, lora)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)
