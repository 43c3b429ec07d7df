"""Adapters that PEFT trained on a model of images and text, used on its text model."""

import copy
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

import convert
from qlora_jax.errors import CheckpointError
from qlora_jax.lora.functional import bind
from tests.lora.reference import logits as our_logits

pytestmark = [
    pytest.mark.peer,
    # PEFT advises on tied tables and names; what counts is computed below.
    pytest.mark.filterwarnings("ignore"),
]

# Of logits of order one, as in tests/test_golden_families.py.
TOLERANCE = 3e-5
SIZES = dict(
    **dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2),
    **dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8),
)
VISION = dict(
    **dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1),
    **dict(num_attention_heads=2, image_size=28, patch_size=14),
)
# PEFT's settings, and whether parts beside the text model get tensors.
KINDS = {
    "names": (dict(target_modules=["q_proj", "up_proj"]), True),
    "all": (dict(target_modules="all-linear"), True),
    "expression": (dict(target_modules=r".*language_model.*\.(q|down)_proj"), False),
    "layers": (
        dict(
            target_modules=["language_model.layers.1.self_attn.o_proj", "v_proj"],
            exclude_modules=r".*vision_tower.*",
            rank_pattern={r"model\.language_model\.layers\.0\..*": 3},
            alpha_pattern={r"language_model\.layers\.1\.self_attn\.v_proj": 7},
        ),
        False,
    ),
    "whole": (
        dict(
            target_modules=r".*language_model.*k_proj",
            modules_to_save=["language_model.norm", "language_model.embed_tokens"],
        ),
        False,
    ),
    "tables": (
        dict(
            target_modules=["embed_tokens", "o_proj"],
            use_dora=True,
            exclude_modules=r".*(vision_tower|projector).*",
        ),
        False,
    ),
    "rows": (
        dict(
            target_modules=r".*language_model.*o_proj",
            trainable_token_indices={"embed_tokens": [1, 5]},
        ),
        False,
    ),
}


@pytest.fixture(scope="module")
def bases(torch, transformers, tmp_path_factory):
    """(A directory, transformers' model of it) of each larger model."""
    configs = {
        "gemma3": transformers.Gemma3Config(
            text_config=SIZES | {"sliding_window": 8, "query_pre_attn_scalar": 8},
            vision_config=VISION,
            **dict(mm_tokens_per_image=4, image_token_index=95),
        ),
        "mistral3": transformers.Mistral3Config(
            text_config=SIZES | {"model_type": "mistral"},
            vision_config=VISION | {"model_type": "pixtral", "head_dim": 8},
            **dict(image_token_index=95, tie_word_embeddings=False),
        ),
    }
    # Its class ties the tables by default, and that of its text model does not.
    configs["mistral3 tied"] = copy.deepcopy(configs["mistral3"])
    configs["mistral3 tied"].tie_word_embeddings = True
    out = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(
            config, attn_implementation="eager"
        ).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "norm" not in key:
                    parameter.normal_(0.0, 0.15)
        path = tmp_path_factory.mktemp(name.replace(" ", "_"))
        model.save_pretrained(path)
        out[name] = path, model
    return out


TOKENS = np.random.default_rng(0).integers(0, 90, (2, 12)).astype(np.int32)
TOKENS[0, :2] = [1, 5]  # rows that are trained alone


@pytest.fixture
def their_logits(torch):
    def run(model):
        ids = torch.from_numpy(TOKENS.astype(np.int64))
        with torch.no_grad():
            return model.eval()(input_ids=ids, use_cache=False).logits.numpy()

    return run


@pytest.fixture
def adapt(torch, peft):
    """A function: (model, settings, directory) -> PEFT's model; saves its adapter.

    Texts train no part but the language model, whose updates alone are random.
    """

    def run(model, settings, path, everywhere=False):
        config = peft.LoraConfig(r=2, lora_alpha=3, **copy.deepcopy(settings))
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if parameter.requires_grad and (everywhere or "language_model" in key):
                    scale = 0.02 if "embedding" in key else 0.1
                    parameter.add_(scale * torch.randn(parameter.shape))
        adapted.save_pretrained(path)
        return adapted

    return run


