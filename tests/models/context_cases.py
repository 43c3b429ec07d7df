"""Trains on one device and on meshes of virtual devices, in a process of its own.

    python -m tests.models.context_cases OUT.json [CASE ...]

JAX counts its devices once, so this cannot be a part of the tests' process.
"""

import dataclasses
import functools
import json
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from qlora_jax.data.encoding import IGNORE
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models import layers, sharding
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.planning.hlo import collectives, parse
from qlora_jax.training.step import eval_step, init_state, train_step
from tests.models import reference

LENGTH = 48
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


CASES = {
    "context": Case({"context": 2}),
    "four": Case({"context": 4}, packed=True),
    "eight": Case({"context": 8}),
    "data": Case({"data": 2, "context": 2}, packed=True),
    "fsdp": Case({"fsdp": 2, "context": 2}),
    "all": Case({"data": 2, "fsdp": 2, "context": 2}, packed=True),
    "axes of one": Case({"data": 1, "fsdp": 1, "context": 4}),
    "padded rows": Case({"context": 4}, length=45, lora={"lora_dropout": 0.3}),
    "padded packed rows": Case({"context": 4}, length=45, packed=True, noise=5.0),
    "window": Case({"context": 4}, model=MISTRAL),
    "gemma2": Case({"data": 2, "context": 2}, model=GEMMA, packed=True),
    "dropout": Case({"fsdp": 2, "context": 2}, lora={"lora_dropout": 0.3}),
    "dropout in chunks": Case(
        {"context": 2},
        lora={"lora_dropout": 0.3},
        compute={"remat": "full"},
        mlp_tokens=10,
    ),
    "dropout of rows": Case({"data": 4}, lora={"lora_dropout": 0.3}, mlp_tokens=10),
    "noise": Case({"data": 2, "context": 2}, noise=5.0, packed=True),
    "micro-batches": Case(
        {"fsdp": 2, "context": 2}, lora={"lora_dropout": 0.3}, micro_batches=2
    ),
    "remat none": Case({"context": 4}, compute={"remat": "none"}),
    "save_matmuls": Case({"context": 4}, compute={"remat": "save_matmuls"}),
    "save_attention": Case({"context": 4}, compute={"remat": "save_attention"}),
    "offload": Case({"context": 4}, compute={"remat": "offload"}, mlp_tokens=16),
    "unrolled": Case({"context": 4}, compute={"scan_layers": False}),
    "dora": Case({"fsdp": 2, "context": 2}, lora={"use_dora": True}),
    "embeddings": Case(
        {"fsdp": 2, "context": 2},
        lora={"modules_to_save": ("embed_tokens", "lm_head")},
    ),
    "token rows": Case(
        {"context": 4}, lora={"trainable_token_indices": (3, 7)}, packed=True
    ),
    "joined": Case({"context": 4}, compute={"lora_products": "joined"}),
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


def run(case: Case, mesh: Mesh | None) -> dict[str, Any]:
    """Takes some steps; returns losses, norms and the trained tree."""
    config = dataclasses.replace(reference.CONFIG, **case.model)
    lora = dataclasses.replace(LORA, **case.lora)
    model = Llama(config, Compute(**{"dtype": "float32", **case.compute}, lora=lora))
    optimizer = optax.sgd(0.05)
    state = init_state(
        reference.adapters(lora, config), optimizer, jax.random.key(0)
    )
    arguments = (state, reference.base(config, packed=True), batch_of(case))
    step = functools.partial(
        train_step, model=model, optimizer=optimizer, neftune_noise_alpha=case.noise
    )
    evaluate = functools.partial(eval_step, model=model)
    if mesh is not None:
        placed = sharding.shard_step(arguments, mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)
        arguments = jax.device_put(arguments, shardings)
        step, evaluate = (_under(mesh, f) for f in (step, evaluate))
    state, base, batch = arguments
    jitted = jax.jit(step)
    program = jitted.lower(*arguments).compile()
    losses, norms = [], []
    for _ in range(STEPS):
        state, metrics = program(state, base, batch)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    total, _ = jax.jit(evaluate)(
        state.adapters, base, jax.tree.map(lambda a: a[0], batch)
    )
    return {
        "losses": losses,
        "norms": norms,
        "eval": float(total),
        "adapters": {
            jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(state.adapters)
        },
        "text": program.as_text(),
    }


def _under(mesh: Mesh, function: Any) -> Any:
    def traced(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return traced


def mesh_of(shape: dict[str, int]) -> Mesh:
    """Returns a mesh of the first devices."""
    size = int(np.prod(list(shape.values())))
    return Mesh(np.array(jax.devices()[:size]).reshape(*shape.values()), tuple(shape))


def compare(case: Case) -> dict[str, Any]:
    """Returns the largest relative differences, and the collectives of the mesh."""
    alone, divided = run(case, None), run(case, mesh_of(case.mesh))

    def worst(name: str) -> float:
        one, other = (np.asarray(r[name]) for r in (alone, divided))
        return float(np.max(np.abs(other / one - 1)))

    start = reference.adapters(
        dataclasses.replace(LORA, **case.lora),
        dataclasses.replace(reference.CONFIG, **case.model),
    )
    begun = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(start)
    }
    moved = {}
    for path, leaf in alone["adapters"].items():
        size = np.linalg.norm((leaf - begun[path]).ravel())
        moved[path] = float(
            np.linalg.norm((divided["adapters"][path] - leaf).ravel()) / size
        )
    return {
        **{name: worst(name) for name in ("losses", "norms", "eval")},
        "adapters": max(moved.values()),
        "collectives": collectives(parse(divided["text"])),
        "text": divided["text"],
        "loss": alone["losses"],
    }


def main() -> None:
    """Writes the results of the named cases, or of all, as JSON."""
    out, names = sys.argv[1], sys.argv[2:] or list(CASES)
    # What a small model has is not small here.
    setattr(sharding, "_SMALL_BYTES", 0)
    results = {}
    for name in names:
        case = CASES[name]
        tokens = case.mlp_tokens
        limits = dict.fromkeys(("full", "offload"), tokens) if tokens else {}
        before, layers._MLP_TOKENS = layers._MLP_TOKENS, limits  # noqa: SLF001
        results[name] = compare(case)
        layers._MLP_TOKENS = before
        shown = {k: v for k, v in results[name].items() if k != "text"}
        print(name, shown, flush=True)
    with open(out, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main()
