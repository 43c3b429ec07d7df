"""A run directory with every kind of adapter: trained, saved, loaded, continued."""

import contextlib
import dataclasses
import functools
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import convert
from convert.peft import open_adapter
from convert.peft_writing import adapter_bytes
from qlora_jax.cli.main import main
from qlora_jax.cli.merge import main as merge
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.inference import model as inference
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.init import init_adapters
from qlora_jax.lora.targets import select
from qlora_jax.models.config import RopeScaling
from qlora_jax.models.vocabulary import add_tokens
from qlora_jax.runs import runner
from qlora_jax.runs.config import RunConfig
from qlora_jax.runs.loading import load
from qlora_jax.runs.prepare import _with_initial_adapter
from qlora_jax.runs.runner import run
from qlora_jax.runs.sources import find_sources
from qlora_jax.runs.toml import read_config, to_toml
from qlora_jax.training.config import ParameterGroup
from tests.runs.directories import weights

pytestmark = pytest.mark.usefixtures("compile_each_program_once")
TOKENS = [[3, 5, 7, 9, 11, 2, 4, 6]]
KINDS = {
    "dora": {"use_dora": True, "lora_dropout": 0.1},
    "patterns": {
        "target_modules": ("q_proj", "up_proj"),
        "layers_to_transform": (1,),
        "rank_pattern": {"up_proj": 3},
        "alpha_pattern": {"q_proj": 1.5},
        "use_rslora": True,
    },
    "tables": {
        "target_modules": ("q_proj",),
        "modules_to_save": ("embed_tokens", "lm_head", "norm"),
    },
    "rows": {
        "target_modules": ("q_proj", "lm_head"),
        "trainable_token_indices": (1, 30),
        "lora_bias": True,
    },
    "embeddings": {"target_modules": ("embed_tokens", "lm_head", "v_proj")},
    "pissa": {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2}},
    "olora": {"init_lora_weights": "olora"},
    "loftq": {"init_lora_weights": "loftq"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


@pytest.fixture(scope="module")
def make(make):
    """A function: directory, settings of [lora] and [train] -> a configuration."""

    def short(directory: Path, lora: dict, model=None, data=None, **train) -> RunConfig:
        return make(
            directory,
            model=model or {},
            data={"max_length": 32} | (data or {}),
            lora={"target_modules": LoraConfig.target_modules, **lora},
            train={"steps": 4, **train},
            checkpoint={"every": 2},
        )

    return short


@pytest.fixture(scope="module")
def straight(make, tmp_path_factory):
    """A function: kind, or "plain" -> its run of four steps, and what it wrote to
    stderr, with single spaces; each is run once.
    """

    @functools.cache
    def straight(kind: str) -> SimpleNamespace:
        directory = tmp_path_factory.mktemp("straight") / "run"
        config = make(directory, {**KINDS, "plain": {}}[kind])
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            report = run(config)
        err = " ".join(stderr.getvalue().split())
        return SimpleNamespace(
            directory=directory, config=config, report=report, err=err
        )

    return straight


@pytest.fixture(scope="module")
def stopped(make, tmp_path_factory):
    """A function: kind, directory -> makes that a run stopped after two steps."""

    @functools.cache
    def original(kind: str) -> Path:
        directory = tmp_path_factory.mktemp("stopped") / "run"
        run(make(directory, KINDS[kind], steps=2))
        return directory

    return lambda kind, directory: shutil.copytree(original(kind), directory)


@pytest.fixture(scope="module")
def plain(llama_dir):
    """The logits of the base alone."""
    return load(llama_dir, quantization="nf4_dq", dtype="float32").logits(TOKENS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_directory_holds_it(
    kind, straight, plain, llama_dir, architecture, capsys
):
    done = straight(kind)
    config, report = done.config, done.report
    base = convert.load_llama(llama_dir, quantization="nf4_dq")[1]
    selection = select(base, config.lora)
    assert report["groups"] == selection.groups()
    assert report["trainable_parameters"] == sum(selection.groups().values())

    # What was predicted from the configuration alone, to the byte.
    lora, _ = open_adapter(done.directory / "adapter")
    assert lora.base_fingerprint == report["base_fingerprint"]
    assert report["adapter_bytes"] == adapter_bytes(architecture, lora)
    saved = dataclasses.replace(config.lora.absorbed, base_fingerprint="0" * 64)
    assert report["adapter_bytes"] == adapter_bytes(architecture, saved)

    # Trained, it is another model; loaded on its base, it is a note less.
    capsys.readouterr()
    tuned = load(done.directory)
    assert "other weights" not in capsys.readouterr().err
    logits = tuned.logits(TOKENS)
    assert np.isfinite(logits).all()
    assert float(jnp.abs(logits - plain).max()) > 1e-3


@pytest.mark.parametrize("kind", ["dora", "tables"])
def test_stopped_and_continued_it_is_the_same(
    kind, make, straight, stopped, tmp_path, capsys
):
    stopped(kind, tmp_path / "parts")
    run(make(tmp_path / "parts", KINDS[kind], steps=4))
    assert weights(tmp_path / "parts") == weights(straight(kind).directory)
    assert "another adapter" not in capsys.readouterr().err


def scale_weights(path):
    file = path / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({k: 2 * v for k, v in tensors.items()}, file)


def change_alpha(path):
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 99}))


