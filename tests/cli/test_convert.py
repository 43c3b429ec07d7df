"""`qlora-convert`; what the conversions compute is tested in tests/convert."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

import convert
from convert.companions import CHAT_TEMPLATE_FILE
from convert.peft import FINGERPRINT
from convert.verify import compare_adapters as compare
from qlora_jax.lora import LoraConfig, init_adapters
from qlora_jax.models.config import LlamaConfig
from qlora_jax.nf4 import fingerprint_tree

WEIGHTS = "adapter_model.safetensors"


def table(text: str) -> dict[str, str]:
    """The lines of a report; nested ones by their last name."""
    lines = [line.split(maxsplit=1) for line in text.splitlines()]
    return {name: value for name, *rest in lines for value in rest}


def read(path, name="adapter_config.json"):
    return json.loads((path / name).read_text())


@pytest.fixture
def report(run):
    """A function: arguments -> the report of a success that has nothing to note."""

    def report(*args, status=0, note=""):
        got, out, err = run(*args, "--json")
        assert (got, err) == (status, note)
        return json.loads(out)

    return report


@pytest.fixture
def refused(run):
    """A function: a message and arguments -> the failure, nothing on stdout."""

    def refused(message, *args, status=1):
        got, out, err = run(*args)
        assert (got, out) == (status, "") and message in err
        return err

    return refused


@pytest.fixture
def adapter(tiny, make_adapter):
    """Of `tiny_model`: rank 3, of q_proj and down_proj."""
    return make_adapter(tiny)


@pytest.fixture
def packed(tiny_model, tmp_path):
    out = tmp_path / "packed"
    convert.save_llama(out, *convert.load_llama(tiny_model))
    return out


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("nothing",),
        ("merge", "a"),
        ("verify", "a"),
        ("model", "a", "b", "--dtype", "int8"),
        ("merge", "a", "b", "--onto", "base"),
    ],
)
def test_wrong_usage_exits_with_2(refused, args):
    assert "Traceback" not in refused(" ", *args, status=2)


@pytest.mark.parametrize("command, failure", [("verify", 2), ("model", 1)])
def test_expected_failure_is_one_paragraph(refused, tmp_path, command, failure):
    """Of `verify` as of diff: 1 is a difference, 2 a failure."""
    places = (tmp_path / "a", tmp_path / "b")
    err = refused("does not exist", command, *places, status=failure)
    assert err.startswith(f"qlora-convert {command}: `")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "status", "how"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_leaves_nothing_half_written(
    handlers, run, tiny_model, tmp_path, monkeypatch, number, status, how
):
    out = tmp_path / "new" / "model"

    def half(file, *_):
        file.write_text("{")
        signal.raise_signal(number)

    monkeypatch.setattr("convert.atomic.write_text", half)
    message = f"qlora-convert model: {how}. Nothing half-written is left.\n"
    assert run("model", tiny_model, out) == (status, "", message)
    assert list(out.parent.iterdir()) == []


def test_as_a_program(tiny_model):
    program = [sys.executable, "-m", "qlora_jax.cli.convert"]
    command = [*program, "verify", tiny_model, tiny_model]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "The same: 21 tensors, byte for byte.\n"


@pytest.mark.parametrize("command, option", [("adapter", "strict"), ("merge", "check")])
def test_the_help_of_a_flag_says_what_the_flag_does(run, command, option):
    status, out, _ = run(command, "--help")
    assert status == 0
    text = " ".join(out.replace("│", " ").split())
    helptext = text.split(f"--no-{option} ")[-1]
    assert helptext.startswith(("Take what fits", "Load nothing after merging"))
    assert "(default: True)" not in helptext.split("--")[0]


# --- verify ---


def test_verify(run, report, tiny_model, packed):
    status, out, _ = run("verify", tiny_model, packed)
    assert status == 1
    assert "Different: 14 of 21 tensors; 0 missing, 42 extra" in out
    assert "... and 16 more (--json lists all)." in out
    # Into a pipe names are whole, however long.
    assert " model.layers.0.self_attn.q_proj.weight.quant_state." in out
    assert report("verify", tiny_model, packed, status=1)["equal"] is False
    assert report("verify", packed, packed) == {
        **{"equal": True, "a": str(packed), "b": str(packed), "kind": "model"},
        **{"tensors": 63, "missing": [], "extra": [], "different": []},
        **{"config": {}, "notes": [], "logits": None},
    }


def test_verify_shows_missing_and_configuration(run, tiny, make_adapter):
    a = make_adapter(tiny, name="a")
    b = make_adapter(tiny, ("q_proj",), name="b", lora_alpha=8)
    status, out, _ = run("verify", a, b)
    assert status == 1
    assert "lora_alpha" in out
    _, swapped, _ = run("verify", b, a)
    assert out.count("missing") == swapped.count("missing")


def test_verify_compares_logits(run, report, tiny, tiny_model, make_adapter, tmp_path):
    a, b = make_adapter(tiny, name="a"), make_adapter(tiny, name="b", seed=2)
    compared = report("verify", a, b, "--base", tiny_model, status=1)
    assert (compared["equal"], len(compared["different"])) == (False, 8)
    logits = compared["logits"]
    assert logits["max_kl"] > 0.01
    status, text, _ = run("verify", a, a, "--base", tiny_model)
    assert status == 0
    assert "The same: 8 tensors, byte for byte." in text
    assert "Logits on 64 tokens: max |a - b| 0 " in text
    # The adapters by their merged checkpoints, in place of their base.
    merged = [tmp_path / f"merged-{adapter.name}" for adapter in (a, b)]
    for adapter, out in zip((a, b), merged, strict=True):
        convert.merge(tiny_model, adapter, out)
    same = report("verify", *merged, "--logits", status=1)["logits"]
    for name in ("mean_kl", "max_abs_difference", "max_abs_logit"):
        assert same[name] == pytest.approx(logits[name], rel=1e-3)


def test_custom_modules_compare_no_logits(
    run, report, tiny, make_tensors, save_model, make_adapter, tmp_path
):
    custom = {**tiny, "extra_tensors": {"model.layers.self_attn.gate.weight": [4, 64]}}
    base = save_model(custom, make_tensors(custom))
    a = make_adapter(custom, ("q_proj", "gate"), name="a")
    b = make_adapter(custom, ("q_proj", "gate"), name="b", seed=2)
    why = f"logits were not compared: `{base}` has modules of its"
    for other in (a, b):
        compared = report("verify", a, other, "--base", base, status=int(other is b))
        assert compared["equal"] is (other is a) and compared["logits"] is None
        (note,) = compared["notes"]
        assert note.startswith(why)
    args = ("merge", a, tmp_path / "o", "--base", base, "--onto", "original", "--json")
    status, text, err = run(*args)
    assert status == 0 and err.startswith(f"Note: {why}")
    assert json.loads(text)["logits"] is None
    assert json.loads(text)["tensors_changed"] == 4


def test_verify_options_that_do_not_fit(refused, tiny_model, adapter):
    a, model = adapter, tiny_model
    for message, *args in (
        ("are compared on their base; give it with", a, a, "--logits"),
        ("A base goes with two adap", model, model, "--base", model),
        ("is a PEFT adapter, not a model", a, a, "--base", a),
    ):
        refused(message, "verify", *args, status=2)


# --- adapter and combine ---


def test_adapter(run, report, tiny_model, adapter, tmp_path):
    source, out, again = adapter, tmp_path / "clean", tmp_path / "again"
    (source / CHAT_TEMPLATE_FILE).write_text("{{ messages }}\n")
    record = {"step": 7, "quantization": "nf4", "lm_head": "auto", "dtype": "float32"}
    (source / "training.json").write_text(json.dumps(record))
    made = report("adapter", source, out, "--base", tiny_model)
    assert read(out, "training.json") == record  # the copy is loaded as it was trained
    assert (made["r"], made["scaling"]) == (3, 2.0)
    assert made["bytes"] == (out / WEIGHTS).stat().st_size
    assert compare(source, out).equal
    assert (out / CHAT_TEMPLATE_FILE).read_text() == "{{ messages }}\n"
    # A run directory stands for the adapter in it.
    args = ("adapter", tmp_path, again, "--base", tiny_model, "--base-name", "n")
    status, text, _ = run(*args)
    assert status == 0
    assert table(text)["target_modules"] == "down_proj, q_proj"
    assert compare(source, again).equal
    assert read(again)["base_model_name_or_path"] == "n"


def test_adapter_that_does_not_fit_to_the_letter(
    run, report, refused, tiny, tiny_model, make_adapter, tmp_path, edit_tensors
):
    source, out = make_adapter(tiny), tmp_path / "o"
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    edit_tensors(source / WEIGHTS, lambda tensors: tensors.pop(key))
    args = ("adapter", source, out, "--base", tiny_model)
    refused(f"1 missing tensors: {key}", *args)
    assert not out.exists()
    skipped = f"{key}: missing tensors"
    note = f"Note: not taken from `{source}`: {skipped}.\n"
    assert report(*args, "--no-strict", note=note)["skipped"] == [skipped]
    _, adapters = convert.load_adapter(out, LlamaConfig.from_hf(tiny))
    part = adapters["model"]["layers"]["self_attn"]["q_proj"]
    assert part["lora_B"][0].any() and not part["lora_B"][1].any()
    # Of one that fits nowhere nothing is written.
    wide = make_adapter({**tiny, "intermediate_size": 48}, ("down_proj",), name="wide")
    more = ("--base", tiny_model, "--no-strict")
    message = "None of its tensors could be used."
    err = refused(message, "adapter", wide, tmp_path / "w", *more)
    assert err.count("\n") == 1 and not (tmp_path / "w").exists()
    # Of very many notes the first; they stand there once.
    deep = make_adapter({**tiny, "num_hidden_layers": 9}, ("q_proj",), name="deep")
    status, text, err = run("adapter", deep, tmp_path / "d", *more)
    assert status == 0
    assert err.count("Note: not taken from") == 11 and "4 more like these" in err
    assert table(text)["skipped"] == "14"


def test_the_copy_of_an_adapter_leads_to_its_base(
    run, tiny, tiny_model, make_adapter, tmp_path, monkeypatch
):
    """By the path it had, where that leads there; else by an absolute one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tiny_model)
    near, far = tmp_path / "near", tmp_path / "elsewhere" / "deep" / "deeper"
    for number, (name, out, base, expected) in enumerate(
        (
            ("../model", near, tiny_model, "../model"),
            ("../model", far / "a", tiny_model, str(tiny_model)),
            ("model", far / "b", tiny_model, str(tiny_model)),
            ("some/model", far / "c", tiny_model, "some/model"),
            ("../nowhere", far / "d", tiny_model, "../nowhere"),
            # The same directory by the path that was given, a link perhaps.
            ("../model", far / "e", link, str(link)),
        )
    ):
        fields = {"name": f"a{number}", "base_model_name_or_path": name}
        source = make_adapter(tiny, **fields)
        status, _, err = run("adapter", source, out, "--base", base)
        assert status == 0
        assert read(out)["base_model_name_or_path"] == expected
        if name == "../nowhere":
            assert "`../nowhere`, the base of" in err
            assert "--base-name names another" in err
        elif base != link:
            assert err == ""
    args = ("combine", far / "f", "--base", tiny_model, "--adapters", far / "a", near)
    assert run(*args)[0] == 0
    assert read(far / "f")["base_model_name_or_path"] == str(tiny_model)


