"""What is timed: a Llama-shaped model with random weights, since speed does not depend on them, and texts for it."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

import repe

FACTS = [
    f"The {thing} of {place} is {saying}"
    for thing in ("capital", "largest city", "anthem", "currency", "emblem")
    for place in ("France", "Japan", "Kenya", "Peru", "Norway", "Egypt", "Chile", "India")
    for saying in (
        "well known to most people who live there",
        "taught in every school",
        "printed on the first page of the guide that visitors carry",
    )
]
PERSONAS = ("honest", "untruthful")
WORDS = 30_522  # of the vocabulary
BLOCKS_STEERED = 5


class Workload:
    """A model of 67 million parameters and 16 blocks, a tokenizer of one token a word, pairs and prompts."""

    def __init__(self, device: str = "cpu", small: bool = False) -> None:
        self.device, self.small = device, small

    @cached_property
    def model(self) -> Any:
        from transformers import LlamaConfig

        width, blocks = (64, 8) if self.small else (512, 16)
        return random_llama(
            LlamaConfig(
                vocab_size=WORDS, hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=blocks,
                num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=1024, bos_token_id=1,
                eos_token_id=None, pad_token_id=0, tie_word_embeddings=True,
            ),
            self.device,
        )  # fmt: skip

    @cached_property
    def looked_into(self) -> Any:
        """A twin that is asked for hidden states: transformers leaves hooks of its own on such a model for good."""
        return twin(self.model)

    @cached_property
    def tokenizer(self) -> Any:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        known = sorted({word for text in self.every_text() for word in split(text)})
        names = ["[PAD]", "[BOS]", "[UNK]", *known]
        names += [f"word{n}" for n in range(len(names), WORDS)]
        made = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
        return PreTrainedTokenizerFast(
            tokenizer_object=made, pad_token="[PAD]", bos_token="[BOS]", unk_token="[UNK]", padding_side="left"
        )

    def every_text(self) -> list[str]:
        return [text for pair in self.pairs(128) for text in pair] + self.prompts(24) + FACTS

    def pairs(self, count: int) -> list[tuple[str, str]]:
        """Statements broken off anywhere, behind one persona and behind the other."""
        dice = random.Random(0)
        chosen = (dice.choice(FACTS).split() for _ in range(count))
        return [posed(" ".join(words[: dice.randrange(3, len(words) + 1)])) for words in chosen]

    def repe_pairs(self, count: int) -> list[tuple[str, str]]:
        """Made as Zou et al. do: behind both personas every prefix of statements, shuffled."""
        dice = random.Random(0)
        prefixes = [" ".join(words[:n]) for words in map(str.split, FACTS) for n in range(1, len(words) + 1)]
        dice.shuffle(prefixes)
        return [posed(prefix) for prefix in prefixes[:count]]

    def unlike(self, count: int, length: int = 48) -> list[str]:
        """Texts that begin with different words and share nothing."""
        dice = random.Random(0)
        firsts = dice.sample(range(1000, WORDS), count)
        return [" ".join(f"word{n}" for n in (f, *dice.choices(range(1000, WORDS), k=length - 1))) for f in firsts]

    def prompts(self, count: int) -> list[str]:
        return [
            f"USER: {FACTS[(7 * n) % len(FACTS)]}. What would you tell your friend about it, and why? ASSISTANT:"
            for n in range(count)
        ]

    @property
    def middle(self) -> list[int]:
        """Five blocks in the middle."""
        half = self.model.config.num_hidden_layers // 2
        return [*range(half - 2, half - 2 + BLOCKS_STEERED)]

    @cached_property
    def vector(self) -> repe.ConceptVector:
        return repe.extract(self.model, self.tokenizer, contrast(self.pairs(32)), blocks=self.middle, writes=False)


def posed(statement: str) -> tuple[str, str]:
    honest, untruthful = (
        f"USER: Pretend you're an {persona} person making statements about the world. ASSISTANT: {statement}"
        for persona in PERSONAS
    )
    return honest, untruthful


def contrast(pairs: Sequence[tuple[str, str]]) -> list[repe.ContrastPair]:
    return [repe.ContrastPair(one, other, template="persona", item=str(n)) for n, (one, other) in enumerate(pairs)]


def split(text: str) -> list[str]:
    from tokenizers import pre_tokenizers

    return [word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text)]


def random_llama(config: Any, device: str, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)


def twin(model: Any) -> Any:
    """A second model on the same weights, so that one can be steered, compiled or baked beside the other."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared(model)})


def shared(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
