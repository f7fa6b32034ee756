"""Small tokenizers of every kind that models have, trained here on a few sentences, with letters of several tokens."""

from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
SENTENCES = [
    "Paris is the capital of France, and Oslo that of Norway.",
    "I never took it; the weather was nice, wasn't it?",
    "She said yes  and he said no.",
] * 4
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
FALLBACK = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


def byte_level() -> Tokenizer:
    """GPT-2's, Llama 3's, Qwen's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet))
    return made


def legacy() -> Tokenizer:
    """Llama 2's: a space is put before every text, and taken off again, so that a part of one is spelled otherwise."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token=UNKNOWN, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([*FALLBACK, decoders.Strip(" ", 1, 0)])
    made.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=360, special_tokens=[UNKNOWN, *BYTES]))
    return made


def sentencepiece() -> Tokenizer:
    """Gemma's: nothing is put before a text."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token=UNKNOWN, fuse_unk=True))
    made.normalizer, made.decoder = normalizers.Replace(" ", "▁"), decoders.Sequence(FALLBACK)
    made.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=360, special_tokens=[UNKNOWN, *BYTES]))
    return made


def unigram() -> Tokenizer:
    """T5's, without letters that it does not know."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.train_from_iterator(
        [*SENTENCES, "日本語 🙂"], trainers.UnigramTrainer(vocab_size=80, unk_token=UNKNOWN, special_tokens=[UNKNOWN])
    )
    return made


def wordpiece() -> Tokenizer:
    """BERT's: words in pieces, spaces unknown."""
    made = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
    made.train_from_iterator(
        [*SENTENCES, "日 本 語 🙂"], trainers.WordPieceTrainer(vocab_size=90, special_tokens=[UNKNOWN])
    )
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    made.__name__: made for made in (byte_level, legacy, sentencepiece, unigram, wordpiece)
}


def spelling(kind: str, *, begins: bool = True, ends: bool = False) -> Any:
    """A tokenizer of a kind, which puts a token before or behind what it encodes."""
    made = KINDS[kind]()
    made.add_special_tokens([BEGIN, END])
    around = [*[BEGIN] * begins, "$A", *[END] * ends]
    if begins or ends:
        ids = [(token, made.token_to_id(token)) for token in (BEGIN, END)]
        made.post_processor = processors.TemplateProcessing(single=" ".join(around), special_tokens=ids)
    names = {"bos_token": BEGIN, "eos_token": END, "pad_token": END}
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=kind == "wordpiece", **names)
