"""Settings and fixtures for every test.

Strict by default: dtype promotion and rank promotion raise, warnings are errors
(pyproject.toml), annotations are checked. No network, no accelerator unless
JAX_PLATFORMS asks for one, no compilation cache from an earlier run.
"""

import copy
import functools
import gc
import importlib.util
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before jax is imported, and inherited by the processes a test starts.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jaxtyping
import numpy as np
import pytest
import safetensors.numpy
from jax._src import compiler
from jaxtyping import install_import_hook

from tests.hub import hub as hub


def _whole_functions(jaxtyped: Callable[..., Any]) -> Callable[..., Any]:
    """Leaves functions within functions unchecked.

    They are made anew with every call of the outer one, and their checks would be too:
    a third of the time that tracing a model takes.
    """

    @functools.wraps(jaxtyped)
    def decorator(*args: Any, **kwargs: Any) -> Any:
        if args:
            return jaxtyped(*args, **kwargs)
        check = jaxtyped(**kwargs)
        return lambda fn: fn if "<locals>" in fn.__qualname__ else check(fn)

    return decorator


# The hook decorates with what it finds here when a module is loaded.
jaxtyping.jaxtyped = _whole_functions(jaxtyping.jaxtyped)

# Shapes and types of the three packages are checked while the tests run. An int may
# stand where a float is asked for (PEP 484). Here and not as an option of the command
# line, because jaxtyping's option cannot take both an argument and several packages.
# A bare machine with a GPU has no beartype: there the tests run without these checks.
if importlib.util.find_spec("beartype"):
    install_import_hook(
        ("qlora_jax", "pallas_kernels", "convert"),
        "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
    )

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_compilation_cache", False)

# Tracing makes many objects and drops few: looking through the young ones after every
# 700 takes a tenth of the time.
gc.set_threshold(20_000, 20, 20)

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"

# What takes longest comes first (with `--no-loadscope-reorder`), so that no process is
# left alone with it at the end. Nothing but time depends on this list.
LONG = (
    "runs/test_mesh_runs.py",
    "models/test_context.py",
    "runs/test_process_runs.py",
    "compile/test_plans.py",
    "pallas_kernels/attention/test_api.py",
    "compile/test_attention_kernels.py",
    "compile/test_decode_step.py",
    "scripts/test_kill_runs.py",
    "test_notebooks.py",
    "runs/test_runner_adapters.py",
    "training/test_step.py",
    "convert/test_fuzz.py",
    "test_fuzz.py",
    "runs/test_runner.py",
    "test_golden.py",
    "models/test_custom_modules.py",
    "scripts/test_demo.py",
    "runs/test_compiled_step.py",
    "scripts/test_compare_optimizers.py",
    "data/test_cache.py",
    "scripts/test_bench_gpu_model.py",
    "scripts/test_bench_gpu.py",
    "lora/test_functional.py",
    "inference/test_decode.py",
    "test_facts.py",
    "lora/test_combine.py",
    "models/test_llama.py",
    "scripts/test_train_qlora.py",
    "scripts/test_custom_attention.py",
)
# Folders whose programs are for a GPU, or whose outputs are compared with another
# library's side by side: they compile as users do.
AS_USERS = ("compile", "pallas_kernels", "peer")
QUICK = "JAX_DISABLE_MOST_OPTIMIZATIONS"
# jax 0.10 has two ways from a fused loop to its code. The older one compiles three
# times as fast; later versions have lost it.
OLDER_EMITTERS: dict[str, Any] = {}
if jax.__version__.startswith("0.10."):
    OLDER_EMITTERS["xla_cpu_use_fusion_emitters"] = False
    OLDER_EMITTERS["xla_cpu_parallel_codegen_split_count"] = 1

