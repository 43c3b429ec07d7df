"""What a run directory says for itself: its head's form, its chat template."""

import dataclasses
from pathlib import Path

import pytest

from qlora_jax.data.config import DataConfig, Source
from qlora_jax.errors import UserError
from qlora_jax.runs.config import EvalConfig, ModelConfig, RunConfig
from qlora_jax.runs.directory import kept_settings, run_of, run_settings, template_text
from qlora_jax.runs.loading import quantizes_lm_head, resolve_auto
from qlora_jax.runs.toml import to_toml
from qlora_jax.training.config import TrainConfig

MESSAGES = {"path": "rows.jsonl", "format": "messages"}


def settings(data=None, **model):
    return RunConfig(
        model=ModelConfig(path="base", **model),
        data=data or DataConfig(**MESSAGES),
        train=TrainConfig(steps=1),
        output_dir="run",
    )


@pytest.mark.parametrize(
    ("asked", "packed"), [("auto", True), ("nf4", True), ("nf4_dq", False)]
)
def test_the_head_is_packed_as_the_run_had_it(tmp_path, asked, packed):
    run = tmp_path / "config.toml"
    run.write_text(
        '[model]\npath = "base"\nquantization = "nf4"\nlm_head = "nf4"\n'
        '[data]\npath = "rows.jsonl"\n[train]\nsteps = 1\n'
    )
    assert quantizes_lm_head(run_settings(tmp_path), asked) == packed
    assert resolve_auto(run_settings(tmp_path), "auto", "auto") == ("nf4", "bfloat16")
    run.unlink()
    assert not quantizes_lm_head(run_settings(tmp_path), asked)


def test_the_text_of_the_first_template_is_kept(tmp_path):
    said = []
    assert template_text(DataConfig(path="a.txt"), said.append) is None
    assert template_text(DataConfig(**MESSAGES), said.append) is None
    places = [tmp_path / f"{n}.jinja" for n in "ab"]
    for place in places:
        place.write_text(f"{{{{ messages }}}}{place.stem}", "utf-8")
    talks = [Source(**MESSAGES, chat_template=str(place)) for place in places]
    alike = DataConfig(sources=(talks[0], talks[0]))
    assert template_text(alike, said.append) == "{{ messages }}a" and not said
    both = DataConfig(sources=(*talks, Source(**MESSAGES)))
    assert template_text(both, said.append) == "{{ messages }}a"
    (note,) = said
    assert f"{places[0]}, {places[1]}, the tokenizer's own. The first" in note
    places[0].unlink()
    with pytest.raises(UserError, match=r"chat_template`: cannot read .*a\.jinja"):
        template_text(alike, said.append)


def test_the_data_of_a_run_are_read_again_with_the_text_that_was_kept(tmp_path):
    run = tmp_path / "moved"
    (run / "best_adapter").mkdir(parents=True)
    talks = [Source(**MESSAGES, chat_template=f"{n}.jinja") for n in "ab"]
    config = settings(DataConfig(sources=tuple(talks)))
    own = EvalConfig(path="held.jsonl", format="messages", chat_template="a.jinja")
    config = dataclasses.replace(config, eval=own)
    (run / "config.toml").write_text(to_toml(config))
    before = kept_settings(run)
    assert before == dataclasses.replace(config, output_dir=str(run))
    kept = run / "best_adapter" / "chat_template.jinja"
    kept.write_text("{{ messages }}")
    found = kept_settings(run)
    assert [s.chat_template for s in found.data.sources] == [str(kept), "b.jinja"]
    assert found.eval.chat_template == str(kept)


def test_the_adapters_of_a_run_are_parts_of_it(tmp_path, monkeypatch):
    run = tmp_path / "run"
    for name in ("best_adapter", "initial_adapter"):
        (run / name).mkdir(parents=True)
        (run / name / "adapter_config.json").write_text("{}")
    assert run_of(run / "best_adapter") is None
    (run / "config.toml").write_text(
        '[model]\npath = "base"\ndtype = "float32"\n'
        '[data]\npath = "rows.jsonl"\n[train]\nsteps = 1\n'
    )
    assert run_of(run) == run_of(run / "best_adapter") == run
    assert resolve_auto(run_settings(run / "best_adapter"), "auto", "auto") == (
        "nf4_dq",
        "float32",
    )
    # It belongs to a base that the run changed; and an empty place is no adapter.
    assert run_of(run / "initial_adapter") is run_of(run / "adapter") is None
    monkeypatch.chdir(run / "best_adapter")
    assert run_of(Path()) == run