def lose_record(path):
    scale_weights(path)
    (path / "training.json").unlink()


@pytest.mark.parametrize(
    ("kind", "change", "step"),
    [
        ("dora", scale_weights, "by its training.json that of step 2"),
        ("tables", lose_record, "without the record of a run"),
        ("pissa", change_alpha, "by its training.json that of step 2"),
        ("dora", lambda path: scale_weights(path.with_name("adapter_ema")), ""),
        ("dora", lambda path: (path / "adapter_config.json").unlink(), "step 2"),
    ],
)
def test_an_adapter_that_was_replaced_is_said_before_it_is_written_over(
    kind, change, step, make, stopped, straight, tmp_path, capsys
):
    directory = stopped(kind, tmp_path / "run")
    average = {"ema_decay": 0.5} if step == "" else {}
    if average:  # a run of its own, whose average is another adapter
        shutil.rmtree(directory)
        run(make(directory, KINDS[kind], steps=2, **average))
    change(directory / "adapter")
    capsys.readouterr()
    run(make(directory, KINDS[kind], steps=4, **average))
    err = " ".join(capsys.readouterr().err.split())
    name = "adapter_ema" if average else "adapter"
    assert f"`{directory / name}` holds another adapter than the checkpoint" in err
    assert step in err and "The checkpoint counts" in err
    # Not of the other directory, which is as the run left it.
    assert err.count("holds another adapter") == 1
    if not average:
        assert weights(directory) == weights(straight(kind).directory)


def test_what_pissa_factors_out_is_kept(
    make, straight, stopped, tmp_path, monkeypatch, capsys
):
    """A decomposition of another machine may differ; the run goes on with the first."""
    stopped("pissa", tmp_path / "run")
    lora, _ = open_adapter(tmp_path / "run" / "initial_adapter")
    assert lora.r == 4 and open_adapter(tmp_path / "run" / "adapter")[0].r == 8

    expected = weights(straight("pissa").directory)
    monkeypatch.setattr(runner, "init_adapters", pytest.fail)  # decomposed again
    capsys.readouterr()
    run(make(tmp_path / "run", KINDS["pissa"], steps=4))
    assert "another adapter" not in capsys.readouterr().err
    assert weights(tmp_path / "run") == expected


