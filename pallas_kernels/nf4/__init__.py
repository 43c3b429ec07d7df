"""NF4 weights: dequantization, and the matrix product that keeps them packed.

NF4 (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314) stores a weight as the
index of the nearest of 16 fixed values, two indices a byte with the first one in the
high nibble, times the largest magnitude (`absmax`) of its block of 64 consecutive
weights. The byte layout is that of bitsandbytes, so its files need no conversion.

Layouts, for a weight of shape [O, I] (out_features, in_features) flattened row by row:
  aligned (I % 64 == 0): codes [O, I/2], absmax [O, I/64]; no block crosses rows.
  flat (any other I): codes [ceil(O*I/2)], absmax [ceil(O*I/64)]; blocks cross rows.

Under double quantization `absmax` is itself 8-bit: index into a 256-entry table, times
a scale for each 256 blocks, plus one offset for the tensor (`Nested`).

Stacked layers: with `layer`, codes, absmax and the arrays of `nested` have one more
axis in front and the weight is that layer's. A kernel reads it in place; cut out of the
stack first, it would be copied.

  api        nf4_dequantize and nf4_matmul: checks, the choice of a kernel, derivatives
  reference  the table and plain dequantization
  gpu        dequantization, and the product of a few rows
  decode     the linear layers of a decoded token, several in a kernel
  parts      what they leave for the layers after them; inner, where they do not
  wgmma      the product of tens to hundreds of rows
  shapes     problem sizes, for tests and benchmarks
"""
