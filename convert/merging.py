"""Converts checkpoints: casts, dequantizes, merges an adapter, requantizes.

All of it is one stream: each tensor is read, dequantized if it is packed, updated in
float32 (`convert.merged_weights`), rounded once to its dtype and written. Memory holds
the adapter and one tensor; an unchanged tensor keeps its bytes.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from convert import bnb
from convert.atomic import check_new_directory, new_directory, write_json
from convert.checkpoint import Checkpoint, lazy_base, open_checkpoint
from convert.companions import Companions, companion_files
from convert.files import DTYPES, FLOAT_DTYPES, read_json
from convert.hf import cast, check_dtype, config_json, quantize_tensor
from convert.merged_weights import MergedWeights, compute_merged_weights
from convert.names import checkpoint_keys
from convert.output import Entry, progress_bar, write_files, write_model_files
from convert.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, other_base_name
from convert.peft_reading import load_adapter
from convert.peft_tables import with_saved_tables
from convert.tokenizer import merged_text_files, merged_text_notes
from qlora_jax.choices import Quantized
from qlora_jax.errors import UserError
from qlora_jax.models import params as model_params
from qlora_jax.nf4 import BLOCK_SIZE, NF4Tensor
from qlora_jax.reading import open_file
from qlora_jax.tree import HEAD, hf_key
from qlora_jax.tree import Path as TreePath
from qlora_jax.version import __version__

MERGE_REPORT = "merge_report.json"

# What `checkpoint_keys` returns.
_Table = Mapping[str, tuple[TreePath, int | None]]


def merge(
    base_path: str | os.PathLike[str],
    adapter_path: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    onto: Literal["original", "dequantized"] = "original",
    quantization: Quantized | None = None,
    quantize_lm_head: bool = False,
    requantize: Quantized | None = None,
    dtype: str | None = None,
    resize_to_adapter: bool = False,
    strict: bool = True,
    max_shard_bytes: int = 5_000_000_000,
    progress: bool = False,
) -> dict[str, Any]:
    """Merges an adapter into its base: a checkpoint that needs no PEFT.

    Everything an adapter can hold is merged: LoRA and DoRA with their ranks and
    scalings layer by layer, biases, fully trained modules, embeddings, single rows. It
    is computed in float32 and rounded to the tensor's dtype. The result and its
    config.json gain what the base lacks: biases (`attention_bias`, `mlp_bias`; zero
    where nothing was trained), and a separate head where embedding and head of a tied
    model become different. The tokenizer of an adapter that has one, or its chat
    template, replaces the base's, and what ends its answers is added to
    generation_config.json.

    You choose the weights that the adapter is added to:

    - "original": the 16 or 32-bit base, although the adapter may have been trained on
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
      quantize_lm_head: whether `quantization` is that of the output head too.
      requantize: quantize the merged weights again, all projections of all layers, and
        write a bitsandbytes-4bit directory. The report states the loss of precision.
      dtype: dtype of all dense tensors of the result, and of what is quantized; None
        keeps each tensor's own.
      resize_to_adapter: let the vocabulary grow to that of the adapter.
      strict: raise for an adapter that does not fit exactly; otherwise what is left out
        is among the "notes" of the report.
      max_shard_bytes: size above which the weights are split over several files.
      progress: show a progress bar on stderr.

    Returns:
      A report, which is also written into the directory as merge_report.json: "base",
      "base_sha256" (over the base's files), "adapter", "adapter_sha256",
      "adapter_base_fingerprint" (of the base as it was loaded for training; null if
      the adapter has none), "merged_before" ("adapter_sha256" of the adapters that the
      base is a merge of), "output", "onto", "quantization", "quantize_lm_head",
      "requantize", "dtype", "tensors", "tensors_changed", "tensors_added" (which the
      base lacks), "config_changes" (field -> [before, after]), "files_of_adapter"
      (tokenizer files that are not the base's), "notes" (on what was left out, or is in
      no file), "max_abs_change" (against the weights merged onto, in
      rows that the base has),
      "requantization_error" (null, or projection -> {"max_abs", "relative"}, the latter
      as a ratio of Frobenius norms) and "qlora_jax_version".

    Raises:
      CheckpointError: a damaged or incomplete directory, file or tensor.
      UserError: `onto` that does not suit the base, a base that holds this adapter
        already, a trained bias that a Llama checkpoint cannot have, or a directory that
        cannot be written.
    """
    # Settings, names and shapes are checked before the first byte is written.
    checkpoint = open_checkpoint(base_path)
    _check_choice(checkpoint, onto, quantization, requantize)
    if quantize_lm_head and quantization is None:
        raise UserError("`quantize_lm_head` goes with `quantization` only.")
    check_dtype(dtype)
    output = Path(output_dir)
    check_new_directory(output)
    base = with_saved_tables(
        checkpoint.config,
        lazy_base(checkpoint.config, checkpoint.files),
        adapter_path,
        resize=resize_to_adapter,
    )
    skipped: list[str] = []
    lora, adapters = load_adapter(
        adapter_path, base.base, strict=strict, skipped=skipped
    )
    skipped += other_base_name(lora, Path(adapter_path), checkpoint.path)
    check_not_merged(base_path, adapter_path)
    merged = compute_merged_weights(base.config, lora, adapters)
    tables = {hf_key((*path, "weight")): w for path, w in base.tables.items()}
    stream = _Stream(
        checkpoint,
        merged,
        dtype,
        quantization,
        requantize,
        tables,
        quantize_lm_head=quantize_lm_head,
    )
    files = merged_text_files(base.config, checkpoint.path, Path(adapter_path))
    skipped += merged_text_notes(merged.config, Path(adapter_path))
    with new_directory(output) as new:
        stream.write(new, max_shard_bytes=max_shard_bytes, progress=progress)
        write_files(new, files)
        changes = _config_changes(checkpoint, merged)
        changes.update(_lengthen_tokenizer(new, checkpoint, merged))
        if not stream.changed:
            skipped.append(
                "no tensor changed: the weights of the result are the base's"
            )
        report = {
            "base": str(base_path),
            "base_sha256": fingerprint(base_path),
            "adapter": str(adapter_path),
            "adapter_sha256": _adapter_sha256(adapter_path),
            "adapter_base_fingerprint": lora.base_fingerprint,
            "merged_before": _merged_into(base_path),
            "output": str(output_dir),
            "onto": onto,
            "quantization": quantization,
            "quantize_lm_head": quantize_lm_head,
            "requantize": requantize,
            "dtype": dtype,
            "tensors": stream.written,
            "tensors_changed": stream.changed,
            "tensors_added": len(merged.sources),
            "config_changes": changes,
            "files_of_adapter": _changed_files(files, companion_files(checkpoint.path)),
            "notes": [*checkpoint.notes, *base.notes, *skipped],
            "max_abs_change": stream.max_abs_change,
            "requantization_error": stream.errors(),
            "qlora_jax_version": __version__,
        }
        write_json(new / MERGE_REPORT, report, sort_keys=False)
    return report


def check_not_merged(
    base: str | os.PathLike[str], adapter: str | os.PathLike[str]
) -> None:
    """Raises `UserError` if a base is the result of merging this adapter."""
    merged = _merged_into(base)
    if merged and _adapter_sha256(adapter) in merged:
        raise UserError(
            f"`{base}` holds the adapter `{adapter}` already ({MERGE_REPORT}), which "
            "would be added twice. Use it without the adapter, or give the base that "
            f"it was merged into: `{read_json(Path(base) / MERGE_REPORT).get('base')}`."
        )


def _merged_into(base: str | os.PathLike[str]) -> list[str]:
    """Returns `adapter_sha256` of the adapters that were merged into a base."""
    file = Path(base) / MERGE_REPORT
    if not file.is_file():
        return []
    report = read_json(file)
    before = report.get("merged_before")
    merged = [
        report.get("adapter_sha256"),
        *(before if isinstance(before, list) else []),
    ]
    return [digest for digest in merged if isinstance(digest, str)]


def _check_choice(
    checkpoint: Checkpoint, onto: Any, quantization: Any, requantize: Any
) -> None:
    """Raises if the weights to merge onto do not exist, or are ambiguous."""
    base_path = checkpoint.path
    if onto not in ("original", "dequantized"):
        raise UserError(
            f"`onto` {onto!r} is not known; expected 'original' or 'dequantized'."
        )
    for name, value in (("quantization", quantization), ("requantize", requantize)):
        if value not in (*get_args(Quantized), None):
            raise UserError(
                f"`{name}`={value!r} is not known; expected 'nf4', 'nf4_dq' or None."
            )
    if onto == "original" and checkpoint.quantized:
        raise UserError(
            f"`{base_path}` holds 4-bit weights, so there is no original to merge "
            "onto. Give the unquantized base model, or choose 'dequantized' (`onto`, "
            "--onto)."
        )
    if onto == "original" and quantization is not None:
        raise UserError(
            f"`quantization` {quantization!r} goes with 'dequantized' (`onto`, --onto) "
            "only. `requantize` quantizes what was merged."
        )
    if onto == "dequantized" and checkpoint.quantized and quantization is not None:
        raise UserError(
            f"`{base_path}` is quantized already; leave `quantization` out, its own "
            "4-bit weights are used."
        )
    if onto == "dequantized" and not checkpoint.quantized and quantization is None:
        raise UserError(
            f"`{base_path}` is not quantized. Give the `quantization` ('nf4' or "
            "'nf4_dq') that the adapter was trained on, or choose 'original' (`onto`, "
            "--onto)."
        )


def write_dense(
    path: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: bool = False,
) -> int:
    """Writes a dense copy of a checkpoint, dequantized and cast.

    Returns:
      The number of its tensors.

    Raises:
      CheckpointError: a damaged or incomplete directory, file or tensor.
      UserError: a directory that cannot be written.
    """
    check_dtype(dtype)
    checkpoint = open_checkpoint(path)
    stream = _Stream(checkpoint, MergedWeights(checkpoint.config, {}, {}), dtype)
    with new_directory(Path(output_dir)) as new:
        stream.write(new, max_shard_bytes=max_shard_bytes, progress=progress)
        write_files(new, companion_files(checkpoint.path))
    return stream.written


def fingerprint(path: str | os.PathLike[str]) -> str:
    """Returns a SHA-256 over the names and bytes of config.json and weight files."""
    return _sha256(
        file
        for file in sorted(Path(path).iterdir())
        if file.name == "config.json"
        or file.name.endswith((".safetensors", ".safetensors.index.json"))
    )


def _adapter_sha256(path: str | os.PathLike[str]) -> str:
    return _sha256(Path(path) / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))


def _sha256(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with open_file(file) as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
        # A hash of names and hashes: neither a renamed file nor another border between
        # two files gives the same one.
        digest.update(f"{file.name} {content}\n".encode())
    return digest.hexdigest()


def add_to_report(directory: str | os.PathLike[str], report: dict[str, Any]) -> None:
    """Replaces the report in a merged directory.

    Raises:
      UserError: it cannot be written.
    """
    write_json(Path(directory) / MERGE_REPORT, report, sort_keys=False)


def _config_changes(
    checkpoint: Checkpoint, merged: MergedWeights
) -> dict[str, list[Any]]:
    configs = checkpoint.config, merged.config
    fields = ("vocab_size", "tie_word_embeddings", "attention_bias", "mlp_bias")
    fields += ("attention_out_bias", "max_position_embeddings")
    pairs = {name: [getattr(c, name) for c in configs] for name in fields}
    # In the form of the file, which has one of them.
    raw = [config.to_hf() for config in configs]
    for name in ("rope_scaling", "rope_parameters"):
        pairs[name] = [fields.get(name) for fields in raw]
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _changed_files(files: Companions, before: Companions) -> list[str]:
    """Returns the names of files that differ from those before."""
    names = files.keys() | before.keys()
    return sorted(name for name in names if files.get(name) != before.get(name))


def _lengthen_tokenizer(
    directory: Path, checkpoint: Checkpoint, merged: MergedWeights
) -> dict[str, list[Any]]:
    """Sets the copied tokenizer's limit to the merged model's context length.

    Only where it was the base's: callers that truncate to `model_max_length` would
    never use the longer context.
    """
    file = directory / "tokenizer_config.json"
    before, after = (
        config.max_position_embeddings for config in (checkpoint.config, merged.config)
    )
    if before == after or not file.is_file():
        return {}
    tokenizer = read_json(file)
    if tokenizer.get("model_max_length") != before:
        return {}
    write_json(file, {**tokenizer, "model_max_length": after}, sort_keys=False)
    return {"model_max_length": [before, after]}


def _largest_difference(a: NDArray, b: NDArray) -> float:
    """Returns the largest difference of two tables in the rows that both have."""
    largest, rows = 0.0, min(len(a), len(b))
    for start in range(0, rows, 4096):  # bounds the scratch memory
        block = slice(start, min(start + 4096, rows))
        difference = np.subtract(a[block], b[block], dtype=np.float32)
        largest = max(largest, float(np.abs(difference).max(initial=0.0)))
    return largest


class _Spool:
    """Keeps tensors in a nameless file on the output's disk until they are written."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._file: IO[bytes] | None = None

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def keep(self, entry: Entry) -> Entry:
        """Writes a tensor to the file; returns an entry that reads it from there."""
        if self._file is None:
            # In the output's directory, because /tmp may be held in memory. A nameless
            # file needs no cleaning up, whatever ends the process.
            self._file = tempfile.TemporaryFile(dir=self._directory)
        start = self._file.seek(0, os.SEEK_END)
        data = np.ascontiguousarray(entry.read()).reshape(-1).view(np.uint8)
        self._file.write(memoryview(data))
        return replace(entry, read=lambda: self._read(entry, start))

    def _read(self, entry: Entry, start: int) -> NDArray:
        assert self._file is not None
        # From here, where `keep` left the position at the end.
        self._file.seek(start)
        data = np.frombuffer(self._file.read(entry.nbytes), entry.dtype)
        return data.reshape(entry.shape)


@dataclass
class _QuantizationError:
    """Accumulates the error of quantizing some weights."""

    max_abs: float = 0.0
    error_square: float = 0.0
    weight_square: float = 0.0

    def add(self, weight: NDArray, quantized: NDArray) -> None:
        """Adds one weight, in slices that bound the scratch memory."""
        exact, rounded = weight.reshape(-1), quantized.reshape(-1)
        for start in range(0, exact.size, 1 << 20):
            wide = exact[start : start + (1 << 20)].astype(np.float32)
            # The sums over slices are Python floats (float64), so that the sizes of
            # tensors do not limit their precision.
            error = wide - rounded[start : start + (1 << 20)].astype(np.float32)
            self.max_abs = max(self.max_abs, float(np.abs(error).max()))
            self.error_square += float(np.vdot(error, error))
            self.weight_square += float(np.vdot(wide, wide))

    def to_json(self) -> dict[str, float]:
        """Returns the largest error, and the ratio of Frobenius norms."""
        relative = 0.0
        if self.weight_square:
            relative = math.sqrt(self.error_square / self.weight_square)
        return {"max_abs": self.max_abs, "relative": relative}


@dataclass
class _Stream:
    """Converts one checkpoint into another, tensor by tensor, and counts changes."""

    checkpoint: Checkpoint
    merged: MergedWeights
    dtype: str | None
    quantization: str | None = None
    requantize: str | None = None
    tables: Mapping[str, NDArray] = field(default_factory=dict)
    """Key -> weight that the adapter's file has for the base."""
    quantize_lm_head: bool = False
    """Whether `quantization` is that of the output head too."""
    written: int = 0
    changed: int = 0
    max_abs_change: float = 0.0
    _errors: dict[str, _QuantizationError] = field(default_factory=dict)

    def write(self, directory: Path, *, max_shard_bytes: int, progress: bool) -> None:
        """Writes config.json and weights into a directory."""
        table = checkpoint_keys(self.merged.config)
        raw = config_json(self.merged.config, self._dtype(next(iter(table))).name)
        with _Spool(directory) as spool:
            packed: dict[str, list[Entry]] = {}
            if self.requantize is not None:
                packed = self._quantize(table, spool, progress)
                original = self.checkpoint.config.quantization_config or {}
                raw["quantization_config"] = bnb.new_quantization_config(
                    compute_dtype=original.get(
                        "bnb_4bit_compute_dtype", self._dtype(next(iter(packed))).name
                    ),
                    quant_storage="uint8",
                    double_quant=self.requantize == "nf4_dq",
                )
            entries = [
                entry
                for key, (path, _) in table.items()
                # Nothing is computed here: an entry computes its tensor when it is
                # written, and is then freed.
                for entry in packed.get(key) or [self._entry(key, path)]
            ]
            write_json(directory / "config.json", raw)
            write_model_files(
                directory, entries, max_shard_bytes=max_shard_bytes, progress=progress
            )

    def errors(self) -> dict[str, dict[str, float]] | None:
        """Returns the error of quantizing, by projection."""
        if self.requantize is None:
            return None
        return {name: error.to_json() for name, error in self._errors.items()}

    def _quantize(
        self, table: _Table, spool: _Spool, progress: bool
    ) -> dict[str, list[Entry]]:
        """Merges and quantizes the projections into the spool.

        A file begins with the length of everything in it, and the length of the
        quantization states is known only after quantizing.
        """
        entries: dict[str, list[Entry]] = {}
        keys = [
            key for key, (path, _) in table.items() if model_params.is_projection(path)
        ]
        double_quant = self.requantize == "nf4_dq"
        shapes = model_params.shapes(self.merged.config)
        sizes = {key: math.prod(shapes[table[key][0]]) for key in keys}
        with progress_bar("Quantizing", sum(sizes.values()), progress) as advance:
            for key in keys:
                path = table[key][0]
                error = self._errors.setdefault(path[-2], _QuantizationError())
                packed = self._unchanged(key, double_quant=double_quant)
                if packed is None:
                    weight = self._tensor(key, path)
                    packed = quantize_tensor(weight, key, double_quant=double_quant)
                    error.add(weight, bnb.dequantize(packed))
                else:
                    self.written += 1
                    weight = bnb.dequantize(packed)
                    error.add(weight, weight)
                entries[key] = [
                    spool.keep(entry)
                    for entry in bnb.entries(key, packed, None, quant_storage="uint8")
                ]
                advance(sizes[key])
        return entries

    def _unchanged(self, key: str, *, double_quant: bool) -> NF4Tensor | None:
        """Returns the packed weight of the base that the result keeps, byte for byte.

        Quantizing what it dequantizes to would give other scales.
        """
        state = self.checkpoint.packed.get(key)
        wanted = (double_quant, BLOCK_SIZE, self._dtype(key).name)
        if key in self.merged.updates or key in self.tables or state is None:
            return None
        if (state.double_quant, state.block_size, state.dtype) != wanted:
            return None
        return bnb.read(self.checkpoint.files, key, state)

    def _entry(self, key: str, path: TreePath) -> Entry:
        shape = model_params.shapes(self.merged.config)[path]
        return Entry(key, self._dtype(key), shape, lambda: self._tensor(key, path))

    def _dtype(self, key: str) -> np.dtype:
        """The dtype of a tensor of the result; of a packed one, before quantization."""
        if self.dtype is not None:
            return DTYPES[FLOAT_DTYPES[self.dtype]]
        if key in self.merged.sources:
            # A new bias gets the dtype of its weight.
            weight = f"{key.removesuffix('.bias')}.weight"
            key = self.merged.sources[key] or weight
        if key in self.tables:
            return self.tables[key].dtype
        # Of packed bytes, the dtype that they dequantize to.
        return DTYPES[FLOAT_DTYPES[self.checkpoint.dtype(key)]]

    def _tensor(self, key: str, path: TreePath) -> NDArray:
        """Computes one tensor of the result."""
        dtype, update = self._dtype(key), self.merged.updates.get(key)
        source = self.merged.sources.get(key, key)
        if source is None:
            tensor = np.zeros(model_params.shapes(self.merged.config)[path], dtype)
        else:
            tensor = self._base_tensor(source, path)
        self.written += 1
        if update is None:
            tensor, largest = cast(tensor, dtype, key), 0.0
        else:
            tensor, largest = update.apply(tensor, dtype, key)
        grown = False
        if (
            source is not None
            and source in self.tables
            and source in self.checkpoint.files
        ):
            # Against the base's own table, not that of the adapter's file.
            base = self._stored(source)
            grown = base.shape != tensor.shape
            largest = _largest_difference(base, tensor)
        self.changed += grown or largest > 0
        self.max_abs_change = max(self.max_abs_change, largest)
        return tensor

    def _base_tensor(self, key: str, path: TreePath) -> NDArray:
        """Reads a tensor of the base, in the form that is merged onto."""
        state = self.checkpoint.packed.get(key)
        if key not in self.tables and state is not None:
            return self._stored(key)
        # Copied, because `Update.apply` may overwrite it.
        weight = self.tables[key].copy() if key in self.tables else self._stored(key)
        is_packed = model_params.is_projection(path) or (
            self.quantize_lm_head and key == hf_key((*HEAD, "weight"))
        )
        # Rounds the weight as loading for training did, and merges onto the result.
        if state is not None:
            tensor = quantize_tensor(weight, key, double_quant=state.double_quant)
            return bnb.dequantize(replace(tensor, dtype=state.dtype))
        if self.quantization is not None and is_packed:
            double_quant = self.quantization == "nf4_dq"
            tensor = quantize_tensor(weight, key, double_quant=double_quant)
            if self.dtype == "float32":
                tensor = replace(tensor, dtype=self.dtype)
            return bnb.dequantize(tensor)
        return weight

    def _stored(self, key: str) -> NDArray:
        """Reads a tensor of the base; a packed one as bitsandbytes computes with it."""
        files, state = self.checkpoint.files, self.checkpoint.packed.get(key)
        if state is None:
            return files.read(key)
        # Scale times code, rounded to the dtype.
        return bnb.dequantize(bnb.read(files, key, state))
