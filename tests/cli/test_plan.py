import json
import re
from pathlib import Path

import pytest

from pallas_kernels.nf4.shapes import MODELS
from qlora_jax.cli import plan
from qlora_jax.planning.compile import Compiled
from qlora_jax.planning.step import StepMemory


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


@pytest.fixture
def planned(cli):
    """A function: options in one string, and places -> the report of an estimate."""

    def planned(options, *args):
        command = ("plan", *args, *options.split(), "--method", "estimate", "--json")
        status, out, err = cli(*command)
        assert status == 0, err
        return json.loads(out)

    return planned


@pytest.fixture
def plan_8b(planned, config_json):
    """A function: GPU and options -> the report of a large model."""
    return lambda options: planned(f"--gpu {options}", "--model", config_json)


@pytest.fixture
def refused(cli):
    def refused(options, *args):
        status, out, err = cli("plan", *args, *options.split())
        assert status == 1 and not out
        return err

    return refused


def test_a_model_on_a_card(plan_8b):
    report = plan_8b("rtx-4090 --max-length 8192 --lora.r 32")
    assert report["fits"]
    assert (report["max_length"], report["batch_size"]) == (8192, 1)
    assert (report["policy"], report["method"]) == ("save_attention", "estimate")
    assert report["compiled_for"] is None
    assert report["dtype"] == "bfloat16"
    assert 4 * 83_886_080 == report["device_bytes"]["adapters"]


def test_a_directory_is_a_model_too(planned, config_json, tmp_path):
    report = planned("--gpu h200 --max-length 1024", "--model", tmp_path)
    assert report["policy"] == "none, unrolled"
    assert (report["remat"], report["scan_layers"]) == ("none", False)


def test_as_long_as_fits(plan_8b):
    longest = plan_8b("l4 --lora.r 32 --max-length fit")
    assert longest["fits"]
    assert longest["max_length"] > 196_608
    options = "--max-length 2048 --batch-size fit --remat full"
    widest = plan_8b(f"l4 --lora.r 32 {options}")
    assert widest["fits"]
    assert widest["batch_size"] > 8


def test_a_run_file_or_its_run_is_planned_and_options_win(planned, run_file, tmp_path):
    report = planned("--gpu l4", run_file)
    assert report["max_length"] == 2048
    assert report["batch_size"] == 4
    assert report["gradient_accumulation_steps"] == 2
    assert report["remat"] == "offload"
    adapters = report["device_bytes"]["adapters"]
    changed = planned("--gpu l4 --lora.r 16 --batch-size 2", run_file)
    assert changed["batch_size"] == 2
    assert changed["max_length"] == 2048
    # q_proj keeps the rank 4 of its pattern: less than twice as much.
    assert adapters < changed["device_bytes"]["adapters"] < 2 * adapters
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(Path(run_file).read_text())
    assert planned("--gpu l4", tmp_path / "run") == report


def test_a_card_without_bfloat16_gets_float16(plan_8b, refused, config_json):
    report = plan_8b("t4 --max-length 2048")
    assert (report["dtype"], report["attention"]) == ("float16", "xla")
    assert any("no bfloat16" in note for note in report["notes"])
    args = ("--model", config_json, "--gpu", "t4", "--max-length", "2048")
    assert "use --dtype float16" in refused("--dtype bfloat16", *args)
    error = refused("--attention cudnn", *args)
    assert "compute capability 8.0 or newer, and this one has 7.5. Use 'auto'" in error


def test_packed_rows_on_hopper_are_planned_with_our_attention(plan_8b):
    pytest.importorskip("jax", minversion="0.11")
    report = plan_8b("h100 --max-length 2048 --packing True")
    assert report["attention"] == "pallas"
    assert any("planned with attention='pallas'" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--remat none", None),
        ("--remat offload", "no effect on remat = 'offload'"),
        ("--remat none --lora.r 64", "no effect on input_layernorm: .* not 192"),
        ("--remat none --mesh.data 2 --batch-size 2", None),
        ("--remat none --mesh.data 2 --batch-size 2 --max-length 2040", "8 rows"),
    ],
)
def test_a_plan_says_where_one_pass_kernels_have_no_effect(plan_8b, options, said):
    pytest.importorskip("jax", minversion="0.11")
    report = plan_8b(f"h200 --max-length 2048 --fusion fused {options}")
    assert report["fusion"] == "fused"
    notes = [note for note in report["notes"] if note.startswith("fusion = 'fused'")]
    assert len(notes) == (said is not None)
    assert said is None or re.search(said, notes[0])


