"""The peer's programs on a CPU: sizes and flow, not speed."""

import importlib.util
import json
import math

import pytest

from scripts.peer import __main__ as peer
from scripts.peer import gpu, training
from scripts.peer.model import why_unavailable

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SMALL = "--hidden 128 --ffn 192 --layers 2 --heads 4 --kv-heads 2 --vocab 64".split()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_a_step_on_a_cpu_trains(dtype, quant, capsys):
    options = ["--dtype", dtype, "--quant", quant, "--seq", "32", "--steps", "3"]
    assert peer.main(["cpu", *SMALL, *options]) == 0
    record = json.loads(capsys.readouterr().out)
    assert len(record["step_s"]) == 3 and len(record["losses"]) == 4
    assert record["losses"][0] == pytest.approx(math.log(64), abs=0.2)
    assert record["losses"][-1] < record["losses"][0]
    assert record["config"]["quant"] == quant and "torch" in record["versions"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "`--steps` must be >= 1"),
        (["--hidden", "100"], "must divide `--hidden`"),
        (["--ffn", "100"], "must be multiples of 64"),
    ],
)
def test_sizes_that_would_spoil_the_comparison_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        peer.parse_args(["cpu", *options])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("dequantize", (64, 128)), ("matmul", (3, 64)), ("backward", (3, 128))],
)
def test_the_calls_compute_what_they_stand_for(kind, shape):
    request = {"kind": kind, "shape": [64, 128], "rows": 3}
    call = gpu.prepare(request | {"copies": 2, "double_quant": True}, "cpu")
    assert tuple(call(0).shape) == shape
    assert not (call(0) == call(1)).all() and (call(0) == call(2)).all()


def test_generation_makes_the_tokens_it_counts():
    options = "--context 20 --tokens 3 --repeats 1 --batch 2".split()
    args = peer.parse_args(["gpu", "decode", *SMALL, *options])
    result = gpu.decode(args, "cpu")
    prefill, total = (min(times[1:]) for times in result["seconds"])
    # By definition. On a busy machine three tokens take less time than noise, so the
    # sign of the difference proves nothing.
    assert result["tokens_per_s"] == 2 * 3 / (total - prefill)
    assert prefill > 0 and "bitsandbytes" in result["versions"]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--gradient-checkpointing", "1"],
        ["--size", "qwen3-8b", "--batch", "2", "--accumulation", "2"],
    ],
)
def test_a_step_for_a_gpu_trains_on_any_device(options, capsys):
    assert peer.main(["gpu", "train", "--dry-run", *options]) == 0
    record = json.loads(capsys.readouterr().out)
    args = record["options"]
    tokens = args["batch"] * args["accumulation"] * 64
    assert record["tokens_per_s"] == tokens / record["step_s"]
    assert len(record["seconds"]) == args["warmup"] + args["steps"]
    # Near the logarithm of the vocabulary.
    assert record["losses"][0] == pytest.approx(math.log(64), abs=0.3)
    adapters = {"llama": 2 * 16 * (2 * 256 + 2 * 192 + 3 * 320)}
    if args["family"] in adapters:
        assert record["trainable_parameters"] == adapters[args["family"]]


def test_what_is_not_installed_is_said(capsys):
    assert peer.main(["gpu", "train", "--by", "unsloth", "--dry-run"]) == 0
    if not importlib.util.find_spec("unsloth"):
        said = json.loads(capsys.readouterr().out)
        assert said == {"unavailable": "unsloth is not installed"}


def test_sizes_are_those_of_the_named_model():
    args = peer.parse_args(["gpu", "train", "--size", "qwen3-8b"])
    assert (args.ffn, args.layers, args.vocab, args.batch) == (12288, 36, 151936, 4)
    config = training.make_config(args)
    assert config.model_type == "qwen3" and config.head_dim == 128


def test_without_a_gpu_it_says_so(capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert why_unavailable("torch", "bitsandbytes") == "torch finds no GPU"
    assert "ModuleNotFoundError" in why_unavailable("no_such_package")
    assert peer.main(["gpu", "decode"]) == 0
    assert "unavailable" in capsys.readouterr().out