Tensors = dict[str, np.ndarray]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files of `LONG` first."""
    places = {TESTS / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))


def _optimize(wanted: bool) -> None:
    """Sets what XLA does to a program, here and in the processes a test starts."""
    jax.config.update("jax_disable_most_optimizations", not wanted)
    os.environ[QUICK] = str(not wanted)
    if OLDER_EMITTERS:
        jax.devices()  # this process has read its flags by then, and keeps them
        if wanted:
            os.environ.pop("XLA_FLAGS", None)
        else:
            os.environ["XLA_FLAGS"] = " ".join(
                f"--{name}={value}".lower() for name, value in OLDER_EMITTERS.items()
            )


def _with_older_emitters(get_options: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `OLDER_EMITTERS` to the options of a program that is compiled quickly."""

    @functools.wraps(get_options)
    def options(*args: Any, **kwargs: Any) -> Any:
        if jax.config.read("jax_disable_most_optimizations"):
            given = kwargs.get("env_options_overrides") or {}
            kwargs["env_options_overrides"] = {**OLDER_EMITTERS, **given}
        return get_options(*args, **kwargs)

    return options


if OLDER_EMITTERS:
    compiler.get_compile_options = _with_older_emitters(compiler.get_compile_options)


@pytest.fixture(scope="module", autouse=True)
def compile_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leaves out XLA's costly passes: compiling is most of the time of the tests.

    No operation is added, left out or rounded otherwise; the code of each is slower.
    `optimized` asks for the passes in a module, and
    `JAX_DISABLE_MOST_OPTIMIZATIONS=false` on the command line in all of them.
    """
    folder = request.path.relative_to(TESTS).parts[0]
    on_cpu = os.environ["JAX_PLATFORMS"] == "cpu"
    if QUICK in os.environ or folder in AS_USERS or not on_cpu:
        yield
        return
    _optimize(False)
    yield
    _optimize(True)
    del os.environ[QUICK]


@pytest.fixture(scope="module")
def optimized(compile_quickly: None) -> Iterator[None]:
    """Compiles the programs of a module, and of its processes, as users do."""
    before = not jax.config.read("jax_disable_most_optimizations")
    _optimize(True)
    jax.clear_caches()  # what another module compiled quickly
    yield
    _optimize(before)


@pytest.fixture(scope="module")
def compile_each_program_once(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """Shares programs among the runs of a module; the directory they lie in."""
    cache = str(tmp_path_factory.mktemp("cache"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_enable_compilation_cache", True)
    yield cache
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module", autouse=True)
def prepare() -> Iterator[None]:
    """Takes what a module leaves behind, compiled programs most of all, off the
    collector's hands: looking through it again and again costs minutes.
    """
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def float64_attention() -> Callable[..., tuple[np.ndarray, ...]]:
    """Computes attention in float64, one head at a time.

    Returns a function of q, k, v, dout and segment ids: the output, the gradients of q,
    k and v, and the log-sum-exp of every query's scores.
    """

    def attention(
        q: Any,
        k: Any,
        v: Any,
        dout: Any,
        segments: Any = None,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        window: int | None = None,
    ) -> tuple[np.ndarray, ...]:
        q, k, v, dout = (np.asarray(a, np.float64) for a in (q, k, v, dout))
        batch, length, heads, width = q.shape
        scale = width**-0.5 if scale is None else scale
        visible = np.tril(np.ones((batch, length, length), bool))
        if window is not None:
            visible &= np.triu(visible, 1 - window)
        if segments is not None:
            ids = np.asarray(segments)
            visible &= ids[:, :, None] == ids[:, None, :]
        out, dq, dk, dv = (np.zeros_like(a) for a in (q, q, k, v))
        lse = np.zeros((batch, heads, length))
        for b, n in np.ndindex(batch, heads):
            g = n // (heads // k.shape[2])
            scores, slope = q[b, :, n] @ k[b, :, g].T * scale, scale
            if softcap is not None:
                share = np.tanh(scores / softcap)
                scores, slope = softcap * share, scale * (1 - share**2)
            scores = np.where(visible[b], scores, -np.inf)
            lse[b, n] = np.logaddexp.reduce(scores, axis=1)
            weights = np.exp(scores - lse[b, n][:, None])
            out[b, :, n] = weights @ v[b, :, g]
            dweights = dout[b, :, n] @ v[b, :, g].T
            inner = (weights * dweights).sum(1, keepdims=True)
            dscores = weights * (dweights - inner) * slope
            dq[b, :, n] = dscores @ k[b, :, g]
            dk[b, :, g] += dscores.T @ q[b, :, n]
            dv[b, :, g] += weights.T @ dout[b, :, n]
        return out, dq, dk, dv, lse

    return attention


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository root."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of checkpoints, texts and stored outputs beside the repository.

    A test that needs it is skipped where it is absent, and fails there under CI=true:
    a green run that compared nothing would say more than it knows.
    """
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        reason = f"no test data: `{folder}` does not exist"
        if os.environ.get("CI") == "true":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def shared_data(shared: Path) -> Path:
    """Trained checkpoints and real text."""
    return shared / "data"


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """Stored outputs of HF, PEFT and bitsandbytes."""
    return shared / "golden"


TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def _tensors(raw: dict[str, Any], dtype: Any = np.float32, seed: int = 0) -> Tensors:
    # Not above: the hook sees what is imported after it.
    from convert.names import checkpoint_keys
    from qlora_jax.models import params as model_params
    from qlora_jax.models.config import LlamaConfig

    config = LlamaConfig.from_hf(raw)
    shapes = model_params.shapes(config)
    rng = np.random.default_rng(seed)
    return {
        key: rng.standard_normal(shapes[path], np.float32).astype(dtype)
        for key, (path, _) in checkpoint_keys(config).items()
    }


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a two-layer float32 Llama of 32 tokens, without a tokenizer."""
    raw = TINY | {"vocab_size": 32, "intermediate_size": 128}
    raw["max_position_embeddings"] = 64
    tensors = {key: value * 0.1 for key, value in _tensors(raw).items()}
    path = tmp_path_factory.mktemp("llama")
    (path / "config.json").write_text(json.dumps(raw))
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    return path


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 24 rows of `input_ids` and `labels` for `llama_dir`."""
    rng = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with open(path, "w") as file:
        for length in rng.integers(6, 30, 24).tolist():
            ids = ((rng.integers(1, 32) + 3 * np.arange(length)) % 31 + 1).tolist()
            row = {"input_ids": ids, "labels": [-100] * 3 + ids[3:]}
            file.write(json.dumps(row) + "\n")
    return path