def test_what_was_factored_out_of_another_base_is_made_anew(
    make, straight, llama_dir, tmp_path, capsys
):
    other = tmp_path / "other"
    shutil.copytree(llama_dir, other)
    tensors = safetensors.numpy.load_file(other / "model.safetensors")
    safetensors.numpy.save_file(
        {name: tensor * 1.5 for name, tensor in tensors.items()},
        other / "model.safetensors",
    )
    directory = tmp_path / "run"
    run(make(directory, KINDS["pissa"], model={"path": str(other)}, steps=4))
    config = make(directory, KINDS["pissa"], steps=4)
    # As a start leaves it that ends before its first checkpoint.
    for path in directory.iterdir():
        if path.name == "initial_adapter":
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (directory / "config.toml").write_text(to_toml(config))
    capsys.readouterr()
    run(config)
    assert "was factored out of another base" in capsys.readouterr().err
    assert weights(directory) == weights(straight("pissa").directory)


def test_pissa_starts_as_the_base(make, tmp_path, plain):
    run(make(tmp_path / "run", KINDS["pissa"], steps=1, learning_rate=0.0))
    np.testing.assert_allclose(load(tmp_path / "run").logits(TOKENS), plain, atol=2e-5)


def test_loftq_and_modules_inside_each_other_are_refused(make, tmp_path):
    with pytest.raises(UserError, match="not quantized"):
        run(make(tmp_path / "run", KINDS["loftq"], {"quantization": "none"}))
    kind = {"target_modules": ("q_proj",), "modules_to_save": ("mlp", "up_proj")}
    with pytest.raises(UserError, match=r"mlp.up_proj`, and `.*mlp` that contains it"):
        run(make(tmp_path / "run", kind))


def test_all_that_was_trained_is_trained_again(
    make, tmp_path, architecture, edit_tensors
):
    """From an adapter as Unsloth and scripts around it write them."""
    kind = {**KINDS["tables"], "rank_pattern": {"q_proj": 2}, "use_dora": True}
    first = run(make(tmp_path / "one", kind, steps=2))
    adapter = tmp_path / "one" / "adapter"
    file = adapter / "adapter_config.json"
    raw = json.loads(file.read_text())
    raw["auto_mapping"] = {"parent_library": "transformers", "unsloth_fixed": True}
    raw["base_model_name_or_path"] = "unsloth/some-llama-bnb-4bit"
    file.write_text(json.dumps(raw))
    _, before = convert.load_adapter(adapter, architecture)

    def respell(tensors):
        for key in [key for key in tensors if "lora_" not in key]:
            spelled = key.replace(".weight", ".modules_to_save.default.weight")
            tensors[spelled] = tensors.pop(key)

    edit_tensors(adapter / "adapter_model.safetensors", respell)
    second = run(make(tmp_path / "two", {"r": 4}, steps=2, adapter_init=str(adapter)))
    assert second["groups"] == first["groups"]
    trained = first["trainable_parameters"]
    assert second["continued_from"]["trainable_parameters_before"] == trained
    lora = read_config(tmp_path / "two" / "config.toml").lora
    assert lora.modules_to_save == ("embed_tokens", "lm_head", "norm")
    assert lora.rank_pattern == {"q_proj": 2}
    # Tables, norms and magnitudes too start from what they were, and move.
    _, after = convert.load_adapter(tmp_path / "two" / "adapter", architecture)
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), before, after)
    assert len(jax.tree.leaves(moved)) == 8
    # Each of two steps moves a number by its rate of 0.01 at most, or a little more.
    assert all(0 < size < 0.03 for size in jax.tree.leaves(moved)), moved


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory):
    """A JSONL file of rows of 100 tokens: longer than the model is meant for."""
    path = tmp_path_factory.mktemp("data") / "long.jsonl"
    with open(path, "w") as file:
        for ids in np.random.default_rng(2).integers(1, 32, (6, 100)).tolist():
            file.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
    return path


