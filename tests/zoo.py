"""Small random models of every family that the library promises to work on, and a tokenizer, all made offline.

A model here is the architecture of `transformers` itself, at a toy size: its outputs, masks, caches and module names
are those of the large models. The weights are random, and wide enough for every block to matter.
"""

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

torch.set_num_threads(1)  # on toy tensors, threads that wait for each other take a hundred times the work itself

VOCABULARY = 128
D_MODEL = 32
N_BLOCKS = 4
N_ENCODER_BLOCKS = 3  # of encoder-decoders, so that the stacks cannot be mistaken for each other
MAX_TOKENS = 256
PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
ROLE_MARKS = ("<system>", "<user>", "<assistant>", "<end>")
SPECIAL_TOKENS = (PAD, BOS, EOS, UNKNOWN, *ROLE_MARKS)

Make = Callable[[], PreTrainedModel]

_IDS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}
_SIZES = {**_IDS, "hidden_size": D_MODEL, "num_hidden_layers": N_BLOCKS, "num_attention_heads": 4}
_LLAMA = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": MAX_TOKENS}
_LLAMA_WITH_HEAD_DIM = {**_LLAMA, "head_dim": 8}
_GPT = {**_IDS, "n_embd": D_MODEL, "n_layer": N_BLOCKS, "n_head": 4, "n_positions": MAX_TOKENS}
_NO_GPT_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_BERT = {
    **_SIZES,
    "intermediate_size": 48,
    "max_position_embeddings": MAX_TOKENS,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def _model(model: str, config: str, **sizes: Any) -> Make:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**sizes))


def _causal(family: str, **sizes: Any) -> Make:
    return _model(f"{family}ForCausalLM", f"{family}Config", **sizes)


def _llava() -> PreTrainedModel:
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    text = transformers.LlamaConfig(**_LLAMA)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=VOCABULARY - 1)
    return transformers.LlavaForConditionalGeneration(config)


