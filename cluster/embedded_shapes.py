"""The shapes of the embedded models, as their `config.json` says them; `embedded` writes the folders."""

from __future__ import annotations

from typing import Any

CHAT: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,  # vLLM's CPU attention takes 32, 64, 80, 96, 112, 128, ...
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "torch_dtype": "float32",
}
# The model that is trained: smaller layers see twice as many dialogues in the same time; more words are one token each.
SCRATCH: dict[str, Any] = (
    CHAT
    | {"vocab_size": 4096, "num_hidden_layers": 2, "initializer_range": 0.06}
    | {"hidden_size": 192, "intermediate_size": 384, "num_attention_heads": 3, "num_key_value_heads": 3}
)
EMBED: dict[str, Any] = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}