@pytest.mark.golden
def test_copies_of_the_base(run, report, refused, golden, tmp_path, edit_tensors):
    source = golden / "adapters/llama32/emb_lora"
    base = shutil.copytree(golden / "llama32/fp32", tmp_path / "base")
    assert run("adapter", source, tmp_path / "a", "--base", base)[0] == 0
    compared = report("verify", source, tmp_path / "a", "--base", base)
    assert compared["logits"]["max_abs_difference"] == 0
    key = "model.embed_tokens.weight"
    edit_tensors(base / "model.safetensors", lambda t: t.update({key: 2 * t[key]}))
    message = "is not the table of this base"
    refused(message, "adapter", source, tmp_path / "b", "--base", base)
    # Its configuration alone: nothing to compare with, and that is said.
    (base / "model.safetensors").unlink()
    status, _, err = run("adapter", source, tmp_path / "c", "--base", base)
    assert status == 0
    assert "not compared, no weights of the base were given" in err


def test_combine(run, report, refused, tiny, tiny_model, make_adapter, tmp_path):
    one = make_adapter(tiny, name="one", seed=1)
    two = make_adapter(tiny, targets=("q_proj",), r=2, name="two", seed=2)
    for directory in (one, two):
        (directory / CHAT_TEMPLATE_FILE).write_text("{{ messages }}")
        record = {
            "step": 3,
            "quantization": "nf4",
            "lm_head": "auto",
            "dtype": "float16",
        }
        (directory / "training.json").write_text(json.dumps(record))
    both = ["--base", tiny_model, "--adapters", one, two, "--weights", 0.5, 2]
    combined = report("combine", tmp_path / "sum", *both)
    assert combined["relative_error"]["total"] == 0.0
    assert combined["weights"] == [0.5, 2.0]

    def update(path) -> np.ndarray:
        lora, adapters = convert.load_adapter(path, LlamaConfig.from_hf(tiny))
        node = adapters["model"]["layers"]["self_attn"]["q_proj"]
        return lora.scaling * node["lora_B"] @ node["lora_A"]

    expected = 0.5 * update(one) + 2.0 * update(two)
    np.testing.assert_allclose(update(tmp_path / "sum"), expected, atol=1e-5)
    assert read(tmp_path / "sum")["base_model_name_or_path"] == "some/model"
    assert (tmp_path / "sum" / CHAT_TEMPLATE_FILE).read_text() == "{{ messages }}"
    del record["step"]
    assert read(tmp_path / "sum", "training.json") == record
    (one / "training.json").unlink()

    (one / CHAT_TEMPLATE_FILE).write_text("{{ messages[0] }}")
    svd = tmp_path / "svd"
    status, text, _ = run("combine", svd, *both, "--method", "svd", "--r", 4)
    assert status == 0 and table(text)["r"] == "4"
    assert not (svd / CHAT_TEMPLATE_FILE).exists()  # they do not agree
    assert not (svd / "training.json").exists()
    refused("1 numbers for 2 adapters", "combine", tmp_path / "x", *both[:-1])
    assert not (tmp_path / "x").exists()


