"""Causal attention within segments, for grouped heads, in memory linear in the length.

What a query sees: keys at its own or an earlier index whose segment id equals its own.
Documents packed into a row are 1, 2, ..., padding is 0. The rows of padding see each
other, so that their results, which mean nothing, are finite.

  api     flash_attention: checks, the choice of an implementation, the derivative
  xla     plain XLA: the formula, and block by block with a running softmax
  forward, backward
          the kernels for Hopper GPUs
  decode  the kernels for one token and a cache, and slots, their inner step
  check   the kernels against the formula, on the device at hand
  reach   which blocks the kernels look at, in which order
  blocks  how those are copied, masked and multiplied
"""
