import json
from pathlib import Path

import pytest

from pallas_kernels.nf4.shapes import MODELS
from qlora_jax.cli import main as cli
from qlora_jax.cli import plan


@pytest.fixture
def config_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODELS["8b"].hf_config))
    return str(path)


@pytest.fixture
def run_file(tmp_path, config_json):
    path = tmp_path / "run.toml"
    path.write_text(
        f'[model]\npath = "{config_json}"\nremat = "offload"\n'
        '[data]\npath = "nowhere.jsonl"\nmax_length = 2048\npacking = true\n'
        "[lora]\nr = 8\nrank_pattern = { q_proj = 4 }\n"
        "[train]\nsteps = 3\nwarmup_steps = 2\nbatch_size = 4\n"
        "gradient_accumulation_steps = 2\n"
    )
    return str(path)


def planned(capsys, *args):
    status = cli.main(["plan", *args, "--method", "estimate", "--json"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out)


def refused(capsys, *args):
    assert cli.main(["plan", *args]) == 1
    return capsys.readouterr().err


def test_a_model_on_a_card(capsys, config_json):
    report = planned(
        capsys,
        *("--model", config_json, "--gpu", "rtx-4090", "--max-length", "8192"),
        *("--lora.r", "32"),
    )
    assert report["fits"]
    assert (report["max_length"], report["batch_size"]) == (8192, 1)
    assert report["policy"] == "full"
    assert report["method"] == "estimate"
    assert report["compiled_for"] is None
    assert report["dtype"] == "bfloat16"
    assert 4 * 83_886_080 == report["device_bytes"]["adapters"]


def test_a_directory_is_a_model_too(capsys, config_json, tmp_path):
    report = planned(
        capsys, "--model", str(tmp_path), "--gpu", "h200", "--max-length", "1024"
    )
    assert report["policy"] == "none"


def test_as_long_as_fits(capsys, config_json):
    args = ("--model", config_json, "--gpu", "l4", "--lora.r", "32")
    longest = planned(capsys, *args, "--max-length", "fit")
    assert longest["fits"]
    assert longest["max_length"] > 196_608
    widest = planned(
        capsys, *args, "--max-length", "2048", "--batch-size", "fit", "--remat", "full"
    )
    assert widest["fits"]
    assert widest["batch_size"] > 8


def test_a_run_file_is_planned_as_it_would_run_and_options_win(capsys, run_file):
    report = planned(capsys, run_file, "--gpu", "l4")
    assert report["max_length"] == 2048
    assert report["batch_size"] == 4
    assert report["gradient_accumulation_steps"] == 2
    assert report["remat"] == "offload"
    adapters = report["device_bytes"]["adapters"]
    changed = planned(
        capsys, run_file, "--gpu", "l4", "--lora.r", "16", "--batch-size", "2"
    )
    assert changed["batch_size"] == 2
    assert changed["max_length"] == 2048
    # q_proj keeps the rank 4 of its pattern: less than twice as much.
    assert adapters < changed["device_bytes"]["adapters"] < 2 * adapters


def test_a_card_without_bfloat16_is_planned_with_float16_and_noted(capsys, config_json):
    args = ("--model", config_json, "--gpu", "t4", "--max-length", "2048")
    report = planned(capsys, *args)
    assert (report["dtype"], report["attention"]) == ("float16", "xla")
    assert any("no bfloat16" in note for note in report["notes"])
    assert "use --dtype float16" in refused(capsys, *args, "--dtype", "bfloat16")
    error = refused(capsys, *args, "--attention", "cudnn")
    assert "compute capability 8.0 or newer, and this one has 7.5. Use 'auto'" in error


def test_the_estimate_refuses_what_the_compiler_would(capsys, config_json, run_file):
    args = ("--model", config_json, "--gpu", "rtx-4090", "--max-length", "2048")
    error = refused(capsys, *args, "--attention", "pallas", "--dtype", "float32")
    assert "attention='pallas' cannot be used on rtx-4090: they compute in" in error
    assert "not float32; they use instructions that only NVIDIA's Hopper has" in error
    error = refused(capsys, *args, "--attention", "cudnn", "--packing", "True")
    assert "takes neither segment ids nor padding masks. Use 'auto' or 'xla'" in error
    assert planned(capsys, *args, "--attention", "cudnn")["attention"] == "cudnn"


def test_a_run_directory_is_planned_by_its_run_file(capsys, run_file, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(Path(run_file).read_text())
    args = ("--gpu", "l4")
    expected = planned(capsys, str(run_file), *args)
    assert planned(capsys, str(tmp_path / "run"), *args) == expected


def test_several_devices_hold_less_each(capsys, config_json):
    args = ("--model", config_json, "--gpu", "l4", "--max-length", "2048")
    args += ("--batch-size", "8", "--remat", "full")
    single = planned(capsys, *args)
    eight = planned(capsys, *args, "--mesh.fsdp", "8")
    assert eight["mesh"] == {"fsdp": 8}
    assert eight["device_bytes"]["base"] < single["device_bytes"]["base"] / 7
    assert eight["device_bytes"]["activations"] == (
        single["device_bytes"]["activations"] / 8
    )


def test_the_optimizer_of_a_run_file_is_counted(capsys, run_file):
    """With groups whose warm-up is longer than the one step of a plan."""
    more = 'optimizer = "adamw_8bit"\nema_decay = 0.5\n'
    more += '[[train.groups]]\nmatch = "proj"\nwarmup_steps = 3\n'
    path = Path(run_file)
    sizes = []
    for text in ("", more):
        path.write_text(path.read_text() + text)
        args = (run_file, "--gpu", "l4", "--max-length", "2048")
        sizes.append(planned(capsys, *args)["device_bytes"]["optimizer"])
    trained = planned(capsys, *args)["device_bytes"]["adapters"] // 4
    # 8 bytes a parameter; 2.03 and the average's 4. And counts, step and key.
    assert sizes[0] == 8 * trained + 20
    assert 6 * trained < sizes[1] < 6.04 * trained
    sharded = planned(capsys, *args, "--batch-size", "8", "--mesh.fsdp", "8")
    assert sharded["device_bytes"]["optimizer"] < 0.3 * sizes[1]


def test_what_does_not_fit_is_reported_with_what_would_help(capsys, config_json):
    report = planned(
        capsys,
        *("--model", config_json, "--gpu", "t4", "--max-length", "32768"),
        *("--remat", "full"),
    )
    assert not report["fits"]
    assert any("more than the 16.00 GB of t4" in note for note in report["notes"])
    assert any("'offload' saves" in note for note in report["notes"])


def test_policies_are_compared_in_a_table(capsys, config_json):
    args = ["plan", "--model", config_json, "--gpu", "rtx-4090", "--max-length", "8192"]
    assert cli.main([*args, "--method", "estimate", "--compare"]) == 0
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if "1 x 8,192" in line]
    assert len(rows) == 7  # the head line, and six policies
    assert sum("does not fit" in row for row in rows) == 2
    assert "cuDNN's backward pass" in text
    assert "Note: an estimate by formula, as asked for" in text


def test_the_longest_of_each_policy_is_compared(capsys, config_json):
    report = planned(
        capsys,
        *("--model", config_json, "--gpu", "rtx-4090", "--max-length", "fit"),
        "--compare",
    )
    lengths = [row.get("max_length", 0) for row in report["policies"]]
    assert lengths == sorted(lengths)
    assert lengths[-1] == report["max_length"]


def test_without_the_compiler_the_plan_says_how_to_get_it(
    capsys, config_json, monkeypatch
):
    monkeypatch.setattr(plan, "find_compiler", lambda python: None)
    args = ["--model", config_json, "--gpu", "h200", "--max-length", "512"]
    assert cli.main(["plan", *args]) == 0
    assert "For the compiled plan: pip install" in capsys.readouterr().out
    error = refused(capsys, *args, "--method", "compiled")
    assert "the GPU compiler is not installed here. Get it with: pip" in error


def test_memory_is_drawn(capsys, config_json, tmp_path):
    picture = tmp_path / "memory.png"
    report = planned(
        capsys,
        *("--model", config_json, "--gpu", "rtx-4090", "--max-length", "8192"),
        *("--plot", str(picture)),
    )
    assert report["plot"] == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp*"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--gpu", "rtx4090", "--max-length", "9"), "Did you mean `rtx-4090`"),
        (("--max-length", "9"), "Name the GPU: --gpu"),
        (("--gpu", "h200"), "Give the length of the rows"),
        (
            ("--gpu", "h200", "--max-length", "0"),
            "`data.max_length` must be an integer from 2",
        ),
        (
            ("--gpu", "h200", "--max-length", "-5"),
            "`data.max_length` must be an integer from 2",
        ),
        (
            ("--gpu", "h200", "--max-length", "2000000000", "--batch-size", "2"),
            "tokens are counted in 32 bits",
        ),
        (
            ("--gpu", "h200", "--max-length", "fit", "--batch-size", "fit"),
            "fix one of them",
        ),
        (
            ("--gpu", "h200", "--max-length", "9", "--mesh.fsdp", "8"),
            "`batch_size`=1 must be a multiple of the 8 devices",
        ),
        (
            ("--gpu", "h200", "--max-length", "9", "--mesh.data", "0"),
            "--mesh.data must be at least 1",
        ),
    ],
)
def test_settings_that_no_run_can_have_are_refused(capsys, config_json, args, message):
    error = refused(capsys, "--model", config_json, "--method", "estimate", *args)
    assert message in error
    assert error.startswith("qlora-jax plan: ")


