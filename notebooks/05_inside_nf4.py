# %% [markdown]
# # Inside NF4
#
# A QLoRA base stores its weights in 4 bits. This notebook shows the parts of such a weight:
# the sixteen values, the scale of each block, the quantization error, and how double
# quantization stores the scales in 8 bits.
#
# The library computes everything on a few random weights; nothing is downloaded.
# (Dettmers et al. 2023, [QLoRA](https://arxiv.org/abs/2305.14314), section 3.)

# %%
import matplotlib.pyplot as plt
import numpy as np

import qlora_jax as qj
from pallas_kernels import NF4_CODE

plt.rcParams.update({
    "figure.figsize": (9, 3.6), "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "axes.titlelocation": "left",
    "axes.titlesize": 11, "legend.frameon": False,
})
BLUE, ORANGE, GREEN, GREY = "#2f6fab", "#d9772b", "#3a8f5d", "#8a8f98"
rng = np.random.default_rng(0)

# %% [markdown]
# ## Sixteen values, dense where weights are frequent
#
# Trained weights are close to normally distributed. NF4 places its sixteen values at
# quantiles of a normal distribution, scaled to [-1, 1]: dense near zero, where most
# weights are, and with an exact zero. Evenly spaced values would spend half of the codes
# on the few large weights.

# %%
weight = (0.02 * rng.standard_normal((1024, 1024))).astype(np.float32)
blocks = weight.reshape(-1, 64)
normed = blocks / np.abs(blocks).max(axis=1, keepdims=True)

fig, ax = plt.subplots()
ax.hist(normed.ravel(), bins=161, density=True, color=GREY, alpha=0.45,
        label="weights / largest of the block")
for i, code in enumerate(NF4_CODE):
    ax.plot([code, code], [-0.12, 1.12], color=BLUE, lw=1.6,
            label=None if i else "NF4 values")
ax.plot(np.linspace(-1, 1, 16), np.full(16, -0.06), "|", color=ORANGE, ms=11, mew=2,
        clip_on=False, label="16 even values")
ax.set(xlabel="normed weight", ylabel="density", xlim=(-1.03, 1.03), ylim=(-0.12, 1.42),
       title="NF4 values are dense where weights are frequent")
ax.legend(loc="upper right", ncols=3);

# %%
print("code  value      share of the weights")
codes = np.abs(normed.ravel()[:200_000, None] - NF4_CODE[None]).argmin(axis=1)
share = np.bincount(codes, minlength=16) / codes.size
for i, (code, part) in enumerate(zip(NF4_CODE, share)):
    print(f"{i:>4}  {code:+.6f}  {part:6.1%}  {'#' * round(250 * part)}")

# %% [markdown]
# ## From a weight to 4 bits and back
#
# `qj.quantize` divides the weights into blocks of 64. Each block stores its largest absolute
# value (`absmax`) and, for every weight, the index of the nearest value. The bytes are those
# of bitsandbytes.

# %%
tensor = qj.quantize(weight, double_quant=False)
print("codes ", tensor.codes.dtype, tensor.codes.shape, " two weights in a byte")
print("absmax", tensor.absmax.dtype, tensor.absmax.shape, " one for each block of 64")
print(f"{weight.nbytes:,} bytes in float32 -> {tensor.nbytes:,} bytes in NF4, "
      f"{8 * tensor.nbytes / weight.size:.2f} bits a weight")

back = np.asarray(qj.dequantize(tensor, "float32"))
block, copy = weight[0, :64], back[0, :64]

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8),
                                  gridspec_kw={"width_ratios": [2.1, 1]})
at = np.arange(64)
left.vlines(at, block, copy, color=ORANGE, lw=2.5, alpha=0.7, label="error")
left.plot(at, block, "o", color=GREY, ms=4.5, label="weight")
left.plot(at, copy, "_", color=BLUE, ms=8, mew=2, label="NF4")
scale = np.abs(block).max()
for code in NF4_CODE:
    left.axhline(code * scale, color=BLUE, lw=0.5, alpha=0.35)
left.grid(False)
left.set(title="One block of 64: each weight moves to the nearest line",
         xlabel="weight of the block", ylabel="value", ylim=(-1.1 * scale, 1.35 * scale))
left.legend(loc="upper right", ncols=3, fontsize=9)
line = np.linspace(-scale, scale, 2001)
nearest = NF4_CODE[np.abs(line[:, None] / scale - NF4_CODE).argmin(axis=1)] * scale
right.plot(line, line, color=GREY, lw=1, ls="--")
right.plot(line, nearest, color=BLUE, lw=1.8)
right.set(title="The same as a function", xlabel="weight", ylabel="dequantized")
fig.tight_layout();

# %% [markdown]
# ## The quantization error
#
# The error of a weight is at most half the gap between two values, times the scale of its
# block. NF4 is finer where most weights are and coarser for the few large ones. For
# comparison: sixteen evenly spaced values with the same scales.

# %%
even = np.linspace(-1, 1, 16).astype(np.float32)
scales = np.abs(blocks).max(axis=1, keepdims=True)
even_back = even[np.abs(normed[..., None] - even).argmin(axis=-1)] * scales
errors = {"NF4": (back.reshape(-1, 64) - blocks, BLUE),
          "16 even values": (even_back - blocks, ORANGE)}

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
for name, (error, colour) in errors.items():
    relative = np.sqrt((error**2).mean() / (blocks**2).mean())
    left.hist(1e3 * error.ravel(), bins=151, range=(-4, 4), density=True, color=colour,
              histtype="step", lw=1.8, label=f"{name}: {relative:.1%}")
left.set(title="Distribution of the error", xlabel="error (thousandths)", ylabel="density",
         ylim=(0, 0.42))
