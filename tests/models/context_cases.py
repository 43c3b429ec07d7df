"""Trains on one device and on meshes of virtual devices, in a process of its own.

    python -m tests.models.context_cases OUT.json [CASE ...]

JAX counts its devices once, so this cannot be a part of the tests' process.
"""

import dataclasses
import json
import sys
import types
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import attention as attention_kernels
from pallas_kernels import gated, norm
from pallas_kernels.attention import api as attention_api
from pallas_kernels.attention import context
from pallas_kernels.attention.context import divided_attention
from pallas_kernels.attention.variant import PLAIN, Variant
from pallas_kernels.attention.xla import blockwise_attention, reference_attention
from pallas_kernels.gated import api as gated_api
from pallas_kernels.gated import reference as gated_formula
from pallas_kernels.norm import api as norm_api
from pallas_kernels.norm import reference as norm_formula
from qlora_jax.data.encoding import IGNORE
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models import layers, sharding
from qlora_jax.models.context import divide_tokens, join_tokens
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.training.step import eval_step, init_state, train_step
from tests.models import reference

LENGTH = 64
STEPS = 3
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
MISTRAL: dict[str, Any] = dict(
    model_type="mistral", sliding_window=9, layer_types=("sliding_attention",) * 2
)
GEMMA: dict[str, Any] = dict(
    model_type="gemma2",
    sliding_window=7,
    layer_types=("sliding_attention", "full_attention"),
    attn_logit_softcapping=5.0,
    final_logit_softcapping=9.0,
    query_pre_attn_scalar=16,
    tie_word_embeddings=True,
    hidden_act="gelu_pytorch_tanh",
)
FUSED = {"norms": "fused", "activation": "fused", "lora_products": "joined"}


class Case(NamedTuple):
    """A run, and the mesh that must repeat it."""

    mesh: dict[str, int]
    lora: dict[str, Any] = {}
    model: dict[str, Any] = {}
    compute: dict[str, Any] = {}
    length: int = LENGTH
    packed: bool = False
    micro_batches: int = 1
    noise: float | None = None
    mlp_tokens: int | None = None
    """Of a chunk of the MLP."""
    evaluates: bool = False
    kernels: int = 0
    """Tokens of each device, for kernels to compute."""


CASES = {
    "one row of each device": Case({"context": 2}),
    # A length that no width of the model has.
    "packed": Case({"context": 4}, packed=True, length=128, compute={"remat": "none"}),
    "axes of one": Case({"data": 1, "fsdp": 1, "context": 8}, model=MISTRAL),
    "windows": Case(
        {"data": 2, "context": 2}, model=GEMMA, packed=True, evaluates=True
    ),
    "dora": Case(
        {"fsdp": 2, "context": 2},
        lora={"use_dora": True, "lora_dropout": 0.3},
        micro_batches=2,
    ),
    "embeddings": Case(
        {"data": 2, "fsdp": 2, "context": 2},
        lora={"modules_to_save": ("embed_tokens", "lm_head")},
        packed=True,
    ),
    "token rows": Case(
        {"data": 2, "context": 2},
        lora={"trainable_token_indices": (3, 7)},
        compute={"remat": "save_attention", "lora_products": "joined"},
    ),
    "padding": Case(
        {"context": 4},
        evaluates=True,
        lora={"lora_dropout": 0.3},
        length=45,
        noise=5.0,
        compute={"remat": "save_matmuls"},
    ),
    "packed padding": Case(
        {"context": 4},
        model=MISTRAL,
        length=45,
        packed=True,
        noise=5.0,
        compute={"scan_layers": False},
    ),
    "chunks": Case({"context": 2}, lora={"lora_dropout": 0.3}, mlp_tokens=40),
    "chunks of rows": Case({"data": 4}, lora={"lora_dropout": 0.3}, mlp_tokens=10),
    "offload": Case(
        {"fsdp": 2, "context": 2}, compute={"remat": "offload"}, mlp_tokens=16
    ),
    # Last, for what takes the place of the kernels stays.
    "kernels": Case(
        {"data": 2, "fsdp": 2},
        packed=True,
        compute={**FUSED, "attention": "pallas"},
        kernels=LENGTH,
    ),
    "kernels of parts of rows": Case(
        {"fsdp": 2, "context": 2},
        evaluates=True,
        length=45,
        compute={**FUSED, "remat": "save_matmuls"},
        kernels=2 * 24,  # and padding
    ),
}