def test_combine_says_what_the_sum_does_not_have(
    run, tiny, tiny_model, make_adapter, tmp_path
):
    one = make_adapter(tiny, name="one", seed=1)
    two = make_adapter(tiny, name="two", seed=2)
    (one / "new_embeddings.safetensors").write_bytes((one / WEIGHTS).read_bytes())
    (one / "trainable_params.bin").write_bytes(b"of LongLoRA")

    tensors = safetensors.numpy.load_file(two / WEIGHTS)
    zeros = {k: 0 * v if "lora_B" in k else v for k, v in tensors.items()}
    metadata = {"format": "pt", FINGERPRINT: "0" * 64}
    safetensors.numpy.save_file(zeros, two / WEIGHTS, metadata)
    args = ("--base", tiny_model, "--adapters", one, two)
    status, _, err = run("combine", tmp_path / "sum", *args)
    assert status == 0
    notes = " ".join(err.split())
    unread = "new_embeddings.safetensors, trainable_params.bin, beside"
    assert f"not taken from `{one}`: {unread} {WEIGHTS}" in notes
    assert f"not taken from `{two}`: the updates of the adapter, all zero" in notes
    assert "the adapters do not record the same base" in notes


def test_combine_says_what_its_weights_do_not_apply_to(run, tiny, tiny_model, tmp_path):
    config, base = convert.load_llama(tiny_model)
    lora = LoraConfig(r=2, modules_to_save=("lm_head",))
    adapters = init_adapters(jax.random.key(0), base, lora)
    convert.save_adapter(tmp_path / "a", lora, adapters, config)
    both = ("--base", tiny_model, "--adapters", tmp_path / "a", tmp_path / "a")
    for weights, said in (((1, 1), True), ((0.25, 0.75), False)):
        out = tmp_path / str(said)
        status, _, err = run("combine", out, *both, "--weights", *weights)
        assert status == 0
        note = "2 in all, do not apply to what the adapters replace in the base (lm_h"
        assert (note in " ".join(err.split())) == said


