# Runs and commands on models and adapters of the hub, as a user names them.

import json
import shutil

import pytest
import yaml

from qlora_jax.cli import convert as qlora_convert
from qlora_jax.cli.main import main
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.runs.loading import resolve
from qlora_jax.runs.publishing import model_card
from qlora_jax.runs.runner import run
from qlora_jax.runs.toml import read_config
from tests.hub import TOKEN

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def base(hub, llama_dir):
    """The commit of the model me/base."""
    return hub.add("me/base", llama_dir)


def test_a_run_on_a_name_keeps_its_commit(hub, base, make, tmp_path, capsys):
    config = make(tmp_path / "run", model={"path": "me/base"}, train={"steps": 2})
    run(config)
    saved = read_config(tmp_path / "run" / "config.toml")
    assert saved.model.path == f"me/base@{base}"
    raw = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    # As PEFT's AutoPeftModel reads it.
    assert (raw["base_model_name_or_path"], raw["revision"]) == ("me/base", base)
    # The branch moves on to other weights; the run does not.
    repo = hub.repos["me/base"]
    repo.commit({**repo.files, "model.safetensors": b"other"})
    capsys.readouterr()
    longer = make(tmp_path / "run", model={"path": "me/base"}, train={"steps": 4})
    assert run(longer)["steps"] == 4
    assert "Continuing from step 2 of 4" in capsys.readouterr().err
    assert resolve(tmp_path / "run").base.name == base
    # Also with the adapter alone, and without the hub.
    shutil.copytree(tmp_path / "run/adapter", tmp_path / "alone")
    hub.status = 503
    assert resolve(tmp_path / "alone").base.name == base


def test_a_run_starts_from_an_adapter_of_the_hub(hub, base, make, tmp_path, capsys):
    run(make(tmp_path / "first", model={"path": "me/base"}, train={"steps": 1}))
    commit = hub.add("me/first", tmp_path / "first/adapter")
    train = {"steps": 1, "adapter_init": "me/first"}
    second = make(tmp_path / "second", model={"path": "me/base"}, train=train)
    capsys.readouterr()
    run(second)
    assert "Starting from the adapter `me/first@" in capsys.readouterr().err
    saved = read_config(tmp_path / "second/config.toml")
    assert saved.train.adapter_init == f"me/first@{commit}"
    assert run(second)["steps"] == 1  # complete, so nothing is done again


@pytest.mark.parametrize(
    ("command", "fetched"),
    [
        ("inspect me/base", {"config.json"}),
        ("inspect me/first", None),
        ("eval me/first --data.path ROWS --data.format tokens", None),
        ("quantize me/base OUT", None),
        ("tokens me/base", None),
        ("merge me/first OUT --no-check --onto original", None),
        ("convert model me/base OUT --dtype float32", None),
        ("convert adapter me/first OUT", None),
        ("convert combine OUT --adapters me/first me/first", None),
        ("convert verify me/first me/first", None),
    ],
)
def test_every_command_takes_names(
    hub, base, llama_dir, make_adapter, rows_file, tmp_path, command, fetched
):
    raw = json.loads((llama_dir / "config.json").read_text())
    hub.add("me/first", make_adapter(raw, base_model_name_or_path="me/base"))
    places = {"OUT": str(tmp_path / "out"), "ROWS": str(rows_file)}
    words = [places.get(word, word) for word in command.split()]
    if words[0] == "convert":
        assert qlora_convert.main(words[1:]) == 0
    else:
        assert main(words) == 0
    downloaded = hub.downloaded & {p.name for p in llama_dir.iterdir()}
    assert fetched is None or downloaded == fetched


# --- Publishing ---