def as_older_versions_name_it(path):
    """Renames the tensors and settings of an adapter to transformers' before 4.52."""
    file = path / "adapter_model.safetensors"
    first = "base_model.model."
    names = {
        f"{first}model.language_model.": f"{first}language_model.model.",
        f"{first}model.": first,
        f"{first}lm_head.": f"{first}language_model.lm_head.",
    }
    tensors = {}
    for key, value in safetensors.numpy.load_file(file).items():
        new, old = next(pair for pair in names.items() if key.startswith(pair[0]))
        tensors[old + key.removeprefix(new)] = value
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    config = path / "adapter_config.json"
    text = config.read_text().replace(r"model\\.language_model", "language_model")
    text = text.replace(r"language_model\\.", r"language_model\\.model\\.")
    config.write_text(text.replace("language_model.", "language_model.model."))


@pytest.mark.parametrize("version", ["newer", "older"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in ("gemma3", "mistral3") for kind in KINDS),
        ("mistral3 tied", "expression"),
    ],
)
def test_the_text_model_computes_the_same(
    bases, adapt, theirs, peft, their_logits, tmp_path, name, kind, version
):
    path, model = bases[name]
    settings, others = KINDS[kind]
    want = their_logits(adapt(model, settings, tmp_path / "adapter"))
    assert np.abs(want - their_logits(model)).max() > 100 * TOLERANCE
    if version == "older":
        as_older_versions_name_it(tmp_path / "adapter")

    config, base = convert.load_llama(path, quantization=None)
    notes = []
    lora, tree = convert.load_adapter(tmp_path / "adapter", base, skipped=notes)
    assert "language_model." in notes[0]
    assert any("no part of the text model (0 of them trained)" in n for n in notes) == (
        others
    )
    got = our_logits(config, base, bind(tree, base, lora), TOKENS)
    assert np.abs(got - want).max() <= TOLERANCE * max(1, np.abs(want).max())
    assert convert.check_adapter(tmp_path / "adapter", config) == lora

    # What is written is an adapter of the text model, in any PEFT.
    convert.save_llama(tmp_path / "text", config, base)
    convert.save_adapter(tmp_path / "again", lora, tree, config)
    text_model = peft.PeftModel.from_pretrained(
        theirs(tmp_path / "text"), tmp_path / "again"
    )
    again = their_logits(text_model)
    assert np.abs(again - want).max() <= TOLERANCE * max(1, np.abs(want).max())
    _, reread = convert.load_adapter(tmp_path / "again", config, skipped=notes)
    jax.tree.map(np.testing.assert_array_equal, reread, tree)
    report = convert.merge(path, tmp_path / "adapter", tmp_path / "merged")
    merged = their_logits(theirs(tmp_path / "merged"))
    assert np.abs(merged - want).max() <= TOLERANCE * max(1, np.abs(want).max())
    assert any("language_model." in note for note in report["notes"])


@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
def test_trained_parts_beside_it_are_refused_unless_told(
    bases, adapt, their_logits, tmp_path, name
):
    path, model = bases[name]
    settings, _ = KINDS["names"]
    want = their_logits(adapt(model, settings, tmp_path / "adapter", everywhere=True))
    config, base = convert.load_llama(path, quantization=None)
    with pytest.raises(CheckpointError, match=r"of vision_tower .*--no-strict"):
        convert.load_adapter(tmp_path / "adapter", config)
    notes = []
    lora, tree = convert.load_adapter(
        tmp_path / "adapter", config, strict=False, skipped=notes
    )
    assert "of vision_tower" in notes[1] and "(0 of" not in notes[1]
    got = our_logits(config, base, bind(tree, base, lora), TOKENS)
    assert np.abs(got - want).max() <= TOLERANCE * max(1, np.abs(want).max())


def test_a_missing_layer_is_missed(bases, adapt, tmp_path):
    path, model = bases["gemma3"]
    adapt(model, KINDS["expression"][0], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    kept = {key: value for key, value in tensors.items() if ".layers.1." not in key}
    safetensors.numpy.save_file(kept, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="missing tensors"):
        convert.load_adapter(tmp_path / "adapter", convert.open_config(path))
    raw = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert raw["target_modules"] == KINDS["expression"][0]["target_modules"]
