"""How options are parsed: switches in every spelling, and names of other libraries."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from qlora_jax.cli.options import FLAGS, parse


@dataclass(frozen=True)
class Section:
    append_eos: bool = True
    packing: bool | Literal["auto"] = "auto"
    name: str = ""


@dataclass(frozen=True)
class Options:
    data: Section = field(default_factory=Section)
    check: bool = True
    force: bool = False


@pytest.mark.parametrize("settings", [{}, {"config": FLAGS}], ids=["pairs", "single"])
@pytest.mark.parametrize(
    ("args", "options"),
    [
        ("--data.append-eos false", Options(Section(append_eos=False))),
        ("--data.append_eos=False", Options(Section(append_eos=False))),
        ("--data.append-eos TRUE --force", Options(force=True)),
        ("--check false --force true", Options(check=False, force=True)),
        ("--check=true --force=false", Options()),
        ("--data.packing true", Options(Section(packing=True))),
        ("--data.packing=false", Options(Section(packing=False))),
        ("--data.packing auto", Options()),
        ("--data.name true", Options(Section(name="true"))),
    ],
)
def test_a_switch_takes_true_and_false(args, options, settings):
    assert parse(Options, args.split(), prog="test", **settings) == options


def test_a_switch_takes_nothing_else(capsys):
    with pytest.raises(SystemExit) as refused:
        parse(Options, ["--check", "maybe"], prog="test")
    assert refused.value.code == 2 and "maybe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (
            "plan --gpu l4 --max_seq_length 5 --per_device_train_batch_size 3",
            ("Here it is `--max-length`.", "Here it is `--batch-size`."),
        ),
        (
            "eval x --load_in_4bit --max_seq_length 5",
            ("Here it is `--quantization`:", "Here it is `--data.max-length`."),
        ),
        (
            "data --max_seq_length=5",
            ("Here it is `--data.max-length`. `qlora-jax data ",),
        ),
        ("generate x --do_sample", ("with a `--temperature` above 0",)),
        ("merge a b --save_method lora", ("`--requantize`",)),
        ("quantize a b --load_in_4bit", ("Here it is `--quantization`",)),
        ("merge a b --lora_r 3", ("In a run file it is `lora.r`.",)),
    ],
)
def test_other_commands_have_the_hints_too(cli, line, parts):
    status, out, err = cli(*line.split())
    assert status == 2 and not out and all(part in err for part in parts)
    assert err.startswith(f"qlora-jax {line.split()[0]}: ")