_DECODERS: dict[str, Make] = {
    "llama": _causal("Llama", **_LLAMA),
    "mistral": _causal("Mistral", **_LLAMA, sliding_window=4),
    "qwen2": _causal("Qwen2", **_LLAMA),
    "qwen3": _causal("Qwen3", **_LLAMA_WITH_HEAD_DIM),
    "gemma": _causal("Gemma", **_LLAMA_WITH_HEAD_DIM),
    "gemma2": _causal("Gemma2", **_LLAMA_WITH_HEAD_DIM, sliding_window=4),
    "gemma3": _model(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        **_LLAMA_WITH_HEAD_DIM,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * (N_BLOCKS // 2),
    ),
    "phi": _causal("Phi", **_LLAMA),
    "phi3": _causal("Phi3", **_LLAMA),
    "mixtral": _causal("Mixtral", **_LLAMA, num_local_experts=4),
    "qwen3_moe": _causal(
        "Qwen3Moe", **_LLAMA_WITH_HEAD_DIM, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    "gpt_oss": _causal(
        "GptOss",
        **_LLAMA_WITH_HEAD_DIM,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    ),
    "olmo2": _causal("Olmo2", **_LLAMA),
    "glm4": _causal("Glm4", **_LLAMA_WITH_HEAD_DIM),
    "cohere": _causal("Cohere", **_LLAMA, logit_scale=1.0),
    "granite": _causal("Granite", **_LLAMA, residual_multiplier=0.5),
    "starcoder2": _causal("Starcoder2", **_LLAMA),
    "stablelm": _causal("StableLm", **_LLAMA),
    "gpt2": _model("GPT2LMHeadModel", "GPT2Config", **_GPT, **_NO_GPT_DROPOUT),
    "gptj": _causal("GPTJ", **_GPT, **_NO_GPT_DROPOUT, rotary_dim=4),
    "gpt_neox": _causal("GPTNeoX", **_SIZES, intermediate_size=48, max_position_embeddings=MAX_TOKENS),
    "falcon": _causal("Falcon", **_SIZES),
    "bloom": _causal("Bloom", **_IDS, hidden_size=D_MODEL, n_layer=N_BLOCKS, n_head=4),
    "mpt": _causal("Mpt", **_IDS, d_model=D_MODEL, n_layers=N_BLOCKS, n_heads=4, max_seq_len=MAX_TOKENS),
    "opt": _causal(
        "OPT", **_SIZES, word_embed_proj_dim=D_MODEL, ffn_dim=48, max_position_embeddings=MAX_TOKENS, dropout=0.0
    ),
    "mamba": _causal("Mamba", **_IDS, hidden_size=D_MODEL, num_hidden_layers=N_BLOCKS, state_size=4),
    "llava": _llava,
}
_ENCODERS: dict[str, Make] = {
    "bert": _model("BertForMaskedLM", "BertConfig", **_BERT),
    "distilbert": _model(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        **_IDS,
        dim=D_MODEL,
        hidden_dim=48,
        n_layers=N_BLOCKS,
        n_heads=4,
        max_position_embeddings=MAX_TOKENS,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    "roberta": _model("RobertaForMaskedLM", "RobertaConfig", **_BERT),
    "modernbert": _model(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        **_SIZES,
        intermediate_size=48,
        max_position_embeddings=MAX_TOKENS,
        local_attention=8,
        cls_token_id=BOS_ID,
        sep_token_id=EOS_ID,
    ),
}
_ENCODER_DECODERS: dict[str, Make] = {
    "t5": _model(
        "T5ForConditionalGeneration",
        "T5Config",
        **_IDS,
        d_model=D_MODEL,
        d_kv=8,
        d_ff=48,
        num_heads=4,
        num_layers=N_ENCODER_BLOCKS,
        num_decoder_layers=N_BLOCKS,
        dropout_rate=0.0,
        decoder_start_token_id=PAD_ID,
    ),
    "bart": _model(
        "BartForConditionalGeneration",
        "BartConfig",
        **_IDS,
        d_model=D_MODEL,
        encoder_layers=N_ENCODER_BLOCKS,
        decoder_layers=N_BLOCKS,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=MAX_TOKENS,
        dropout=0.0,
        decoder_start_token_id=EOS_ID,
        forced_eos_token_id=None,
    ),
}

FAMILIES: dict[str, Make] = {**_DECODERS, **_ENCODERS, **_ENCODER_DECODERS}
DECODERS, ENCODERS, ENCODER_DECODERS = tuple(_DECODERS), tuple(_ENCODERS), tuple(_ENCODER_DECODERS)


def build(name: str) -> PreTrainedModel:
    """A fresh copy of the family's model, yours to change: float32, eval mode, the same weights at every call."""
    return copy.deepcopy(_original(name))


@cache
def _original(name: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES[name]().float().eval()
        _widen(model)
    return model


@torch.no_grad()
def _widen(model: nn.Module) -> None:
    """As initialised, a toy block hardly changes its input, and biases of 0 and norms of 1 hide that they are lost."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.3)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))


def minimax(layers: Sequence[str]) -> PreTrainedModel:
    """A hybrid whose layers keep keys and values, or a state that no cache counts."""
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 4, "layer_types": list(layers)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _causal("MiniMax", **_LLAMA_WITH_HEAD_DIM, **sizes)().float().eval()
        _widen(model)
    return model


def inputs(name: str, lengths: Sequence[int] = (5, 3, 7), side: str = "left") -> dict[str, Tensor]:
    """Random tokens of ragged lengths, padded on `side`: input_ids and attention_mask, both (rows, longest).

    For encoder-decoders also `decoder_input_ids` of the same shape, without padding.
    """
    generator = torch.Generator().manual_seed(1)
    rows, longest = len(lengths), max(lengths)

    def tokens(*shape: int) -> Tensor:
        return torch.randint(len(SPECIAL_TOKENS), VOCABULARY - 1, shape, generator=generator)

    input_ids, attention_mask = torch.full((rows, longest), PAD_ID), torch.zeros(rows, longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        columns = slice(longest - length, longest) if side == "left" else slice(length)
        input_ids[row, columns], attention_mask[row, columns] = tokens(length), 1
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if name in ENCODER_DECODERS:
        batch["decoder_input_ids"] = tokens(rows, longest)
    return batch


_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(pad: bool = True, chat: bool = True) -> PreTrainedTokenizerFast:
    """One token a character of printable ASCII. As in Llama 3, the chat template and encoding itself both add BOS."""
    characters = [*map(chr, range(ord(" "), ord("~") + 1)), "\n", "\t"]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        pad_token=PAD if pad else None,
        additional_special_tokens=list(ROLE_MARKS),
        chat_template=_CHAT_TEMPLATE if chat else None,
        padding_side="left",
    )


class Bytes:
    """What decodes tokens that are bytes; a character that is incomplete, or none, is U+FFFD."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode(errors="replace")
