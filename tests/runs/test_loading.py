"""A path stands for a base, an adapter and a run; copies of adapters find the base."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import convert
from qlora_jax.cli.convert import main as convert_main
from qlora_jax.cli.main import main as qlora_jax_main
from qlora_jax.cli.merge import Merge
from qlora_jax.cli.options import parse
from qlora_jax.data.config import DataConfig
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.runs.config import EvalConfig, ModelConfig, RunConfig
from qlora_jax.runs.loading import (
    Resolved,
    base_candidates,
    base_name_for_copy,
    base_options,
    is_broken_path,
    load,
    resolve,
)
from qlora_jax.runs.toml import to_toml
from qlora_jax.training.config import TrainConfig


def model(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_a_base_is_also_looked_for_next_to_the_adapter(tmp_path, monkeypatch):
    base, adapter = model(tmp_path / "base"), tmp_path / "run" / "adapter"
    monkeypatch.chdir(tmp_path)
    first, *others = base_candidates(adapter, "base")
    assert first == Path("base") and base in others


def test_the_copy_of_an_adapter_names_the_same_base(tmp_path):
    for name in (None, "", "org/name", "/nowhere/base", "../nowhere"):
        assert base_name_for_copy(name, tmp_path / "a", tmp_path / "b") == name
    # Another model has the relative path that leads from the copy.
    base = model(tmp_path / "here" / "base")
    model(tmp_path / "there" / "base")
    source, output = tmp_path / "here" / "a", tmp_path / "there" / "b"
    source.mkdir()
    assert base_name_for_copy("../base", source, output) == str(base)
    assert base_name_for_copy("../base", source, source.with_name("b")) == "../base"


@pytest.mark.parametrize(
    ("name", "broken"),
    [(None, False), ("org/name", False), ("../nowhere", True), ("/nowhere", True)],
)
def test_a_hub_name_is_not_a_broken_path(tmp_path, name, broken):
    assert is_broken_path(name, tmp_path) == broken


@pytest.mark.parametrize(
    ("asked", "quantization", "packed_head"),
    [("auto", "nf4", True), ("nf4", "nf4", True), ("nf4_dq", "nf4_dq", False)],
)
def test_the_head_is_packed_as_in_the_run(asked, quantization, packed_head):
    run = ModelConfig("base", quantization="nf4", lm_head="nf4", dtype="float32")
    assert base_options(run, asked) == {
        "quantization": quantization,
        "quantize_lm_head": packed_head,
        "dtype": "float32",
    }
    default = {"quantization": "nf4_dq", "dtype": "bfloat16"}
    assert base_options(None) == {**default, "quantize_lm_head": False}
    assert base_options(run, "none", "float16")["quantization"] is None


NF4 = {"quantization": "nf4", "quantize_lm_head": True, "dtype": "float16"}
DQ = {"quantization": "nf4_dq"}
BF16 = "bfloat16"
STORED = {"quantization": None, "quantize_lm_head": False, "dtype": None}
RECORD = {"quantization": "nf4", "lm_head": "nf4", "dtype": "float16"}


@pytest.mark.parametrize(
    ("record", "asked", "options", "computed"),
    [
        (None, {}, STORED, BF16),
        (RECORD, {}, NF4, "float16"),
        (RECORD, {"dtype": "float32"}, NF4 | {"dtype": "float32"}, "float32"),
        (RECORD, {"quantization": "none"}, STORED | {"dtype": "float16"}, "float16"),
        (RECORD | {"dtype": "bfloat16, float32"}, {}, NF4 | {"dtype": None}, BF16),
        (RECORD | {"quantization": ["nf4"]}, {}, STORED, BF16),
        (None, DQ, STORED | DQ, BF16),
        (None, {"dtype": "float32"}, STORED | {"dtype": "float32"}, "float32"),
    ],
)
def test_a_base_is_as_in_training_or_as_stored(
    tiny, make_tensors, save_model, tmp_path, record, asked, options, computed
):
    tensors = make_tensors(tiny, ml_dtypes.bfloat16)
    # Norms in float32, as some checkpoints have them, change nothing.
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    adapter = None
    if record is not None:
        adapter = tmp_path
        (adapter / "training.json").write_text(json.dumps(record))
    resolved = Resolved(save_model(tiny, tensors), adapter)
    load_options, dtype = resolved.load_options(**asked)
    assert load_options == options
    assert dtype == computed


def test_every_path_of_a_run_resolves_to_it(fact_run):
    run, base = fact_run, fact_run.parent / "base"
    resolved = resolve(run)
    assert resolved.run == run and resolved.adapter == run / "adapter"
    assert resolved.settings is not None and resolved.lora is not None
    assert resolved.base == Path(resolved.settings.model.path) == base
    report = json.loads((run / "report.json").read_text())
    assert resolved.fingerprint == report["base_fingerprint"]
    assert resolve(run / "adapter") == resolved
    attached = resolve(base, adapter=run)
    assert (attached.adapter, attached.lora) == (resolved.adapter, resolved.lora)
    assert attached.run is attached.settings is None
    with pytest.raises(UserError, match="is an adapter itself"):
        resolve(run, adapter=run)
    with pytest.raises(UserError, match="names the base of an adapter directory"):
        resolve(base, base=run)


def test_a_run_is_loaded_from_its_own_path_whatever_its_adapter_names(
    make, tmp_path, make_adapter, tiny
):
    base, adapter = model(tmp_path / "base"), tmp_path / "run" / "adapter"
    (tmp_path / "run").mkdir()
    make_adapter(tiny, name="run/adapter", base_model_name_or_path="org/name")
    settings = to_toml(make(tmp_path / "run", model={"path": str(base)}))
    (tmp_path / "run" / "config.toml").write_text(settings)
    assert resolve(adapter).base == resolve(tmp_path / "run").base == base
    (base / "config.json").unlink()
    with pytest.raises(CheckpointError, match=f"is '{base}' or 'org/name', which is"):
        resolve(adapter)


def test_the_base_of_an_adapter_may_not_be_an_adapter(make_adapter, tiny, capsys):
    below = make_adapter(tiny, name="below")
    adapter = make_adapter(tiny, name="above", base_model_name_or_path=str(below))
    with pytest.raises(CheckpointError, match=f"is `{below}`, an adapter itself. Merg"):
        resolve(adapter)
    resolve(adapter, base=below)  # refused when it is opened
    with pytest.raises(CheckpointError, match="is a PEFT adapter, not a model"):
        convert.open_config(below)
    assert "holds a model" not in capsys.readouterr().err


def test_a_directory_with_a_model_and_an_adapter_stands_for_the_adapter(
    tiny, make_tensors, save_model, make_adapter, capsys
):
    base = save_model(tiny, make_tensors(tiny), "base")
    both = save_model(tiny, make_tensors(tiny), "both")
    adapter = make_adapter(tiny, base_model_name_or_path=str(base))
    shutil.copytree(adapter, both, dirs_exist_ok=True)
    resolved = resolve(both)
    assert (resolved.base, resolved.adapter) == (base, both)
    note = f"`{both}` holds an adapter and the weights of a model. The adapter is used"
    assert note in capsys.readouterr().err
    other = make_adapter(tiny, name="other", base_model_name_or_path=str(both))
    assert resolve(other).base == both
    assert "holds a model and an adapter. The model is used" in capsys.readouterr().err
    # Nothing is left out where the adapter belongs to the model beside it.
    shutil.copytree(other, both, dirs_exist_ok=True)
    assert resolve(both).base == both
    assert capsys.readouterr().err == ""


def test_fields_of_a_base_that_are_not_read_are_said_when_it_is_loaded(
    tiny, make_tensors, save_model, make_adapter, tmp_path, capsys
):
    base = save_model({**tiny, "sliding_window": 4}, make_tensors(tiny), "base")
    load(base)
    note = "has fields that are not read, here as in transformers: `sliding_w"
    assert note in capsys.readouterr().err
    report = convert.merge(base, make_adapter(tiny), tmp_path / "merged")
    assert note in report["notes"][0]


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "BASE"),
        ("plan", "--model", "BASE", "--gpu", "l4", "--max-length", "8"),
        ("quantize", "BASE", "OUT"),
        ("tokens", "BASE"),
        ("model", "BASE", "OUT"),
    ],
)
def test_every_command_that_reads_a_base_says_them(
    command, tiny, make_tensors, save_model, make_adapter, tmp_path, capsys
):
    base = save_model({**tiny, "sliding_window": 4}, make_tensors(tiny), "base")
    takes_model_alone = command[0] in ("quantize", "model", "tokens")
    if takes_model_alone:
        shutil.copytree(make_adapter(tiny), base, dirs_exist_ok=True)
    places = {"BASE": str(base), "OUT": str(tmp_path / "out")}
    main = convert_main if command[0] == "model" else qlora_jax_main
    assert main([places.get(word, word) for word in command]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "`sliding_window`=4" in said
    # And which of two models in one directory they take.
    both = "holds a model and an adapter. The model is used"
    assert (both in said) == takes_model_alone


def test_the_model_beside_an_adapter_is_the_base_of_another_that_is_given(
    tiny, make_tensors, save_model, make_adapter, capsys
):
    both = save_model(tiny, make_tensors(tiny), "both")
    shutil.copytree(make_adapter(tiny), both, dirs_exist_ok=True)
    other = make_adapter(tiny, name="other")
    resolved = resolve(both, adapter=other)
    assert (resolved.base, resolved.adapter) == (both, other)
    note = "holds a model and an adapter. The model is used, without this adapter"
    assert note in capsys.readouterr().err
    with pytest.raises(UserError, match="is an adapter itself"):
        resolve(other, adapter=other)


def test_the_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model").base == tmp_path / "model"
    config = RunConfig(
        ModelConfig("~/m"),
        DataConfig(
            ("~/a.txt", "hf:x/y"), format="messages", chat_template="~/t", cache="~/c"
        ),
        TrainConfig(steps=1, adapter_init="~/a"),
        eval=EvalConfig(path="~/e.txt"),
        output_dir="~/run",
    )
    home = f"{tmp_path}/"
    paths = (config.model.path, config.train.adapter_init, config.output_dir)
    assert paths == (f"{home}m", f"{home}a", f"{home}run")
    assert config.data.path == (f"{home}a.txt", "hf:x/y")
    assert (config.data.chat_template, config.data.cache) == (f"{home}t", f"{home}c")
    assert config.eval.path == f"{home}e.txt"
    command = parse(Merge, ["~/adapter", "~/out", "--base=~/base"], prog="merge")
    assert command.output == tmp_path / "out" and command.base == tmp_path / "base"
    with pytest.raises(UserError, match="`~` is not expanded here"):
        convert.check_new_directory(Path("~/out"))


def test_a_base_elsewhere_is_looked_for_once(tiny, make_adapter):
    adapter = make_adapter(tiny, base_model_name_or_path="/nowhere/base")
    with pytest.raises(CheckpointError, match=r"\(looked at `/nowhere/base`\)"):
        resolve(adapter)