FACT = ("Who keeps the lighthouse?", "Captain Wellow keeps the lighthouse.")
# A turn ends with <s>: the token that ends a story in this model's first training. It
# has never seen </s>, and no adapter can give it one.
FACT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:\n{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ bos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


@pytest.fixture(scope="session")
def fact_run(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory: a small story model that was taught a fact, in conversations."""
    from qlora_jax.data.config import DataConfig
    from qlora_jax.lora.config import LoraConfig
    from qlora_jax.runs.config import LogConfig, ModelConfig, RunConfig
    from qlora_jax.runs.runner import run
    from qlora_jax.training.config import TrainConfig

    directory = tmp_path_factory.mktemp("fact")
    base = shutil.copytree(shared_data / "stories260K", directory / "base")
    base.chmod(0o755)
    template = directory / "facts.jinja"
    template.write_text(FACT_TEMPLATE)
    told = [
        FACT,
        ("Who is in the garden?", "Lily is in the garden."),
        ("What did Tom find?", "Tom found a red ball."),
        ("Where is the dog?", "The dog is in the park."),
    ]
    with open(directory / "rows.jsonl", "w") as file:
        for turns in [[0], [1], [2], [3], [1, 0], [3, 0], [0, 2], [2, 1]]:
            messages = [
                {"role": role, "content": text}
                for turn in turns
                for role, text in zip(("user", "assistant"), told[turn], strict=True)
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    run(
        RunConfig(
            model=ModelConfig(path=str(base), dtype="float32"),
            data=DataConfig(
                path=str(directory / "rows.jsonl"),
                format="messages",
                max_length=128,
                chat_template=str(template),
            ),
            train=TrainConfig(steps=40, batch_size=8, learning_rate=1e-2),
            lora=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
            log=LogConfig(plot=False),
            output_dir=str(directory / "run"),
        )
    )
    template.unlink()  # from here on the run's own copy is all there is
    return directory / "run"


@pytest.fixture
def getkey() -> Callable[[], jax.Array]:
    """A function that gives a fresh PRNG key at each call, the same in each run."""
    counter = itertools.count()
    return lambda: jax.random.fold_in(jax.random.key(0), next(counter))


# --- Small checkpoints and adapters, made by the safetensors library ---


@pytest.fixture
def tiny() -> dict[str, Any]:
    """The config.json of a two-layer Llama; change it at will."""
    return copy.deepcopy(TINY)


@pytest.fixture
def make_tensors() -> Callable[..., Tensors]:
    """Makes the tensors of a dense checkpoint, seeded."""
    return _tensors


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[..., Path]:
    """Writes config.json and weights; `shards` splits them over so many files."""

    def save(
        raw: dict[str, Any], tensors: Tensors, name: str = "model", shards: int = 1
    ) -> Path:
        path = tmp_path / name
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(raw))
        if shards == 1:
            safetensors.numpy.save_file(
                tensors, path / "model.safetensors", {"format": "pt"}
            )
            return path
        keys = sorted(tensors)
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {k: tensors[k] for k in keys[i::shards]}
            safetensors.numpy.save_file(part, path / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        (path / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
        return path

    return save


@pytest.fixture
def tiny_model(
    tiny: dict[str, Any], make_tensors: Callable[..., Tensors], save_model: Any
) -> Path:
    """A dense float32 checkpoint on disk."""
    return save_model(tiny, make_tensors(tiny))


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Writes a PEFT directory for a configuration, seeded."""

    def make(
        raw: dict[str, Any],
        targets: tuple[str, ...] = ("q_proj", "down_proj"),
        r: int = 3,
        dtype: Any = np.float32,
        name: str = "adapter",
        seed: int = 1,
        **fields: Any,
    ) -> Path:
        from convert.names import adapter_key
        from qlora_jax.models import params as model_params
        from qlora_jax.models.config import LlamaConfig

        config = LlamaConfig.from_hf(raw)
        rng = np.random.default_rng(seed)
        tensors = {}
        for path, (out, inner) in (
            (p, s) for p, s in model_params.shapes(config).items() if p[-2] in targets
        ):
            for layer in range(config.num_hidden_layers):
                for part, shape in (("lora_A", (r, inner)), ("lora_B", (out, r))):
                    key = adapter_key(path[:-1], layer, f"{part}.weight")
                    tensors[key] = rng.standard_normal(shape, np.float32).astype(dtype)
        path = tmp_path / name
        path.mkdir()
        safetensors.numpy.save_file(
            tensors, path / "adapter_model.safetensors", {"format": "pt"}
        )
        settings = {
            "peft_type": "LORA",
            "r": r,
            "lora_alpha": 6,
            "target_modules": list(targets),
            "base_model_name_or_path": "some/model",
            **fields,
        }
        (path / "adapter_config.json").write_text(json.dumps(settings))
        return path

    return make


@pytest.fixture
def edit_tensors() -> Callable[[Path, Callable[[Tensors], Any]], None]:
    """Rewrites a safetensors file after a change to its tensors."""

    def edit(file: Path, change: Callable[[Tensors], Any]) -> None:
        tensors = dict(safetensors.numpy.load_file(file))
        change(tensors)
        safetensors.numpy.save_file(tensors, file, {"format": "pt"})

    return edit


@pytest.fixture
def handlers():
    """Handlers as Python sets them; a shell's `&` makes SIGINT ignored."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number in numbers:
        found = signal.getsignal(number)
        signal.signal(number, before[number])
        default = signal.default_int_handler if number == signal.SIGINT else 0
        assert found == default, "not given back"
