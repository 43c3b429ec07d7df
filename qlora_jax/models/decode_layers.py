"""The layers of a decoded token, on the kernels of `pallas_kernels.nf4.decode`.

    variables = prepare(config, compute, variables, rows)  # before the loop over tokens
    x, kv = decode_layers(config, variables, x, kv, ...)  # for every token

A token needs few computations and many weights, so the time of a layer is that of
reading them and of starting its kernels: dozens when Flax modules are compiled one by
one, and six here. `refusal` says which models have this form; all others decode through
their modules. `decode_layers` computes what `block.Block` does, rounding less often.

What a norm and adapters need of all features of their input is left by the kernel that
writes the input, as parts of sums (`pallas_kernels.nf4.parts`), where rows are few.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.nf4.api import kernels_refusal
from qlora_jax import nf4
from qlora_jax.models.block import LayerKinds, attend_to_cache, write_tokens
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.layers import Compute, rms_norm
from qlora_jax.models.rope import rotate

if TYPE_CHECKING:
    # Mosaic is imported only where there are kernels.
    from pallas_kernels.nf4.parts import Following, Prepared

_GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Linear layers that share an input."""
_READERS = {"o": "gate_up", "gate_up": "down", "down": "qkv"}
"""Which group reads what a group writes."""
_NORMS = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}
"""The norm before a group."""
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
"""Those of queries and keys, where the family has them."""
_PLAIN_ADAPTER = {"lora_A", "lora_B", "scaling"}


def refusal(
    config: LlamaConfig, compute: Compute, variables: Mapping[str, Any], rows: int
) -> str | None:
    """Returns why a model cannot be decoded by these kernels, or None.

    Args:
      config: the architecture, without custom layers.
      compute: how it is computed.
      variables: as `Compute.arrange` returns them.
      rows: of the batch.
    """
    if compute.kernels != "pallas":
        # Nothing has measured them, so "auto" does not choose them.
        return "they are not selected."
    family = config.family
    if (
        *(family.fused, family.post_norms, family.norm_offset),
        config.hidden_act != "silu",
    ) != (False,) * 4:
        return "the layers are not those of Llama."
    if compute.dtype == "float32":
        return "they compute in 16 bits."
    if jax.sharding.get_abstract_mesh().size > 1:
        return "the model is on several devices."
    return _weights_refusal(config, compute, variables, rows)


def _weights_refusal(
    config: LlamaConfig, compute: Compute, variables: Mapping[str, Any], rows: int
) -> str | None:
    trees = {name: _layers(variables, name) for name in ("params", "lora", "stacks")}
    adapted = _flat(trees["lora"])
    if any(norm in adapted for norm in (*_NORMS.values(), *_HEAD_NORMS)):
        return "norms are trained."
    for key, names in _GROUPS.items():
        shapes = []
        for name in names:
            weight = _flat(trees["stacks"]).get(name, {}).get("weight")
            if not isinstance(weight, nf4.NF4Tensor):
                return f"`{name}` is not packed."
            if not set(_flat(trees["params"])[name]) <= {"weight", "bias"}:
                return f"`{name}` has more than a weight and a bias."
            if not set(adapted.get(name, {})) <= _PLAIN_ADAPTER:
                return f"`{name}` has an adapter that is not plain LoRA."
            # The table's values are rounded to the dtype of x: not if the weights
            # were rounded more coarsely before.
            stored, dtype = jnp.finfo(weight.dtype), jnp.finfo(compute.dtype)
            if stored.nmant < dtype.nmant:
                return f"`{name}` was stored in {weight.dtype}."
            reason = kernels_refusal(
                weight.shape, weight.block_size, weight.nested_block_size
            )
            if reason is not None:
                return reason
            shapes.append(weight.shape)
        # Mosaic is imported only where there are kernels.
        from pallas_kernels.nf4.decode_plan import plan_for

        if plan_for(shapes, rows, gated=key == "gate_up") is None:
            return f"{rows} rows with weights {shapes} are not supported."
    if adapted and (compute.lora is None or not compute.lora.uniform):
        scaled = [name for name, arrays in adapted.items() if "scaling" not in arrays]
        return f"the scaling of `{scaled[0]}` is not known." if scaled else None
    return None


