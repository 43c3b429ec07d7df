"""Runs on mixtures and on mapped data: stopped, continued, refused when data change."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.cli.main import main
from qlora_jax.data.config import Source
from qlora_jax.errors import Problems, UserError
from qlora_jax.runs import prepare as prepared
from qlora_jax.runs import runner
from qlora_jax.runs.config import EvalConfig, RunConfig
from qlora_jax.runs.directory import run_lock
from qlora_jax.runs.resume import compare_records, run_record
from qlora_jax.runs.sources import find_sources
from tests.runs.directories import after_step, losses, weights

pytestmark = pytest.mark.usefixtures("compile_each_program_once")
STEPS = 7


@pytest.fixture(scope="module")
def sources(rows_file, tmp_path_factory):
    """Three sources of few rows, so that a run passes through each many times."""
    rows = rows_file.read_text().splitlines()
    folder = tmp_path_factory.mktemp("sources")
    sources = []
    for weight, part in ((3, rows[:13]), (1, rows[13:17]), (2, rows[17:])):
        path = folder / f"{weight}.jsonl"
        path.write_text("\n".join(part))
        sources.append(Source(path=str(path), weight=weight))
    return tuple(sources)


@pytest.fixture(scope="module")
def make(make):
    """A function: directory, settings of [data] -> a run of packed rows."""

    def packed(directory, steps=STEPS, held_out=None, **data) -> RunConfig:
        return make(
            directory,
            data={"packing": True, **data},
            train={"steps": steps, "gradient_accumulation_steps": 2},
            eval=held_out or {},
            lora={"r": 2, "lora_alpha": 4, "target_modules": ("q_proj",)},
            checkpoint={"every": 2},
        )

    return packed


@pytest.fixture(scope="module")
def straight(make, sources, tmp_path_factory):
    """A run on the mixture that nothing disturbed."""
    directory = tmp_path_factory.mktemp("straight") / "run"
    report = runner.run(make(directory, sources=sources, seed=5))
    return directory, report


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize(("step", "cache"), [(2, None), (5, "auto")])
def test_a_mixture_continues_to_the_same_bits(
    straight, make, sources, tmp_path, step, cache
):
    config = make(tmp_path / "run", sources=sources, seed=5, cache=cache)
    with after_step(step, interrupt), pytest.raises(KeyboardInterrupt):
        runner.run(config)
    # Where the tokens are held has no part in what a run is.
    other = str(tmp_path / "elsewhere") if cache is None else None
    report = runner.run(make(tmp_path / "run", sources=sources, seed=5, cache=other))
    directory, expected = straight
    assert losses(tmp_path / "run") == losses(directory)
    assert weights(tmp_path / "run") == weights(directory)
    assert report["data"] == expected["data"]
    assert report["data"]["sources"][0]["share"] == 0.5
    assert (tmp_path / "run.data").exists() == (cache == "auto")


def test_a_mixture_that_changed_is_refused(make, sources, tmp_path, straight):
    directory, _ = straight
    first, *rest = sources
    shorter = tmp_path / "shorter.jsonl"
    lines = Path(str(first.path)).read_text().splitlines()
    shorter.write_text("\n".join(lines[:-1]))
    for changed in (
        (Source(path=first.path, weight=4), *rest),
        (Source(path=str(shorter), weight=3), *rest),
        sources[::-1],
    ):
        config = make(directory, sources=changed, seed=5)
        with pytest.raises(UserError, match=r"data\.fingerprint: '\w+' -> "):
            runner.run(config)


def test_the_settings_of_a_run_with_a_mixture_continue_it(straight, capsys):
    directory, _ = straight
    assert main(["train", str(directory / "config.toml")]) == 0
    assert "This run is finished" in capsys.readouterr().err
    assert main(["eval", str(directory), "--json"]) == 1
    assert "held nothing out" in capsys.readouterr().err
    file = directory / "config.toml"
    before = file.read_text()
    # A run that held nothing out has nothing to show, whatever its file says later.
    file.write_text(before.replace("[eval]", "[eval]\nexamples = 6"))
    assert main(["eval", str(directory), "--json"]) == 1
    assert "are not what they were" in capsys.readouterr().err
    file.write_text(before)


def test_the_held_out_part_of_a_mixture_is_measured_by_source(
    make, sources, rows_file, tmp_path, capsys
):
    report = runner.run(make(tmp_path / "run", 1, {"examples": 6}, sources=sources))
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    mixture = json.loads(capsys.readouterr().out)
    assert mixture["rows"] == 6 == sum(s["rows"] for s in mixture["sources"].values())
    assert set(mixture["sources"]) == {source.path for source in sources}
    # Sums of float32 in another order.
    np.testing.assert_allclose(mixture["loss"], report["eval"]["best_loss"], rtol=1e-5)
    args = ["--data.path", str(rows_file), "--json"]
    assert main(["eval", str(tmp_path / "run"), *args]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 24


def test_the_record_has_what_makes_the_rows(make, rows_file):
    config = make("run", path=str(rows_file))
    record = run_record(config, "base", "data")
    assert set(record["data"]) == {
        *("fingerprint", "format", "max_length", "packing", "shuffle", "seed"),
        *("train_on", "prompt", "completion", "text", "too_long", "append_eos"),
        *("messages", "roles", "on_bad_row", "chat_template_kwargs"),
        *("instruction_part", "response_part"),
        *("answers", "date", "allow_lost_answers"),
        "eos_token",
    }


def test_fewer_rows_than_a_step_takes_are_noted(
    make, rows_file, architecture, tmp_path, capsys
):
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(rows_file.read_text().splitlines()[:3]))

    def notes_of(path):
        config = make(tmp_path / "run", path=str(path))
        prepared._load_data(config, find_sources(config)[1], architecture)
        return capsys.readouterr().err

    assert "repeated" not in notes_of(rows_file)
    note = "the data make 1 row and a step takes 4, so that rows are rep"
    assert note in notes_of(few)


@pytest.mark.parametrize(
    ("epochs", "rows", "noted"),
    [
        (1.0, 9, "last step takes 3 rows of another pass, because a step takes 4 and"),
        (
            2.0,
            9,
            "takes 2 rows of another pass, because a step takes 4 and there are 9",
        ),
        (3.0, 8, ""),
        (1.0, 99, ""),
    ],
)
def test_a_last_step_that_repeats_rows_is_noted(
    make, rows_file, architecture, tmp_path, capsys, epochs, rows, noted
):
    path = tmp_path / "rows.jsonl"
    lines = [line for line in rows_file.read_text().splitlines() if line.strip()]
    path.write_text("\n".join((lines * 20)[:rows]))
    config = make(tmp_path / "run", path=str(path), packing=False)
    train = dataclasses.replace(config.train, steps=None, epochs=epochs)
    config = dataclasses.replace(config, train=train)
    prepared._load_data(config, find_sources(config)[1], architecture)
    error = " ".join(capsys.readouterr().err.split())
    assert noted in error and ("another pass" in error) == bool(noted)


def test_eval_settings_without_data_to_measure_are_reported(
    make, rows_file, tmp_path, capsys
):
    config = make(tmp_path / "run", path=str(rows_file))
    for evaluation, note in (
        (EvalConfig(every=7, at_start=True), "Note: eval: `every`, `at_start` given"),
        (EvalConfig(every=7, fraction=0.5), ""),
        (EvalConfig(every=7, sample_prompts=("a",)), ""),
        (EvalConfig(), ""),
    ):
        problems = Problems()
        config = dataclasses.replace(config, eval=evaluation)
        assert prepared._check_paths(config, problems) and not len(problems)
        error = capsys.readouterr().err
        assert error.startswith(note) and bool(error) == bool(note)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16"},
        {"quantization": "nf4"},
        {"lm_head": "nf4"},
        {"max_position_embeddings": 999},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_of_the_model_are_in_the_record_of_a_run(make, rows_file, changes):
    config = make("run", path=str(rows_file))
    model = dataclasses.replace(config.model, **changes)
    changed = dataclasses.replace(config, model=model)
    records = [run_record(c, "base", "data") for c in (config, changed)]
    with pytest.raises(UserError, match=rf"model\.{next(iter(changes))}"):
        compare_records(*records)


def test_a_changed_run_is_refused_before_data_are_read(
    make, sources, straight, tmp_path, monkeypatch
):
    directory, _ = straight
    config = make(directory, sources=sources, seed=5)
    monkeypatch.setattr(prepared, "load_examples", pytest.fail)
    other = dataclasses.replace(config.train, learning_rate=0.5, batch_size=3)
    message = r"train\.batch_size: 2 -> 3\n- train\.learning_rate: "
    with pytest.raises(UserError, match=message):
        runner.run(dataclasses.replace(config, train=other))
    with pytest.raises(UserError, match=f"has taken {STEPS} steps already"):
        runner.run(make(directory, STEPS - 1, sources=sources, seed=5))
    (tmp_path / "new").mkdir()
    for output in (directory, tmp_path / "new"):
        other = make(output, sources=sources, seed=5)
        with run_lock(output), pytest.raises(UserError, match="Another process is tr"):
            runner.run(other)
