import json
import re
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.runs.loading import load

SCRIPT = "scripts/train_qlora.py"


@pytest.fixture
def train(repository, monkeypatch, capsys):
    """Runs the script in this process; returns what it printed."""

    def run(*arguments: str) -> str:
        script = repository / SCRIPT
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def tiny(small, tmp_path) -> Path:
    """A random Llama without a tokenizer, in Hugging Face form."""
    model = Llama(small, Compute(dtype="float32"))
    params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    convert.save_llama(tmp_path / "tiny", small, jax.device_get(params))
    return tmp_path / "tiny"


@pytest.fixture
def counting(tmp_path) -> Path:
    """Rows of token ids that count upwards: what comes next is always certain."""
    rows = [list(range(start, start + 16)) for start in range(32)]
    lines = [json.dumps({"input_ids": row, "labels": row}) + "\n" for row in rows]
    path = tmp_path / "counting.jsonl"
    path.write_text("".join(lines))
    return path


@pytest.fixture
def start(tiny, counting) -> tuple[str, ...]:
    return "--model", str(tiny), "--data", str(counting), "--format", "tokens"


def losses(output: str) -> list[float]:
    return [float(x) for x in re.findall(r"^step \d+/\d+  loss (\S+) ", output, re.M)]


def test_the_loss_falls_and_the_adapter_is_what_was_trained(
    train, tiny, start, tmp_path
):
    out = tmp_path / "adapter"
    options = "--steps 40 --batch-size 4 --r 8 --accumulation 2 --learning-rate 1e-2"
    options += f" --dtype float32 --output {out}"
    output = train(*start, *options.split())
    curve = losses(output)
    assert len(curve) == 5  # steps 1, 10, 20, 30, 40
    # The base is random: ln(64) = 4.16 nats at first, whatever the adapter can take
    # off without embeddings or output head afterwards.
    assert curve[0] == pytest.approx(np.log(64), abs=0.1)
    assert curve[-1] < 0.75 * curve[0]
    # 2 layers, r=8 times in + out: q, o 128; k, v 96; gate, up, down 160 each.
    assert "training 14,848 parameters\n" in output
    assert re.search(r"[1-9][\d,]* tokens/s", output)

    config = convert.load_llama(tiny)[0]
    lora, adapters = convert.load_adapter(out, config)
    assert lora.r == 8
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(adapters))
    # The directory names its base, and the model answers as it was trained to.
    model = load(out, quantization="nf4_dq", dtype="float32")
    row = jnp.arange(8, 24)[None]
    loss = -jax.nn.log_softmax(model.logits(row))[0, jnp.arange(15), row[0, 1:]].mean()
    assert loss < 0.75 * curve[0]


def test_an_output_that_exists_is_refused(train, start, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train(*start, "--output", str(tmp_path))
    assert stopped.value.code == 2
    assert "exists; give a new directory as --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nosuch.txt"), "there is no file nosuch.txt"),
        (("--format", "prompt_completion"), "needs a tokenizer and the model came"),
        (("--steps", "0"), "`steps` must be at least 1"),
        (("--r", "0"), "`r` must be"),
    ],
)
def test_arguments_that_cannot_be_used_end_in_one_paragraph(
    train, start, tmp_path, arguments, message
):
    with pytest.raises(SystemExit) as stopped:
        train(*start, "--output", str(tmp_path / "adapter"), *arguments)
    assert str(stopped.value.code).startswith("train_qlora: ")
    assert message in str(stopped.value.code)


def test_templates_make_prompt_and_completion_of_other_fields(
    train, shared_data, tmp_path
):
    rows = [{"question": f"The cat number {n}", "answer": " sat."} for n in range(4)]
    (tmp_path / "qa.json").write_text(json.dumps(rows))
    options = f"--data {tmp_path / 'qa.json'} --output {tmp_path / 'adapter'} --r 2"
    options += " --format prompt_completion --prompt {question} --completion {answer}"
    options += " --steps 1 --batch-size 1"
    output = train("--model", str(shared_data / "stories260K"), *options.split())
    assert output.startswith("4 of 4 rows kept")
    assert len(losses(output)) == 1


@pytest.mark.real
def test_stories260k_learns_shakespeare(train, shared_data, tmp_path):
    text = (shared_data / "text/tinyshakespeare/input.txt").read_text()
    (tmp_path / "text.txt").write_text(text[:20_000])
    model = shared_data / "stories260K"
    options = f"--data {tmp_path / 'text.txt'} --output {tmp_path / 'adapter'}"
    options += " --steps 20 --batch-size 4 --max-length 64 --learning-rate 5e-3"
    output = train("--model", str(model), *options.split(), "--dtype", "float32")
    curve = losses(output)
    assert curve[-1] < curve[0] - 1.0
    config = convert.load_llama(model, quantization=None)[0]
    lora, _ = convert.load_adapter(tmp_path / "adapter", config)
    assert lora.base_model_name_or_path == str(model.resolve())


def test_it_stays_short_enough_to_read(repository):
    assert len((repository / SCRIPT).read_text().splitlines()) < 150