def test_a_model_is_needed(capsys, tmp_path):
    assert "Name the model" in refused(capsys, "--gpu", "h200", "--max-length", "9")
    missing = str(tmp_path / "nowhere")
    args = ("--model", missing, "--gpu", "h200", "--max-length", "9")
    assert "nowhere" in refused(capsys, *args)


@pytest.mark.parametrize("name", ["nowhere/memory.png", "memory.txt"])
def test_a_picture_that_cannot_be_drawn_is_refused_first(
    capsys, config_json, tmp_path, name
):
    args = ["plan", "--model", str(config_json), "--gpu", "l4", "--max-length", "2048"]
    assert cli.main([*args, "--plot", str(tmp_path / name)]) == 1
    error = capsys.readouterr()
    assert "`plot`" in error.err and not error.out


def test_a_policy_is_printed_as_settings_of_a_run_file(capsys, config_json):
    args = ["plan", "--model", str(config_json), "--gpu", "l4", "--max-length", "2048"]
    assert cli.main([*args, "--method", "estimate", "--remat", "offload"]) == 0
    assert '  remat = "offload"\n' in capsys.readouterr().out


def test_every_policy_is_compared_whatever_is_planned(capsys, config_json):
    args = ["plan", "--model", str(config_json), "--gpu", "l4", "--max-length", "2048"]
    args += ["--method", "estimate", "--remat", "full", "--compare", "--json"]
    assert cli.main(args) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["policies"]) == 6
