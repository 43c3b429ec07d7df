"""The accepted values of settings that several modules take, each list once."""

from typing import Literal

Auto = Literal["auto"]
"""Chosen from the run, the device or the model; combines with the others by `|`."""

Quantized = Literal["nf4", "nf4_dq"]
"""Packed linear layers: NF4, or NF4 with double quantization."""
Quantization = Literal[Quantized, "none"]
Dtype = Literal["bfloat16", "float16", "float32"]
Attention = Literal["auto", "eager", "xla", "cudnn", "pallas"]
Kernels = Literal["auto", "xla", "pallas"]
LoraProducts = Literal["auto", "joined", "separate"]
Fusion = Literal["auto", "fused", "separate"]
Remat = Literal["none", "full", "save_attention", "save_matmuls", "offload"]
RematOrAuto = Literal["auto", Remat]
EmbeddingMemory = Literal["device", "host"]
HeadMemory = Literal[EmbeddingMemory, "nf4"]
