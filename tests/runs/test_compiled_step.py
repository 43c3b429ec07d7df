"""The step is compiled before the base is loaded, and the run takes that program."""

import dataclasses
import json
import os
import shutil
import sys
import types
from pathlib import Path

import pytest

import convert
import qlora_jax as qj
from pallas_kernels.attention.check import AttentionCheck
from qlora_jax.cli.main import main
from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models.layers import Compute
from qlora_jax.planning import gpus
from qlora_jax.planning.gpus import ALLOWANCE, CARDS, this_device
from qlora_jax.planning.ladder import policies
from qlora_jax.planning.plan import Planner
from qlora_jax.planning.step import Step
from qlora_jax.runs import compiled_step, prepare
from qlora_jax.runs.packed_attention import packed_attention
from qlora_jax.runs.rows import read_metrics
from qlora_jax.runs.runner import run
from tests.models.reference import CONFIG

pytestmark = pytest.mark.usefixtures("compile_each_program_once")


@pytest.fixture(scope="module")
def make(make):
    """A function: directory, settings of [lora] and [model] -> a short run."""

    def short(directory, lora=None, data=None, eval=None, **model):
        lora = {"target_modules": "all-linear"} | (lora or {})
        given = {"data": data or {}, "eval": eval or {}, "train": {"steps": 3}}
        return make(directory, model=model, lora=lora, **given)

    return short


@pytest.fixture
def set_memory(monkeypatch):
    """A function: bytes -> the device has so many for a run."""

    def set_memory(nbytes):
        card = dataclasses.replace(this_device(), memory_bytes=nbytes + ALLOWANCE)
        monkeypatch.setattr(prepare, "this_device", lambda: card)

    return set_memory


@pytest.fixture(scope="module")
def plain(make, tmp_path_factory):
    """A run that held everything on the device."""
    directory = tmp_path_factory.mktemp("plain") / "run"
    return run(make(directory, remat="full")), directory


def losses(directory):
    return [row["loss"] for row in read_metrics(directory)]


@pytest.mark.parametrize("passes", [True, False])
def test_packed_rows_on_a_hopper_take_the_kernels_that_pass_their_check(
    passes, monkeypatch
):
    name = "qlora_jax.runs.packed_attention.jax_has_kernels"
    monkeypatch.setattr(name, lambda: True)
    config = dataclasses.replace(CONFIG, head_dim=64)

    def check(heads, groups, head_dim, *, variant):
        assert (heads, head_dim) == (config.num_attention_heads, 64)
        return AttentionCheck({"dq": 3e-3 if passes else 0.5}, {"dq": 4e-3})

    def choose(capability, dtype="bfloat16"):
        model = qj.Llama(config, qj.Compute(dtype=dtype))
        return packed_attention(model, capability=capability, check=check)

    chosen, note = choose("9.0")
    assert chosen == ("pallas" if passes else "auto")
    assert ("passed" if passes else "5.0e-01 of 4.0e-03); please report it") in note
    for other in (choose(None), choose("8.0"), choose("9.0", dtype="float16")):
        assert other == ("auto", None)


def test_a_run_that_cannot_fit_ends_before_its_base_is_loaded(
    make, tmp_path, set_memory, monkeypatch
):
    set_memory(1000)
    monkeypatch.setattr(convert, "load_llama", pytest.fail)
    with pytest.raises(UserError) as refused:
        run(make(tmp_path / "run"))
    message = str(refused.value)
    assert "2 x 64 tokens take" in message and "more than the" in message
    assert any(advice in message for advice in ("remat", "policy", "r=2"))
    assert not (tmp_path / "run").exists()


def test_more_pinned_memory_than_jax_allows_is_refused_with_the_variable():
    step = Step(CONFIG, Compute(lora=LoraConfig(r=4)), length=64)
    plan = Planner(CARDS["h200"]).plan(step, policies(remat="offload")[0])
    pinned = dataclasses.replace(plan.memory, host_activations=64 << 30)
    plan = dataclasses.replace(plan, memory=pinned)
    with pytest.raises(UserError, match="Set XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=71"):
        compiled_step.check_pinned(plan, gpus.PINNED_BYTES)
    compiled_step.check_pinned(plan, 71 << 30)


