"""Hugging Face checkpoints out of others: cast, dequantized, with an adapter merged in.

One stream serves all: each tensor is read, dequantized if it is packed, given what the
adapter does to it in float32 (`convert.merged`), rounded once to its dtype and
written. Nothing but the adapter and the tensor in hand is in memory, and a tensor that
is not changed keeps its bytes.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from convert import bnb, names
from convert.checkpoint import FLOATS, Checkpoint, lazy_base, open_checkpoint
from convert.files import DTYPES, carried, read_json
from convert.hf import (
    cast,
    check_dtype,
    config_json,
    quantize_tensor,
    write_directory,
)
from convert.merged import Folded, fold
from convert.output import (
    Entry,
    check_new_directory,
    progress_bar,
    write_json,
    write_text,
)
from convert.peft import CONFIG, WEIGHTS, load_adapter
from qlora_jax.choices import Quantized
from qlora_jax.errors import UserError
from qlora_jax.models import params as model_params
from qlora_jax.version import __version__

REPORT = "merge_report.json"
_TOKENIZER = "tokenizer_config.json"


def merge(
    base_path: str | os.PathLike[str],
    adapter_path: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    onto: Literal["original", "dequantized"] = "original",
    quantization: Quantized | None = None,
    requantize: Quantized | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: bool = False,
) -> dict[str, Any]:
    """Merges an adapter into its base: a checkpoint that needs no PEFT.

    Everything an adapter can hold is merged: LoRA and DoRA with their ranks and
    scalings layer by layer, biases, modules trained whole, embeddings, single rows. It
    is computed in float32 and rounded to the tensor's dtype. Where the base has no
    place for it, the result gets one, and its config.json says so: biases
    (`attention_bias`, `mlp_bias`; zero where nothing was trained), and a head of its
    own where embedding and head of a tied model come apart. A chat template beside the
    adapter (chat_template.jinja) takes the place of the base's.

    Which weights the adapter is added to is said, never guessed:

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
      requantize: quantize the merged weights again, all projections of all layers, and
        write a bitsandbytes-4bit directory. This loses precision, and the report says
        how much.
      dtype: dtype of all dense tensors of the result, and of what is quantized; None
        keeps each tensor's own.
      max_shard_bytes: size above which the weights are split over several files.
      progress: show a progress bar on stderr.

    Returns:
      A report, which is also written into the directory as merge_report.json: "base",
      "base_sha256" (over the base's files), "adapter", "adapter_sha256",
      "adapter_base_fingerprint" (of the base it was trained on, as it was loaded for
      that; null if the adapter does not say), "output", "onto", "quantization",
      "requantize", "dtype", "tensors", "tensors_changed", "tensors_added" (which the
      base has not), "config_changes" (field -> [before, after]), "max_abs_change"
      (against the weights merged onto), "requantization_error" (null, or projection ->
      {"max_abs", "relative"}, the latter as a ratio of Frobenius norms) and
      "qlora_jax_version".

    Raises:
      CheckpointError: a directory, file or tensor that is not as it should be.
      UserError: `onto` that does not fit the base, a trained bias that has no place in
        a Llama, or a directory that cannot be written.
    """
    checkpoint = open_checkpoint(base_path)
    _check_choice(checkpoint, onto, quantization, requantize)
    check_dtype(dtype)
    output = Path(output_dir)
    check_new_directory(output)
    lora, adapters = load_adapter(
        adapter_path, lazy_base(checkpoint.config, checkpoint.files)
    )
    folded = fold(checkpoint.config, lora, adapters)
    stream = _Stream(checkpoint, folded, dtype, quantization, requantize)
    report: dict[str, Any] = {}
    # Tokenizers take this file before what tokenizer_config.json has.
    texts = carried(Path(adapter_path))

    def finish(directory: Path) -> None:
        for name, text in texts.items():
            write_text(directory / name, text)
        changes = _config_changes(checkpoint, folded)
        changes.update(_lengthen(directory / _TOKENIZER, checkpoint, folded))
        report.update(
            {
                "base": str(base_path),
                "base_sha256": fingerprint(base_path),
                "adapter": str(adapter_path),
                "adapter_sha256": _sha256(
                    Path(adapter_path) / name for name in (CONFIG, WEIGHTS)
                ),
                "adapter_base_fingerprint": lora.base_fingerprint,
                "output": str(output_dir),
                "onto": onto,
                "quantization": quantization,
                "requantize": requantize,
                "dtype": dtype,
                "tensors": stream.written,
                "tensors_changed": stream.changed,
                "tensors_added": len(folded.sources),
                "config_changes": changes,
                "max_abs_change": stream.max_abs_change,
                "requantization_error": stream.errors(),
                "qlora_jax_version": __version__,
            }
        )
        write_json(directory / REPORT, report, sort_keys=False)

    stream.write(
        output, max_shard_bytes=max_shard_bytes, progress=progress, finish=finish
    )
    return report


def _check_choice(
    checkpoint: Checkpoint, onto: Any, quantization: Any, requantize: Any
) -> None:
    """Refuses weights to merge onto that are not there, or not said."""
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
            f"`{base_path}` is not quantized. Say with `quantization` ('nf4' or "
            "'nf4_dq') what the adapter was trained on, or choose 'original' (`onto`, "
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
    """Writes a dense copy of a checkpoint, dequantized and cast; counts its tensors.

    Raises:
      CheckpointError: a directory, file or tensor that is not as it should be.
      UserError: a directory that cannot be written.
    """
    check_dtype(dtype)
    checkpoint = open_checkpoint(path)
    stream = _Stream(checkpoint, Folded(checkpoint.config, {}, {}), dtype)
    stream.write(Path(output_dir), max_shard_bytes=max_shard_bytes, progress=progress)
    return stream.written


def fingerprint(path: str | os.PathLike[str]) -> str:
    """SHA-256 over the names and bytes of config.json and the weight files."""
    return _sha256(
        file
        for file in sorted(Path(path).iterdir())
        if file.name == "config.json"
        or file.name.endswith((".safetensors", ".safetensors.index.json"))
    )


def _sha256(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            one = hashlib.file_digest(opened, "sha256").hexdigest()
        digest.update(f"{file.name} {one}\n".encode())
    return digest.hexdigest()


def add_to_report(directory: str | os.PathLike[str], report: dict[str, Any]) -> None:
    """Replaces the report in a merged directory, which has one at every moment.

    Raises:
      UserError: it cannot be written.
    """
    place = Path(directory) / REPORT
    temporary = place.with_name(f".{REPORT}.new")
    try:
        write_json(temporary, report, sort_keys=False)
        os.replace(temporary, place)
    except OSError as error:
        raise UserError(
            f"Cannot write `{place}`: {error.strerror or error}."
        ) from error
    finally:  # a signal as well
        temporary.unlink(missing_ok=True)


def _config_changes(checkpoint: Checkpoint, folded: Folded) -> dict[str, list[Any]]:
    before, after = checkpoint.config.to_hf(), folded.config.to_hf()
    fields = ("tie_word_embeddings", "attention_bias", "mlp_bias")
    fields += ("max_position_embeddings", "rope_scaling", "rope_parameters")
    pairs = {name: [c.get(name) for c in (before, after)] for name in fields}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _lengthen(
    file: Path, checkpoint: Checkpoint, folded: Folded
) -> dict[str, list[Any]]:
    """Gives a copied tokenizer the merged model's context where it had the base's.

    Whoever truncates to `model_max_length` would not see the longer context.
    """
    before, after = (
        config.max_position_embeddings for config in (checkpoint.config, folded.config)
    )
    if before == after or not file.is_file():
        return {}
    tokenizer = read_json(file)
    if tokenizer.get("model_max_length") != before:
        return {}
    write_json(file, {**tokenizer, "model_max_length": after}, sort_keys=False)
    return {"model_max_length": [before, after]}


class _Spool:
    """Tensors in a nameless file beside the output, until their turn comes."""

    def __init__(self, output: Path):
        self._output = output
        self._file: IO[bytes] | None = None

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def keep(self, entry: Entry) -> Entry:
        """Writes a tensor down; returns one that reads it again."""
        try:
            if self._file is None:
                parent = self._output.absolute().parent
                parent.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=parent)
            start = self._file.seek(0, os.SEEK_END)
            data = np.ascontiguousarray(entry.read()).reshape(-1).view(np.uint8)
            self._file.write(memoryview(data))
        except OSError as error:
            raise UserError(
                f"Cannot write beside `{self._output}`: {error.strerror or error}. "
                "Nothing was left behind."
            ) from error
        return replace(entry, read=lambda: self._take(entry, start))

    def _take(self, entry: Entry, start: int) -> NDArray:
        assert self._file is not None
        self._file.seek(start)
        data = np.frombuffer(self._file.read(entry.nbytes), entry.dtype)
        return data.reshape(entry.shape)


@dataclass
class _Error:
    """What quantizing some weights lost, summed up."""

    max_abs: float = 0.0
    square: float = 0.0
    of_square: float = 0.0

    def add(self, weight: NDArray, quantized: NDArray) -> None:
        """Adds one weight, in slices that bound the scratch."""
        one, two = weight.reshape(-1), quantized.reshape(-1)
        for start in range(0, one.size, 1 << 20):
            wide = one[start : start + (1 << 20)].astype(np.float32)
            gap = wide - two[start : start + (1 << 20)].astype(np.float32)
            self.max_abs = max(self.max_abs, float(np.abs(gap).max()))
            self.square += float(np.vdot(gap, gap))
            self.of_square += float(np.vdot(wide, wide))

    def to_json(self) -> dict[str, float]:
        """The largest error, and the ratio of Frobenius norms."""
        relative = math.sqrt(self.square / self.of_square) if self.of_square else 0.0
        return {"max_abs": self.max_abs, "relative": relative}


@dataclass
class _Stream:
    """A checkpoint on its way to another, and what was counted on the way."""

    checkpoint: Checkpoint
    folded: Folded
    dtype: str | None
    quantization: str | None = None
    requantize: str | None = None
    written: int = 0
    changed: int = 0
    max_abs_change: float = 0.0
    _errors: dict[str, _Error] = field(default_factory=dict)

    def write(self, output: Path, *, progress: bool, **options: Any) -> None:
        """Writes the directory; `options` as `write_directory`."""
        table = names.keys(self.folded.config)
        raw = config_json(self.folded.config, self._dtype(next(iter(table))).name)
        raw.pop("quantization_config", None)
        with _Spool(output) as spool:
            packed: dict[str, list[Entry]] = {}
            if self.requantize is not None:
                packed = self._quantize(table, spool, progress)
                own = self.checkpoint.config.quantization_config or {}
                raw["quantization_config"] = bnb.new_quantization_config(
                    compute_dtype=own.get(
                        "bnb_4bit_compute_dtype", self._dtype(next(iter(packed))).name
                    ),
                    quant_storage="uint8",
                    double_quant=self.requantize == "nf4_dq",
                )
            entries = [
                entry
                for key, (path, _) in table.items()
                for entry in packed.get(key) or [self._entry(key, path)]
            ]
            write_directory(
                output,
                raw,
                entries,
                tokenizer_from=self.checkpoint.path,
                progress=progress,
                **options,
            )

    def errors(self) -> dict[str, dict[str, float]] | None:
        """What quantizing lost, by projection."""
        if self.requantize is None:
            return None
        return {name: error.to_json() for name, error in self._errors.items()}

    def _quantize(
        self, table: dict[str, Any], spool: _Spool, progress: bool
    ) -> dict[str, list[Entry]]:
        """Merges and quantizes the projections, into a file beside the output.

        How long the texts that describe them are is known only then, and a file says
        at its beginning how long everything in it is.
        """
        out: dict[str, list[Entry]] = {}
        keys = [
            key for key, (path, _) in table.items() if model_params.is_projection(path)
        ]
        shapes = model_params.shapes(self.folded.config)
        sizes = {key: math.prod(shapes[table[key][0]]) for key in keys}
        with progress_bar("Quantizing", sum(sizes.values()), progress) as advance:
            for key in keys:
                path = table[key][0]
                weight = self._tensor(key, path)
                packed = quantize_tensor(
                    weight, key, double_quant=self.requantize == "nf4_dq"
                )
                error = self._errors.setdefault(path[-2], _Error())
                error.add(weight, bnb.dequantize(packed))
                out[key] = [
                    spool.keep(entry)
                    for entry in bnb.entries(key, packed, None, quant_storage="uint8")
                ]
                advance(sizes[key])
        return out

    def _entry(self, key: str, path: names.Path) -> Entry:
        shape = model_params.shapes(self.folded.config)[path]
        return Entry(key, self._dtype(key), shape, lambda: self._tensor(key, path))

    def _dtype(self, key: str) -> np.dtype:
        """The dtype of a tensor of the result, of a packed one before quantization."""
        if self.dtype is not None:
            return DTYPES[FLOATS[self.dtype]]
        if key in self.folded.sources:
            # A bias is of its weight's dtype.
            source = self.folded.sources[key] or f"{key.removesuffix('.bias')}.weight"
            key = source
        return DTYPES[FLOATS[self.checkpoint.dtype(key)]]

    def _tensor(self, key: str, path: names.Path) -> NDArray:
        """One tensor of the result."""
        dtype, update = self._dtype(key), self.folded.updates.get(key)
        source = self.folded.sources.get(key, key)
        if source is None:
            tensor = np.zeros(model_params.shapes(self.folded.config)[path], dtype)
        else:
            tensor = self._read(source, path)
        self.written += 1
        if update is None:
            return cast(tensor, dtype, key)
        merged, largest = update.apply(tensor, dtype, key)
        self.changed += largest > 0
        self.max_abs_change = max(self.max_abs_change, largest)
        return merged

    def _read(self, key: str, path: names.Path) -> NDArray:
        files = self.checkpoint.files
        if key in self.checkpoint.packed:
            return bnb.dequantize(bnb.read(files, key, self.checkpoint.packed[key]))
        weight = files.read(key)
        if self.quantization is not None and model_params.is_projection(path):
            packed = quantize_tensor(
                weight, key, double_quant=self.quantization == "nf4_dq"
            )
            return bnb.dequantize(packed)
        return weight
