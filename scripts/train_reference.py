"""Train a reference model: a small Llama, or Qwen2, on the Python sources of this machine.

One command, no download: `python scripts/train_reference.py --out DIR --hours 2`. `--family qwen2`
is a second architecture to measure on, with biases and a head of its own. The text is the
standard library and the installed packages of PACKAGES, less the files that compresso holds out
for evaluation (`compresso.calibration.stdlib.is_held_out`). The model is small enough for two CPU
cores, so everything here is chosen for loss per hour: Muon on the block matrices, bf16 matmuls
with fp32 master weights, a compiled step, short sequences first, and a schedule that follows
whichever of the token and the time budget runs out first, so that the rate always cools down.
"""

import argparse
import json
import math
import os
import random
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from compresso.calibration.stdlib import python_files, stdlib_files

# The package multiprocess and the directories COPIES repeat standard library files, some held out.
PACKAGES = (
    "transformers torch sympy pandas numpy networkx pygments pip datasets accelerate pyarrow PIL "
    "matplotlib fontTools mypy mypyc setuptools huggingface_hub mpmath pydantic _pytest torchgen "
    "rich fsspec compressed_tensors filelock anyio jinja2 packaging pyparsing bitsandbytes typer "
    "click regex httpx2 dateutil psutil dill"
)
COPIES = ("_vendor", "_distutils", "_vendored", "externals")
MAX_PACKAGE_BYTES, MAX_FILE_BYTES = 16_000_000, 400_000
VOCABULARY = 4096
END, PAD = "<|endoftext|>", "<|pad|>"
MICRO_TOKENS, SINGLE_UNTIL = 4096, 0.4  # then two micro batches a step
WINDOW, SHORT_WINDOW, SHORT_UNTIL = 512, 256, 0.67
WARM_UP_STEPS, COOL_FROM, FINAL_RATE = 60, 0.6, 0.01
SNAPSHOT_SECONDS = 600
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "qwen2": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 10,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
}


def training_texts(seed: int) -> list[str]:
    """Collect the training files in a shuffled order, so that no stretch is all of one package."""
    texts = [text for _, text in stdlib_files(held_out=False)]
    for package in PACKAGES.split():
        root = Path(sysconfig.get_path("purelib")) / package
        files = list(python_files(root, held_out=False, prefix=package + "/"))
        random.Random(seed).shuffle(files)
        size = 0
        for name, text in files:
            length = len(text.encode())
            if length > MAX_FILE_BYTES or not set(COPIES).isdisjoint(name.split("/")):
                continue
            if size + length > MAX_PACKAGE_BYTES:
                break
            texts.append(text)
            size += length
    random.Random(seed).shuffle(texts)
    return texts


def train_tokenizer(texts: list[str], family: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; END is id 0 and PAD id 1, as in the model's configuration."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if family == "qwen2":
        # AutoTokenizer splits and normalizes as this class does, whatever tokenizer.json says.
        stock = Qwen2Tokenizer().backend_tokenizer
        core.normalizer, core.pre_tokenizer = stock.normalizer, stock.pre_tokenizer
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1")
    options: dict[str, Any] = {"vocab_size": VOCABULARY, "special_tokens": [END, PAD]}
    options |= {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    core.train_from_iterator(texts, trainers.BpeTrainer(**options))
    names = {"bos_token": END, "eos_token": END, "pad_token": PAD}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=2 * WINDOW, **names)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Encode the texts into one stream, END after each."""
    parts = []
    for start in range(0, len(texts), 200):
        for ids in tokenizer(texts[start : start + 200], verbose=False)["input_ids"]:
            parts.append(np.array([*ids, 0], dtype=np.uint16))
    return np.concatenate(parts)


def prepare(work: Path, family: str, seed: int) -> tuple[PreTrainedTokenizerFast, np.ndarray]:
    """Make the tokenizer and the training stream, or reuse those of an earlier start."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokens.npy").exists():
        texts = training_texts(seed)
        print(f"{len(texts)} files, {sum(map(len, texts)) / 1e6:.1f} M characters", flush=True)
        tokenizer = train_tokenizer(texts, family)
        tokenizer.save_pretrained(work)
        np.save(work / "tokens.tmp.npy", encode(tokenizer, texts))
        os.replace(work / "tokens.tmp.npy", work / "tokens.npy")
    tokens = np.load(work / "tokens.npy")
    print(f"{len(tokens) / 1e6:.2f} M training tokens in an epoch", flush=True)
    return PreTrainedTokenizerFast.from_pretrained(work), tokens


