"""Tokenizers as model families have them, made here of a few words: what becomes of spaces, and of ends, differs."""

from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<bos>", "<eos>"]
CORPUS = [
    "The capital of France is Paris.", "is Rome the capital? Unable, able, capital, capitals.", "A: Yes, B: No.",
    "un able unable do doing undo undoing", "Question: is it so? Answer: yes. Answer: no. User: Assistant:",
] * 4  # fmt: skip
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
AFTER_A_SPACE = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])


def _legacy() -> Tokenizer:
    """SentencePiece as of Llama 2: a space is put before every stretch of text."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}+[^{SPACE}]*"), "isolated")
    backend.decoder = AFTER_A_SPACE
    return backend


def _first() -> Tokenizer:
    """SentencePiece without the legacy normalizer: a space is put before the first word alone."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = AFTER_A_SPACE
    return backend


def _fallback() -> Tokenizer:
    """SentencePiece as of Gemma: nothing is put before a text, and letters that are not known are bytes."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}+[^{SPACE}]*"), "isolated")
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _unigram() -> Tokenizer:
    """SentencePiece as of T5: spaces at the end are lost."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Strip(left=False, right=True)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def _bytes() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _wordpiece() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


KINDS = {
    "legacy": _legacy, "first": _first, "fallback": _fallback, "unigram": _unigram, "bytes": _bytes,
    "wordpiece": _wordpiece,
}  # fmt: skip
FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]
MORE = {
    "unigram": {"unk_token": "<unk>"},
    "bytes": {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "vocab_size": 400},
    "fallback": {"special_tokens": [*SPECIAL, *FALLBACK], "vocab_size": 500},
}
TRAINERS = {"unigram": trainers.UnigramTrainer, "wordpiece": trainers.WordPieceTrainer}
ADDED = {"nothing": "$A", "begin": "<bos> $A", "end": "$A <eos>", "both": "<bos> $A <eos>"}


@cache
def _trained(kind: str) -> str:
    backend = KINDS[kind]()
    how = {"vocab_size": 200, "special_tokens": SPECIAL, "show_progress": False} | MORE.get(kind, {})
    trainer = TRAINERS.get(kind, trainers.BpeTrainer)(**how)
    backend.train_from_iterator(CORPUS, trainer)
    return str(backend.to_str())


def subwords(kind: str, added: str = "begin") -> PreTrainedTokenizerFast:
    """One of `KINDS`, which puts before and behind a text what `ADDED` says."""
    backend = Tokenizer.from_str(_trained(kind))
    ids = [(token, backend.token_to_id(token)) for token in SPECIAL]
    backend.post_processor = processors.TemplateProcessing(single=ADDED[added], special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