def card_of(repo):
    text = repo.files["README.md"].decode()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_run_publishes_its_adapter_with_a_card_once(
    hub, base, make, rows_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    config = make(
        tmp_path / "run",
        model={"path": "me/base"},
        train={"steps": 2},
        eval={"examples": 4},
        hub={"model_id": "me/tuned", "adapter": "best"},
    )
    url = run(config)["published"]
    repo = hub.repos["me/tuned"]
    assert repo.private and url.endswith(repo.refs["main"])
    for file in (tmp_path / "run/best_adapter").iterdir():
        assert repo.files[file.name] == file.read_bytes()
    front, body = card_of(repo)
    assert front == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["qlora-jax", "lora"],
        "base_model": "me/base",
        "base_model_relation": "adapter",
    }
    report = json.loads((tmp_path / "run/report.json").read_text())
    for said in (
        f"QLoRA (nf4_dq) adapter for [me/base](https://huggingface.co/me/base) at "
        f"revision `{base}`",
        'AutoPeftModelForCausalLM.from_pretrained("me/tuned")',
        f"| files | {rows_file.name} |".replace("_", "\\_"),
        f"| last training loss | {report['final_loss']:.4f} |",
        f"| best held-out loss | {report['eval']['best_loss']:.4f} (step 2) |",
        "| learning rate | 0.01 |",
        "The weights are those of step 2.",
    ):
        assert said in body, said
    assert str(tmp_path) not in body
    # What is published is loaded under its name, on its base.
    assert resolve("me/tuned").base.name == base
    hub.status = 503
    assert run(config)["published"] == url  # complete and published: nothing to do


def test_a_run_that_cannot_publish_loses_nothing(
    hub, base, make, tmp_path, monkeypatch
):
    config = make(
        tmp_path / "run",
        model={"path": "me/base"},
        train={"steps": 1},
        hub={"model_id": "me/tuned"},
    )
    with pytest.raises(CheckpointError, match="auth login"):
        run(config)  # without a token, before the first step
    assert not (tmp_path / "run/adapter").exists()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.loses_blobs = True
    with pytest.raises(CheckpointError, match="The run is complete .* tries again"):
        run(config)
    hub.loses_blobs = False
    assert "commit" in run(config)["published"]
    with pytest.raises(UserError, match="needs held-out data"):
        make(tmp_path / "x", hub={"model_id": "me/tuned", "adapter": "best"})


