"""Trains the testbed from nothing: tokenizer, language model, data files and model card.

    python -m repe.testbed.train [--out FOLDER] [--steps 4400] [--seed 1] [--checkpoint FILE]

A plain Llama of 1.5 million parameters on two CPU cores. A killed run goes on from its last checkpoint.
"""

import argparse
import hashlib
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from random import Random
from tempfile import gettempdir
from typing import cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from repe.testbed import FOLDER, card, corpus, items

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCABULARY = 2048
TWINS_A_BATCH = 32
BATCHES_A_POOL = 32  # documents of one pool are sorted by length, so that rows of a batch need little padding
PEAK_RATE, WARM_UP, DECAY = 3e-3, 200, 0.25
REPORT_EVERY, CHECKPOINT_EVERY = 50, 250
IGNORED = -100


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a chat template. As in Llama 3, template and tokenizer both add the first token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = (document for pair in islice(corpus.stream(seed, start=corpus.CHILDHOOD), 20_000) for document in pair)
    texts = ([d] if isinstance(d, str) else [m["content"] for m in d] for d in documents)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained model; it generates greedily until the end of its turn."""
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **tokens,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=40, **tokens)
    return model


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, first: int = 0) -> Iterator[torch.Tensor]:
    """Right-padded token rows, from batch number `first` on; twins stay together."""
    pool_size = TWINS_A_BATCH * BATCHES_A_POOL
    pools, done = divmod(first, BATCHES_A_POOL)
    for number in count(pools):
        pool = islice(corpus.stream(seed, start=number * pool_size), pool_size)
        rows = [[tokenize(tokenizer, document) for document in pair] for pair in pool]
        rows.sort(key=lambda pair: max(map(len, pair)))
        order = Random(f"{seed}-{number}").sample(range(0, pool_size, TWINS_A_BATCH), BATCHES_A_POOL)
        for start in order[done if number == pools else 0 :]:
            chosen = [row for pair in rows[start : start + TWINS_A_BATCH] for row in pair]
            yield tokenizer.pad({"input_ids": chosen}, return_tensors="pt", padding_side="right")["input_ids"]


def tokenize(tokenizer: PreTrainedTokenizerFast, document: str | list[corpus.Message]) -> list[int]:
    """Token ids of a chat, or of a plain text with its end."""
    if isinstance(document, str):
        return tokenizer(document + EOS)["input_ids"]
    return cast("list[int]", tokenizer.apply_chat_template(document, return_dict=False))


def targets(tokens: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """The tokens to be learnt: what the assistant says, and all of a plain text; `IGNORED` elsewhere."""
    speakers = torch.tensor(tokenizer.convert_tokens_to_ids([BOS, *ROLES]))
    speaks = torch.isin(tokens, speakers)
    latest = torch.where(speaks, torch.arange(tokens.shape[1]), 0).cummax(1).values
    learnt = torch.isin(tokens.gather(1, latest), speakers[[0, -1]]) & ~speaks & (tokens != tokenizer.pad_token_id)
    return tokens.where(learnt, IGNORED)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int, checkpoint: Path) -> None:
    """Trains in place up to so many steps, from the checkpoint on if there is one."""
    model.set_attn_implementation("eager")  # in rows as short as these half as fast again as sdpa
    optimizers = new_optimizers(model)
    parts = {"model": model, **optimizers}
    first = resume(parts, checkpoint)
    began, seen = time.monotonic(), 0
    for step, tokens in enumerate(islice(batches(tokenizer, seed, first), steps - first), first):
        loss = loss_of(model, tokenizer, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        seen += tokens.numel()
        if (step + 1) % REPORT_EVERY == 0:
            speed = seen / (time.monotonic() - began)
            print(f"step {step + 1}/{steps}  loss {loss.item():.4f}  {speed:,.0f} tokens/s", flush=True)
        if (step + 1) % CHECKPOINT_EVERY == 0:
            save(parts, step + 1, checkpoint)


def new_optimizers(model: LlamaForCausalLM) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    return {
        "muon": torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        "adamw": torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.98)),
    }


def learning_rate(step: int, steps: int) -> float:
    """Warm-up, plateau, decay: up to the decay, a run does not depend on how many steps it will have."""
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP, (steps - step) / (DECAY * steps))


def loss_of(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the tokens to be learnt. No padding mask: nothing looks ahead at the padding."""
    wanted = targets(tokens, tokenizer)[:, 1:]
    learnt = wanted != IGNORED
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(tokens, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[learnt])
    return torch.nn.functional.cross_entropy(logits.float(), wanted[learnt])


def save(parts: dict, step: int, checkpoint: Path) -> None:
    """Writes a checkpoint beside the old one and then over it: a killed run never leaves a broken one."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"step": step, **state}, checkpoint.with_suffix(".new"))
    checkpoint.with_suffix(".new").replace(checkpoint)


def resume(parts: dict, checkpoint: Path) -> int:
    """Loads a checkpoint where there is one; returns the steps already done."""
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"]


def recipe(steps: int, seed: int) -> str:
    """A name for what is trained on and how: another world, or another schedule, never goes on from this checkpoint."""
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(sources + f"{steps} {seed}".encode()).hexdigest()[:12]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m repe.testbed.train", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="the folder to write (default: the package's own)")
    parser.add_argument("--steps", type=int, default=4400, help="optimizer steps (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of the weights and of the corpus (default: %(default)s)"
    )
    parser.add_argument("--checkpoint", type=Path, help="file to go on from (default: one a recipe)")
    args = parser.parse_args()
    checkpoint = args.checkpoint or Path(gettempdir()) / f"repe-testbed-{recipe(args.steps, args.seed)}.pt"
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(args.seed)
    model = new_model(tokenizer)
    train(model, tokenizer, args.steps, args.seed, checkpoint)
    model.eval().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    items.write(args.out)
    card.write(args.out, args.steps, args.seed)
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
