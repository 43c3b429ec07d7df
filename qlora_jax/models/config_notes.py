"""What a config.json says and a model does not compute.

Files have fields for other models and for other programs. A field that would change
the result of its own family is read or refused; what transformers passes over too is
named here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_jax.models.config_fields import is_number
from qlora_jax.models.families import Family, family_of
from qlora_jax.models.rope_scaling import rope_fields

# Fields that change what models of other families compute, and the values under which
# they change nothing.
_OTHER_MODELS: Mapping[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "clip_qkv": (),
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "no_rope_layers": ([],),
    "sliding_window_pattern": (1, 2),
    "use_parallel_residual": (False,),
    # How other programs quantized the weights; such weights have other tensors.
    "compression_config": (),
    "quantization": (),
}
# Probabilities of dropout in training, which nothing here applies to the base.
_DROPOUTS = ("attention_dropout", "residual_dropout", "resid_pdrop", "embd_pdrop")


def unread_fields(raw: Mapping[str, Any], vocab_size: int) -> list[str]:
    """Lists what a config.json says and its model does not compute.

    transformers passes over it too, with or without a warning.

    Args:
      raw: content of the file, as `LlamaConfig.from_hf` accepts it.
      vocab_size: of the model, which may have grown.

    Returns:
      Fields with their values, and why they are not used where that is not clear.
    """
    family = family_of(raw["model_type"])
    out = [
        f"`{name}`={raw[name]!r:.80}"
        for name, off in _OTHER_MODELS.items()
        if name not in family.fields
        and raw.get(name) is not None
        and raw[name] not in off
    ]
    out += [
        f"`{name}`={raw[name]!r:.80}"
        for name in ("attention_bias", "attention_out_bias", "mlp_bias")
        if raw.get(name) and name not in family.biases.values()
    ]
    out += [
        f"`{name}`={raw[name]!r:.80} (training drops nothing of the base; "
        "`lora_dropout` regularizes)"
        for name in _DROPOUTS
        if raw.get(name)
    ]
    window = raw.get("sliding_window")
    longest = raw.get("max_position_embeddings") or 2048
    if "sliding_window" not in family.fields and is_number(window):
        if 0 < window < longest:
            out.append(f"`sliding_window`={window}")
    kinds = raw.get("layer_types")
    if "layer_types" not in family.fields and isinstance(kinds, list):
        if {"full_attention"} != set(map(str, kinds)):
            out.append(f"`layer_types`={kinds!r:.80}")
    if isinstance(raw.get("auto_map"), Mapping):
        out.append(f"`auto_map`={dict(raw['auto_map'])!r:.80} (custom code is not run)")
    if not family.ropes_by_layer_type:
        out += _unread_rope(raw, family)
    eos = raw.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [eos]
    absent = [i for i in ids if i is not None and not 0 <= i < vocab_size]
    if absent:
        out.append(
            f"`eos_token_id`={', '.join(map(str, absent))} (the vocabulary has "
            f"{vocab_size:,} tokens)"
        )
    return out


def _unread_rope(raw: Mapping[str, Any], family: Family) -> list[str]:
    """Lists the fields of rotary embeddings that their type does not read."""
    reads_partial = "partial_rotary_factor" in family.fields
    unread_partial = None
    if not reads_partial and raw.get("partial_rotary_factor") != 1:
        unread_partial = raw.get("partial_rotary_factor")
    names = [name for name in ("rope_scaling", "rope_parameters") if raw.get(name)]
    if not names:
        if unread_partial is None:
            return []
        return [f"`partial_rotary_factor`={unread_partial}"]
    # The first counts, as in transformers.
    source, fields = names[0], raw[names[0]]
    name = "rope_type" if "rope_type" in fields else "type"
    kind = fields.get(name, "default")
    read = rope_fields(family.rope_aliases.get(kind, kind))
    known = {"rope_theta", "rope_type", *read}
    if reads_partial:
        known.add("partial_rotary_factor")
    unread = {
        f"{source}.{field}": value
        for field, value in fields.items()
        if value is not None
        and field not in known
        and not (field == "partial_rotary_factor" and value == 1)
        and not (field == "type" and value == kind)
    }
    if kind == "default" and unread_partial is not None:
        unread["partial_rotary_factor"] = unread_partial
    theta = raw.get("rope_theta")
    if "rope_theta" in fields and theta not in (None, fields["rope_theta"]):
        unread["rope_theta"] = theta
    if len(names) > 1 and raw[names[1]] != fields:
        unread[names[1]] = dict(raw[names[1]])
    return [
        f"`{field}`={value!r:.80} (`{source}.{name}` is {kind!r:.80})"
        for field, value in unread.items()
    ]
