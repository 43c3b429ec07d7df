import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

import convert
from convert.peft import CHAT_TEMPLATE_FILE
from convert.verify import compare_adapters
from qlora_jax.cli.convert import main
from qlora_jax.models.config import LlamaConfig
from qlora_jax.nf4 import fingerprint_tree


def table(text: str) -> dict[str, str]:
    """The lines of a report; nested ones by their last name."""
    lines = [line.split(maxsplit=1) for line in text.splitlines()]
    return {name: value for name, *rest in lines for value in rest}


def run(capsys, *args) -> tuple[int, str, str]:
    status = main([str(a) for a in args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def packed(tiny_model, tmp_path):
    out = tmp_path / "packed"
    convert.save_llama(out, *convert.load_llama(tiny_model))
    return out


@pytest.mark.parametrize("command", [(), ("adapter",), ("merge",), ("model",)])
def test_help(capsys, command):
    assert main([*command, "--help"]) == 0
    assert "usage: qlora-convert" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("nothing",),
        ("merge", "a"),
        ("verify", "a"),
        ("model", "a", "b", "--dtype", "int8"),
        ("merge", "a", "b", "c"),  # --onto is never guessed
    ],
)
def test_wrong_usage_exits_with_2(capsys, args):
    assert main(list(args)) == 2
    captured = capsys.readouterr()
    assert captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    "command, failure", [("verify", 2), ("model", 1)], ids=["verify", "model"]
)
def test_expected_failure_is_one_paragraph(capsys, tmp_path, command, failure):
    """Of `verify` as of diff: 1 is a difference, 2 a failure."""
    status, out, err = run(capsys, command, tmp_path / "a", tmp_path / "b")
    assert (status, out) == (failure, "")
    assert err.startswith(f"qlora-convert {command}: `")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "status", "how"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_leaves_nothing_half_written(
    handlers, capsys, tiny_model, tmp_path, monkeypatch, number, status, how
):
    out = tmp_path / "new" / "model"

    def half(file, *_):
        file.write_text("{")
        signal.raise_signal(number)

    monkeypatch.setattr("convert.output.write_text", half)
    assert run(capsys, "model", tiny_model, out) == (
        status,
        "",
        f"qlora-convert model: {how}. Nothing half-written is left.\n",
    )
    assert list(out.parent.iterdir()) == []


