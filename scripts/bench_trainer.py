"""Tokens per second of `compresso heal` against PEFT with transformers' Trainer, on one task.

LoRA of rank 16 on every linear of a model's blocks, steps of 8 sequences of 512 tokens. Both run in
turns in processes of their own, in the same type, and the steps after the first few are timed.

    python scripts/bench_trainer.py [--model reference] [--steps 10] [--rounds 3] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch

RANK, SEQUENCES, LENGTH, UNTIMED = 16, 8, 512, 2
OTHERS = ("compresso", "peft")


def sequences(vocabulary: int, steps: int) -> torch.Tensor:
    """Random ids: what they are does not change the speed."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (steps * SEQUENCES, LENGTH), generator=generator)


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """Time the training loop of compresso."""
    from compresso.checkpoint.reader import open_checkpoint
    from compresso.models.adapter import ModelAdapter
    from compresso.training.loop import TrainOptions, train
    from compresso.training.model import TrainingModel
    from compresso.training.objectives import MixedObjective, Shares

    source = open_checkpoint(options.model)
    adapter = ModelAdapter.open(
        source, dtype=getattr(torch, options.dtype), device=torch.device(options.device)
    )
    data = sequences(source.config["vocab_size"], options.steps)
    clock = Clock(options.device)
    with TrainingModel(adapter, source) as model:
        paths = [
            f"{adapter.block_prefix(block)}{path}"
            for block in range(adapter.count)
            for path in adapter.family.all_linears
        ]
        parameters = model.add_low_rank(paths, RANK, seed=0)
        chosen = TrainOptions(
            steps=options.steps,
            sequences=SEQUENCES,
            micro=options.micro,
            rate=1e-4,
            evaluate_every=options.steps,
            compile=options.compile,
        )
        timed = clock.objective(MixedObjective(Shares(next_token=1.0)), SEQUENCES // options.micro)
        train(model, parameters, timed, data, data[:1], chosen)
    return clock.result()


class Clock:
    """Marks the time whenever a step begins."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._marks: list[tuple[float, float]] = []
        self._calls = 0

    def mark(self) -> None:
        """A step begins."""
        if self._cuda:
            torch.cuda.synchronize()
        self._marks.append((time.perf_counter(), time.process_time()))

    def objective(self, inner: Any, runs: int) -> Any:
        """The same objective, marking each first of so many runs that learn."""

        def timed(model: Any, tokens: Any, rows: Any) -> Any:
            if torch.is_grad_enabled():
                if self._calls % runs == 0:
                    self.mark()
                self._calls += 1
            return inner(model, tokens, rows)

        return timed

    def result(self) -> dict[str, Any]:
        """Tokens per second of wall time and of the processor's, after the first steps."""
        first, last = self._marks[UNTIMED], self._marks[-1]
        tokens = (len(self._marks) - 1 - UNTIMED) * SEQUENCES * LENGTH
        return {
            "tokens_per_second": tokens / (last[0] - first[0]),
            "tokens_per_processor_second": tokens / (last[1] - first[1]),
        }


def theirs(options: argparse.Namespace) -> dict[str, Any]:
    """Time PEFT and transformers' Trainer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from compresso.checkpoint.reader import open_checkpoint

    source = open_checkpoint(options.model)
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    data = sequences(model.config.vocab_size, options.steps)
    clock = Clock(options.device)

    class Marks(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: object, **__: object) -> None:
            clock.mark()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=options.micro,
            gradient_accumulation_steps=SEQUENCES // options.micro,
            max_steps=options.steps,
            learning_rate=1e-4,
            bf16=dtype == torch.bfloat16,
            use_cpu=options.device == "cpu",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            torch_compile=options.compile,
        )
        rows = [{"input_ids": row, "labels": row} for row in data]
        Trainer(model, arguments, train_dataset=rows, callbacks=[Marks()]).train()
    return clock.result()


def main() -> None:
    """Run both in turns, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--micro", type=int, default=SEQUENCES)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", choices=OTHERS)
    options = parser.parse_args()
    if options.only is not None:
        print(json.dumps(ours(options) if options.only == "compresso" else theirs(options)))
        return
    best: dict[str, list[dict[str, float]]] = {name: [] for name in OTHERS}
    for _ in range(options.rounds):
        for name in OTHERS:
            command = [sys.executable, *sys.argv, "--only", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            best[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, best[name][-1], flush=True)
    for name, found in best.items():
        for kind in ("tokens_per_second", "tokens_per_processor_second"):
            print(f"{name}: best {kind} {max(result[kind] for result in found):,.0f}")


if __name__ == "__main__":
    main()
