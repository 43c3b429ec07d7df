import json
import subprocess
import sys

import pytest

import convert
from convert.verify import compare
from qlora_jax.convert_cli import main


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
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
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
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.err
    assert "Traceback" not in captured.err


def test_expected_failure_is_one_paragraph_and_1(capsys, tmp_path):
    status, out, err = run(capsys, "verify", tmp_path / "a", tmp_path / "b")
    assert (status, out) == (1, "")
    assert err.startswith("qlora-convert: `")
    assert err.count("\n") == 1


def test_as_a_program(tiny_model, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "qlora_jax.convert_cli",
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
    status, text, _ = run(
        capsys, "adapter", source, out, "--base", tiny_model, "--json"
    )
    assert status == 0
    report = json.loads(text)
    assert (report["r"], report["scaling"]) == (3, 2.0)
    assert report["bytes"] == (out / "adapter_model.safetensors").stat().st_size
    assert compare(source, out).equal
    # A run directory stands for the adapter in it.
    again = tmp_path / "again"
    status, text, _ = run(
        capsys, "adapter", tmp_path, again, "--base", tiny_model, "--base-name", "n"
    )
    assert status == 0
    assert "target_modules: ('down_proj', 'q_proj')" in text
    assert compare(source, again).equal
    raw = json.loads((again / "adapter_config.json").read_text())
    assert raw["base_model_name_or_path"] == "n"


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
    assert json.loads(text)["tensors_changed"] == 4
    convert.merge(tiny_model, adapter, tmp_path / "p")
    assert compare(tmp_path / "o", tmp_path / "p").equal
    args = ("merge", packed, adapter, tmp_path / "q", "--onto", "dequantized")
    assert run(capsys, *args, "--dtype", "bfloat16")[0] == 0
    assert (
        run(capsys, "merge", packed, adapter, tmp_path / "r", "--onto", "original")[0]
        == 1
    )


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
    assert compare(four, tmp_path / "expected").equal
    assert run(capsys, "model", four, same, "--quant-storage", "float32")[0] == 0
    assert (
        run(capsys, "model", same, tmp_path / "u8", "--quant-storage", "uint8")[0] == 0
    )
    assert compare(four, tmp_path / "u8").equal
    assert run(capsys, "model", same, dense, "--dequantize")[0] == 0
    found = compare(tiny_model, dense)
    assert not found.missing and not found.extra
    assert len(found.different) == 14
    assert all(d.max_abs_difference < 1 for d in found.different)


def test_model_cast_and_sharding(capsys, tiny_model, tmp_path):
    out, back = tmp_path / "out", tmp_path / "back"
    args = ("model", tiny_model, out, "--max-shard-bytes", "20000")
    status, text, _ = run(capsys, *args)
    assert status == 0
    assert compare(tiny_model, out).equal
    assert f"files: {len(list(out.glob('*.safetensors')))}" in text
    assert run(capsys, "model", out, back, "--dtype", "bfloat16")[0] == 0
    assert {d.b.split()[0] for d in compare(tiny_model, back).different} == {"BF16"}


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
