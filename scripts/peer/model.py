"""What the peer's programs share: versions, and linears in NF4."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PROJECTIONS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
BLOCK_SIZE = 64
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def versions(*names: str) -> dict[str, str]:
    """Returns the versions of installed packages."""
    return {name: importlib.metadata.version(name) for name in names}


def why_unavailable(*names: str, on: str = "cuda") -> str | None:
    """Says which package or GPU is missing; None if nothing is."""
    try:
        for name in names:
            importlib.import_module(name)
    except Exception as error:  # a library that cannot be loaded raises what it likes
        return f"{type(error).__name__}: {error}"[:500]
    import torch

    found = on == "cpu" or torch.cuda.is_available()
    return None if found else "torch finds no GPU"


def quantize_linears(
    model: torch.nn.Module, compute_dtype: torch.dtype, device: str
) -> int:
    """Replaces the projections by double-quantized NF4 linears; returns how many."""
    import bitsandbytes as bnb
    import torch

    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name not in PROJECTIONS or not isinstance(child, torch.nn.Linear):
                continue
            linear = bnb.nn.Linear4bit(
                child.in_features,
                child.out_features,
                bias=False,
                compute_dtype=compute_dtype,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            linear.weight = bnb.nn.Params4bit(
                child.weight.data.cpu(),
                requires_grad=False,
                blocksize=BLOCK_SIZE,
                compress_statistics=True,
                quant_type="nf4",
                module=linear,
            )
            setattr(parent, name, linear.to(device))  # moving is what quantizes
            if (
                linear.weight.quant_state is None
                or not linear.weight.quant_state.nested
            ):
                raise RuntimeError(f"`{name}` was not quantized with double quant.")
            count += 1
    return count
