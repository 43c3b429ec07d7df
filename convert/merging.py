"""Dense Hugging Face checkpoints out of others: cast, dequantized, with LoRA merged in.

One stream serves all three: each tensor is read, dequantized if it is packed, given its
update `scaling * B @ A` in float32, rounded once to its dtype and written. Nothing but
the adapter and the tensor in hand is in memory, and a tensor that is not changed keeps
its bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from convert import bnb, names
from convert.checkpoint import FLOATS, Checkpoint, open_checkpoint
from convert.files import DTYPES
from convert.hf import (
    cast,
    check_dtype,
    config_json,
    quantize_tensor,
    write_directory,
)
from convert.output import Entry
from convert.peft import load_adapter
from qlora_jax.errors import UserError
from qlora_jax.lora_config import LoraConfig


def merge(
    base_path: str | os.PathLike[str],
    adapter_path: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    onto: Literal["original", "dequantized"] = "original",
    quantization: Literal["nf4", "nf4_dq"] | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: bool = False,
) -> dict[str, Any]:
    """Merges a LoRA adapter into its base: a dense checkpoint that needs no PEFT.

    `W + scaling * B @ A` is computed in float32 and rounded to the tensor's dtype.
    Which weights W are meant is said, never guessed:

    - "original": the 16 or 32-bit base, though the adapter may have been trained on
      its quantized form.
    - "dequantized": what the adapter was trained on, the 4-bit weights of a
      bitsandbytes directory, or those that `quantization` makes of a dense one,
      dequantized to the dtype they were quantized from.

    Args:
      base_path: the base model's directory.
      adapter_path: PEFT directory.
      output_dir: to be created; must not exist or be empty.
      onto: see above.
      quantization: "nf4" or "nf4_dq", for "dequantized" on a dense base only.
      dtype: dtype of all tensors of the result; None keeps each tensor's own.
      max_shard_bytes: size above which the weights are split over several files.
      progress: show a progress bar on stderr.

    Returns:
      A report: "base", "adapter", "output", "onto", "quantization", "base_sha256"
      (over the base's files), "tensors", "tensors_changed" and "max_abs_change"
      (against W).

    Raises:
      CheckpointError: a directory, file or tensor that is not as it should be.
      UserError: `onto` that does not fit the base, or a directory that cannot be
        written.
    """
    if onto not in ("original", "dequantized"):
        raise UserError(
            f"`onto`={onto!r} is not known; expected 'original' or 'dequantized'."
        )
    checkpoint = open_checkpoint(base_path)
    if onto == "original" and checkpoint.quantized:
        raise UserError(
            f"`{base_path}` holds 4-bit weights, so there is no original to merge "
            "onto. Give the unquantized base model, or choose onto='dequantized'."
        )
    if onto == "original" and quantization is not None:
        raise UserError(
            f"`quantization`={quantization!r} goes with onto='dequantized' only."
        )
    if onto == "dequantized" and checkpoint.quantized and quantization is not None:
        raise UserError(
            f"`{base_path}` is quantized already; leave `quantization` out, its own "
            "4-bit weights are used."
        )
    if onto == "dequantized" and not checkpoint.quantized and quantization is None:
        raise UserError(
            f"`{base_path}` is not quantized. Say with `quantization` ('nf4' or "
            "'nf4_dq') what the adapter was trained on, or choose onto='original'."
        )
    lora, adapters = load_adapter(adapter_path, checkpoint.config)
    stream = _Stream(checkpoint, dtype, quantization, lora, dict(names.walk(adapters)))
    stream.write(output_dir, max_shard_bytes=max_shard_bytes, progress=progress)
    return {
        "base": str(base_path),
        "adapter": str(adapter_path),
        "output": str(output_dir),
        "onto": onto,
        "quantization": quantization,
        "base_sha256": fingerprint(base_path),
        "tensors": stream.written,
        "tensors_changed": stream.changed,
        "max_abs_change": stream.max_abs_change,
    }


def write_dense(
    path: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: bool = False,
) -> int:
    """Writes a dense copy of a checkpoint, dequantized and cast; counts its tensors.

    Raises:
      CheckpointError: a directory, file or tensor that is not as it should be.
      UserError: a directory that cannot be written.
    """
    stream = _Stream(open_checkpoint(path), dtype)
    stream.write(output_dir, max_shard_bytes=max_shard_bytes, progress=progress)
    return stream.written


def fingerprint(path: str | os.PathLike[str]) -> str:
    """SHA-256 over the names and bytes of config.json and the weight files."""
    digest = hashlib.sha256()
    for file in sorted(Path(path).iterdir()):
        if file.name == "config.json" or file.name.endswith(
            (".safetensors", ".safetensors.index.json")
        ):
            with open(file, "rb") as opened:
                one = hashlib.file_digest(opened, "sha256").hexdigest()
            digest.update(f"{file.name} {one}\n".encode())
    return digest.hexdigest()


@dataclass
class _Stream:
    """A checkpoint on its way to a dense one, and what was counted on the way."""

    checkpoint: Checkpoint
    dtype: str | None
    quantization: str | None = None
    lora: LoraConfig | None = None
    adapters: Mapping[names.Path, NDArray[np.float32]] = field(default_factory=dict)
    written: int = 0
    changed: int = 0
    max_abs_change: float = 0.0

    def write(self, output_dir: Any, *, max_shard_bytes: int, progress: bool) -> None:
        """Writes the dense directory."""
        check_dtype(self.dtype)
        config = self.checkpoint.config
        entries = [
            self._entry(key, path, layer)
            for key, (path, layer) in names.keys(config).items()
        ]
        raw = config_json(config, entries[0].dtype.name)
        raw.pop("quantization_config", None)
        write_directory(
            output_dir,
            raw,
            entries,
            max_shard_bytes=max_shard_bytes,
            tokenizer_from=self.checkpoint.path,
            progress=progress,
        )

    def _entry(self, key: str, path: names.Path, layer: int | None) -> Entry:
        shape = names.shapes(self.checkpoint.config)[path]
        target = DTYPES[FLOATS[self.dtype or self.checkpoint.dtype(key)]]

        def read() -> NDArray:
            weight = self._weight(key, path)
            self.written += 1
            if (*path[:-1], "lora_A") in self.adapters and path[-1] == "weight":
                return self._merged(weight, key, path, layer, target)
            return cast(weight, target, key)

        return Entry(key, target, shape, read)

    def _weight(self, key: str, path: names.Path) -> NDArray:
        files = self.checkpoint.files
        if key in self.checkpoint.packed:
            return bnb.dequantize(bnb.read(files, key, self.checkpoint.packed[key]))
        weight = files.read(key)
        if self.quantization is not None and names.is_projection(path):
            packed = quantize_tensor(
                weight, key, double_quant=self.quantization == "nf4_dq"
            )
            return bnb.dequantize(packed)
        return weight

    def _merged(
        self,
        weight: NDArray,
        key: str,
        path: names.Path,
        layer: int | None,
        target: np.dtype,
    ) -> NDArray:
        assert self.lora is not None
        index = () if layer is None else layer
        a = self.adapters[*path[:-1], "lora_A"][index]
        b = self.adapters[*path[:-1], "lora_B"][index]
        total = b @ a
        total *= np.float32(self.lora.scaling)
        # Widened in passing, without a float32 copy of the weight.
        np.add(total, weight, out=total, dtype=np.float32)
        merged = cast(total, target, key)
        del total
        difference = np.subtract(merged, weight, dtype=np.float32)
        largest = float(np.abs(difference, out=difference).max())
        self.changed += largest > 0
        self.max_abs_change = max(self.max_abs_change, largest)
        return merged