def test_as_a_program(tiny_model, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "qlora_jax.cli.convert",
            "verify",
            tiny_model,
            tiny_model,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout == "The same: 21 tensors, byte for byte.\n"


def test_verify(capsys, tiny_model, packed):
    status, out, _ = run(capsys, "verify", tiny_model, packed)
    assert status == 1
    assert "Different: 14 of 21 tensors; 0 missing, 42 extra" in out
    assert "... and 16 more (--json lists all)." in out
    # Into a pipe names are whole, however long.
    assert " model.layers.0.self_attn.q_proj.weight.quant_state." in out
    status, out, _ = run(capsys, "verify", tiny_model, packed, "--json")
    assert status == 1
    assert json.loads(out)["equal"] is False
    status, out, _ = run(capsys, "verify", packed, packed, "--json")
    assert status == 0
    assert json.loads(out) == {
        "equal": True,
        "a": str(packed),
        "b": str(packed),
        "kind": "model",
        "tensors": 63,
        "missing": [],
        "extra": [],
        "different": [],
        "config": {},
        "notes": [],
        "logits": None,
    }


def test_verify_shows_missing_and_configuration(capsys, tiny, make_adapter):
    a = make_adapter(tiny, name="a")
    b = make_adapter(tiny, ("q_proj",), name="b", lora_alpha=8)
    status, out, _ = run(capsys, "verify", a, b)
    assert status == 1
    assert "lora_alpha" in out
    _, swapped, _ = run(capsys, "verify", b, a)
    assert out.count("missing") == swapped.count("missing")


def test_adapter(capsys, tiny, tiny_model, make_adapter, tmp_path):
    source = make_adapter(tiny)
    out = tmp_path / "clean"
    (source / CHAT_TEMPLATE_FILE).write_text("{{ messages }}\n")
    status, text, _ = run(
        capsys, "adapter", source, out, "--base", tiny_model, "--json"
    )
    assert status == 0
    report = json.loads(text)
    assert (report["r"], report["scaling"]) == (3, 2.0)
    assert report["bytes"] == (out / "adapter_model.safetensors").stat().st_size
    assert compare_adapters(source, out).equal
    assert (out / CHAT_TEMPLATE_FILE).read_text() == "{{ messages }}\n"
    # A run directory stands for the adapter in it.
    again = tmp_path / "again"
    status, text, _ = run(
        capsys, "adapter", tmp_path, again, "--base", tiny_model, "--base-name", "n"
    )
    assert status == 0
    assert table(text)["target_modules"] == "down_proj, q_proj"
    assert compare_adapters(source, again).equal
    raw = json.loads((again / "adapter_config.json").read_text())
    assert raw["base_model_name_or_path"] == "n"


def test_adapter_that_does_not_fit_to_the_letter(
    capsys, tiny, tiny_model, make_adapter, tmp_path, edit_tensors
):
    source = make_adapter(tiny)
    module = "base_model.model.model.layers.1.self_attn.q_proj"
    edit_tensors(
        source / "adapter_model.safetensors",
        lambda tensors: tensors.pop(f"{module}.lora_A.weight"),
    )
    args = ("adapter", source, tmp_path / "o", "--base", tiny_model)
    status, _, err = run(capsys, *args)
    assert status == 1
    assert f"1 missing tensors: {module}.lora_A.weight" in err
    assert not (tmp_path / "o").exists()
    status, text, err = run(capsys, *args, "--no-strict", "--json")
    assert status == 0
    skipped = f"{module}.lora_A.weight: missing tensors"
    assert err == f"Note: not taken from `{source}`: {skipped}.\n"
    assert json.loads(text)["skipped"] == [skipped]
    _, adapters = convert.load_adapter(tmp_path / "o", LlamaConfig.from_hf(tiny))
    part = adapters["model"]["layers"]["self_attn"]["q_proj"]
    assert part["lora_B"][0].any() and not part["lora_B"][1].any()


def test_an_adapter_of_which_little_or_nothing_fits(
    capsys, tiny, tiny_model, make_adapter, tmp_path
):
    source = make_adapter({**tiny, "intermediate_size": 48}, ("down_proj",))
    out = tmp_path / "o"
    args = ("adapter", source, out, "--base", tiny_model, "--no-strict")
    status, text, err = run(capsys, *args)
    assert (status, text) == (1, "") and not out.exists()
    assert "None of its tensors could be used." in err and err.count("\n") == 1
    # Of very many notes the first; they stand there once.
    deep = make_adapter({**tiny, "num_hidden_layers": 9}, ("q_proj",), name="deep")
    status, text, err = run(capsys, "adapter", deep, *args[2:])
    assert status == 0
    assert err.count("Note: not taken from") == 11 and "4 more like these" in err
    assert table(text)["skipped"] == "14"


def test_the_copy_of_an_adapter_leads_to_its_base(
    capsys, tiny, tiny_model, make_adapter, tmp_path, monkeypatch
):
    """By the path it had, where that leads there; else by an absolute one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def named(name, out, base=tiny_model):
        source = make_adapter(
            tiny, name=f"a{len(list(tmp_path.iterdir()))}", base_model_name_or_path=name
        )
        status, _, err = run(capsys, "adapter", source, out, "--base", base)
        assert status == 0
        raw = json.loads((out / "adapter_config.json").read_text())
        return raw["base_model_name_or_path"], err

    far = tmp_path / "elsewhere" / "deep" / "deeper"
    assert named("../model", tmp_path / "near") == ("../model", "")
    assert named("../model", far / "a") == (str(tiny_model), "")
    assert named("model", far / "b") == (str(tiny_model), "")
    assert named("some/base", far / "c") == ("some/base", "")
    name, err = named("../nowhere", far / "d")
    assert name == "../nowhere"
    assert "`../nowhere`, the base of" in err and "--base-name names another" in err
    # The same directory by the path that was given, a link perhaps.
    (tmp_path / "link").symlink_to(tiny_model)
    assert named("../model", far / "e", tmp_path / "link")[0] == str(tmp_path / "link")
    first, second = far / "a", tmp_path / "near"
    args = ("combine", far / "f", "--base", tiny_model, "--adapters", first, second)
    assert run(capsys, *args)[0] == 0
    raw = json.loads((far / "f" / "adapter_config.json").read_text())
    assert raw["base_model_name_or_path"] == str(tiny_model)


@pytest.mark.parametrize("command, option", [("adapter", "strict"), ("merge", "check")])
def test_the_help_of_a_flag_says_what_the_flag_does(capsys, command, option):
    assert main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    helptext = text.split(f"--no-{option} ")[-1]
    assert helptext.startswith(("Take what fits", "Load nothing after merging"))


@pytest.mark.parametrize("command", ["model", "merge"])
def test_an_adapter_is_not_taken_for_a_model(
    capsys, tiny, make_adapter, tmp_path, command
):
    adapter = make_adapter(tiny)
    more = ["--onto", "original"] if command == "merge" else []
    places = [adapter, adapter] if command == "merge" else [adapter]
    status, _, err = run(capsys, command, *places, tmp_path / "o", *more)
    assert status == 1
    assert err.endswith("not a model. Give the directory of its base model here.\n")


@pytest.mark.golden
def test_adapter_with_copies_of_its_base(capsys, golden, tmp_path, edit_tensors):
    source = golden / "adapters/llama32/emb_lora"
    base = shutil.copytree(golden / "llama32/fp32", tmp_path / "base")
    assert run(capsys, "adapter", source, tmp_path / "a", "--base", base)[0] == 0
    args = ("verify", source, tmp_path / "a", "--base", base, "--json")
    status, text, _ = run(capsys, *args)
    assert status == 0
    assert json.loads(text)["logits"]["max_abs_difference"] == 0
    key = "model.embed_tokens.weight"
    edit_tensors(
        base / "model.safetensors",
        lambda tensors: tensors.update({key: 2 * tensors[key]}),
    )
    status, _, err = run(capsys, "adapter", source, tmp_path / "b", "--base", base)
    assert status == 1
    assert "is not the table of this base" in err
    # Its configuration alone: nothing to compare with, and that is said.
    (base / "model.safetensors").unlink()
    status, _, err = run(capsys, "adapter", source, tmp_path / "c", "--base", base)
    assert status == 0
    assert "not compared, no weights of the base were given" in err


@pytest.mark.golden
def test_every_adapter_written_again_is_the_same_file(capsys, golden, tmp_path):
    for adapter in sorted((golden / "adapters").glob("*/*")):
        raw = json.loads((adapter / "adapter_config.json").read_text())
        base = golden / raw["base_model_name_or_path"]
        first, second = (tmp_path / f"{adapter.name}-{n}" for n in (1, 2))
        assert run(capsys, "adapter", adapter, first, "--base", base)[0] == 0
        assert run(capsys, "adapter", first, second, "--base", base)[0] == 0
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (first / name).read_bytes() == (second / name).read_bytes()
        assert compare_adapters(adapter, second).equal


def test_adapter_is_checked_against_its_base(
    capsys, tiny, tiny_model, make_adapter, tmp_path
):
    source = make_adapter({**tiny, "num_hidden_layers": 3})
    status, _, err = run(
        capsys, "adapter", source, tmp_path / "o", "--base", tiny_model
    )
    assert status == 1
    assert "unexpected tensors" in err


def test_merge(capsys, tiny, tiny_model, packed, make_adapter, tmp_path):
    adapter = make_adapter(tiny)
    args = ("merge", tiny_model, adapter, tmp_path / "o", "--onto", "original")
    status, text, err = run(capsys, *args, "--json")
    assert (status, err) == (0, "")
    report = json.loads(text)
    assert report["tensors_changed"] == 4
    assert report["logits"]["probe_tokens"] == 64  # its context is 32
    assert (
        report["logits"]["max_abs_difference"]
        < 1e-4 * (report["logits"]["max_abs_logit"])
    )
    assert report["logits"]["mean_kl"] < 1e-7
    assert report["trained_on_this_base"] is None
    assert json.loads((tmp_path / "o/merge_report.json").read_text()) == report
    convert.merge(tiny_model, adapter, tmp_path / "p")
    assert compare_adapters(tmp_path / "o", tmp_path / "p").equal
    args = ("merge", packed, adapter, tmp_path / "q", "--onto", "dequantized")
    status, text, _ = run(capsys, *args, "--dtype", "bfloat16", "--no-check")
    assert status == 0
    assert "logits" not in text
    assert table(text)["config_changes"] == "none"
    assert table(text)["requantization_error"] == "-"
    assert (
        run(capsys, "merge", packed, adapter, tmp_path / "r", "--onto", "original")[0]
        == 1
    )


def test_merge_quantized_and_again(capsys, tiny, tiny_model, make_adapter, tmp_path):
    adapter = make_adapter(tiny, seed=3)
    args = ("merge", tiny_model, adapter, tmp_path / "o", "--onto", "dequantized")
    args = (*args, "--quantization", "nf4_dq", "--requantize", "nf4")
    status, text, _ = run(capsys, *args)
    assert status == 0
    report = json.loads((tmp_path / "o" / "merge_report.json").read_text())
    error = report["requantization_error"]["q_proj"]
    of_q = text.split("  q_proj\n")[1].splitlines()[:2]
    assert table("\n".join(of_q))["relative"] == f"{error['relative']:.6g}"
    assert table(text)["max_kl"] == f"{report['logits']['max_kl']:.6g}"
    # The check is of what was written: here 4-bit weights.
    assert report["logits"]["max_kl"] > 1e-4
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_use_double_quant"] is False


def noted(tiny, make_adapter, tmp_path, name, fingerprint):
    """An adapter that says what it was trained on."""
    config = LlamaConfig.from_hf(tiny)
    lora, adapters = convert.load_adapter(make_adapter(tiny, name=f"{name}-"), config)
    lora = dataclasses.replace(lora, base_fingerprint=fingerprint)
    convert.save_adapter(tmp_path / name, lora, adapters, config)
    return tmp_path / name


def test_the_base_that_was_trained_on(capsys, tiny, tiny_model, make_adapter, tmp_path):
    _, base = convert.load_llama(tiny_model, quantization="nf4", dtype="bfloat16")
    known = noted(tiny, make_adapter, tmp_path, "known", fingerprint_tree(base))
    other = noted(tiny, make_adapter, tmp_path, "other", "0" * 64)
    for adapter, here in ((known, True), (other, False)):
        out = tmp_path / f"merged-{adapter.name}"
        args = ("merge", tiny_model, adapter, out, "--onto", "original", "--json")
        status, text, err = run(capsys, *args)
        assert status == 0
        report = json.loads(text)
        assert report["trained_on_this_base"] is here
        assert report["trained_form"] == ("nf4, bfloat16" if here else None)
        note = f"Note: `{adapter}` was trained on another base than `{tiny_model}`.\n"
        assert err == ("" if here else note)
    # Merged onto what was not trained on; the dtype of what stays dense counts too.
    for quantization, dtype, here in (
        ("nf4_dq", "bfloat16", False),
        ("nf4", "float32", False),
        ("nf4", "bfloat16", True),
    ):
        out = tmp_path / f"onto-{quantization}-{dtype}"
        args = ("merge", tiny_model, known, out, "--onto", "dequantized", "--json")
        args = (*args, "--quantization", quantization, "--dtype", dtype)
        status, text, err = run(capsys, *args)
        assert status == 0
        assert json.loads(text)["trained_on_this_base"] is here
        note = (
            f"Note: `{known}` was trained on `{tiny_model}` as nf4, bfloat16, and was "
            f"merged onto {quantization}, {dtype}.\n"
        )
        assert err == ("" if here else note)
    status, text, _ = run(capsys, "verify", known, other)
    assert status == 0
    assert "Note: they were trained on different bases" in text
    args = ("verify", known, other, "--base", tiny_model, "--json")
    status, text, _ = run(capsys, *args)
    assert status == 0
    report = json.loads(text)
    assert len(report["notes"]) == 2
    assert f"`{other}` was trained on another base" in report["notes"][1]
    # It stays with an adapter that is written again.
    again = tmp_path / "again"
    status, text, _ = run(capsys, "adapter", known, again, "--base", tiny_model)
    assert table(text)["base_fingerprint"] == fingerprint_tree(base)
    files = [d / "adapter_model.safetensors" for d in (known, again)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_check_that_fails_is_reported_after_the_merge(
    capsys, monkeypatch, tiny, tiny_model, make_adapter, tmp_path
):
    def fail(*args):
        raise MemoryError("Unable to allocate 16 GiB.")

    monkeypatch.setattr("qlora_jax.inference.compare_logits", fail)
    args = ("merge", tiny_model, make_adapter(tiny), tmp_path / "o")
    status, text, err = run(capsys, *args, "--onto", "original")
    assert (status, text) == (1, "")
    assert "`o` was written, and could not" in err.replace(f"{tmp_path}/", "")
    assert "Unable to allocate 16 GiB. With --no-check nothing is loaded" in err
    assert "logits" not in json.loads((tmp_path / "o/merge_report.json").read_text())


@pytest.mark.real
def test_a_probe_text(capsys, shared_data, tmp_path):
    base = shared_data / "stories260K"
    adapter = shared_data / "adapters" / "stories260K-lora-r8-shakespeare"
    args = ("merge", base, adapter, tmp_path / "o", "--onto", "original")
    status, text, _ = run(capsys, *args, "--probe", "Once upon a time", "--json")
    assert status == 0
    assert 2 < json.loads(text)["logits"]["probe_tokens"] < 20
    args = ("verify", base, tmp_path / "o", "--probe", "Once upon a time")
    status, text, _ = run(capsys, *args)
    assert status == 1
    assert re.search(r"Logits on \d+ tokens: max [|]a - b[|] [1-9]", text)


def test_a_probe_text_without_a_tokenizer(
    capsys, tiny, tiny_model, make_adapter, tmp_path
):
    args = ("merge", tiny_model, make_adapter(tiny), tmp_path / "o")
    status, _, err = run(capsys, *args, "--onto", "original", "--probe", "text")
    assert status == 1
    assert "has no tokenizer to read a probe text with" in err
    assert not (tmp_path / "o").exists()


def test_merge_of_custom_modules_compares_no_logits(
    capsys, tiny, make_tensors, save_model, make_adapter, tmp_path
):
    custom = {**tiny, "extra_tensors": {"model.layers.self_attn.gate.weight": [4, 64]}}
    base, out = save_model(custom, make_tensors(custom)), tmp_path / "o"
    adapter = make_adapter(custom, ("q_proj", "gate"))
    status, text, err = run(
        capsys, "merge", base, adapter, out, "--onto", "original", "--json"
    )
    assert status == 0
    assert json.loads(text)["logits"] is None
    assert json.loads(text)["tensors_changed"] == 4
    assert err.startswith(f"Note: logits were not compared: `{base}` has modules of")


def test_verify_compares_logits(capsys, tiny, tiny_model, make_adapter, tmp_path):
    a, b = make_adapter(tiny, name="a"), make_adapter(tiny, name="b", seed=2)
    args = ("verify", a, b, "--base", tiny_model)
    status, text, _ = run(capsys, *args, "--json")
    report = json.loads(text)
    assert (status, report["equal"], len(report["different"])) == (1, False, 8)
    assert report["logits"]["max_kl"] > 0.01
    status, text, _ = run(capsys, "verify", a, a, "--base", tiny_model)
    assert status == 0
    assert "The same: 8 tensors, byte for byte." in text
    assert "Logits on 64 tokens: max |a - b| 0 " in text
    # The adapters by their merged checkpoints, in place of their base.
    for adapter in (a, b):
        out = tmp_path / f"merged-{adapter.name}"
        args = ("merge", tiny_model, adapter, out, "--onto", "original", "--no-check")
        assert run(capsys, *args)[0] == 0
    args = ("verify", tmp_path / "merged-a", tmp_path / "merged-b", "--logits")
    status, text, _ = run(capsys, *args, "--json")
    merged = json.loads(text)["logits"]
    assert status == 1
    for name in ("mean_kl", "max_abs_difference", "max_abs_logit"):
        assert merged[name] == pytest.approx(report["logits"][name], rel=1e-3)


def test_verify_of_custom_modules_compares_no_logits(
    capsys, tiny, make_tensors, save_model, make_adapter
):
    custom = {**tiny, "extra_tensors": {"model.layers.self_attn.gate.weight": [4, 64]}}
    base = save_model(custom, make_tensors(custom))
    a = make_adapter(custom, ("q_proj", "gate"), name="a")
    b = make_adapter(custom, ("q_proj", "gate"), name="b", seed=2)
    for other, same in ((a, True), (b, False)):
        status, text, err = run(capsys, "verify", a, other, "--base", base, "--json")
        assert (status, err) == (0 if same else 1, "")
        report = json.loads(text)
        assert report["equal"] is same and report["logits"] is None
        (note,) = report["notes"]
        assert note.startswith(f"logits were not compared: `{base}` has modules of its")


def test_verify_options_that_do_not_fit(capsys, tiny, tiny_model, make_adapter):
    adapter = make_adapter(tiny)
    for args, message in (
        ((adapter, adapter, "--logits"), "are compared on their base; give it with"),
        ((tiny_model, tiny_model, "--base", tiny_model), "A base goes with two adap"),
        ((adapter, adapter, "--base", adapter), "is a PEFT adapter, not a model"),
    ):
        status, _, err = run(capsys, "verify", *args)
        assert status == 2
        assert message in err


@pytest.mark.parametrize("quantization", ["nf4", "nf4_dq"])
def test_model_to_4bit_and_back(capsys, tiny_model, tmp_path, quantization):
    four, dense, same = (tmp_path / n for n in ("four", "dense", "same"))
    args = ("model", tiny_model, four, "--quantization", quantization, "--json")
    status, text, _ = run(capsys, *args)
    assert status == 0
    report = json.loads(text)
    assert (report["quantization"], report["files"]) == (quantization, 1)
    config, base = convert.load_llama(tiny_model, quantization=quantization)
    convert.save_llama(tmp_path / "expected", config, base)
    assert compare_adapters(four, tmp_path / "expected").equal
    assert run(capsys, "model", four, same, "--quant-storage", "float32")[0] == 0
    assert (
        run(capsys, "model", same, tmp_path / "u8", "--quant-storage", "uint8")[0] == 0
    )
    assert compare_adapters(four, tmp_path / "u8").equal
    assert run(capsys, "model", same, dense, "--dequantize")[0] == 0
    comparison = compare_adapters(tiny_model, dense)
    assert not comparison.missing and not comparison.extra
    assert len(comparison.different) == 14
    assert all(d.max_abs_difference < 1 for d in comparison.different)


def test_model_cast_and_sharding(capsys, tiny_model, tmp_path):
    out, back = tmp_path / "out", tmp_path / "back"
    args = ("model", tiny_model, out, "--max-shard-bytes", "20000")
    status, text, _ = run(capsys, *args)
    assert status == 0
    assert compare_adapters(tiny_model, out).equal
    assert table(text)["files"] == str(len(list(out.glob("*.safetensors"))))
    assert table(text)["quantization"] == "unchanged"
    assert run(capsys, "model", out, back, "--dtype", "bfloat16")[0] == 0
    assert {d.b.split()[0] for d in compare_adapters(tiny_model, back).different} == {
        "BF16"
    }


def test_model_settings_that_contradict(capsys, tiny_model, packed, tmp_path):
    out = tmp_path / "out"
    for args, message in (
        (
            (packed, out, "--quantization", "nf4"),
            "is quantized already; quantizing aga",
        ),
        ((tiny_model, out, "--dequantize"), "--dequantize needs 4-bit weights"),
        (
            (packed, out, "--dequantize", "--quantization", "nf4"),
            "--dequantize goes without --quantization",
        ),
        ((tiny_model, out, "--quant-storage", "uint8"), "goes with 4-bit output only"),
    ):
        status, _, err = run(capsys, "model", *args)
        assert status == 1
        assert message in err
    assert not out.exists()


def test_combine(capsys, tiny, tiny_model, make_adapter, tmp_path):
    one = make_adapter(tiny, name="one", seed=1)
    two = make_adapter(tiny, targets=("q_proj",), r=2, name="two", seed=2)
    for directory in (one, two):
        (directory / CHAT_TEMPLATE_FILE).write_text("{{ messages }}")
    both = ["--base", tiny_model, "--adapters", one, two, "--weights", 0.5, 2]
    status, text, _ = run(capsys, "combine", tmp_path / "sum", *both, "--json")
    assert status == 0
    report = json.loads(text)
    assert report["relative_error"]["total"] == 0.0 and report["weights"] == [0.5, 2.0]

    def update(path) -> np.ndarray:
        lora, adapters = convert.load_adapter(path, LlamaConfig.from_hf(tiny))
        node = adapters["model"]["layers"]["self_attn"]["q_proj"]
        return lora.scaling * node["lora_B"] @ node["lora_A"]

    expected = 0.5 * update(one) + 2.0 * update(two)
    np.testing.assert_allclose(update(tmp_path / "sum"), expected, atol=1e-5)
    raw = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert raw["base_model_name_or_path"] == "some/base"
    assert (tmp_path / "sum" / CHAT_TEMPLATE_FILE).read_text() == "{{ messages }}"

    (one / CHAT_TEMPLATE_FILE).write_text("{{ messages[0] }}")
    status, text, _ = run(
        capsys, "combine", tmp_path / "svd", *both, "--method", "svd", "--r", 4
    )
    assert status == 0 and table(text)["r"] == "4"
    assert not (tmp_path / "svd" / CHAT_TEMPLATE_FILE).exists()  # they do not agree
    status, _, err = run(capsys, "combine", tmp_path / "x", *both[:-1])
    assert status == 1 and "1 numbers for 2 adapters" in err
    assert not (tmp_path / "x").exists()
