"""Trains cases on one device and on eight virtual ones, in a process of its own.

    python -m tests.runs.mesh_cases MODEL ROWS FOLDER OUTPUT.json

JAX decides how many devices a CPU has when it touches the first.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
import safetensors.numpy

from qlora_jax.data.config import DataConfig
from qlora_jax.lora.config import LoraConfig
from qlora_jax.runs.config import (
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
)
from qlora_jax.runs.rows import read_evaluations, read_metrics
from qlora_jax.runs.runner import run
from qlora_jax.training.config import TrainConfig

FSDP, BOTH = {"fsdp": 8}, {"data": 2, "fsdp": 4}
# Name -> mesh, and settings by section.
CASES: dict[str, tuple[dict[str, int], dict[str, dict[str, Any]]]] = {
    "measured": ({"data": 8}, {"eval": {"examples": 8, "every": 2}}),
    "accumulated, packed, dropout, DoRA, NEFTune": (
        BOTH,
        {
            "train": {"gradient_accumulation_steps": 2, "neftune_noise_alpha": 5.0},
            "data": {"packing": True},
            "lora": {"lora_dropout": 0.2, "use_dora": True},
        },
    ),
    "trained table, 8-bit AdamW, save_matmuls, shared rows": (
        {"data": 2, "fsdp": 2, "context": 2},
        {
            "lora": {"modules_to_save": ("embed_tokens",)},
            "train": {"optimizer": "adamw_8bit"},
            "model": {"remat": "save_matmuls"},
        },
    ),
    "trained rows, pissa, adafactor, offload": (
        BOTH,
        {
            "lora": {
                "trainable_token_indices": (3, 5, 9),
                "init_lora_weights": "pissa",
            },
            "train": {"optimizer": "adafactor"},
            "model": {"remat": "offload", "quantization": "nf4"},
        },
    ),
    "lion, moving average, dense, eager, unrolled": (
        FSDP,
        {
            "train": {"optimizer": "lion", "ema_decay": 0.9, "learning_rate": 1e-3},
            "model": {
                "quantization": "none",
                "attention": "eager",
                "remat": "none",
                "scan_layers": False,
            },
        },
    ),
}
STEPS = 4


def settings(
    model_path: str, rows: str, folder: Path, mesh: MeshConfig, **sections: Any
) -> RunConfig:
    """Returns a short run on the tiny model, in rows of 8."""

    def section(kind: Any, name: str, **defaults: Any) -> Any:
        return kind(**defaults | sections.get(name, {}))

    return RunConfig(
        model=section(ModelConfig, "model", path=model_path, dtype="float32"),
        data=section(DataConfig, "data", path=rows, format="tokens", max_length=64),
        train=section(
            TrainConfig,
            "train",
            steps=STEPS,
            batch_size=8,
            learning_rate=1e-2,
            lr_scheduler="constant",
        ),
        lora=section(LoraConfig, "lora", r=4, lora_alpha=8),
        checkpoint=CheckpointConfig(every=2),
        eval=section(EvalConfig, "eval"),
        log=LogConfig(plot=False),
        mesh=mesh,
        output_dir=str(folder),
    )


def results(config: RunConfig) -> dict[str, Any]:
    """Trains; returns the losses, gradient norms and held-out losses."""
    report = run(config)
    folder = Path(config.output_dir)
    rows = read_metrics(folder)
    weights = safetensors.numpy.load_file(folder / "adapter/adapter_model.safetensors")
    return {
        "losses": [row["loss"] for row in rows],
        "norms": [row["grad_norm"] for row in rows],
        "held_out": [row["eval_loss"] for row in read_evaluations(folder)],
        "mesh": report["plan"]["mesh"],
        "bytes": report["plan"]["device_bytes"],
        "adapter": {name: array.tobytes().hex() for name, array in weights.items()},
    }


def main() -> None:
    """Trains every case, and runs that go on elsewhere than they began."""
    model, rows, folder, output = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 8)
    one = MeshConfig(data=1, fsdp=1)
    out: dict[str, Any] = {}
    for name, (mesh, sections) in CASES.items():
        pair = []
        for number, config in enumerate((one, MeshConfig(**{"fsdp": 1} | mesh))):
            place = Path(folder) / f"{name} {number}"
            pair.append(results(settings(model, rows, place, config, **sections)))
        out[name] = pair
    # Both go on from what ran elsewhere.
    name, longer = "measured", {"train": {"steps": STEPS + 2}}
    out["longer"] = [
        results(settings(model, rows, place, mesh, **CASES[name][1] | longer))
        for place, mesh in (
            (Path(folder) / f"{name} 0", MeshConfig(**BOTH)),
            (Path(folder) / f"{name} 1", one),
        )
    ]
    Path(output).write_text(json.dumps(out))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