def batch_of(case: Case) -> dict[str, jax.Array]:
    """Returns [A, B, T]: rows of their own lengths, or of several documents."""
    rng = np.random.default_rng(0)
    shape = (case.micro_batches, 4, case.length)
    tokens = rng.integers(0, 61, shape)
    start = rng.integers(0, case.length // 2, (*shape[:2], 1))
    labels = np.where(np.arange(case.length) < start, IGNORE, tokens)
    batch = {"tokens": tokens, "labels": labels}
    if case.packed:
        starts = rng.random(shape) < 0.1
        segments = 1 + np.cumsum(starts, axis=-1)
        first = np.maximum.accumulate(
            np.where(starts, np.arange(case.length), 0), axis=-1
        )
        batch |= {"segment_ids": segments, "positions": np.arange(case.length) - first}
    return {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}


def begin(case: Case) -> tuple[Llama, Any]:
    """Returns the model, and the adapters before the first step."""
    config = dataclasses.replace(reference.CONFIG, **case.model)
    lora = dataclasses.replace(LORA, **case.lora)
    model = Llama(config, Compute(**{"dtype": "float32", **case.compute}, lora=lora))
    return model, reference.adapters(lora, config)


def run(case: Case, mesh: Mesh | None) -> dict[str, Any]:
    """Takes some steps; returns losses, norms, trained arrays and the program."""
    model, adapters = begin(case)
    optimizer = optax.sgd(0.05)
    step = partial(
        train_step, model=model, optimizer=optimizer, neftune_noise_alpha=case.noise
    )
    arguments: Any = (
        init_state(adapters, optimizer, jax.random.key(0)),
        reference.base(model.config, packed=True),
        batch_of(case),
    )
    if mesh is not None:
        shardings = jax.tree.map(
            lambda leaf: leaf.sharding, sharding.shard_step(arguments, mesh)
        )
        arguments = jax.device_put(arguments, shardings)
    state, base, batch = arguments
    results: dict[str, Any] = {"losses": [], "norms": [], "evaluated": []}
    with sharding.traced_on(mesh):
        program = jax.jit(step).lower(state, base, batch).compile()
        if case.evaluates:
            first = jax.tree.map(lambda a: a[0], batch)
            evaluate = jax.jit(partial(eval_step, model=model))
            results["evaluated"] = [float(evaluate(state.adapters, base, first)[0])]
    for _ in range(STEPS):
        state, metrics = program(state, base, batch)
        results["losses"].append(float(metrics["loss"]))
        results["norms"].append(float(metrics["grad_norm"]))
    trained = jax.tree.leaves(jax.tree.map(np.asarray, state.adapters))
    return {**results, "trained": trained, "program": program.as_text()}


def mesh_of(shape: dict[str, int]) -> Mesh:
    """Returns a mesh of the first devices."""
    size = int(np.prod(list(shape.values())))
    return Mesh(np.array(jax.devices()[:size]).reshape(*shape.values()), tuple(shape))


def put_formulas_in_place_of_kernels(tokens: int) -> set[str]:
    """Has the formulas compute what the kernels would; returns the names of the called.

    Args:
      tokens: of each device of the mesh.
    """
    called: set[str] = set()

    def module(package: Any, name: str, **functions: Any) -> None:
        stand_in = types.SimpleNamespace()
        for each, function in functions.items():

            def on_device(*arrays: Any, function=function, each=each, **options) -> Any:
                if jax.sharding.get_abstract_mesh().manual_axes:
                    called.add(f"{package.__name__}.{name}.{each}")
                    # Of attention a device has one row here, padded to a block.
                    rows = 1 if package is attention_kernels else tokens
                    assert len(arrays[0]) == rows, (name, each, arrays[0].shape)
                return function(*arrays, options.get("eps"))

            setattr(stand_in, each, on_device)
        sys.modules[f"{package.__name__}.{name}"] = stand_in  # pyright: ignore[reportArgumentType]
        setattr(package, name, stand_in)

    def attend(q, k, v, segments, window, _):
        return reference_attention(q, k, v, segments)

    def attend_backward(q, k, v, segments, out, lse, dout, window, _):
        attention = partial(reference_attention, segment_ids=segments)
        return jax.vjp(lambda *qkv: attention(*qkv)[0], q, k, v)[1](dout)

    def extend(x, factor, a, scaling, eps):
        return norm_formula.forward(x, factor, a, scaling, eps=eps)

    def extend_backward(dx_ext, z, a, inner, x, factor, dres, eps):
        return norm_formula.backward(dx_ext, z, a, x, factor, dres, eps=eps)

    module(attention_kernels, "forward", forward=attend)
    module(attention_kernels, "backward", backward=attend_backward)
    module(norm, "gpu", forward=extend, backward=extend_backward)
    module(
        gated,
        "gpu",
        forward=lambda gate_up, a, _: gated_formula.forward(gate_up, a),
        backward=lambda gate_up, dh, z, _: gated_formula.backward(gate_up, dh, z),
    )
    for api in (attention_api, norm_api, gated_api):
        api.refusal = lambda *_, **__: None
    return called


def compare(case: Case) -> dict[str, Any]:
    """Returns the largest relative differences, and the program of the mesh."""
    alone, divided = run(case, None), run(case, mesh_of(case.mesh))
    results: dict[str, Any] = {"program": divided["program"]}
    for name in ("losses", "norms", "evaluated"):
        one, other = np.asarray(alone[name]), np.asarray(divided[name])
        results[name] = float(np.max(np.abs(other / one - 1), initial=0.0))
    begun = [np.asarray(leaf) for leaf in jax.tree.leaves(begin(case)[1])]
    results["trained"] = max(
        float(np.linalg.norm((b - a).ravel()) / np.linalg.norm((a - start).ravel()))
        for a, b, start in zip(alone["trained"], divided["trained"], begun, strict=True)
    )
    return results


class Rows(NamedTuple):
    """Queries, keys and values of rows that devices share."""

    devices: int
    length: int
    variant: Variant = PLAIN
    choice: int | None = None
    packed: bool = False


ATTENTION = {
    # Chunks of several blocks, the last of them in part padding.
    "plain": Rows(4, 512),
    "window": Rows(4, 1000, Variant(windows=(37,)), packed=True),
    "cap": Rows(2, 332, Variant(softcap=3.0), packed=True),
    "no window": Rows(2, 332, Variant(scale=0.1, windows=(40, None)), choice=1),
    "longer than a chunk": Rows(4, 520, Variant(windows=(300, 90)), choice=0),
}


def attend(case: Rows) -> list[float]:
    """Returns the largest differences of output and gradients to whole rows."""
    rng = np.random.default_rng(0)

    def random(heads: int) -> jax.Array:
        shape = (2, case.length, heads, 8)
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    arrays = (random(4), random(2), random(2), random(4))
    segments = None
    if case.packed:
        ids = np.sort(rng.integers(0, 4, (2, case.length)), axis=1)
        segments = jnp.asarray(ids, jnp.int32)
    choice = None if case.choice is None else jnp.asarray(case.choice)

    def derive(attention: Any, *given: Any) -> tuple:
        q, k, v, dout, ids = given
        out, pullback = jax.vjp(
            lambda *qkv: attention(*qkv, ids, case.variant, choice), q, k, v
        )
        return out, *pullback(dout)

    whole = jax.jit(partial(derive, blockwise_attention))(*arrays, segments)

    def divided(*given: Any) -> Any:
        attention = partial(divided_attention, row_axes=("data",))
        results = derive(attention, *(divide_tokens(array) for array in given))
        return [join_tokens(array, case.length) for array in results]

    mesh = mesh_of({"data": 2, "context": case.devices})
    rows = NamedSharding(mesh, PartitionSpec("data"))
    with sharding.traced_on(mesh):
        parts = jax.jit(divided)(*jax.device_put((*arrays, segments), rows))
    return [float(jnp.abs(a - b).max()) for a, b in zip(whole, parts, strict=True)]


def main() -> None:
    """Writes the results of the named cases, or of all, as JSON."""
    out, names = sys.argv[1], sys.argv[2:] or list(CASES)
    results: dict[str, Any] = {"steps": {}, "attention": {}}
    # Blocks of a few tokens, and windows in yet smaller ones: chunks of several.
    context.block_sizes = lambda _: (16, 16)
    context.block_under = lambda window, block, _: block if window is None else 8
    for name in [*ATTENTION]:
        results["attention"][name] = attend(ATTENTION[name])
        print(name, results["attention"][name], flush=True)
    for name in names:
        case = CASES[name]
        called = set()
        if case.kernels:
            called = put_formulas_in_place_of_kernels(case.kernels)
        tokens = case.mlp_tokens
        layers._MLP_TOKENS = {"full": tokens, "offload": tokens} if tokens else {}
        results["steps"][name] = compare(case)
        results["steps"][name]["kernels"] = sorted(called)
        shown = {k: v for k, v in results["steps"][name].items() if k != "program"}
        print(name, shown, flush=True)
    with open(out, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main()
