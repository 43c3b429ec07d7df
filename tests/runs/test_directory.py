"""A run directory: its settings, its chat template, its adapters."""

import dataclasses
import datetime
import os
import types
from pathlib import Path

import pytest

from qlora_jax.cli.train import from_arguments
from qlora_jax.data.config import DataConfig, Source
from qlora_jax.errors import UserError
from qlora_jax.runs.config import EvalConfig, ModelConfig, RunConfig
from qlora_jax.runs.dates import with_run_date, with_saved_date
from qlora_jax.runs.directory import find_run, read_settings, template_text
from qlora_jax.runs.toml import to_toml
from qlora_jax.training.config import TrainConfig

MESSAGES = {"path": "rows.jsonl", "format": "messages"}


def test_the_text_of_the_first_template_is_kept(tmp_path):
    notes = []
    assert template_text(DataConfig(path="a.txt"), notes.append) is None
    assert template_text(DataConfig(**MESSAGES), notes.append) is None
    files = [tmp_path / f"{n}.jinja" for n in "ab"]
    for file in files:
        file.write_text(f"{{{{ messages }}}}{file.stem}", "utf-8")
    chats = [Source(**MESSAGES, chat_template=str(file)) for file in files]
    alike = DataConfig(sources=(chats[0], chats[0]))
    assert template_text(alike, notes.append) == "{{ messages }}a" and not notes
    mixed = DataConfig(sources=(*chats, Source(**MESSAGES)))
    assert template_text(mixed, notes.append) == "{{ messages }}a"
    (note,) = notes
    assert f"{files[0]}, {files[1]}, the tokenizer's own. The first" in note
    files[0].unlink()
    with pytest.raises(UserError, match=r"chat_template`: cannot read .*a\.jinja"):
        template_text(alike, notes.append)


def test_the_text_of_a_built_in_template_travels_too():
    notes = []
    named = DataConfig(**MESSAGES, chat_template="chatml")
    assert "<|im_start|>" in (template_text(named, notes.append) or "")
    turns = DataConfig(
        path="a.jsonl", format="prompt_completion", chat_template="chatml"
    )
    assert template_text(turns, notes.append) == template_text(named, notes.append)


def test_settings_of_a_moved_run_name_its_copy_of_the_template(tmp_path):
    run = tmp_path / "moved"
    (run / "best_adapter").mkdir(parents=True)
    chats = tuple(Source(**MESSAGES, chat_template=f"{n}.jinja") for n in "ab")
    config = RunConfig(
        model=ModelConfig(path="base"),
        data=DataConfig(sources=chats),
        train=TrainConfig(steps=1),
        eval=EvalConfig(path="held.jsonl", format="messages", chat_template="a.jinja"),
        output_dir="run",
    )
    (run / "config.toml").write_text(to_toml(config))
    assert read_settings(run) == dataclasses.replace(config, output_dir=str(run))
    copy = run / "best_adapter" / "chat_template.jinja"
    copy.write_text("{{ messages }}")
    settings = read_settings(run)
    assert [s.chat_template for s in settings.data.sources] == [str(copy), "b.jinja"]
    assert settings.eval.chat_template == str(copy)


def test_a_run_keeps_the_date_of_its_first_start(tmp_path):
    tokenizer = types.SimpleNamespace(
        chat_template="{{ strftime_now('%d') }}",
        apply_chat_template=lambda *_, **__: "",
    )
    config = RunConfig(
        model=ModelConfig(path="base"),
        data=DataConfig(**MESSAGES),
        train=TrainConfig(steps=1),
        output_dir=str(tmp_path),
    )
    started = with_run_date(config, tokenizer)
    assert started.data.date == datetime.date.today().isoformat()
    assert with_saved_date(config) == config
    kept = dataclasses.replace(
        config, data=dataclasses.replace(config.data, date="2020-01-01")
    )
    (tmp_path / "config.toml").write_text(to_toml(kept))
    assert with_saved_date(config) == kept == with_run_date(kept, tokenizer)
    assert with_saved_date(started) == started  # to be refused, as it was given
    # Held-out conversations alone may be dated too; other data have no date.
    text = dataclasses.replace(config, data=DataConfig(path="a.txt"))
    assert with_run_date(text, tokenizer) == text
    held_out = dataclasses.replace(text, eval=EvalConfig(**MESSAGES))
    assert with_run_date(held_out, tokenizer).data.date == started.data.date


def test_adapters_on_the_unchanged_base_are_parts_of_the_run(tmp_path, monkeypatch):
    run = tmp_path / "run"
    for name in ("best_adapter", "initial_adapter"):
        (run / name).mkdir(parents=True)
        (run / name / "adapter_config.json").write_text("{}")
    assert find_run(run / "best_adapter") is None
    (run / "config.toml").write_text("")
    assert find_run(run) == find_run(run / "best_adapter") == run
    # The first belongs to a base that the run changed; the second does not exist.
    assert find_run(run / "initial_adapter") is find_run(run / "adapter") is None
    monkeypatch.chdir(run / "best_adapter")
    assert find_run(Path()) == run


@pytest.mark.parametrize("given", ["config.toml", ""])
@pytest.mark.parametrize("is_run", [True, False])
def test_a_copied_run_is_continued_where_it_is(tmp_path, capsys, given, is_run):
    """Not where it was: another run may be there, or one would begin."""
    was, now = tmp_path / "was", tmp_path / "now"
    now.mkdir()
    config = RunConfig(
        output_dir=str(was),
        model=ModelConfig(path="base"),
        data=DataConfig(path="rows.jsonl", format="text", max_length=8),
        train=TrainConfig(steps=1),
    )
    (now / "config.toml").write_text(to_toml(config))
    if is_run:
        (now / "started.json").write_text("{}")
    moved, _ = from_arguments([str(now / given)])
    assert moved.output_dir == str(now if is_run else was)
    assert ("continued where it is now" in capsys.readouterr().err) == is_run
    # An option says where, and a link to the directory is the directory.
    elsewhere = ["--output-dir", str(tmp_path / "new")]
    assert from_arguments([str(now / given), *elsewhere])[0].output_dir == elsewhere[1]
    was.symlink_to(now)
    assert from_arguments([str(now / given)])[0].output_dir == str(was)


def test_settings_that_are_no_file_are_not_passed_over(tmp_path):
    os.mkfifo(tmp_path / "config.toml")
    run = find_run(tmp_path)
    assert run == tmp_path
    with pytest.raises(UserError, match="it is a pipe or a device"):
        read_settings(run)