@pytest.mark.parametrize(("value", "limit"), [("", 64), ("71", 71), ("much", 64)])
def test_the_limit_of_pinned_memory_is_jax_s(monkeypatch, value, limit):
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", value)
    assert gpus.pinned_limit() == gpus.UNLIMITED  # a CPU has none
    gpu = types.SimpleNamespace(platform="gpu")
    monkeypatch.setattr(gpus.jax, "local_devices", lambda: [gpu])
    assert gpus.pinned_limit() == limit << 30


def test_auto_takes_the_fastest_policy_that_fits(
    make, plain, tmp_path, set_memory, capsys
):
    report, directory = plain
    keeps_all = run(make(tmp_path / "all", remat="auto"))["plan"]
    assert keeps_all["policy"] == "none"
    full = report["plan"]
    assert full["policy"] == "full"
    need = sum(full["device_bytes"].values())
    assert need < sum(keeps_all["device_bytes"].values())
    set_memory(need)
    capsys.readouterr()
    chosen = run(make(tmp_path / "fitted", remat="auto"))["plan"]
    assert chosen == full
    assert "policy 'full'" in capsys.readouterr().err
    assert losses(tmp_path / "fitted") == losses(directory)


def test_a_continued_run_keeps_its_policy(make, plain, tmp_path):
    """Another one may round differently, whatever the memory that is free today."""
    _, directory = plain
    copy = shutil.copytree(directory, tmp_path / "run")
    config = make(copy, remat="auto")
    longer = dataclasses.replace(config.train, steps=4)
    assert run(dataclasses.replace(config, train=longer))["plan"]["policy"] == "full"


def test_what_a_continued_run_computes_in_another_way_is_said(
    make, plain, tmp_path, capsys
):
    copy = shutil.copytree(plain[1], tmp_path / "run")

    def continued(steps, **model):
        config = make(copy, **model)
        capsys.readouterr()
        run(
            dataclasses.replace(
                config, train=dataclasses.replace(config.train, steps=steps)
            )
        )
        return " ".join(capsys.readouterr().err.split())

    said = continued(4, remat="none", fusion="fused", attention="eager")
    assert (
        "(remat: full -> none; attention: auto -> eager; fusion: auto -> fused)" in said
    )
    kept = {"remat": "auto", "fusion": "fused", "attention": "eager"}
    assert "other choices" not in continued(5, **kept)


def test_other_choices_draw_other_dropout_masks():
    report = {"remat": "full", "scan_layers": True, "fusion": "auto"}
    note = compiled_step._changed_choices
    assert note(report, report, True) is None
    assert note({}, report, True) is None  # nothing was recorded
    other = report | {"scan_layers": False}
    assert "may draw other dropout masks and round diff" in str(
        note(report, other, True)
    )
    assert "(scan_layers: True -> False). They may round" in str(
        note(report, other, False)
    )


@pytest.mark.parametrize("content", ["{", '{"plan": [], "versions": 1}'])
def test_a_damaged_record_of_the_start_costs_a_note(
    make, plain, tmp_path, capsys, content
):
    copy = shutil.copytree(plain[1], tmp_path / "run")
    (copy / "started.json").write_text(content)
    config = make(copy, remat="full")
    longer = dataclasses.replace(config.train, steps=4)
    assert run(dataclasses.replace(config, train=longer))["plan"]["policy"] == "full"
    said = capsys.readouterr().err
    assert "started.json" in said and "Continuing from step 3 of 4" in said


def test_bytes_of_the_plan_are_those_of_the_run(plain):
    report, _ = plain
    planned = report["plan"]["device_bytes"]
    assert planned["base"] == report["base_bytes"]
    assert planned["adapters"] == 4 * report["trainable_parameters"]
    # Step number and key are counted with the moments.
    assert 0 < planned["optimizer"] - report["optimizer_bytes"] < 64
    assert planned["temporaries"] > 0


