"""Small GGUF files, as llama.cpp's converter writes them: random Llamas with a tokenizer, and what is no model."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import nn

from tests import zoo

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
TOKENS = [*zoo.SPECIAL_TOKENS, *map(chr, range(33, 127)), "Ġ", "Ċ", "ab"]
TOKENS += [f"<unused {i}>" for i in range(zoo.VOCABULARY - len(TOKENS))]


def write(path: Path, model: nn.Module, kind: str = "F32", leave_out: str = "", **metadata: Any) -> Path:
    """The file of a Llama: matrices of that type, the rest in float32."""
    writer, config = gguf.GGUFWriter(path, metadata.pop("architecture", "llama")), model.config
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    write_tokenizer(writer)
    for name, value in metadata.items():
        add = writer.add_uint16 if isinstance(value, int) else writer.add_string
        add(name.replace("__", "."), value)
    for name, tensor in model.state_dict().items():
        part, block = name.removesuffix(".weight"), ""
        if part.startswith("model.layers."):
            _, _, number, part = part.split(".", 3)
            block = f"blk.{number}."
        values = tensor.float()
        if part[-6:] in ("q_proj", "k_proj"):
            values = interleaved(values, heads[part[-6]])
        if name != leave_out:
            add_tensor(writer, f"{block}{NAMES[part]}.weight", values.numpy(), kind)
    return finished(writer, path)


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a query or key matrix in llama.cpp's order, which rotates neighbours, and not halves."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: str) -> None:
    quantised = gguf.GGMLQuantizationType[kind if values.ndim > 1 and values.shape[-1] % 32 == 0 else "F32"]
    writer.add_tensor(name, gguf.quantize(values, quantised), raw_dtype=quantised)


def write_tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token.startswith("<") and len(token) > 1 else 1 for token in TOKENS])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(zoo.BOS_ID)
    writer.add_eos_token_id(zoo.EOS_ID)
    writer.add_pad_token_id(zoo.PAD_ID)
    writer.add_chat_template(TEMPLATE)


def write_control_vector(path: Path, architecture: str = "controlvector") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for block in (1, 2):
        writer.add_tensor(f"direction.{block}", np.ones(zoo.D_MODEL, dtype=np.float32))
    return finished(writer, path)


def finished(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