# --- merge ---


def test_merge(run, report, refused, tiny, tiny_model, packed, make_adapter, tmp_path):
    adapter, out = make_adapter(tiny), tmp_path / "o"
    of = ("--base", tiny_model)
    # What it was trained on is recorded nowhere, and not guessed.
    refused("does not record what it was trained on", "merge", adapter, out, *of)
    merged = report("merge", adapter, out, *of, "--onto", "original")
    assert merged["tensors_changed"] == 4
    logits = merged["logits"]
    assert logits["probe_tokens"] == 64  # its context is 32
    assert logits["max_abs_difference"] < 1e-4 * logits["max_abs_logit"]
    assert logits["mean_kl"] < 1e-7
    assert merged["trained_on_this_base"] is None
    assert read(out, "merge_report.json") == merged
    convert.merge(tiny_model, adapter, tmp_path / "p")
    assert compare(out, tmp_path / "p").equal
    # Of a 4-bit base there is one form, the default.
    args, of = ("merge", adapter, tmp_path / "q"), ("--base", packed)
    status, text, _ = run(*args, *of, "--dtype", "bfloat16", "--no-check")
    assert status == 0
    assert "logits" not in text
    assert table(text)["config_changes"] == "none"
    assert table(text)["requantization_error"] == "-"
    refused("no original to merge", *args[:2], tmp_path / "r", *of, "--onto=original")
    refused("is not an adapter or a run", "merge", tiny_model, tmp_path / "r")
    refused("`nothing` does not exist", "merge", "nothing", tmp_path / "r")


