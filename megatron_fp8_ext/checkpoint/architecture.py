"""config.json -> what Megatron must be told: every flag derived, none copied from a shell file.

The weights of a model fit a command with a wrong rotary base, epsilon or head count without a word, so
all of it is read from the configuration, printed, stored with a converted checkpoint, and compared with
what a trained checkpoint says of itself. `convert` and `run` both take their flags from here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_fp8_ext.errors import UserError

BLOCK = 128
# What Megatron's --use-rope-scaling hard-codes (core/models/common/embeddings/rotary_pos_embedding).
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a `model_type` differs from a pre-norm SwiGLU decoder with rotary positions and no biases.

    Attributes:
        qkv_bias: whether the QKV projection has a bias.
        qk_norm: whether queries and keys are normalized, each head by itself.
        window: `sliding_window` where config.json has none, for a family that always obeys the field.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    window: int | None = None


FAMILIES: dict[str, Family] = {
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
    "llama": Family(),
    "mistral": Family(window=4096),
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder of one of the `FAMILIES`, in Megatron's terms.

    Attributes:
        family: `model_type` of config.json.
        num_layers: decoder layers.
        hidden_size: width of the residual stream.
        ffn_hidden_size: width of gate and up, each.
        num_attention_heads: query heads.
        num_query_groups: key and value heads.
        kv_channels: width of a head.
        vocab_size: rows of the embedding in the Hugging Face model.
        max_position_embeddings: longest context; None where the configuration does not say.
        rotary_base: RoPE theta.
        rope_scaling_factor: of Llama 3's scaling; None without.
        norm_epsilon: of every RMSNorm.
        qkv_bias: whether the QKV projection has a bias.
        qk_norm: whether queries and keys are normalized.
        tied: whether embedding and LM head are one tensor.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int | None
    rotary_base: int
    rope_scaling_factor: float | None
    norm_epsilon: float
    qkv_bias: bool
    qk_norm: bool
    tied: bool

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """Rows of Megatron's embedding: the vocabulary, padded only where TP does not divide it."""
        if self.vocab_size % tensor_parallel == 0:
            return self.vocab_size
        step = BLOCK * tensor_parallel
        return -(-self.vocab_size // step) * step

    def megatron_arguments(self) -> dict[str, Any]:
        """Return Megatron's arguments by name: what a checkpoint of this model stores."""
        arguments = {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "group_query_attention": self.num_query_groups != self.num_attention_heads,
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.kv_channels,
            "max_position_embeddings": self.max_position_embeddings,
            "position_embedding_type": "rope",
            "rotary_base": self.rotary_base,
            "rotary_percent": 1.0,
            "rotary_interleaved": False,
            "use_rope_scaling": self.rope_scaling_factor is not None,
            "normalization": "RMSNorm",
            "norm_epsilon": self.norm_epsilon,
            "swiglu": True,
            "add_bias_linear": False,
            "add_qkv_bias": self.qkv_bias,
            "qk_layernorm": self.qk_norm,
            "untie_embeddings_and_output_weights": not self.tied,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            # The embedding is stored unpadded, whole: any run may pad and split it anew.
            "padded_vocab_size": self.vocab_size,
            "vocab_size": self.vocab_size,
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
            "ckpt_format": "torch_dist",
            "consumed_train_samples": 0,
            "consumed_valid_samples": 0,
        }
        if self.rope_scaling_factor is not None:
            arguments["rope_scaling_factor"] = self.rope_scaling_factor
        return arguments

    def flags(self, tensor_parallel: int = 1) -> dict[str, str]:
        """Return Megatron's flags by name without dashes; `true` and `false` are switches."""

        def switch(on: bool) -> str:
            return "true" if on else "false"

        found = {
            "num-layers": str(self.num_layers),
            "hidden-size": str(self.hidden_size),
            "ffn-hidden-size": str(self.ffn_hidden_size),
            "num-attention-heads": str(self.num_attention_heads),
        }
        if self.num_query_groups != self.num_attention_heads:
            found["group-query-attention"] = "true"
            found["num-query-groups"] = str(self.num_query_groups)
        if self.kv_channels * self.num_attention_heads != self.hidden_size:
            found["kv-channels"] = str(self.kv_channels)
        found |= {
            "disable-bias-linear": "true",
            "add-qkv-bias": switch(self.qkv_bias),
            "qk-layernorm": switch(self.qk_norm),
            "normalization": "RMSNorm",
            "norm-epsilon": f"{self.norm_epsilon:g}",
            "swiglu": "true",
            "position-embedding-type": "rope",
            "rotary-percent": "1.0",
            "rotary-base": str(self.rotary_base),
        }
        if self.rope_scaling_factor is not None:
            found["use-rope-scaling"] = "true"
            found["rope-scaling-factor"] = f"{self.rope_scaling_factor:g}"
        return found | {
            "untie-embeddings-and-output-weights": switch(not self.tied),
            "padded-vocab-size": str(self.padded_vocab_size(tensor_parallel)),
        }

    def megatron_flags(self, tensor_parallel: int = 1) -> list[str]:
        """Return the flags of a training command for this model, one string a flag.

        Besides `flags`, what a preset decides for itself: context, dropout and the bare vocabulary.
        """
        found = self.flags(tensor_parallel)
        if self.max_position_embeddings is not None:
            found["max-position-embeddings"] = str(self.max_position_embeddings)
        found |= {
            "vocab-size": str(self.vocab_size),
            "attention-dropout": "0",
            "hidden-dropout": "0",
        }
        return [
            f"--{name}" if value == "true" else f"--{name} {value}"
            for name, value in found.items()
            if value != "false"
        ]

    def differences(self, arguments: Mapping[str, Any]) -> list[str]:
        """Return where a checkpoint's own arguments contradict this architecture, in clauses."""
        wanted = self.megatron_arguments()
        found = []
        for name in _COMPARED:
            names = _OTHER_NAMES.get(name, (name,))
            stored = next((arguments[n] for n in names if arguments.get(n) is not None), None)
            if name == "num_query_groups" and arguments.get("group_query_attention") is False:
                stored = arguments.get("num_attention_heads")
            if stored is not None and not _same(stored, wanted[name]):
                found.append(f"{name} is {stored} in the checkpoint, {wanted[name]} in config.json")
        for name in _MUST_BE_OFF:
            if arguments.get(name):
                found.append(
                    f"{name} is {arguments[name]} in the checkpoint, which {self.family} lacks"
                )
        scaling = arguments.get("rope_scaling_factor")
        if self.rope_scaling_factor is not None and scaling not in (None, self.rope_scaling_factor):
            found.append(
                f"rope_scaling_factor is {scaling} in the checkpoint, {self.rope_scaling_factor} in "
                "config.json"
            )
        return found

    def block_mismatches(self, tensor_parallel: int) -> list[str]:
        """Return why blocks of 128x128 of the Hugging Face weights are not those training casts.

        Megatron casts its own tensors: Q, K and V fused and interleaved by group, gate and up fused,
        each tensor-parallel rank its shard. Where every seam falls on a multiple of 128, the blocks are
        the same and so are codes and scales; elsewhere the export is a cast of its own by the same rule.
        """
        found = []
        if self.kv_channels % BLOCK:
            found.append(
                f"q_proj, k_proj, v_proj: heads of {self.kv_channels} rows share blocks in the fused QKV"
            )
        if self.ffn_hidden_size % (BLOCK * tensor_parallel):
            rows = self.ffn_hidden_size / tensor_parallel
            found.append(f"gate_proj, up_proj, down_proj: {rows:g} of the FFN on a rank")
        heads = self.num_attention_heads * self.kv_channels
        if tensor_parallel > 1 and heads % (BLOCK * tensor_parallel):
            found.append(f"o_proj: {heads / tensor_parallel:g} columns on a rank")
        return found


def _same(stored: Any, wanted: Any) -> bool:
    if isinstance(wanted, float) and isinstance(stored, (int, float)):
        return math.isclose(stored, wanted, rel_tol=1e-6)  # an FP32 on its way through some format
    return bool(stored == wanted)


_COMPARED = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels rotary_base "
    "rotary_percent use_rope_scaling norm_epsilon normalization swiglu add_bias_linear add_qkv_bias "
    "qk_layernorm untie_embeddings_and_output_weights position_embedding_type"
).split()
_OTHER_NAMES = {"norm_epsilon": ("norm_epsilon", "layernorm_epsilon")}
_MUST_BE_OFF = (
    "num_experts qk_l2_norm attention_output_gate apply_layernorm_1p rotary_interleaved "
    "multi_latent_attention mtp_num_layers heterogeneous_layers_config_path"
).split()


