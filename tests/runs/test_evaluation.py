"""A run measured on the way: what is measured, what is best, when it ends."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import convert
from qlora_jax.cli.main import main
from qlora_jax.data.config import DataConfig
from qlora_jax.data.examples import load_examples
from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import bind
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.runs.config import EvalConfig, RunConfig
from qlora_jax.runs.eval_data import load_held_out, split_held_out
from qlora_jax.runs.evaluation import Best, Evaluation, check_prompts, perplexity
from qlora_jax.runs.rows import read_evaluations, read_metrics
from qlora_jax.runs.runner import run
from qlora_jax.training.step import jit_eval
from tests.runs.directories import after_step, weights

pytestmark = pytest.mark.usefixtures("compile_each_program_once")
STEPS = 24


@pytest.fixture(scope="module")
def held_file(tmp_path_factory) -> Path:
    """Rows that have nothing to do with `rows_file`: their loss gets worse."""
    rng = np.random.default_rng(5)
    path = tmp_path_factory.mktemp("held") / "held.jsonl"
    with open(path, "w") as file:
        for length in rng.integers(5, 20, 11).tolist():
            ids = rng.integers(1, 32, length).tolist()
            file.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
    return path


@pytest.fixture(scope="module")
def make(make, held_file, rows_file):
    """A function: directory, settings of [eval] -> a run that overfits."""

    def measured(directory, steps=STEPS, data=rows_file, **settings) -> RunConfig:
        return make(
            directory,
            model={"quantization": "none"},
            data={"max_length": 32, "path": str(data)},
            train={"steps": steps, "learning_rate": 3e-2},
            lora={"lora_alpha": LoraConfig.lora_alpha},
            checkpoint={"every": 5},
            eval={"path": str(held_file), "every": 3, "batch_size": 4} | settings,
            log={"every": 50},
        )

    return measured


# --- What is best, and for how long nothing was ---


def by_the_callback(losses, patience, threshold):
    """Where `EarlyStoppingCallback` of transformers stops, and the best step before."""
    best = best_step = None
    counter = 0
    for step, loss in enumerate(losses):
        if best is None or (loss < best and abs(loss - best) > threshold):
            counter = 0
        else:
            counter += 1
        if best is None or loss < best:
            best, best_step = loss, step
        if counter >= patience:
            return step, best_step
    return None, best_step


@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_early_stopping_counts_like_the_callback_of_transformers(threshold):
    rng = np.random.default_rng(0)
    ends = set()
    for patience in (1, 3, 12, 31):
        for _ in range(50):
            losses = (4 - np.linspace(0, 1, 30) + rng.normal(0, 0.3, 30)).tolist()
            best, stopped = Best(), None
            for step, loss in enumerate(losses):
                best = best.after(step, loss, threshold)
                if best.waited >= patience:
                    stopped = step
                    break
            assert (stopped, best.step) == by_the_callback(losses, patience, threshold)
            ends.add(stopped)
    assert None in ends and len(ends) > 5


def test_nan_is_never_the_best_loss():
    best = Best().after(0, math.nan).after(1, 2.0).after(2, math.nan).after(3, math.inf)
    assert best == Best(1, 2.0, 2)
    assert perplexity(math.log(7.0)) == pytest.approx(7.0, rel=1e-15)
    assert math.isfinite(perplexity(5000.0))


# --- Data that cannot be measured on ---


def test_unusable_held_out_data_are_refused(make, tmp_path, rows_file):
    examples = load_examples(make(tmp_path).data, None, vocab_size=32)

    def held(text):
        path = tmp_path / "held.jsonl"
        path.write_text(text)
        config = make(tmp_path / "run", path=str(path))
        held_out = load_held_out(config, None, vocab_size=32)
        return split_held_out(config, examples, held_out)[1]

    rows = rows_file.read_text()
    for text, message in (
        (rows, "every example there is in the training data"),
        (
            '{"input_ids": [1, 2, 3], "labels": [-100, -100, -100]}',
            r"\[eval\] .*nothing to supervise",
        ),
        ("", r"\[eval\] .*held\.jsonl"),
    ):
        with pytest.raises(UserError, match=message):
            held(text)
    new = '{"input_ids": [5, 6], "labels": [5, 6]}'
    note = "2 of the 3 held-out examples are in the training data too"
    assert note in held("\n".join([*rows.splitlines()[:2], new])).note


def test_problems_of_both_files_are_reported_together(make, tmp_path):
    files = {"data": tmp_path / "neither.jsonl", "path": str(tmp_path / "no.jsonl")}
    with pytest.raises(UserError, match=r"(?s)neither\.jsonl.*\[eval\]"):
        run(make(tmp_path / "run", **files))
    assert not (tmp_path / "run").exists()


def test_held_out_data_take_the_settings_of_the_training_data():
    pairs = {"format": "prompt_completion", "prompt": "Q {q}"}
    data = DataConfig("train.jsonl", split="train", **pairs)
    same = EvalConfig(path="held.jsonl").data_config(data)
    assert same == dataclasses.replace(data, path="held.jsonl", split=None)
    text = EvalConfig(path="held.txt", format="text").data_config(data)
    assert (text.format, text.prompt) == ("text", None)
    with pytest.raises(UserError, match=r"with the settings of \[data\]: .*text"):
        EvalConfig(path="x", text="{t}").data_config(data)


class Words:
    """A tokenizer of words that are numbers."""

    eos_token_id = None

    def __call__(self, text, **options):
        if isinstance(text, list):
            return {"input_ids": [self(t)["input_ids"] for t in text]}
        words = text.split()
        return {"input_ids": [int(word) if word.isdigit() else 0 for word in words]}

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))

    def get_added_vocab(self):
        return {}


def test_prompts_that_cannot_be_continued_are_refused(architecture):
    prompts = ("", "1 99", " ".join(["3"] * 60), "4", "4")
    config = EvalConfig(sample_prompts=prompts, sample_max_new_tokens=10)
    with pytest.raises(UserError) as caught:
        check_prompts(config, Words(), architecture)
    for part in ("'' has no tokens", "token 99", "60 tokens", "room for 54", "twice"):
        assert part in str(caught.value)
    with pytest.raises(UserError, match="need a tokenizer"):
        check_prompts(config, None, architecture)


@pytest.mark.parametrize(
    ("threshold", "why"),
    [
        (0.0, "no better held-out loss in 2 measurements (`early_stopping_patience`)"),
        (
            1.0,
            "none of 2 measurements (`early_stopping_patience`) lowered the best "
            "held-out loss by more than 1 (`early_stopping_threshold`)",
        ),
    ],
)
def test_the_reason_to_end_names_the_threshold(architecture, threshold, why):
    patience = {"early_stopping_patience": 2, "early_stopping_threshold": threshold}
    evaluation = Evaluation(
        EvalConfig(path="held.txt", **patience),
        Llama(architecture, Compute()),
        held_out=None,
        batch_size=1,
        best=Best(20, 3.736, waited=2),
    )
    assert evaluation.reason == f"{why}; the best is 3.7360, after step 20"


# --- Whole runs ---


@pytest.fixture(scope="module")
def straight(make, tmp_path_factory):
    """A run that ends early, undisturbed."""
    directory = tmp_path_factory.mktemp("straight") / "run"
    config = make(directory, early_stopping_patience=3, at_start=True)
    return directory, config, run(config)


def test_a_run_ends_early_and_says_why(straight, capsys):
    directory, config, report = straight
    rows = read_evaluations(directory)
    losses = [row["eval_loss"] for row in rows]
    stop, best = by_the_callback(losses, 3, 0.0)
    assert stop == len(rows) - 1 and rows[-1]["step"] < STEPS
    assert [row["step"] for row in rows] == list(range(0, rows[-1]["step"] + 1, 3))
    # Those who read training steps see nothing else.
    steps = [row["step"] for row in read_metrics(directory)]
    assert steps == list(range(1, rows[-1]["step"] + 1))
    assert report["steps"] == rows[-1]["step"]
    assert report["eval"]["best_step"] == rows[best]["step"]
    assert report["eval"]["best_loss"] == min(losses)
    assert "no better held-out loss in 3 measurements" in report["stopped_early"]
    about = json.loads((directory / "best_adapter" / "training.json").read_text())
    for key in ("step", "eval_loss", "eval_perplexity"):
        assert about[key] == rows[best][key]
    assert "Ended early after step" in (directory / "report.html").read_text()
    # Given again, it is finished; with more patience it goes on.
    before = (directory / "metrics.jsonl").read_bytes()
    assert run(config) == report
    assert "It ended early" in capsys.readouterr().err
    assert (directory / "metrics.jsonl").read_bytes() == before


def test_the_numbers_are_those_of_the_kept_adapter(
    straight, held_file, llama_dir, architecture, capsys
):
    """Computed by hand from logits: log-sum-exp in float64 over each row alone."""
    directory, config, report = straight
    base = convert.load_llama(llama_dir, quantization=None)[1]
    lora, adapters = convert.load_adapter(directory / "best_adapter", base)
    model = Llama(architecture, Compute(dtype="float32", lora=lora))
    variables = {"params": base, "lora": bind(adapters, base, lora)}
    logits_of = jax.jit(model.apply)
    total, count = 0.0, 0
    for line in held_file.read_text().splitlines():
        ids = np.array(json.loads(line)["input_ids"], np.int32)
        # One compiled length; causal, so what follows changes nothing before it.
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.asarray(logits_of(variables, padded)[0, : len(ids) - 1], np.float64)
        chosen = logits[np.arange(len(ids) - 1), ids[1:]]
        total += float((np.log(np.exp(logits).sum(-1)) - chosen).sum())
        count += len(ids) - 1
    step = report["eval"]["best_step"]
    (row,) = (row for row in read_evaluations(directory) if row["step"] == step)
    assert row["eval_tokens"] == count
    # float32 sums over 64 and 128 features in two layers and 130 tokens' losses.
    np.testing.assert_allclose(row["eval_loss"], total / count, rtol=1e-5)
    assert row["eval_perplexity"] == math.exp(row["eval_loss"])
    # `eval` computes that adapter as its run did, on what the run measured.
    capsys.readouterr()
    assert main(["eval", str(directory / "best_adapter"), "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["data"] == str(held_file) and report["supervised_tokens"] == count
    assert report["measured"] == "the data that the run was measured on ([eval])"
    # The same float32 sums in batches of another size.
    np.testing.assert_allclose(report["loss"], row["eval_loss"], rtol=1e-5)
    assert f"dense; computed in float32; adapter `{directory}/best_adapter`" in err
    assert f"(step {step})." in err and "Note" not in err


@pytest.mark.parametrize("at", [4, 17])
def test_a_run_that_was_killed_decides_as_an_undisturbed_run(
    straight, make, tmp_path, at
):
    """Step 4: before any checkpoint, after a measurement; 17: continued from 15, with
    two measurements of waiting to remember, and one more to the end."""

    def kill():
        raise KeyboardInterrupt

    config = make(tmp_path / "run", early_stopping_patience=3, at_start=True)
    with after_step(at, kill), pytest.raises(KeyboardInterrupt):
        run(config)
    directory, _, report = straight
    assert report["steps"] == 18 and report["eval"]["best_step"] == 9
    again = run(config)
    measured, expected = map(read_evaluations, (tmp_path / "run", directory))
    for row in measured + expected:
        del row["eval_seconds"]
    assert measured == expected
    assert again["eval"] == report["eval"]
    assert again["stopped_early"] == report["stopped_early"]
    for name in ("adapter", "best_adapter"):
        assert weights(tmp_path / "run", name) == weights(directory, name)
    best = Path("best_adapter/training.json")
    assert (directory / best).read_bytes() == (tmp_path / "run" / best).read_bytes()


def test_samples_and_a_part_held_out(make, rows_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("convert.tokenizer.load_tokenizer", lambda path: Words())
    data = Path(shutil.copy(rows_file, tmp_path / "rows.jsonl"))
    settings = {"path": "", "fraction": 0.25, "every": 2, "sample_every": 3}
    settings |= {"sample_prompts": ("1 2 3", "7 8"), "sample_max_new_tokens": 4}
    config = make(tmp_path / "run", 4, data, **settings)
    jitted = []

    def jit_once(model):
        jitted.append(jit_eval(model))
        return jitted[-1]

    monkeypatch.setattr("qlora_jax.runs.compiled_step.jit_eval", jit_once)
    report = run(config)
    # One program, compiled before the run, whatever the rows of the last batch.
    assert [step._cache_size() for step in jitted] == [0]
    assert len(read_evaluations(tmp_path / "run")) == 2
    err = capsys.readouterr().err
    assert "Held out of the training data: 6 examples" in err
    assert report["held_out"]["examples"] == 6 and report["data"]["examples"] == 18
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (step, prompt) for step in (3, 4) for prompt in ("1 2 3", "7 8")
    ]
    for row in rows:
        assert len(row["text"].split()) == 4
        assert row["prompt"] + row["text"] in err
    # The last sample is what the saved adapter writes.
    capsys.readouterr()
    args = ["generate", str(tmp_path / "run"), "--prompt", "7 8"]
    assert main([*args, "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip() == "7 8" + rows[-1]["text"]
    # `eval` finds the part that was held out again, or says that it cannot.
    command = ["eval", str(tmp_path / "run")]
    assert main([*command, "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["measured"] == "what the run held out of its training data"
    assert measured["rows"] == 6 and measured["data"] == str(data)
    last = read_evaluations(tmp_path / "run")[-1]
    # The same float32 sums in batches of another size.
    np.testing.assert_allclose(measured["loss"], last["eval_loss"], rtol=1e-5)
    assert main([*command, "--data.max-length", "8"]) == 1
    assert "--data.max-length would read other rows" in capsys.readouterr().err
    data.write_text("".join(data.read_text().splitlines(keepends=True)[2:]))
    assert main(command) == 1
    assert "rows it was trained on would be measured" in capsys.readouterr().err