def test_a_run_that_cannot_be_measured_ends_before_its_base_is_loaded(
    make, plain, rows_file, tmp_path, set_memory, monkeypatch
):
    need = sum(plain[0]["plan"]["device_bytes"].values())
    assert plain[0]["plan"]["eval_bytes"] is None

    short = tmp_path / "short.jsonl"
    short.write_text("\n".join(rows_file.read_text().splitlines()[:9]))

    def measured(directory, rows):
        held = {"path": str(rows_file), "every": 2, "batch_size": rows}
        return make(directory, data={"path": str(short)}, eval=held, remat="full")

    few = run(measured(tmp_path / "few", 1))["plan"]
    held = sum(few["device_bytes"][part] for part in ("base", "adapters", "optimizer"))
    assert few["eval_bytes"] > held
    set_memory(max(need, few["eval_bytes"]))
    run(measured(tmp_path / "again", 1))
    monkeypatch.setattr(convert, "load_llama", pytest.fail)
    with pytest.raises(UserError, match=r"Measuring the .*: 512 rows of 64 tok.*sma"):
        run(measured(tmp_path / "many", 512))
    assert not (tmp_path / "many").exists()


def test_a_run_with_its_tables_on_the_host_is_the_same_run(make, plain, tmp_path):
    host = {"embed_tokens": "host", "lm_head": "host", "remat": "offload"}
    report = run(make(tmp_path / "run", **host))
    assert report["plan"]["host_bytes"] > 0
    held = report["plan"]["device_bytes"]["base"] + report["plan"]["host_bytes"]
    assert held >= plain[0]["base_bytes"]
    # Recomputed in other programs: float32 to rounding, through three steps of AdamW.
    assert losses(tmp_path / "run") == pytest.approx(losses(plain[1]), rel=1e-5)
    assert report["base_fingerprint"] == plain[0]["base_fingerprint"]


def test_a_run_with_a_quantized_head_loads_as_it_was_trained(
    make, plain, tmp_path, capsys
):
    report = run(make(tmp_path / "run", lm_head="nf4"))
    assert report["base_bytes"] < plain[0]["base_bytes"]
    assert report["base_parameters"] == plain[0]["base_parameters"]
    assert losses(tmp_path / "run")[0] != losses(plain[1])[0]
    model = qj.load(tmp_path / "run")
    assert isinstance(model.base["lm_head"]["weight"], qj.NF4Tensor)
    assert "layers NF4, double-quantized, lm_head too;" in model.description
    dense = qj.load(tmp_path / "run", quantization="none")
    assert not isinstance(dense.base["lm_head"]["weight"], qj.NF4Tensor)
    assert "lm_head" not in dense.description
    # `inspect` counts what the run held, and says what it is.
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "run"), "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert counted["base_bytes"] == report["base_bytes"]
    assert counted["lm_head"] == "nf4"


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"modules_to_save": ("lm_head", "embed_tokens")},
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}},
        {"trainable_token_indices": (3, 4)},
    ],
    ids=lambda lora: next(iter(lora.values()), "plain"),
)
def test_the_program_that_was_compiled_runs(make, tmp_path, monkeypatch, lora):
    first_choice = compiled_step._first_choice

    def never_again(compiled, jitted, planned, mesh):
        return first_choice(compiled, pytest.fail, planned, mesh)

    monkeypatch.setattr(compiled_step, "_first_choice", never_again)
    assert run(make(tmp_path / "run", lora))["steps"] == 3


def test_this_device_has_the_memory_of_the_machine():
    card = this_device()
    assert card.name == "this machine"
    assert 1 << 28 < gpus.available_memory() < 1 << 50
    assert card.memory_bytes - ALLOWANCE <= 1 << 50


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_returns_to_the_system():
    def resident():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    if not gpus.give_back_freed_memory():
        pytest.skip("this C library has no way to")
    # Below the size from which on each has a mapping of its own.
    held = [bytearray(64 << 10) for _ in range(3200)]
    last = bytearray(64 << 10)  # on top of them: nothing is given back by itself
    held.clear()
    before = resident()
    assert gpus.give_back_freed_memory()
    assert before - resident() > 100 << 20
    assert len(last) == 64 << 10