def test_the_estimate_refuses_what_the_compiler_would(plan_8b, refused, config_json):
    args = ("--model", config_json, "--gpu", "rtx-4090", "--max-length", "2048")
    error = refused("--attention pallas --dtype float32", *args)
    assert "attention='pallas' cannot be used on rtx-4090: they compute in" in error
    assert "not float32; they use instructions that only NVIDIA's Hopper has" in error
    error = refused("--attention cudnn --packing True", *args)
    assert "takes neither segment ids nor padding masks. Use 'auto' or 'xla'" in error
    report = plan_8b("rtx-4090 --max-length 2048 --attention cudnn")
    assert report["attention"] == "cudnn"


def test_several_devices_hold_less_each(plan_8b):
    options = "l4 --max-length 2048 --batch-size 8 --remat full"
    single, eight = plan_8b(options), plan_8b(f"{options} --mesh.fsdp 8")
    assert eight["mesh"] == {"fsdp": 8}
    one, each = (report["device_bytes"] for report in (single, eight))
    assert each["base"] < one["base"] / 7
    assert each["activations"] == one["activations"] / 8


@pytest.mark.parametrize(
    ("options", "mesh", "rows", "reason"),
    [
        ("h200 --devices 16", {"data": 16}, 16, "every GPU repeats the weights"),
        ("rtx-4090 --devices 16", {"data": 16}, 16, "every GPU repeats the weights"),
        ("l4 --devices 4 --max-length 40960", {"data": 2, "fsdp": 2}, 4, "2 GPUs of a"),
        ("h200 --devices 16 --mesh.fsdp 4", {"data": 4, "fsdp": 4}, 16, "as set"),
        ("h200 --mesh.data 2 --mesh.fsdp 4", {"data": 2, "fsdp": 4}, 8, "as set"),
        ("h200 --devices 4 --batch-size 2", {"data": 2, "context": 2}, 2, "share a"),
    ],
)
def test_a_plan_of_several_gpus_chooses_their_mesh_and_says_why(
    cli, plan_8b, config_json, options, mesh, rows, reason
):
    options = f"{options} --max-length 4096" if "max-len" not in options else options
    report = plan_8b(options)
    assert report["mesh"] == mesh
    assert report["batch_size"] == rows
    assert reason in report["mesh_reason"]
    args = ("--model", config_json, "--method", "estimate", "--gpu", *options.split())
    _, text, _ = cli("plan", *args)
    assert report["mesh_reason"] in text
    assert f"[mesh] of the run file\n  data = {mesh.get('data', 1)}\n" in text
    assert "time of a step, by a model, not measured" in text
    assert "assumed: compute at 55% of the peak" in text


def test_what_each_micro_batch_gathers_again_is_said(plan_8b):
    options = "h200 --max-length 2048 --mesh.fsdp 8"
    once = plan_8b(options)
    four = plan_8b(f"{options} --gradient-accumulation-steps 4")
    assert once["gathered_again_bytes"] == 0
    assert not any("micro-batches gathers" in note for note in once["notes"])
    assert any("of the 4 micro-batches gathers" in note for note in four["notes"])
    gathers = [report["collectives"]["all-gather"] for report in (once, four)]
    # The tables of the vocabulary are gathered once.
    extra = gathers[1]["node_bytes"] - gathers[0]["node_bytes"]
    assert four["gathered_again_bytes"] == pytest.approx(extra, rel=1e-6)


