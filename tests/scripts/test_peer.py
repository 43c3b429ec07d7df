"""The peer's programs on a CPU: sizes and flow, not speed."""

import json
import math

import pytest

from scripts import peer

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
    call = peer.prepare(request | {"copies": 2, "double_quant": True}, "cpu")
    assert tuple(call(0).shape) == shape
    assert not (call(0) == call(1)).all() and (call(0) == call(2)).all()


def test_generation_makes_the_tokens_it_counts():
    options = "--context 20 --tokens 3 --repeats 1 --batch 2".split()
    args = peer.parse_args(["gpu", "decode", *SMALL, *options])
    result = peer.decode(args, "cpu")
    prefill, total = (min(times[1:]) for times in result["seconds"])
    # By definition. On a busy machine three tokens take less time than noise, so the
    # sign of the difference proves nothing.
    assert result["tokens_per_s"] == 2 * 3 / (total - prefill)
    assert prefill > 0 and "bitsandbytes" in result["versions"]


def test_without_a_gpu_it_says_so(capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert peer.why_unavailable("torch", "bitsandbytes") == "torch finds no GPU"
    assert "ModuleNotFoundError" in peer.why_unavailable("no_such_package")
    assert peer.main(["gpu", "decode"]) == 0
    assert "unavailable" in capsys.readouterr().out
