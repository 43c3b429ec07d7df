"""NF4 problem sizes, shared by the tests and the benchmarks.

Weights are [O, I] (out_features, in_features) as in checkpoints. `MODELS` are models
that people fine-tune, from their published `config.json`; `ODD` are shapes that a
kernel must compute or refuse; the `*_ROWS` are numbers of rows of `x`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


class Projection(NamedTuple):
    """A linear layer that occurs once in each layer of a model."""

    name: str
    """Its Hugging Face name."""
    shape: tuple[int, int]
    """(O, I)."""
    layers: int
    """Layers of the model, each with one."""


@dataclass(frozen=True)
class Model:
    """Sizes of a Llama, by the names of its `config.json`."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int = 128256
    tie_word_embeddings: bool = False

    @property
    def hf_config(self) -> dict[str, Any]:
        """The `config.json`, without the scaling of the rotary embedding."""
        sizes = {k: v for k, v in asdict(self).items() if k != "name"}
        context = {"max_position_embeddings": 131072, "rope_theta": 500000.0}
        return {"model_type": "llama", **sizes, **context}

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The seven linear layers that are quantized, in the order they are used."""
        query_width = self.num_attention_heads * self.head_dim
        key_width = self.num_key_value_heads * self.head_dim
        shapes = {
            "q_proj": (query_width, self.hidden_size),
            "k_proj": (key_width, self.hidden_size),
            "v_proj": (key_width, self.hidden_size),
            "o_proj": (self.hidden_size, query_width),
            "gate_proj": (self.intermediate_size, self.hidden_size),
            "up_proj": (self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }
        return tuple(
            Projection(name, shape, self.num_hidden_layers)
            for name, shape in shapes.items()
        )

    @property
    def quantized_weights(self) -> int:
        """Weights in all projections of all layers."""
        return sum(p.shape[0] * p.shape[1] * p.layers for p in self.projections)


MODELS = {
    "1b": Model(
        "Llama 3.2 1B",
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    "3b": Model(
        "Llama 3.2 3B",
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "8b": Model(
        "Llama 3.1 8B",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "70b": Model(
        "Llama 3.1 70B",
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
    ),
}

ODD = {
    "one weight": (1, 1),
    "one block": (1, 64),
    "one row": (1, 4096),
    "one column of blocks, odd rows": (7, 64),
    "odd rows of a real width": (2047, 4096),
    "not a multiple of a tile either way": (129, 192),
    "an odd number of blocks a row": (1000, 1088),
    "half a block more, rows cross blocks": (64, 96),
    "odd width, a nibble left over": (3, 65),
    "less than a block": (5, 7),
    "Llama 2's MLP": (11008, 4096),
    "Llama 2's MLP, back": (4096, 11008),
}
"""What is odd -> (O, I). Those with I % 64 != 0 are stored flat."""

DECODE_ROWS = (1, 2, 4, 8, 16, 32, 64)
"""One token for each sequence of a batch."""
MIDDLE_ROWS = (128, 256, 512)
"""A short prompt."""
LARGE_ROWS = (1024, 2048, 4096, 8192)
"""A micro-batch of training (tokens)."""
ROWS = DECODE_ROWS + MIDDLE_ROWS + LARGE_ROWS


def distinct(models: tuple[str, ...]) -> dict[tuple[int, int], list[str]]:
    """Returns each shape once -> where it occurs ("8b gate_proj"), in model order."""
    uses: dict[tuple[int, int], list[str]] = {}
    for key in models:
        for projection in MODELS[key].projections:
            uses.setdefault(projection.shape, []).append(f"{key} {projection.name}")
    return uses


def packed_bytes(
    shape: tuple[int, int],
    *,
    double_quant: bool,
    block_size: int = 64,
    nested_block_size: int = 256,
) -> int:
    """Counts the bytes of a packed weight.

    Args:
      shape: (O, I).
      double_quant: whether block scales are 8-bit, and have a second level: a float32
        scale for each `nested_block_size` of them, a table of 256 and an offset.
      block_size: weights that share one scale.
      nested_block_size: block scales that share one second-level scale.
    """
    size = shape[0] * shape[1]
    blocks = -(-size // block_size)
    codes = -(-size // 2)
    if not double_quant:
        return codes + 4 * blocks
    return codes + blocks + 4 * (-(-blocks // nested_block_size) + 256 + 1)