def test_a_damaged_note_of_what_was_published_publishes_again(
    hub, base, make, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    config = make(
        tmp_path / "run",
        model={"path": "me/base"},
        train={"steps": 1},
        hub={"model_id": "me/tuned"},
    )
    run(config)
    file = tmp_path / "run/published.json"
    without_url = {**json.loads(file.read_text()), "url": None}
    for text in ("{", "[]", "", json.dumps(without_url)):
        file.write_text(text)
        capsys.readouterr()
        assert hub.url in run(config)["published"]
        said = "published again" in capsys.readouterr().err
        assert said == (not text.startswith('{"'))


def test_a_run_says_that_another_revision_is_asked_for(
    hub, base, make, tmp_path, capsys
):
    run(make(tmp_path / "run", model={"path": "me/base"}, train={"steps": 1}))
    for revision, said in ((base, False), ("main", True)):
        capsys.readouterr()
        path = f"me/base@{revision}"
        run(make(tmp_path / "run", model={"path": path}, train={"steps": 1}))
        assert ("began with `me/base@" in capsys.readouterr().err) == said


@pytest.mark.parametrize("revision", ["x`\n# Heading\n<b>", "main`", "a b", "\x1b[31m"])
def test_a_card_has_no_markup_of_an_adapter(
    hub, llama_dir, make_adapter, tmp_path, revision
):
    raw = json.loads((llama_dir / "config.json").read_text())
    changes = {"base_model_name_or_path": "me/base", "revision": revision}
    card = model_card(make_adapter(raw, **changes), "me/x")
    assert "A LoRA adapter for [me/base](https://huggingface.co/me/base).\n" in card


def test_a_card_names_no_path_of_this_machine(
    llama_dir, make_adapter, tmp_path, monkeypatch
):
    # It looks like a name of the hub, and leads to a directory next to the adapter.
    raw = json.loads((llama_dir / "config.json").read_text())
    adapter = make_adapter(raw, base_model_name_or_path="models/base")
    (adapter.parent / "models").mkdir()
    (adapter.parent / "models/base").symlink_to(llama_dir)
    monkeypatch.chdir("/")
    assert "models/base" not in model_card(adapter, "me/x")


@pytest.mark.parametrize(
    ("command", "relation"),
    [
        ("merge me/first OUT --no-check --onto original", "finetune"),
        ("convert adapter me/first OUT", "adapter"),
        ("convert combine OUT --adapters me/first me/first", "adapter"),
        ("quantize me/base OUT", "quantized"),
        ("convert model me/base OUT --dtype float32", None),
    ],
)
def test_every_export_publishes_what_it_wrote(
    hub, base, llama_dir, make_adapter, tmp_path, monkeypatch, command, relation
):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    raw = json.loads((llama_dir / "config.json").read_text())
    hub.add("me/first", make_adapter(raw, base_model_name_or_path="me/base"))
    out = tmp_path / "out"
    words = command.replace("OUT", str(out)).split()
    words += ["--push-to-hub", "me/made", "--no-private"]
    program = qlora_convert.main if words[0] == "convert" else main
    assert program(words[words[0] == "convert" :]) == 0
    repo = hub.repos["me/made"]
    assert not repo.private
    files = {p.name: p.read_bytes() for p in out.iterdir() if "report" not in p.name}
    assert files.items() <= repo.files.items()
    front, body = card_of(repo)
    assert front["base_model"] == "me/base" and str(tmp_path) not in body
    assert front.get("base_model_relation") == relation


def test_no_private_without_a_repository_is_refused(llama_dir, tmp_path, capsys):
    assert (
        main(["quantize", str(llama_dir), str(tmp_path / "out"), "--no-private"]) == 2
    )
    assert "--no-private goes with --push-to-hub" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "quantize me/none OUT",
        "quantize me/base FULL",
        "merge me/base OUT",
        "convert model me/base FULL",
        "convert model me/base OUT --dequantize",
    ],
)
def test_an_export_that_fails_leaves_no_repository(
    hub, base, tmp_path, monkeypatch, command
):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    places = {"OUT": str(tmp_path / "out"), "FULL": str(tmp_path / "full")}
    words = [places.get(word, word) for word in command.split()]
    words += ["--push-to-hub", "me/made"]
    program = qlora_convert.main if words[0] == "convert" else main
    assert program(words[words[0] == "convert" :]) == 1
    assert "me/made" not in hub.repos


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": {"target_modules": ("no_such",)}},
        {"data": {"path": "missing.jsonl"}},
        {"data": {"max_length": 1}},
        {"data": {"format": "messages"}},
        {"hub": {"model_id": "not a name"}},
        {"train": {"steps": 1, "adapter_init": "me/none"}},
        {"model": {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}},
    ],
)
def test_a_mistake_in_a_run_costs_no_download(hub, base, make, tmp_path, changes):
    sections = {"model": {}, "train": {"steps": 1}, **changes}
    with pytest.raises(UserError):
        sections["model"] = {"path": "me/base", **sections["model"]}
        run(make(tmp_path / "run", **sections))
    assert "model.safetensors" not in hub.downloaded


def test_a_changed_setting_or_another_family_costs_no_download(
    hub, base, make, llama_dir, tmp_path, monkeypatch
):
    first = make(tmp_path / "run", model={"path": "me/base"}, train={"steps": 1})
    run(first)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "new"))
    hub.requests.clear()
    lora = {"r": 8}
    with pytest.raises(UserError, match="cannot be continued"):
        run(make(tmp_path / "run", model={"path": "me/base"}, lora=lora))
    raw = json.loads((llama_dir / "config.json").read_text())
    moe = json.dumps(raw | {"model_type": "qwen3_moe"}).encode()
    hub.add("me/moe", {**hub.repos["me/base"].files, "config.json": moe})
    assert main(["quantize", "me/moe", str(tmp_path / "out")]) == 1
    assert "model.safetensors" not in hub.downloaded
