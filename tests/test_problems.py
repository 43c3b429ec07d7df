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


@pytest.fixture
def refused(capsys, tmp_path):
    """A function: number and parts of the problems, arguments -> the message."""

    def refused(count, parts, *args):
        status = main(["train", *map(str, args)])
        error = capsys.readouterr().err
        assert status == 1 and "Traceback" not in error
        assert count is None or f"{count} problems:" in error
        assert [part for part in parts if part not in error] == []
        assert not (tmp_path / "run" / "report.json").exists()
        return error

    return refused


def test_all_problems_of_a_run_file_are_listed(rows, tmp_path, refused):
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
    parts = (
        "[model] `quantization` must be one of",
        "`data.max_length` must be an integer from 2",
        "not supported: `use_qalora`=True",
        "[train] `warmup_stepz` is not an option here. Did you mean `warmup_steps`?",
        "eval: `every` must be at least 1",
    )
    refused(5, parts, file)


def test_all_problems_of_options_are_listed(llama_dir, rows, tmp_path, refused):
    options = [
        *("--output-dir", tmp_path / "run", "--model.path", llama_dir),
        *("--data.path", rows, "--data.max-length", 1, "--lora.r", 0),
        *("--train.steps", 3, "--train.learning-rate", -1, "--train.warmup-steps", 5),
        *("--eval.early-stopping-patience", 1),
    ]
    parts = (
        "`data.max_length` must be",
        "lora: `r` must be a positive integer, got 0",
        "train: `learning_rate` must be >= 0, got -1.0",
        "train: `warmup_steps`=5 exceeds `steps`=3",
        "eval: `early_stopping_patience` needs data to measure",
    )
    refused(5, parts, *options)
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
    llama_dir, rows, tmp_path, refused, monkeypatch
):
    parts = (
        "[eval] `eval.path`: there is no file",
        "`target_modules`=('q_porj',) matches no linear module",
        "`sample_prompts` need a tokenizer",
        "rows.jsonl:2: malformed JSON",
        "rows.jsonl:3: `input_ids`[1] is 99; expected 0..31",
    )
    file = run_file(tmp_path, llama_dir, rows)
    refused(5, parts, file)
    # Large data are not read if settings are wrong.
    monkeypatch.setattr("qlora_jax.runs.prepare._QUICK_BYTES", 10)
    assert "malformed" not in refused(2, ["q_porj"], file)
    assert not (tmp_path / "run").exists()


def test_a_missing_model_does_not_hide_missing_data(tmp_path, refused):
    gone = tmp_path / "gone.jsonl"
    parts = (f"there is no file {gone}", "none` does not exist")
    refused(3, parts, run_file(tmp_path, tmp_path / "none", gone))


def test_a_run_directory_stands_for_its_settings(rows, tmp_path, refused):
    run = tmp_path / "run"
    run.mkdir()
    text = run_file(tmp_path, tmp_path / "none", rows).read_text()
    (run / "config.toml").write_text(text)
    refused(None, ["lora: `r` must be a positive integer"], run, "--lora.r", "0")
    (run / "config.toml").unlink()
    refused(None, [f"`{run}/config.toml` cannot be read"], run)