def test_an_adapter_is_continued_at_a_longer_context(
    make, straight, long_rows, llama_dir, architecture, tmp_path, capsys
):
    """With groups, a moving average and noise; and stopped on the way."""
    before = straight("dora")
    changes = {"max_position_embeddings": 128}
    changes["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}

    def longer(directory, steps):
        return make(
            *(tmp_path / directory, {}, changes),
            {"path": str(long_rows), "max_length": 128},
            steps=steps,
            adapter_init=str(before.directory / "adapter"),
            loraplus_lr_ratio=4.0,
            weight_decay=0.1,
            groups=(ParameterGroup("down_proj", learning_rate=0.0),),
            ema_decay=0.5,
            neftune_noise_alpha=5.0,
        )

    run(longer("parts", 2))
    written = read_config(tmp_path / "parts" / "config.toml")
    assert written == dataclasses.replace(longer("parts", 2), lora=written.lora)
    started = " ".join(capsys.readouterr().err.split())
    report = run(longer("parts", 4))
    err = " ".join(capsys.readouterr().err.split())
    run(longer("straight", 4))
    straight_run, parts = tmp_path / "straight", tmp_path / "parts"
    for adapter in ("adapter", "adapter_ema"):
        assert weights(straight_run, adapter) == weights(parts, adapter)
    assert weights(straight_run) != weights(straight_run, "adapter_ema")

    # What was trained is trained again, and its rates are said and reported.
    trained = before.report["trainable_parameters"]
    assert report["continued_from"] == {
        "path": str(before.directory / "adapter"),
        "trainable_parameters_before": trained,
        "trainable_parameters": trained,
    }
    assert f"it has {trained:,} trained parameters, and this run trains" in started
    assert "optimizer starts afresh" in started and "afresh" not in err
    assert "the longest example has" not in err
    groups = {group["name"]: group for group in report["optimizer_groups"]}
    both = ("default", "default, no decay", "down_proj", "down_proj, no decay")
    assert set(groups) == {*both, "lora_B"}
    assert sum(g["parameters"] for g in report["optimizer_groups"]) == trained
    assert groups["lora_B"]["learning_rate"] == 0.04
    assert groups["default, no decay"]["weight_decay"] == 0.0
    assert "lora_B: " in err and "learning rate 0.04 (constant" in err
    start, end = (
        convert.load_adapter(directory / "adapter", architecture)[1]["model"]
        for directory in (before.directory, straight_run)
    )
    for module, part, moves in (
        ("self_attn.q_proj", "lora_A", True),
        ("self_attn.q_proj", "lora_magnitude_vector", True),
        ("mlp.down_proj", "lora_B", False),
    ):
        block, name = module.split(".")
        pair = [tree["layers"][block][name][part] for tree in (start, end)]
        assert np.array_equal(*pair) != moves, module

    # The longer context goes where the adapter goes.
    file = straight_run / "adapter" / "base_config.json"
    assert json.loads(file.read_text()) == changes
    assert load(straight_run).config.rope_scaling == RopeScaling("linear", 2.0)
    average = load(straight_run / "adapter_ema", dtype="float32")
    assert average.config.max_position_embeddings == 128
    config = make(tmp_path / "next", {}, adapter_init=str(straight_run / "adapter"))
    abstract = convert.abstract_llama(llama_dir, quantization="nf4_dq")[1]
    sources = find_sources(config)[1]
    kept, origin = _with_initial_adapter(config, sources, (), abstract)
    assert kept.model.config_changes == changes
    assert origin["trainable_parameters_before"] == trained


def test_an_adapter_of_other_weights_is_noted(straight, tmp_path, llama_dir, capsys):
    adapter = straight("plain").directory / "adapter"
    other = convert.load_llama(llama_dir, quantization=None)
    other[1]["model"]["norm"]["weight"] *= np.float32(1.5)
    convert.save_llama(tmp_path / "other", *other)
    capsys.readouterr()
    load(tmp_path / "other", adapter=adapter, dtype="float32")
    assert "was trained on a base with other weights" in capsys.readouterr().err
    # The same weights in another form: what to do about it is said.
    for how, cause in (
        ({"dtype": "bfloat16"}, "trained in float32, and is computed here in bfloat16"),
        ({"quantization": "none"}, "--quantization nf4_dq --dtype float32 load it"),
    ):
        load(llama_dir, adapter=adapter, **{"dtype": "float32"} | how)
        assert cause in capsys.readouterr().err
    # Without its run it still says so of the dtype.
    shutil.copytree(adapter, tmp_path / "copy")
    load(llama_dir, adapter=tmp_path / "copy", dtype="bfloat16")
    assert "--dtype float32 (`dtype`)" in capsys.readouterr().err


def test_inspect_predicts_what_a_run_writes(straight, llama_dir, capsys):
    report = straight("tables").report
    # 2 tables of 32 x 64, 5 norms of 64, and of q_proj 2 x 4 x 128.
    note = "make 4,096 of 5,440 trained parameters (75%): 0.02 MB"
    assert note in straight("tables").err
    capsys.readouterr()
    command = ["inspect", str(llama_dir / "config.json"), "--json", "--lora.r", "4"]
    command += ["--lora.target-modules", "q_proj"]
    command += ["--lora.modules-to-save", "embed_tokens", "lm_head", "norm"]
    assert main(command) == 0
    counted = json.loads(capsys.readouterr().out)
    for name in ("trainable_parameters", "groups", "adapter_bytes", "optimizer_bytes"):
        assert counted[name] == report[name], name
    assert "embed_tokens and lm_head, trained in full" in counted["warnings"][0]
    assert main([*command, "--optimizer", "lion"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert counted["optimizer_bytes"] == 4 * counted["trainable_parameters"] + 8


def test_a_run_may_start_from_what_fits_of_an_adapter(make, straight, tmp_path, capsys):
    start = tmp_path / "start"
    shutil.copytree(straight("plain").directory / "adapter", start)
    file = start / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["value_head.weight"] = np.zeros(3, np.float32)
    safetensors.numpy.save_file(tensors, file)
    train = {"steps": 1, "adapter_init": str(start)}
    with pytest.raises(CheckpointError, match="1 unexpected tensors: value_head"):
        run(make(tmp_path / "a", {}, **train))
    run(make(tmp_path / "b", {}, **train, adapter_init_strict=False))
    note = f"Not used of `{start}`: value_head.weight: unexpected tensors"
    assert note in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({}, ""),
        ({"dtype": "bfloat16"}, "was trained in float32, and is computed here in "),
        (
            {"quantization": "none"},
            "--model.quantization nf4_dq --model.dtype float32 load it as it was",
        ),
    ],
    ids=str,
)
def test_another_form_of_the_base_than_that_of_the_first_adapter_is_said(
    make, straight, tmp_path, capsys, model, said
):
    start = straight("plain").directory
    config = make(tmp_path, {}, model, steps=1, adapter_init=str(start / "adapter"))
    run(config)
    err = " ".join(capsys.readouterr().err.split())
    assert said in err and ("as it was trained" in err) == bool(said)


def test_another_config_of_the_same_weights_is_said(
    make, straight, llama_dir, tmp_path, capsys
):
    start = straight("plain").directory / "adapter"
    shutil.copytree(llama_dir, tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    raw = json.loads(file.read_text()) | {"rms_norm_eps": 1e-3}
    file.write_text(json.dumps(raw))
    model = {"path": str(tmp_path / "base")}
    run(make(tmp_path / "run", {}, model, steps=1, adapter_init=str(start)))
    said = "`rms_norm_eps` was 1e-06 and is 0.001"
    assert said in " ".join(capsys.readouterr().err.split())
    base = ["--base", str(tmp_path / "base"), "--json"]
    assert merge([str(start), str(tmp_path / "merged"), *base]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["trained_on_this_base"] is False
    assert said in " ".join(err.split())


def test_float16_without_loss_scaling_is_said(make, tmp_path, capsys):
    for dtype, said in (("float16", True), ("bfloat16", False)):
        run(make(tmp_path / dtype, {}, steps=1, model={"dtype": dtype}))
        assert ("the loss is not scaled" in capsys.readouterr().err) == said


def test_hot_swap(make, straight, tmp_path):
    """Another adapter of the same shapes: no new program, and the right logits."""
    run(make(tmp_path / "two", {"lora_alpha": 32}, steps=2))
    first, second = load(straight("plain").directory), load(tmp_path / "two")
    expected = second.logits(TOKENS)
    first.logits(TOKENS)
    before = inference._logits._jitted(())._cache_size()
    swapped = dataclasses.replace(
        first, adapters=second.adapters, lora_config=second.lora_config
    )
    np.testing.assert_array_equal(swapped.logits(TOKENS), expected)
    assert inference._logits._jitted(())._cache_size() == before
    attached = first.attach(tmp_path / "two")
    np.testing.assert_array_equal(attached.logits(TOKENS), expected)
    assert inference._logits._jitted(())._cache_size() == before
    bare = first.attach(None)
    assert bare.adapters is None and bare.base is first.base
    assert jax.tree.structure(first.adapters) == jax.tree.structure(second.adapters)


def test_a_run_from_a_grown_vocabulary_keeps_its_tables(
    tmp_path, make, llama_dir, capsys
):
    config, base = convert.load_llama(llama_dir, quantization=None)
    size = config.vocab_size + 4
    larger, tree = add_tokens(
        config, base, tokenizer_size=config.vocab_size, count=4, how=3
    )
    lora, start = LoraConfig(r=4, lora_alpha=8), tmp_path / "start"
    adapters = init_adapters(jax.random.key(0), tree, lora)
    table = tree["model"]["embed_tokens"]["weight"]
    tables = {("model", "embed_tokens"): table}
    if not config.tie_word_embeddings:
        tables["lm_head",] = tree["lm_head"]["weight"]
    convert.save_adapter(start, lora, adapters, larger, base_tables=tables)

    train = {"steps": 1, "adapter_init": str(start)}
    with pytest.raises(CheckpointError, match=f"of {size} tokens, and this base has"):
        run(make(tmp_path / "run", {}, **train))
    model = {"resize_to_adapter": True, "quantization": "none"}
    report = run(make(tmp_path / "run", {}, **train, model=model))
    # What inspect predicts has the tables too.
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "run" / "config.toml"), "--json"]) == 0
    predicted = json.loads(capsys.readouterr().out)
    assert predicted["adapter_bytes"] == report["adapter_bytes"]
    # And what plan does, whose [lora] is the adapter's.
    options = ("--gpu", "l4", "--method", "estimate", "--json")
    assert main(["plan", str(tmp_path / "run" / "config.toml"), *options]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["adapter_bytes"] == report["adapter_bytes"]
    # Both refuse what the run refuses; the adapter itself is counted as it is.
    text = (tmp_path / "run" / "config.toml").read_text()
    refused = text.replace("resize_to_adapter = true", "resize_to_adapter = false")
    (tmp_path / "refused.toml").write_text(refused)
    for command in (("inspect",), ("plan", *options)):
        assert main([command[0], str(tmp_path / "refused.toml"), *command[1:]]) == 1
        assert f"of {size} tokens, and this base has" in capsys.readouterr().err
    args = [str(start), "--base", str(llama_dir), "--json"]
    assert main(["inspect", *args]) == 0
    counted = json.loads(capsys.readouterr().out)["base_parameters"]
    assert counted == predicted["base_parameters"]
    # The tables are in the adapter again, as they were, and nothing trained them.
    loaded = load(tmp_path / "run")
    assert loaded.config.vocab_size == size
    assert loaded.lora_config.modules_to_save is None
    np.testing.assert_array_equal(
        loaded.base["model"]["embed_tokens"]["weight"], table.astype(np.float32)
    )
    # Only with an adapter is there a vocabulary to grow to.
    with pytest.raises(UserError, match="`resize_to_adapter` goes with"):
        run(make(tmp_path / "two", {}, model=model))
