import json
import random

import pytest

import convert
from convert.tokenizer import load_tokenizer
from qlora_jax.cli.main import main
from qlora_jax.errors import UserError
from scripts.demo import __main__ as demo
from scripts.demo import story_model, user_data

# The one test of every command as a user's machine runs it.
pytestmark = pytest.mark.usefixtures("optimized")


# --- The stories and the questions ---


def test_questions_are_about_distinct_scenes_that_answer_them():
    rows = story_model.distinct_questions(random.Random(0), 300)
    assert rows == story_model.distinct_questions(random.Random(0), 300)
    scenes, kinds = set(), set()
    for row in rows:
        scene, question, _ = row["prompt"].split("\n")
        answer = row["completion"]
        assert answer.startswith(" ") and answer.endswith(", of course.")
        scenes.add(scene)
        kinds.add(question.split()[1])
        words = answer.removesuffix(", of course.").split()
        if question.startswith("Q: How"):
            numbers = [int(word) for word in scene.split() if word.isdigit()]
            assert words[2] == str(sum(numbers))
        else:
            assert words[-1] in scene.replace(".", "").split()
    assert len(scenes) == 300
    assert kinds == {"Where", "What", "How", "Who"}


@pytest.mark.parametrize(
    ("family", "size"),
    [("llama", "Llama of 390,656"), ("qwen3", "Qwen3 of 358,016")],
)
def test_the_story_model_is_a_checkpoint_with_a_tokenizer(
    run_script, tmp_path, family, size
):
    options = "--steps 2 --questions 10 --held-out 5 --output".split()
    options = [*options, tmp_path, *(["--family", family] * (family != "llama"))]
    done = run_script("demo/story_model.py", *options)
    assert done.returncode == 0, done.stderr
    assert f"{size} parameters, 2 steps" in done.stdout
    config, base = convert.load_llama(tmp_path / "base", quantization=None)
    assert (config.model_type, config.num_hidden_layers) == (family, 2)
    assert config.tie_word_embeddings
    norms = {"q_norm", "k_norm"} & set(base["model"]["layers"]["self_attn"])
    assert len(norms) == (2 if family == "qwen3" else 0)
    assert base["model"]["embed_tokens"]["weight"].shape == (config.vocab_size, 128)
    tokenizer = load_tokenizer(tmp_path / "base")
    rows = [json.loads(x) for x in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 10
    ids = tokenizer(rows[0]["prompt"])["input_ids"]
    assert max(ids) < config.vocab_size
    assert tokenizer.decode(ids) == rows[0]["prompt"]


# --- A user's data ---


def test_plain_text_is_cut_at_a_line_and_nothing_is_lost(tmp_path):
    text = "".join(f"line {i} of the text\n" for i in range(100))
    (tmp_path / "data.txt").write_text(text)
    parts = user_data.split(tmp_path / "data.txt", tmp_path)
    train, held = [(tmp_path / f"{n}.txt").read_text() for n in ("train", "held_out")]
    assert (parts.format, parts.suffix) == ("text", ".txt")
    assert train + held == text and train.endswith("\n")
    assert 0.08 < len(held) / len(text) < 0.12
    assert held.startswith(parts.prompts[0][:6])


ALPACA = {"instruction": "do", "input": "this", "output": "done"}


@pytest.mark.parametrize(
    ("row", "kind", "prompt"),
    [
        ({"text": "once upon a time"}, "text", "once upon a time"),
        ({"prompt": "a?", "completion": " b"}, "prompt_completion", "a?"),
        ({"question": "a?", "answer": "b"}, "prompt_completion", "a?\n"),
        (ALPACA, "prompt_completion", "do\nthis\n"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages", None),
        ({"conversations": [{"from": "human", "value": "a"}]}, "messages", None),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "tokens", None),
    ],
)
def test_rows_are_recognised_by_their_fields(tmp_path, row, kind, prompt):
    path = tmp_path / "data.jsonl"
    path.write_text((json.dumps(row) + "\n") * 20)
    parts = user_data.split(path, tmp_path)
    assert (parts.format, parts.suffix) == (kind, ".jsonl")
    assert parts.prompts == ([] if prompt is None else [prompt] * 2)
    for name, rows in (("train", 18), ("held_out", 2)):
        assert (tmp_path / f"{name}.jsonl").read_text().count("\n") == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"body": "a"}\n' * 2, "rows with the fields body. Expected `text`"),
        ('{"text": "a"}\n', "has one row; one is needed to train on"),
        ("one line", "is one line; a part is needed to train on"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(tmp_path, text, message):
    path = tmp_path / ("data.jsonl" if text.startswith("{") else "data.txt")
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        user_data.split(path, tmp_path)


# --- The directory ---


def test_only_a_directory_of_the_demo_is_replaced(tmp_path, capsys):
    replaced, foreign = tmp_path / "replaced", tmp_path / "foreign"
    demo.make_directory(replaced)
    (replaced / "left from before").write_text("x")
    demo.make_directory(replaced)
    assert [path.name for path in replaced.iterdir()] == [demo.MARK]

    foreign.mkdir()
    (foreign / "precious").write_text("x")
    (tmp_path / "link").symlink_to(replaced)
    (tmp_path / "file").write_text("x")
    reasons = {foreign: "was not made by this demo"}
    reasons |= dict.fromkeys((tmp_path / "link", tmp_path / "file"), "is not a dir")
    for path, reason in reasons.items():
        with pytest.raises(SystemExit) as stopped:
            demo.make_directory(path)
        assert stopped.value.code == 1
        assert reason in capsys.readouterr().err.replace("\n", " ")
    assert (foreign / "precious").exists() and (replaced / demo.MARK).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "somewhere"], "give both"),
        (["--steps", "19"], "at least 20"),
        (["--family", "gpt"], "invalid choice"),
        (["--model", "a", "--data", "b", "--family", "qwen3"], "leave it out with"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.parse_arguments(options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_families_of_the_demo_are_those_of_the_story_model():
    names = {family: name for family, (name, _) in story_model.FAMILIES.items()}
    assert demo.NAMES == names


@pytest.mark.slow
def test_every_command_runs_on_a_small_qwen3(run_script, tmp_path):
    # Not the steps after which it answers: those take minutes.
    options = "--family qwen3 --steps 2 --questions 200 --output".split()
    done = run_script("demo/story_model.py", *options, tmp_path / "story")
    assert done.returncode == 0, done.stderr
    rows = tmp_path / "story/train.jsonl"
    options = ["--model", tmp_path / "story/base", "--data", rows, "--steps", "20"]
    done = run_script("demo", *options, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed (SIGKILL) after step" in done.stdout
    assert "byte for byte. Logits with either adapter: equal" in done.stdout
    assert (tmp_path / "out/run/loss.png").stat().st_size > 10_000
    assert main(["merge", str(tmp_path / "out/run"), str(tmp_path / "merged")]) == 0
    config, base = convert.load_llama(tmp_path / "merged", quantization=None)
    assert config.model_type == "qwen3" and "lm_head" not in base


@pytest.mark.real
@pytest.mark.slow
def test_every_command_runs_on_a_real_model(run_script, shared_data, tmp_path):
    text = (shared_data / "text/tinyshakespeare/input.txt").read_text()
    (tmp_path / "text.txt").write_text(text[:60_000])
    files = ["--model", shared_data / "stories260K", "--data", tmp_path / "text.txt"]
    options = "--steps 20 --learning-rate 1e-3 --max-length 128 --output".split()
    done = run_script("demo", *files, *options, tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed (SIGKILL) after step" in done.stdout
    assert "continued from step" in done.stdout
    assert "The same: 70 tensors, byte for byte." in done.stdout
    assert (tmp_path / "out/run/loss.png").stat().st_size > 10_000
    assert (tmp_path / "out/adapter/adapter_model.safetensors").is_file()
