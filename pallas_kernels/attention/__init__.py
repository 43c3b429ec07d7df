"""Causal attention within segments, for grouped heads, in memory linear in the length.

What a query sees: keys at its own or an earlier index whose segment id equals its own.
Documents packed into a row are 1, 2, ..., padding is 0. The rows of padding see each
other, so that their results, which mean nothing, are finite.

  api     flash_attention: checks, the choice of an implementation, the derivative
  xla     plain XLA: the formula, and block by block with a running softmax
  gpu     the kernels for Hopper GPUs, forward and backward
  check   the kernels against the formula, on the device at hand
  blocks  which blocks the kernels look at, how those come and are masked
"""