def test_merge_quantized_and_again(run, tiny, tiny_model, make_adapter, tmp_path):
    adapter, out = make_adapter(tiny, seed=3), tmp_path / "o"
    args = ("merge", adapter, out, "--base", tiny_model)  # --onto follows
    status, text, _ = run(*args, "--quantization", "nf4_dq", "--requantize", "nf4")
    assert status == 0
    report = read(out, "merge_report.json")
    error = report["requantization_error"]["q_proj"]
    of_q = text.split("  q_proj\n")[1].splitlines()[:2]
    assert table("\n".join(of_q))["relative"] == f"{error['relative']:.6g}"
    assert table(text)["max_kl"] == f"{report['logits']['max_kl']:.6g}"
    # The check is of what was written: here 4-bit weights.
    assert report["logits"]["max_kl"] > 1e-4
    quantization = read(out, "config.json")["quantization_config"]
    assert quantization["bnb_4bit_use_double_quant"] is False


def test_the_base_that_was_trained_on(run, report, tiny, tiny_model, adapter, tmp_path):
    _, base = convert.load_llama(tiny_model, quantization="nf4", dtype="bfloat16")
    trained, config = fingerprint_tree(base), LlamaConfig.from_hf(tiny)
    lora, adapters = convert.load_adapter(adapter, config)
    known, other = tmp_path / "known", tmp_path / "other"
    for path, fingerprint in ((known, trained), (other, "0" * 64)):
        lora = dataclasses.replace(lora, base_fingerprint=fingerprint)
        convert.save_adapter(path, lora, adapters, config)
    note = f"Note: `{other}` was trained on another base than `{tiny_model}`.\n"
    for adapter, form, err in ((known, "nf4, bfloat16", ""), (other, None, note)):
        out = tmp_path / f"merged-{adapter.name}"
        args = ("merge", adapter, out, "--base", tiny_model, "--onto", "original")
        merged = report(*args, note=err)
        assert merged["trained_on_this_base"] is (form is not None)
        assert merged["trained_form"] == form
    # Merged onto what was not trained on; the dtype of what stays dense counts too.
    for quantization, dtype, here in (
        ("nf4_dq", "bfloat16", False),
        ("nf4", "float32", False),
        ("nf4", "bfloat16", True),
    ):
        note = (
            f"Note: `{known}` was trained on `{tiny_model}` as nf4, bfloat16, and was "
            f"merged onto {quantization}, {dtype}; --dtype and --quantization choose "
            "these.\n"
        )
        args = ("merge", known, tmp_path / f"{quantization}-{dtype}")
        args += ("--base", tiny_model, "--quantization", quantization)
        merged = report(*args, "--dtype", dtype, note="" if here else note)
        assert merged["trained_on_this_base"] is here
    status, text, _ = run("verify", known, other)
    assert status == 0
    assert "Note: they were trained on different bases" in text
    notes = report("verify", known, other, "--base", tiny_model)["notes"]
    assert len(notes) == 2
    assert f"`{other}` was trained on another base" in notes[1]
    # It stays with an adapter that is written again.
    again = tmp_path / "again"
    _, text, _ = run("adapter", known, again, "--base", tiny_model)
    assert table(text)["base_fingerprint"] == trained
    assert (known / WEIGHTS).read_bytes() == (again / WEIGHTS).read_bytes()