def test_the_optimizer_of_a_run_file_is_counted(planned, run_file):
    """With groups whose warm-up is longer than the one step of a plan."""
    more = 'optimizer = "adamw_8bit"\nema_decay = 0.5\n'
    more += '[[train.groups]]\nmatch = "proj"\nwarmup_steps = 3\n'
    options = "--gpu l4 --max-length 2048"
    plain = planned(options, run_file)["device_bytes"]["optimizer"]
    Path(run_file).write_text(Path(run_file).read_text() + more)
    bytes_ = planned(options, run_file)["device_bytes"]
    trained = bytes_["adapters"] // 4
    # 8 bytes a parameter; 2.03 and the average's 4. And counts, step and key.
    assert plain == 8 * trained + 20
    assert 6 * trained < bytes_["optimizer"] < 6.04 * trained
    sharded = planned(f"{options} --batch-size 8 --mesh.fsdp 8", run_file)
    assert sharded["device_bytes"]["optimizer"] < 0.3 * bytes_["optimizer"]


def test_what_does_not_fit_is_reported_with_what_would_help(plan_8b):
    report = plan_8b("t4 --max-length 32768 --remat full")
    assert not report["fits"]
    assert any("more than the 16.00 GB of t4" in note for note in report["notes"])
    assert any("'offload' saves" in note for note in report["notes"])


@pytest.mark.parametrize("options", ["--max-length fit", "--max-length 2048"])
def test_an_estimate_within_its_error_says_so(cli, plan_8b, config_json, options):
    report = plan_8b(f"l4 {options}")
    share = report["device_bytes"]["total"] / report["card_bytes"]
    assert report["uncertain"] == (0.9 < share <= 1) == ("fit" in options)
    assert any("compile to be" in n for n in report["notes"]) == report["uncertain"]
    args = ("--model", config_json, "--gpu", "l4", *options.split())
    _, text, _ = cli("plan", *args, "--method", "estimate")
    assert ("estimated to fit, within the estimate's 10 %" in text) == (share > 0.9)


def test_policies_are_compared_in_a_table(cli, plan_8b, config_json):
    args = ["plan", "--model", config_json, "--gpu", "rtx-4090", "--max-length", "8192"]
    _, text, _ = cli(*args, "--method", "estimate", "--compare")
    rows = [line for line in text.splitlines() if "1 x 8,192" in line]
    assert len(rows) == 9  # the head line, and eight policies
    assert sum("does not fit" in row for row in rows) == 3
    assert "cuDNN's backward pass" in text
    assert "Note: an estimate by formula, as asked for" in text
    # Whatever is planned; or the longest of each.
    report = plan_8b("l4 --max-length 2048 --remat full --compare")
    assert len(report["policies"]) == 8
    report = plan_8b("rtx-4090 --max-length fit --compare")
    lengths = [row.get("max_length", 0) for row in report["policies"]]
    assert lengths == sorted(lengths)
    assert lengths[-1] == report["max_length"]


def test_a_compiled_plan_shows_the_counted_time(cli, config_json, monkeypatch):
    sizes = ("base", "adapters", "optimizer", "batch", "activations", "gradients")
    sizes += ("loss", "temporaries", "workspace")
    counted = {"tokens": 8192, "floor_seconds": 0.32, "launches": 5432}
    counted["ideal"] = {"seconds": 0.4, "tokens_per_second": 20480.0}
    counted["reachable"] = {"seconds": 0.5, "tokens_per_second": 16384.0}

    def compile_for(*args, **options):
        memory = StepMemory(**dict.fromkeys(sizes, 10**9))
        return Compiled(memory, {}, (), "0.0", 1.0, counted)

    monkeypatch.setattr(plan, "find_compiler", lambda python: "python")
    monkeypatch.setattr("qlora_jax.planning.plan.compile_for", compile_for)
    args = [
        "--model",
        config_json,
        "--gpu",
        "h200",
        "--max-length",
        "2048",
        "--compare",
    ]
    status, text, _ = cli("plan", *args)
    assert status == 0
    assert "counted from its compiled kernels, not measured" in text
    for row in (
        r"floor: FLOPs without recomputation +0.32 s +25,600 tokens/s",
        r"all kernels, ideal rates +0.4 s +20,480 tokens/s",
        r"all kernels, reachable rates +0.5 s +16,384 tokens/s",
        r"kernels launched +5,432",
        r"  full .*16,384 tokens/s",
    ):
        assert re.search(row, text), row
    report = json.loads(cli("plan", *args, "--json")[1])
    assert report["counted"] == counted
    assert {row["counted_tokens_per_second"] for row in report["policies"]} == {16384}
    # By formula: what a policy repeats is not necessary.
    assert report["necessary_flops_per_token"] <= report["flops_per_token"]