left.annotate("the largest of a block\nhas no error", (0.02, 0.31), (0.7, 0.27),
              fontsize=9, arrowprops={"arrowstyle": "-", "color": GREY})
left.legend(loc="upper left", fontsize=9, title="rms relative to the weights'",
            title_fontsize=9, alignment="left")
edges = np.quantile(np.abs(weight), np.linspace(0, 1, 31))
middle = (edges[1:] + edges[:-1]) / 2
for name, (error, colour) in errors.items():
    bins = np.digitize(np.abs(blocks).ravel(), edges[1:-1])
    rms = np.sqrt(np.bincount(bins, error.ravel() ** 2) / np.bincount(bins))
    right.plot(1e3 * middle, 1e3 * rms, color=colour, lw=2, label=name)
right.set(title="Error by weight", xlabel="magnitude of the weight (thousandths)",
          ylabel="rms error (thousandths)", ylim=(0, None))
right.legend()
fig.tight_layout();

# %% [markdown]
# ## Why blocks, and why 64
#
# One outlier sets the scale of its block and increases the error only there. Smaller blocks
# have smaller errors but store more scales: with 64, even a matrix with outliers has a small
# error, for half a bit a weight.

# %%
outliers = weight.copy()
rows, columns = rng.integers(0, 1024, (400, 2)).T
outliers[rows, columns] *= 12


def error_of(matrix, size):
    parts = matrix.reshape(-1, size)
    top = np.abs(parts).max(axis=1, keepdims=True)
    bounds = (NF4_CODE[1:] + NF4_CODE[:-1]) / 2
    dequantized = NF4_CODE[np.searchsorted(bounds, parts / top)] * top
    return np.sqrt(((dequantized - parts) ** 2).mean() / (parts**2).mean())


sizes = 2 ** np.arange(4, 15)
fig, ax = plt.subplots()
ax.plot(sizes, [error_of(weight, s) for s in sizes], "o-", color=BLUE, label="normal weights")
ax.plot(sizes, [error_of(outliers, s) for s in sizes], "o-", color=ORANGE,
        label="with 400 outliers in a million")
ax.axvline(64, color=GREY, ls="--", lw=1)
for size in (16, 64, 256, 1024, 4096):
    ax.annotate(f"{4 + 32 / size:.2f}\nbits", (size, 0.012), ha="center", fontsize=9,
                color=GREY)
ax.set_xscale("log", base=2)
ax.set(xlabel="weights in a block", ylabel="error / rms of the weights", ylim=(0, None),
       title="Error by block size")
ax.legend(loc="upper left", frameon=True, facecolor="white", edgecolor="none", framealpha=1);

# %% [markdown]
# ## Double quantization
#
# A float32 scale for 64 weights is half a bit a weight. Double quantization subtracts the
# mean of the scales and stores them in 8 bits, with one scale for each 256 of them: 4.50
# bits become 4.13. The error of the scales is negligible compared with that of the weights.

# %%
double = qj.quantize(weight, double_quant=True)
names = ["codes (4 bits)", "scales", "scales of scales"]
sizes = {
    "float32 scales": [tensor.codes.nbytes, tensor.absmax.nbytes, 0],
    "double\nquantization": [
        double.codes.nbytes, double.absmax.nbytes,
        double.nested_absmax.nbytes + double.nested_quant_map.nbytes + 4,
    ],
}
again = np.asarray(qj.dequantize(double, "float32")).reshape(-1, 64)
largest = np.abs(again).max(axis=1)
kept = largest > 0
ratio = largest[kept] / scales[kept, 0] - 1

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4))
bottom = np.zeros(2)
for row, name, colour in zip(np.array(list(sizes.values())).T, names, (BLUE, ORANGE, GREEN)):
    bits = 8 * row / weight.size
    left.barh(list(sizes), bits, left=bottom, color=colour, label=name, height=0.55)
    bottom += bits
for y, total in enumerate(bottom):
    left.text(total + 0.005, y, f"{total:.3f}", va="center", fontsize=10)
left.set(xlim=(3.9, 4.6), xlabel="bits a weight", title="Bits a weight (axis from 3.9)")
left.legend(loc="upper right", fontsize=9)
left.grid(axis="y", visible=False)
right.hist(100 * ratio, bins=81, color=ORANGE, alpha=0.8)
right.set(title="Relative error of the 8-bit scales", xlabel="per cent",
          ylabel="blocks")
fig.tight_layout()

for name, dequantized in (("float32 scales", back.reshape(-1, 64)), ("double quantization", again)):
    error = np.sqrt(((dequantized - blocks) ** 2).mean() / (blocks**2).mean())
    print(f"{name:<20} error {error:.4%} of the weights' rms")

# %% [markdown]
# ## The error of a product
#
# The errors of single weights are independent, so the error of a matrix product grows with
# the square root of its length, as the product does: the relative error of an output is that
# of the weights, about 9 %. QLoRA adapters are trained on top of this error in every layer.
# This is why an adapter records the base it was trained on.

# %%
x = rng.standard_normal((512, 1024)).astype(np.float32)
exact, coded = x @ weight.T, np.asarray(qj.nf4.matmul(x, double))
print(f"relative error of the outputs: {np.linalg.norm(coded - exact) / np.linalg.norm(exact):.2%}")

fig, ax = plt.subplots(figsize=(4.6, 4.2))
ax.plot(exact.ravel()[::97], coded.ravel()[::97], ".", color=BLUE, ms=2.5, alpha=0.5)
lim = 1.05 * np.abs(exact).max()
ax.plot([-lim, lim], [-lim, lim], color=GREY, lw=1, ls="--")
ax.set(xlabel="x @ W.T", ylabel="with W in NF4", title="Outputs of one layer",
       xlim=(-lim, lim), ylim=(-lim, lim), aspect="equal");
