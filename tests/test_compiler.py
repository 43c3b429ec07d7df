"""Options of programs for a GPU, and what of the user's flags counts."""

import jax
import jax.numpy as jnp
import pytest

from qlora_jax import compiler
from qlora_jax.compiler import GPU_OPTIONS, compiler_options, device_jit, gpu_options
from qlora_jax.inference.config import Sampling
from qlora_jax.inference.decode import _generate, _Program, _start
from qlora_jax.inference.sampling import Values
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.models.params import abstract_base
from qlora_jax.planning.gpus import CARDS
from qlora_jax.planning.step import Step, lower
from qlora_jax.training.step import jit_eval
from tests.models.reference import CONFIG

TRITON = "xla_gpu_enable_triton_gemm"


@pytest.fixture(autouse=True)
def flags(monkeypatch):
    """A function that sets the user's XLA_FLAGS; none at first."""

    def set_flags(value):
        monkeypatch.setenv("XLA_FLAGS", value)
        compiler._checked.cache_clear()

    set_flags("")
    yield set_flags
    compiler._checked.cache_clear()


@pytest.fixture
def pretend_gpu(monkeypatch):
    """Programs get the options of a GPU, which the compiler of a CPU ignores."""
    monkeypatch.setattr(compiler.device, "this_device", lambda: CARDS["h200"])
    monkeypatch.setattr(type(CARDS["h200"]), "platform", "gpu", raising=False)


def test_only_a_gpu_has_options_and_this_jax_knows_them():
    assert compiler_options() == compiler_options("cpu") == {}
    options = compiler_options("gpu")
    assert options == dict(GPU_OPTIONS)
    # Unknown options are refused on every platform.
    x = jnp.ones((2, 2))
    jax.jit(lambda x: x @ x).lower(x).compile(compiler_options=options)


@pytest.mark.parametrize(
    ("given", "noted"),
    [
        (f"--{TRITON}=false", False),
        (f"--xla_foo=3 --{TRITON}=true", True),
        (f"--{TRITON}", True),
        (f"--{TRITON}=true --{TRITON}=0", False),  # the last one counts
    ],
)
def test_the_user_s_flag_is_used_and_a_contradiction_is_noted(
    given, noted, tmp_path, flags, capsys
):
    # XLA takes the name of a file as well.
    (tmp_path / "flags").write_text(f"{given}\n")
    for value in (given, str(tmp_path / "flags")):
        options, notes = gpu_options(value)
        assert set(options) == set(GPU_OPTIONS) - {TRITON}
        assert len(notes) == noted
    flags(given)
    for _ in range(2):  # said once
        assert compiler_options("gpu") == options
    assert capsys.readouterr().err.count(f"XLA_FLAGS has `--{TRITON}") == noted


def test_a_jitted_function_gets_the_options_and_may_be_part_of_another(pretend_gpu):
    seen = []

    @device_jit(static_argnames="power")
    def scaled(x, power):
        seen.append(power)
        return x**power

    x = jnp.arange(3.0)
    assert scaled(x, power=2).tolist() == [0, 1, 4]
    scaled(x + 1, power=2)
    assert seen == [2]  # compiled once
    # JAX refuses options of an inner function.
    outer = jax.jit(lambda x: scaled(x, power=3) + 1)
    assert outer(x).tolist() == [1, 2, 9]


def test_every_program_of_training_and_decoding_gets_the_options(
    pretend_gpu, monkeypatch
):
    monkeypatch.setattr(compiler, "GPU_OPTIONS", {"xla_gpu_unheard_of": True})
    step = Step(CONFIG, Compute(lora=LoraConfig(r=2)), length=8)
    base = abstract_base(CONFIG, quantization="none", dtype="float32")
    model, tokens = Llama(CONFIG, Compute()), jax.ShapeDtypeStruct((1, 8), jnp.int32)
    program = _Program.of(model, Sampling(), (2,), cache_size=32)
    values = jax.eval_shape(lambda: Values.of(Sampling()))
    held_out = {"tokens": tokens, "labels": tokens}
    arguments = (program, {"params": base}, tokens, tokens, values)
    for lowered in (
        lower(step),
        jit_eval(model).lower({}, base, held_out),
        _generate.lower(*arguments, max_new_tokens=2),
        _start.lower(*arguments),
    ):
        with pytest.raises(Exception, match="No such compile option"):
            lowered.compile()