def build_model(family: str) -> PreTrainedModel:
    """Make the untrained model, in fp32."""
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    common = {"vocab_size": VOCABULARY, "max_position_embeddings": 2 * WINDOW, **special}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **common, **SHAPES[family])
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()  # every block starts as the identity: faster and steadier early on
    return model


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Push the singular values of a stack of matrices (rows <= columns) towards 1.

    Five steps of the quintic Newton-Schulz iteration of Muon; bf16 is enough for a direction.
    """
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, poly, x, beta=3.4445)
    return x.float()


class Muon:
    """Momentum whose step is orthogonalized, for matrices.

    Matrices of one shape (up to transposition) are stacked, as many small products are slow.
    """

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        """Group the weights by shape and start their momentum at zero."""
        self.momentum, self.decay = 0.95, 0.05
        self.groups: dict[tuple[int, ...], list[torch.Tensor]] = {}
        for weight in weights:
            self.groups.setdefault(tuple(sorted(weight.shape)), []).append(weight)
        self.buffers = {
            shape: torch.zeros(len(group), *shape, device=group[0].device)
            for shape, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update every weight from its gradient; a step has the size of Adam's at 0.2 `rate`."""
        for shape, group in self.groups.items():
            flip = [weight.shape[0] > weight.shape[1] for weight in group]
            found = [weight.grad for weight in group if weight.grad is not None]
            grads = torch.stack([g.T if f else g for g, f in zip(found, flip, strict=True)])
            buffer = self.buffers[shape].lerp_(grads, 1 - self.momentum)
            update = orthogonalize(grads.lerp_(buffer, self.momentum))
            for weight, step, flipped in zip(group, update, flip, strict=True):
                weight.mul_(1 - rate * self.decay)
                weight.add_(step.T if flipped else step, alpha=-rate * 0.2 * shape[1] ** 0.5)