def prepare(
    config: LlamaConfig, compute: Compute, variables: Mapping[str, Any], rows: int
) -> Mapping[str, Any]:
    """Returns the variables with a collection "decode", if the model has this form.

    It holds what the kernels read besides the packed stacks, in the dtype of the
    computation. Of each group of layers with one input: "b" of the adapters, and
    "bias"; the norm's weight and A of all adapters, as "follows" if the kernel before
    leaves parts of their sums, and as "inner" if not, or for the first layer.

    Args:
      config: the architecture, without custom layers.
      compute: how it is computed.
      variables: as `Compute.arrange` returns them.
      rows: of the batch.
    """
    if refusal(config, compute, variables, rows) is not None:
        return variables
    dtype = jnp.dtype(compute.dtype)
    params, lora = (_flat(_layers(variables, name)) for name in ("params", "lora"))
    stacks, groups = _flat(_layers(variables, "stacks")), {}
    for key, names in _GROUPS.items():
        group: dict[str, Any] = {"b": {}, "bias": {}}
        follows = {}
        if key in _NORMS:
            follows["norm"] = params[_NORMS[key]]["weight"].astype(dtype)
        a = []
        for name in names:
            if "bias" in params[name]:
                group["bias"][name] = params[name]["bias"].astype(dtype)
            adapter = lora.get(name, {})
            if not adapter:
                continue
            a.append(adapter["lora_A"].astype(dtype))
            scaling = adapter.get("scaling", getattr(compute.lora, "scaling", 1))
            scaling = jnp.asarray(scaling, jnp.float32).reshape(-1, 1, 1)
            # Here it costs nothing, and B is still rounded once.
            group["b"][name] = (scaling * adapter["lora_B"]).astype(dtype)
        inner = dict(follows)
        if a:
            inner["a"] = jnp.concatenate(a, axis=1)
            follows["a"] = inner["a"].swapaxes(1, 2)
        if _is_left(key, follows, stacks, rows, dtype):
            group["follows"] = follows
            # No kernel comes before the first layer.
            inner = {name: array[:1] for name, array in inner.items()}
        if key == "qkv" or "follows" not in group:
            group["inner"] = inner
        groups[key] = group
    if config.family.qk_norm:
        norms = [params[name]["weight"].astype(dtype) for name in _HEAD_NORMS]
        groups["qkv"]["head_norms"] = tuple(norms)
    return {**variables, "decode": {"model": groups}}


def _is_left(
    key: str,
    follows: Mapping[str, Array],
    stacks: Mapping[str, Any],
    rows: int,
    dtype: Any,
) -> bool:
    """Returns whether the kernel before a group leaves the parts of its sums."""
    from pallas_kernels import device
    from pallas_kernels.nf4.decode_plan import leaves_parts
    from pallas_kernels.nf4.parts import Following

    if key == "o":
        return "a" in follows  # by attention
    (before,) = (name for name, reader in _READERS.items() if reader == key)
    return leaves_parts(
        [stacks[name]["weight"].shape for name in _GROUPS[before]],
        rows,
        Following(follows.get("a"), follows.get("norm")),
        dtype,
        gated=before == "gate_up",
        multiprocessors=device.multiprocessors(),
    )