def from_config(config: Mapping[str, Any], where: str) -> Architecture:
    """Derive the architecture from a Hugging Face configuration.

    Args:
        config: config.json of transformers 4 or 5.
        where: its path, for messages.

    Raises:
        UserError: another family, a missing field, or something Megatron computes otherwise.
    """
    family = config.get("model_type")
    traits = FAMILIES.get(str(family))
    if traits is None:
        raise UserError(
            f"{where}: model_type '{family}' is not supported; known: {', '.join(FAMILIES)}"
        )

    def integer(name: str) -> int:
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{where}: {name} is {value!r}, expected a positive integer")
        return value

    heads, hidden = integer("num_attention_heads"), integer("hidden_size")
    groups = integer("num_key_value_heads") if config.get("num_key_value_heads") else heads
    if heads % groups:
        raise UserError(f"{where}: {groups} key-value heads do not divide {heads} heads")
    head = integer("head_dim") if config.get("head_dim") else hidden // heads
    if not config.get("head_dim") and hidden % heads:
        raise UserError(
            f"{where}: hidden_size {hidden} is no multiple of {heads} heads; add head_dim"
        )
    if traits.window is not None and config.get("sliding_window", traits.window) is not None:
        raise UserError(
            f"{where}: sliding_window is {config.get('sliding_window', traits.window)}; Megatron's flags "
            "know no window; null where the model was trained without one"
        )
    for name, fine in _FIXED.items():
        if config.get(name, fine[0]) not in fine:
            raise UserError(
                f"{where}: {name} is {config[name]!r}, which Megatron's {family} mapping does not compute"
            )
    base, factor = _rope(config, where)
    return Architecture(
        family=str(family),
        num_layers=integer("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=integer("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=head,
        vocab_size=integer("vocab_size"),
        max_position_embeddings=(
            integer("max_position_embeddings") if "max_position_embeddings" in config else None
        ),
        rotary_base=base,
        rope_scaling_factor=factor,
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        qkv_bias=traits.qkv_bias,
        qk_norm=traits.qk_norm,
        tied=bool(config.get("tie_word_embeddings", False)),
    )


# Values under which transformers computes what Megatron's flags say; the first is its default.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "attention_bias": (False, None),
    "use_sliding_window": (False, None),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1.0, None),
}


def _rope(config: Mapping[str, Any], where: str) -> tuple[int, float | None]:
    """Return (base, factor of Llama 3's scaling) from either spelling: transformers 5 or before."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise UserError(f"{where}: rope_parameters is not an object")
    theta = parameters.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise UserError(f"{where}: no rope_theta; add the one the model was trained with")
    if not isinstance(theta, (int, float)) or theta != int(theta):
        raise UserError(f"{where}: rope_theta is {theta!r}; Megatron's --rotary-base is an integer")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return int(theta), None
    if kind != "llama3" or any(parameters.get(name) != value for name, value in _LLAMA3.items()):
        raise UserError(
            f"{where}: RoPE scaling {kind} with these parameters has no flags in Megatron (it has llama3's)"
        )
    return int(theta), float(parameters["factor"])