def test_an_estimate_counts_no_kernels(cli, plan_8b, config_json):
    report = plan_8b("h200 --max-length 2048 --remat full")
    assert report["counted"] is None
    assert report["necessary_flops_per_token"] < report["flops_per_token"]
    args = ("--model", config_json, "--gpu", "h200", "--max-length", "2048")
    _, text, _ = cli("plan", *args, "--method", "estimate")
    assert "counted" not in text


def test_the_way_to_the_compiler_is_told(cli, refused, config_json, monkeypatch):
    monkeypatch.setattr(plan, "find_compiler", lambda python: None)
    args = ["--model", config_json, "--gpu", "h200", "--max-length", "512"]
    status, out, _ = cli("plan", *args)
    assert status == 0
    assert "For the compiled plan: pip install" in out
    error = refused("--method compiled", *args)
    assert "the GPU compiler is not installed here. Get it with: pip" in error


def test_memory_is_drawn(plan_8b, tmp_path):
    picture = tmp_path / "memory.png"
    report = plan_8b(f"rtx-4090 --max-length 8192 --plot {picture}")
    assert report["plot"] == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*partial"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--gpu rtx4090 --max-length 9", "Did you mean `rtx-4090`"),
        ("--max-length 9", "Name the GPU: --gpu"),
        ("--gpu h200", "Give the length of the rows"),
        ("--gpu h200 --max-length 0", "--max-length must be at least 2"),
        ("--gpu h200 --max-length -5", "--max-length must be at least 2"),
        ("--gpu h200 --max-length 9 --batch-size 0", "--batch-size must be at least 1"),
        (
            "--gpu h200 --max-length 2000000000 --batch-size 2",
            "tokens are counted in 32 bits",
        ),
        ("--gpu h200 --max-length fit --batch-size fit", "fix one of them"),
        (
            "--gpu h200 --max-length 9 --batch-size 3 --mesh.fsdp 8",
            "`batch_size`=3 counts the rows of all GPUs and must be a multiple of 8",
        ),
        (
            "--gpu h200 --max-length 9 --mesh.data 0",
            "[mesh] data = 0, fsdp = auto, context = 1: sizes are at least 1",
        ),
        (
            "--gpu h200 --max-length 9 --devices 12 --gpus-per-node 8",
            "12 GPUs in nodes of 8",
        ),
        (
            "--gpu h200 --max-length 8 --devices 16 --batch-size 5",
            "`batch_size`=5 cannot be divided among 16 GPUs",
        ),
    ],
)
def test_settings_of_no_run_are_refused(refused, config_json, options, message):
    error = refused(f"--method estimate {options}", "--model", config_json)
    assert message in error
    assert error.startswith("qlora-jax plan: ")


def test_a_model_is_needed(refused, tmp_path):
    options = "--gpu h200 --max-length 9"
    assert "Name the model" in refused(options)
    assert "nowhere" in refused(options, "--model", tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["nowhere/memory.png", "memory.txt"])
def test_a_picture_not_to_be_drawn_is_refused(refused, config_json, tmp_path, name):
    args = ("--model", config_json, "--plot", tmp_path / name)
    assert "memory." in refused("--gpu l4 --max-length 2048", *args)


def test_a_policy_is_printed_as_settings_of_a_run_file(cli, config_json):
    args = ["plan", "--model", config_json, "--gpu", "l4", "--max-length", "2048"]
    status, out, _ = cli(*args, "--method", "estimate", "--remat", "offload")
    assert status == 0
    assert '  remat = "offload"\n' in out
