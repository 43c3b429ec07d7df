"""What a run directory says for itself: its head's form, its chat template."""

import pytest

from qlora_jax.data import DataConfig, Source
from qlora_jax.directories import chat_template, quantizes_lm_head, resolve_auto
from qlora_jax.runfile import ModelConfig, RunConfig
from qlora_jax.train import TrainConfig

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
    assert quantizes_lm_head(tmp_path, asked) == packed
    assert resolve_auto(tmp_path, "auto", "auto") == ("nf4", "bfloat16")
    run.unlink()
    assert not quantizes_lm_head(tmp_path, asked)


def test_the_template_is_that_of_the_runs_conversations(tmp_path):
    assert chat_template(None, None) is None
    one = DataConfig(**MESSAGES, chat_template="one.jinja")
    assert chat_template(settings(one), tmp_path) == "one.jinja"
    assert chat_template(settings(), tmp_path) is None
    # Of several sources, where they agree.
    text = Source(path="text.txt", format="text")
    talks = [Source(**MESSAGES, chat_template=f"{n}.jinja") for n in ("a", "a", "b")]
    assert chat_template(settings(DataConfig(sources=(text, *talks[:2]))), None) == (
        "a.jinja"
    )
    assert chat_template(settings(DataConfig(sources=(text, *talks))), None) is None
    # An adapter may bring its own.
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    beside = str(tmp_path / "chat_template.jinja")
    assert (
        chat_template(None, tmp_path) == chat_template(settings(), tmp_path) == beside
    )
