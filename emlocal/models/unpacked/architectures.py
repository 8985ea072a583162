"""How GGUF architectures become transformers' classes: names of tensors, and what each class can express.

The rules for the tensors are those of llama.cpp's converters (conversion/*.py), reversed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_PLAIN = _NORMS | _ATTENTION | _MLP
_SHORT_CONVOLUTION = {
    "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
}


@dataclass(frozen=True)
class Architecture:
    """One GGUF architecture in transformers. A field's default is what Qwen3's class does."""

    name: str
    """The class."""
    model_type: str
    parts: Mapping[str, str] = field(default_factory=lambda: _PLAIN)
    """Parts of a layer with attention: from the GGUF name to the name in the folder."""
    other_parts: Mapping[str, str] | None = None
    """Parts of a layer without attention, if the architecture has such layers."""
    last_norm: tuple[str, str] = ("output_norm", "model.norm")
    """The GGUF name and the folder's name of the norm before the output."""
    reordered: bool = False
    """Whether llama.cpp's converter reorders the rows of Q and K."""
    norms_plus_one: bool = False
    """Whether the file has the norms' weights plus one."""
    scales: bool = False
    """Whether the class multiplies embeddings, residuals, attention and logits by numbers of its own."""
    biases: tuple[str, ...] = ()
    """Kinds of biases that its configuration can switch on: attention, mlp."""
    always_biased: bool = False
    """Whether Q, K and V always have biases."""
    rotates_part: bool = False
    """Whether it can rotate a part of each head."""
    activation: tuple[str, str] | None = ("hidden_act", "silu")
    """Name and value in the configuration."""

    def parts_of(self, attention: bool) -> Mapping[str, str]:
        """Returns the parts of a layer with or without attention."""
        return self.parts if attention or self.other_parts is None else self.other_parts


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", "llama", reordered=True, biases=("attention", "mlp")),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", always_biased=True),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", _PLAIN | _HEAD_NORMS, biases=("attention",)),
    "smollm3": Architecture("SmolLM3ForCausalLM", "smollm3", reordered=True, biases=("attention", "mlp")),
    "granite": Architecture(
        "GraniteForCausalLM", "granite", reordered=True, scales=True, biases=("attention", "mlp")
    ),
    "phi3": Architecture(
        "Phi3ForCausalLM",
        "phi3",
        _NORMS
        | {"attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj"}
        | {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"},
        rotates_part=True,
    ),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        "gemma3_text",
        _ATTENTION
        | _HEAD_NORMS
        | _MLP
        | {
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        norms_plus_one=True,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
    ),
}
_LFM2_BOTH = {
    "attn_norm": "operator_norm",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
}
ARCHITECTURES["lfm2"] = Architecture(
    "Lfm2ForCausalLM",
    "lfm2",
    _LFM2_BOTH
    | _ATTENTION
    | {
        "attn_output": "self_attn.out_proj",
        "attn_q_norm": "self_attn.q_layernorm",
        "attn_k_norm": "self_attn.k_layernorm",
    },
    _LFM2_BOTH | _SHORT_CONVOLUTION,
    ("token_embd_norm", "model.embedding_norm"),
    activation=None,
)
