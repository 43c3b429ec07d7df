"""All problems of a run are listed in one message, and nothing is written."""

from __future__ import annotations

import json

import pytest

from qlora_jax.cli.main import main


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    good, bad = (
        {"input_ids": [1, token, 2], "labels": [-100, token, 2]} for token in (3, 99)
    )
    file.write_text(f"{json.dumps(good)}\n{{no json\n{json.dumps(bad)}\n")
    return file


def refused(capsys, *args):
    status = main(["train", *map(str, args)])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return status, error


def test_all_problems_of_a_run_file_are_listed(rows, tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text(
        f"""
        output_dir = "{tmp_path / "run"}"
        [model]
        path = "m"
        quantization = "int3"
        [data]
        path = "{rows}"
        max_length = 1
        [lora]
        use_qalora = true
        [train]
        warmup_stepz = 3
        [eval]
        every = 0
        """
    )
    status, error = refused(capsys, file)
    assert status == 1
    for part in (
        "5 problems:",
        "[model] `quantization` must be one of",
        "`data.max_length` must be an integer from 2",
        "not supported: `use_qalora`=True",
        "[train] `warmup_stepz` is not an option here. Did you mean `warmup_steps`?",
        "eval: `every` must be at least 1",
    ):
        assert part in error


def test_all_problems_of_options_are_listed(llama_dir, rows, tmp_path, capsys):
    options = {
        "--output-dir": tmp_path / "run",
        "--model.path": llama_dir,
        "--data.path": rows,
        "--data.max-length": 1,
        "--lora.r": 0,
        "--train.steps": 3,
        "--train.learning-rate": -1,
        "--train.warmup-steps": 5,
        "--eval.early-stopping-patience": 1,
    }
    status, error = refused(capsys, *(x for pair in options.items() for x in pair))
    assert status == 1 and "5 problems:" in error
    for part in (
        "`data.max_length` must be",
        "lora: `r` must be a positive integer, got 0",
        "train: `learning_rate` must be >= 0, got -1.0",
        "train: `warmup_steps`=5 exceeds `steps`=3",
        "eval: `early_stopping_patience` needs data to measure",
    ):
        assert part in error
    assert not (tmp_path / "run").exists()


def run_file(tmp_path, model, rows):
    file = tmp_path / "run.toml"
    file.write_text(
        f"""
        output_dir = "{tmp_path / "run"}"
        [model]
        path = "{model}"
        dtype = "float32"
        [data]
        path = "{rows}"
        format = "tokens"
        [lora]
        target_modules = ["q_porj"]
        [train]
        steps = 3
        [eval]
        path = "{tmp_path / "nowhere.jsonl"}"
        sample_prompts = ["a"]
        """
    )
    return file


def test_problems_of_settings_model_and_rows_are_one_list(
    llama_dir, rows, tmp_path, capsys
):
    status, error = refused(capsys, run_file(tmp_path, llama_dir, rows))
    assert status == 1 and "5 problems:" in error
    for part in (
        "[eval] `eval.path`: there is no file",
        "`target_modules`=('q_porj',) matches no linear module",
        "`sample_prompts` need a tokenizer",
        "rows.jsonl:2: malformed JSON",
        "rows.jsonl:3: `input_ids`[1] is 99; expected 0..31",
    ):
        assert part in error
    assert not (tmp_path / "run").exists()


def test_a_missing_model_does_not_hide_missing_data(tmp_path, capsys):
    gone = tmp_path / "gone.jsonl"
    status, error = refused(capsys, run_file(tmp_path, tmp_path / "none", gone))
    assert status == 1 and "3 problems:" in error
    assert f"there is no file {gone}" in error and "none` does not exist" in error


def test_large_data_are_not_read_if_settings_are_wrong(
    llama_dir, rows, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("qlora_jax.runs.prepare._QUICK_BYTES", 10)
    status, error = refused(capsys, run_file(tmp_path, llama_dir, rows))
    assert status == 1 and "2 problems:" in error
    assert "malformed" not in error and "q_porj" in error


def test_a_run_directory_stands_for_its_settings(rows, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    text = run_file(tmp_path, tmp_path / "none", rows).read_text()
    (run / "config.toml").write_text(text)
    status, error = refused(capsys, run, "--lora.r", "0")
    assert status == 1 and "lora: `r` must be a positive integer" in error
    (run / "config.toml").unlink()
    status, error = refused(capsys, run)
    assert status == 1 and f"`{run}/config.toml` cannot be read" in error