def decode_layers(
    config: LlamaConfig,
    variables: Mapping[str, Any],
    x: Float[Array, "B D"],
    kv: tuple[Float[Array, "L B K S H"], Float[Array, "L B K S H"]],
    rope: tuple[Array, Array],
    segments: tuple[Int[Array, "B 1"], Int[Array, "B S"]],
    start: Int[Array, ""],
) -> tuple[Float[Array, "B D"], tuple[Array, Array]]:
    """Computes all layers of one token of each row.

    Args:
      config: the architecture.
      variables: of `LlamaModel`, from `prepare`.
      x: the embedded tokens.
      kv: the cache.
      rope: cos and sin of `LayerKinds.rope_tables`.
      segments: ids of the tokens, and of the cache including them.
      start: slots of the cache in use before the tokens.

    Returns:
      The residual stream, and the cache with the tokens' keys and values.
    """
    from pallas_kernels.attention import decode as cached
    from pallas_kernels.nf4 import decode, inner
    from pallas_kernels.nf4.parts import Following, Prepared, prepared_reference

    groups, stacks = variables["decode"], _flat(variables["stacks"]["layers"])
    kinds = LayerKinds.of(config)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads

    def following(key: str) -> Following | None:
        # Queries, keys and values that follow are those of the next layer.
        left, ahead = groups[key].get("follows"), int(key == "qkv")
        if left is None:
            return None
        return Following(left.get("a"), left.get("norm"), ahead)

    def linear(
        key: str, x: Array, prepared: Prepared | None, layer: Array, **named: Any
    ) -> tuple[Array, Prepared | None]:
        """Computes a group of layers: of x, or of what the kernel before has left."""
        group, updates, offset, eps = groups[key], [], 0, None
        if prepared is None:
            norm, a = (group["inner"].get(name) for name in ("norm", "a"))
            norm = None if norm is None else inner.Norm(norm, config.rms_norm_eps)
            x, sums = inner.inner(x, layer, norm=norm, a=a)
            prepared = Prepared(x, None if sums is None else sums[None])
        elif "norm" in group.get("follows", {}):
            eps = config.rms_norm_eps
        weights = [stacks[name]["weight"] for name in _GROUPS[key]]
        for name in _GROUPS[key]:
            b = group["b"].get(name)
            updates.append(None if b is None else decode.Update(b, offset))
            offset += 0 if b is None else b.shape[2]
        return decode.products(
            prepared.x,
            [decode.Packed(w.codes, w.absmax, w.nested(), layer) for w in weights],
            shapes=[w.shape for w in weights],
            updates=updates,
            parts=prepared.parts,
            biases=[group["bias"].get(name) for name in _GROUPS[key]],
            eps=eps,
            following=following(_READERS[key]) if key in _READERS else None,
            **named,
        )

    def attention(
        qkv: Array, rope: tuple[Array, Array], kv: Any, layer: Array, window: Any
    ) -> tuple[Prepared, tuple[Array, Array]]:
        variant, slots = kinds.variant, kv[0].shape[3]
        sizes = (heads, kv_heads, config.head_dim, slots)
        to_o, norms = following("o"), groups["qkv"].get("head_norms")
        if cached.refusal(*sizes, variant.softcap) is None:
            limit = variant.window(window, slots)
            token = cached.Token(
                layer,
                start.reshape(1),
                segments[1],
                None if limit is None else limit.reshape(1),
            )
            angles = (rope[0][:, 0, 0], rope[1][:, 0, 0])
            scale = variant.scale_of(config.head_dim)
            named: dict[str, Any] = {"scale": scale, "following": to_o}
            if norms is not None:
                q_norm, k_norm = norms
                eps = config.rms_norm_eps
                named["norms"] = cached.HeadNorms(q_norm, k_norm, eps)
            return cached.attend(qkv, angles, kv, token, **named)
        index = layer[0]
        parts = qkv.reshape(qkv.shape[0], 1, -1, config.head_dim)
        q, k, v = jnp.split(parts, [heads, heads + kv_heads], axis=2)
        if norms is not None:
            eps = config.rms_norm_eps
            q, k = (
                rms_norm(x, weight[index], eps)
                for x, weight in zip((q, k), norms, strict=True)
            )
        q, k = rotate(q, rope), rotate(k, rope)
        kv = write_tokens(kv, (k, v), index, start)
        places = (segments[1], start, index)
        out = attend_to_cache(q, kv, segments[0], places, variant, window)
        out = out.reshape(qkv.shape[0], -1)
        if to_o is None:
            return Prepared(out, None), kv
        return prepared_reference(out, layer, to_o), kv

    # Traced once for all layers but the first.
    @jax.jit
    def one_layer(
        x: Array,
        prepared: Prepared | None,
        kv: tuple[Array, Array],
        layer: Array,
        window: Array | None,
        rope: tuple[Array, Array],
    ) -> tuple[Array, Prepared | None, tuple[Array, Array]]:
        qkv, _ = linear("qkv", x, prepared, layer)
        with jax.named_scope("attention"):
            out, kv = attention(qkv, rope, kv, layer, window)
        onto = {"residual": x, "multiplier": config.residual_multiplier}
        x, to_mlp = linear("o", x, out, layer, **onto)
        h, to_down = linear("gate_up", x, to_mlp, layer, gated=True)
        onto["residual"] = x
        return *linear("down", h, to_down, layer, **onto), kv

    windows, tables = kinds.index()
    prepared = None
    # Not a loop: its counter would be a kernel for every layer.
    with jax.named_scope("layers"):
        for n in range(config.num_hidden_layers):
            window = None if windows is None else windows[n]
            rope_of_layer = (
                rope if tables is None else tuple(a[tables[n]] for a in rope)
            )
            layer = jnp.array([n], jnp.int32)
            x, prepared, kv = one_layer(x, prepared, kv, layer, window, rope_of_layer)
    return x, kv


def _layers(variables: Mapping[str, Any], collection: str) -> Mapping[str, Any]:
    """Returns the stacked layers of a collection; empty if it has none."""
    return variables.get(collection, {}).get("model", {}).get("layers", {})


def _flat(layers: Mapping[str, Any]) -> dict[str, Any]:
    """Returns modules by their path: "self_attn.q_proj", or "input_layernorm"."""
    flat = {}
    for name, node in layers.items():
        if name in ("self_attn", "mlp"):
            flat |= {f"{name}.{inner}": value for inner, value in node.items()}
        else:
            flat[name] = node
    return flat