def batches(tokens: np.ndarray, window: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield micro batches of windows for ever: each epoch a new cut in a new order."""
    rng = np.random.default_rng(seed)
    rows = MICRO_TOKENS // window
    while True:
        offset = int(rng.integers(window))
        starts = rng.permutation((len(tokens) - offset - 1) // window) * window + offset
        for i in range(0, len(starts) - rows + 1, rows):
            cut = np.stack([tokens[s : s + window + 1] for s in starts[i : i + rows]])
            yield torch.from_numpy(cut.astype(np.int64))


def make_loss(model: PreTrainedModel, compiled: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the training loss of a batch of windows; compiled, no fp32 logits are stored."""

    def loss(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(batch.device.type, torch.bfloat16):
            hidden = model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
            logits = model.lm_head(hidden)
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    return torch.compile(loss, dynamic=False) if compiled else loss


def rate_at(step: int, progress: float) -> float:
    """Return the fraction of the peak rate: warm-up, constant, then linear to FINAL_RATE."""
    cooled = max(0.0, min(1.0, (progress - COOL_FROM) / (1 - COOL_FROM)))
    return min(1.0, (step + 1) / WARM_UP_STEPS) * (1 - (1 - FINAL_RATE) * cooled)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, target: Path) -> None:
    """Write the model in bf16 with its tokenizer; `target` is replaced whole or not at all."""
    new, old = target.with_name(target.name + ".new"), target.with_name(target.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    copy = AutoModelForCausalLM.from_config(model.config).bfloat16()
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(new)
    tokenizer.save_pretrained(new)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def train(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, tokens: np.ndarray
) -> PreTrainedModel:
    """Run the training loop until the tokens or the hours are used up."""
    model = build_model(args.family).to(args.device)
    if args.init:
        model.load_state_dict(AutoModelForCausalLM.from_pretrained(args.init).state_dict())
    if args.device == "cpu":  # there the fused attention's backward costs a third of a step
        model.set_attn_implementation("eager")
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers" not in n]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=args.adam_rate, betas=(0.9, 0.95), weight_decay=0.0)
    loss_of = make_loss(model, args.compile)
    window, stream = SHORT_WINDOW, batches(tokens, SHORT_WINDOW, args.seed)
    start = logged = saved = time.monotonic()
    step, seen, total, progress = 0, 0, 0.0, 0.0
    while progress < 1:
        if window == SHORT_WINDOW and progress > SHORT_UNTIL:
            window, stream = WINDOW, batches(tokens, WINDOW, args.seed + 1)
        micros = 1 if progress < SINGLE_UNTIL else 2  # early on more steps count, later less noise
        for _ in range(micros):
            loss = loss_of(next(stream).to(args.device)) / micros
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = rate_at(step, progress)
        adam.param_groups[0]["lr"] = args.adam_rate * scale
        adam.step()
        muon.step(args.muon_rate * scale)
        model.zero_grad(set_to_none=True)
        step, seen, now = step + 1, seen + micros * MICRO_TOKENS, time.monotonic()
        progress = max(seen / args.tokens, (now - start) / 3600 / args.hours)
        if step % 20 == 0:
            speed = 20 * micros * MICRO_TOKENS / (now - logged)
            line = f"step {step} tokens {seen / 1e6:.2f}M loss {total / 20:.4f} rate {scale:.3f}"
            print(f"{line} progress {progress:.3f} tokens/s {speed:.0f}", flush=True)
            logged, total = now, 0.0
        if now > saved + SNAPSHOT_SECONDS:
            saved = now
            save(model, tokenizer, args.out / "snapshot")
    return model


@torch.no_grad()
def evaluate(path: Path) -> dict[str, float]:
    """Measure the saved model, in fp32, on the held-out standard library in windows of WINDOW."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    stream = encode(tokenizer, [text for _, text in stdlib_files(held_out=True)])
    windows = torch.from_numpy(stream[: len(stream) // WINDOW * WINDOW].astype(np.int64))
    # In a byte-level vocabulary a token has one character for each byte; END stands for none.
    width = torch.tensor([len(t) for t in tokenizer.convert_ids_to_tokens(list(range(VOCABULARY)))])
    width[:2] = 0
    total, count, size = 0.0, 0, 0
    for batch in windows.view(-1, WINDOW).split(8):
        targets = batch[:, 1:].flatten()
        logits = model(batch).logits[:, :-1].flatten(0, 1)
        total += F.cross_entropy(logits, targets, reduction="sum").item()
        count += targets.numel()
        size += int(width[targets].sum())
    loss, bits = total / count, total / math.log(2) / size
    return {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits, "tokens": count}


def main() -> None:
    """Train, save and measure the model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the model")
    parser.add_argument("--family", choices=sorted(SHAPES), default="llama")
    parser.add_argument("--tokens", type=float, default=36e6, help="stop after this many tokens")
    parser.add_argument("--hours", type=float, default=1e3, help="or after this many hours")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: all cores)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--init", type=Path, help="go on from this snapshot of an earlier run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--muon-rate", type=float, default=5e-3)
    parser.add_argument("--adam-rate", type=float, default=3e-3)
    args = parser.parse_args()
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    args.device = "cuda" if cuda else "cpu"
    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    torch.manual_seed(args.seed)
    tokenizer, tokens = prepare(args.out / "work", args.family, args.seed)
    save(train(args, tokenizer, tokens), tokenizer, args.out / "model")
    print(json.dumps(evaluate(args.out / "model")), flush=True)


if __name__ == "__main__":
    main()
