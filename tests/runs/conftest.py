"""Configurations of short runs on a tiny model."""

import json

import pytest

from qlora_jax.data.config import DataConfig
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models.config import LlamaConfig
from qlora_jax.runs.config import (
    CheckpointConfig,
    EvalConfig,
    HubConfig,
    LogConfig,
    ModelConfig,
    RunConfig,
)
from qlora_jax.training.config import TrainConfig


@pytest.fixture(scope="session")
def architecture(llama_dir):
    """The configuration of the model."""
    return LlamaConfig.from_hf(json.loads((llama_dir / "config.json").read_text()))


@pytest.fixture(scope="session")
def make(llama_dir, rows_file):
    """A function: directory, fields of sections to change -> a configuration."""

    def make(directory, **sections) -> RunConfig:
        def section(kind, name, **defaults):
            return kind(**defaults | sections.get(name, {}))

        path = {} if "sources" in sections.get("data", {}) else {"path": str(rows_file)}
        return RunConfig(
            model=section(ModelConfig, "model", path=str(llama_dir), dtype="float32"),
            data=section(DataConfig, "data", format="tokens", max_length=64, **path),
            train=section(
                TrainConfig,
                "train",
                steps=20,
                batch_size=2,
                learning_rate=1e-2,
                # With a constant rate, runs of any length are the same program.
                lr_scheduler="constant",
            ),
            lora=section(
                LoraConfig,
                "lora",
                r=4,
                lora_alpha=8,
                target_modules=("q_proj", "down_proj"),
            ),
            checkpoint=section(CheckpointConfig, "checkpoint", every=4),
            eval=section(EvalConfig, "eval"),
            log=section(LogConfig, "log", plot=False),
            hub=section(HubConfig, "hub"),
            output_dir=str(directory),
        )

    return make