def test_a_failed_check_is_told(refused, monkeypatch, tiny_model, adapter, tmp_path):
    def fail(*args):
        raise MemoryError("Unable to allocate 16 GiB.")

    monkeypatch.setattr("qlora_jax.inference.compare_logits", fail)
    args = ("merge", adapter, tmp_path / "o", "--base", tiny_model, "--onto")
    err = refused(f"`{tmp_path / 'o'}` was written, and could not", *args, "original")
    assert "Unable to allocate 16 GiB. With --no-check nothing is loaded" in err
    assert "logits" not in read(tmp_path / "o", "merge_report.json")


@pytest.mark.real
def test_a_probe_text(run, report, shared_data, tmp_path):
    base, out = shared_data / "stories260K", tmp_path / "o"
    adapter = shared_data / "adapters" / "stories260K-lora-r8-shakespeare"
    probe = ("--probe", "Once upon a time")
    of = ("--base", base, "--onto", "original")
    merged = report("merge", adapter, out, *of, *probe)
    assert 2 < merged["logits"]["probe_tokens"] < 20
    status, text, _ = run("verify", base, out, *probe)
    assert status == 1
    assert re.search(r"Logits on \d+ tokens: max [|]a - b[|] [1-9]", text)


def test_a_probe_text_without_a_tokenizer(refused, tiny_model, adapter, tmp_path):
    args = ("merge", adapter, tmp_path / "o", "--base", tiny_model, "--onto")
    message = "has no tokenizer to read a probe text with"
    refused(message, *args, "original", "--probe", "text")
    assert not (tmp_path / "o").exists()


# --- model ---


@pytest.mark.parametrize("quantization", ["nf4", "nf4_dq"])
def test_model_to_4bit_and_back(run, report, tiny_model, tmp_path, quantization):
    four, dense, wide, u8, expected = (tmp_path / name for name in "fdwue")
    made = report("model", tiny_model, four, "--quantization", quantization)
    assert (made["quantization"], made["files"]) == (quantization, 1)
    config, base = convert.load_llama(tiny_model, quantization=quantization)
    convert.save_llama(expected, config, base)
    assert compare(four, expected).equal
    assert run("model", four, wide, "--quant-storage", "float32")[0] == 0
    assert run("model", wide, u8, "--quant-storage", "uint8")[0] == 0
    assert compare(four, u8).equal
    assert run("model", wide, dense, "--dequantize")[0] == 0
    comparison = compare(tiny_model, dense)
    assert not comparison.missing and not comparison.extra
    assert len(comparison.different) == 14
    assert all(d.max_abs_difference < 1 for d in comparison.different)


def test_model_cast_and_sharding(run, tiny_model, tmp_path):
    out, back = tmp_path / "out", tmp_path / "back"
    status, text, _ = run("model", tiny_model, out, "--max-shard-bytes", "20000")
    assert status == 0
    assert compare(tiny_model, out).equal
    assert table(text)["files"] == str(len(list(out.glob("*.safetensors"))))
    assert table(text)["quantization"] == "unchanged"
    assert run("model", out, back, "--dtype", "bfloat16")[0] == 0
    assert {d.b.split()[0] for d in compare(tiny_model, back).different} == {"BF16"}


def test_model_settings_that_contradict(refused, tiny_model, packed, tmp_path):
    out, quantize = tmp_path / "out", ("--quantization", "nf4")
    for message, source, *options in (
        ("is quantized already; quantizing aga", packed, *quantize),
        ("--dequantize needs 4-bit weights", tiny_model, "--dequantize"),
        ("--dequantize goes without --quanti", packed, "--dequantize", *quantize),
        ("goes with 4-bit output only", tiny_model, "--quant-storage", "uint8"),
    ):
        refused(message, "model", source, out, *options)
    assert not out.exists()
