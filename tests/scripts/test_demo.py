import json
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import convert
from convert.tokenizer import load_tokenizer

# The one test of every command as a user's machine runs it.
pytestmark = pytest.mark.usefixtures("optimized")


@pytest.fixture(scope="module")
def demo(repository) -> dict:
    """The demo's functions, by name."""
    return runpy.run_path(str(repository / "scripts/demo.py"), run_name="demo")


@pytest.fixture(scope="module")
def world(repository) -> dict:
    """The story model's functions, by name."""
    return runpy.run_path(str(repository / "scripts/story_model.py"), run_name="world")


def run_script(repository: Path, name: str, *arguments: str):
    return subprocess.run(
        [sys.executable, str(repository / "scripts" / name), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )


# --- The stories and the questions ---


def test_every_question_can_be_answered_from_its_scene(world):
    rows = world["distinct_questions"](random.Random(0), 300)
    kinds = set()
    for row in rows:
        scene, asked, _ = row["prompt"].split("\n")
        answer = row["completion"]
        assert answer.startswith(" ") and answer.endswith(", of course.")
        kinds.add(asked.split()[1])
        said = answer.removesuffix(", of course.").split()
        if asked.startswith("Q: How"):
            found = [int(word) for word in scene.split() if word.isdigit()]
            assert said[2] == str(sum(found))
        else:
            assert said[-1] in scene.replace(".", "").split()
    assert kinds == {"Where", "What", "How", "Who"}


def test_no_two_questions_share_a_scene(world):
    rows = world["distinct_questions"](random.Random(0), 300)
    assert len({row["prompt"].split("\n")[0] for row in rows}) == 300
    assert rows == world["distinct_questions"](random.Random(0), 300)


def test_the_story_model_is_a_checkpoint_with_a_tokenizer(repository, tmp_path):
    done = run_script(
        repository,
        "story_model.py",
        *("--output", str(tmp_path), "--steps", "2"),
        *("--questions", "10", "--held-out", "5"),
    )
    assert done.returncode == 0, done.stderr
    assert "390,656 parameters, 2 steps" in done.stdout
    config, base = convert.load_llama(tmp_path / "base", quantization=None)
    assert config.num_hidden_layers == 2
    assert base["model"]["embed_tokens"]["weight"].shape == (config.vocab_size, 128)
    tokenizer = load_tokenizer(tmp_path / "base")
    rows = [json.loads(x) for x in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 10
    ids = tokenizer(rows[0]["prompt"])["input_ids"]
    assert max(ids) < config.vocab_size
    assert tokenizer.decode(ids) == rows[0]["prompt"]


# --- Data of the user's own ---


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_plain_text_is_cut_at_a_line_and_nothing_is_lost(demo, tmp_path):
    text = "".join(f"line {i} of the text\n" for i in range(100))
    (tmp_path / "own.txt").write_text(text)
    kind, ending, prompts = demo["own_data"](tmp_path / "own.txt", tmp_path)
    train, held = [(tmp_path / f"{n}.txt").read_text() for n in ("train", "held_out")]
    assert (kind, ending) == ("text", ".txt")
    assert train + held == text and train.endswith("\n")
    assert 0.08 < len(held) / len(text) < 0.12
    assert held.startswith(prompts[0][:6])


@pytest.mark.parametrize(
    ("row", "kind", "prompt"),
    [
        ({"text": "once upon a time"}, "text", "once upon a time"),
        ({"prompt": "a?", "completion": " b"}, "prompt_completion", "a?"),
        ({"question": "a?", "answer": "b"}, "prompt_completion", "a?\n"),
        (
            {"instruction": "do", "input": "this", "output": "done"},
            "prompt_completion",
            "do\nthis\n",
        ),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages", None),
        ({"conversations": [{"from": "human", "value": "a"}]}, "messages", None),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "tokens", None),
    ],
)
def test_rows_are_recognised_by_their_fields(demo, tmp_path, row, kind, prompt):
    path = write(tmp_path / "own.jsonl", [row] * 20)
    found, ending, prompts = demo["own_data"](path, tmp_path)
    assert (found, ending) == (kind, ".jsonl")
    assert prompts == ([] if prompt is None else [prompt] * 2)
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 18
    assert len((tmp_path / "held_out.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"body": "a"}] * 2, "rows with the fields body. Expected `text`"),
        ([{"text": "a"}], "has one row; one is needed to train on"),
    ],
)
def test_rows_of_no_use_end_the_demo(demo, tmp_path, capsys, rows, message):
    with pytest.raises(SystemExit) as stopped:
        demo["own_data"](write(tmp_path / "own.jsonl", rows), tmp_path)
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err.replace("\n", " ")


# --- The directory ---


def test_only_a_directory_of_its_own_is_replaced(demo, tmp_path, capsys):
    own, foreign = tmp_path / "own", tmp_path / "foreign"
    demo["make_directory"](own)
    (own / "left from before").write_text("x")
    demo["make_directory"](own)
    assert [path.name for path in own.iterdir()] == [demo["MARK"]]

    foreign.mkdir()
    (foreign / "precious").write_text("x")
    (tmp_path / "link").symlink_to(own)
    (tmp_path / "file").write_text("x")
    for path, reason in (
        (foreign, "was not made by this demo"),
        (tmp_path / "link", "is no directory"),
        (tmp_path / "file", "is no directory"),
    ):
        with pytest.raises(SystemExit) as stopped:
            demo["make_directory"](path)
        assert stopped.value.code == 1
        assert reason in capsys.readouterr().err.replace("\n", " ")
    assert (foreign / "precious").exists() and (own / demo["MARK"]).exists()


def test_model_and_data_are_given_together(demo, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--model", "somewhere"])
    with pytest.raises(SystemExit) as stopped:
        demo["parse_arguments"]()
    assert stopped.value.code == 2
    assert "give both" in capsys.readouterr().err


@pytest.mark.real
@pytest.mark.slow
def test_the_whole_way_on_a_real_model(repository, shared_data, tmp_path):
    text = (shared_data / "text/tinyshakespeare/input.txt").read_text()
    (tmp_path / "text.txt").write_text(text[:60_000])
    done = run_script(
        repository,
        "demo.py",
        *("--model", str(shared_data / "stories260K")),
        *("--data", str(tmp_path / "text.txt"), "--output", str(tmp_path / "out")),
        *("--steps", "20", "--learning-rate", "1e-3", "--max-length", "128"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed (SIGKILL) after step" in done.stdout
    assert "continued from step" in done.stdout
    assert "The same: 70 tensors, byte for byte." in done.stdout
    assert (tmp_path / "out/run/loss.png").stat().st_size > 10_000
    assert (tmp_path / "out/adapter/adapter_model.safetensors").is_file()
