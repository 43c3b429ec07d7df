"""The yardstick's own code on a CPU: sizes and flow, not speed."""

import runpy
from types import SimpleNamespace

import pytest

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def peer(repository) -> SimpleNamespace:
    """The names of peer_gpu.py."""
    path = repository / "scripts/peer_gpu.py"
    return SimpleNamespace(**runpy.run_path(str(path), run_name="peer_gpu"))


@pytest.mark.parametrize(
    "kind, want",
    [("dequantize", (64, 128)), ("matmul", (3, 64)), ("backward", (3, 128))],
)
def test_the_calls_compute_what_they_stand_for(peer, kind, want):
    request = {"kind": kind, "shape": [64, 128], "rows": 3}
    call = peer.prepare(request | {"copies": 2, "double_quant": True}, "cpu")
    assert tuple(call(0).shape) == want
    assert not (call(0) == call(1)).all() and (call(0) == call(2)).all()


def test_generation_makes_the_tokens_it_counts(peer):
    words = "decode --hidden 128 --ffn 192 --layers 2 --heads 4 --kv-heads 2"
    words += " --vocab 64 --context 20 --tokens 3 --repeats 1 --batch 2"
    found = peer.decode(peer.parser().parse_args(words.split()), "cpu")
    assert found["tokens_per_s"] > 0 and "bitsandbytes" in found["versions"]


def test_without_a_gpu_it_is_said(peer, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert peer.absent("torch", "bitsandbytes") == "torch finds no GPU"
    assert "ModuleNotFoundError" in peer.absent("no_such_package")
    assert peer.main(["decode"]) == 0
    assert "unavailable" in capsys.readouterr().out
