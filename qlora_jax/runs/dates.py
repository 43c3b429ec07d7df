"""The date that a run's chat templates write, which it keeps from its first start."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from qlora_jax.data import with_date
from qlora_jax.errors import UserError
from qlora_jax.runs.config import RunConfig
from qlora_jax.runs.toml import SETTINGS, read_table


def with_saved_date(config: RunConfig) -> RunConfig:
    """Returns the settings of a run that continues, with the date of its first start.

    The tokens of a run must not change from one day to the next.
    """
    path = Path(config.output_dir)
    if config.data.date is not None or not (path / SETTINGS).is_file():
        return config
    date = read_table(path).get("data", {}).get("date")
    data = dataclasses.replace(config.data, date=date)
    return dataclasses.replace(config, data=data)


def with_run_date(config: RunConfig, tokenizer: Any) -> RunConfig:
    """Returns the settings of a run with the date that its chat templates write."""
    date = with_date(config.data, tokenizer).date
    if date is None and config.eval.path:
        with contextlib.suppress(UserError):  # raised when they are read
            held_out = config.eval.data_config(config.data)
            date = with_date(held_out, tokenizer).date
    data = dataclasses.replace(config.data, date=date)
    return dataclasses.replace(config, data=data)
