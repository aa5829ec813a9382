# SPDX-License-Identifier: Apache-2.0
"""Trains the demo model and its draft sibling from nothing but the running Python's standard library.

Why: a clone must serve text at once, without a download, and every machine has this text. The result is two ordinary
Hugging Face checkpoint directories that share one tokenizer. Invariants:
    1. the batch of step i is a pure function of (seed, i), so a resumed run sees what an uninterrupted one would have
    2. every figure in a card is measured with the saved bf16 weights, read back from the disk (demo_model_report.py)
    3. nothing is pickled: weights and optimizer state are safetensors, the rest is JSON
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import BarColumn, Progress, TextColumn
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import demo_model_report as report
from demo_model_corpus import (
    BOS,
    END,
    EOS,
    LONG_CONTEXT,
    PAD,
    TOKENIZER_CONFIG,
    VOCAB_SIZE,
    Corpus,
    build_corpus,
    is_held_out,
    read_files,
    train_tokenizer,
)

TOKENS_PER_STEP = 8192
SHORT_CONTEXT = 512  # cheaper attention for most steps ...
LONG_CONTEXT_AFTER = 0.4  # ... but positions that training never showed cost half of the held-out perplexity, so from
LONG_CONTEXT_EVERY = 4  #   this part of the run on, one step in four is long
WARM_UP_STEPS = 100
FINAL_LEARNING_RATE = 0.02  # as a fraction of the peak

# config.json in the fields that every reader of Llama checkpoints knows.
LLAMA = json.loads(f"""{{
  "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": {VOCAB_SIZE}, "hidden_act": "silu",
  "max_position_embeddings": {LONG_CONTEXT}, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "attention_bias": false,
  "mlp_bias": false, "tie_word_embeddings": true, "initializer_range": 0.02, "bos_token_id": {BOS},
  "eos_token_id": {EOS}, "pad_token_id": {PAD}, "torch_dtype": "bfloat16", "use_cache": true}}""")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One of the two models: its config.json, and how long and how fast it learns.

    With `steps` a run ends after so many; without, the schedule is stretched to fill `minutes`.
    """

    name: str
    config: dict[str, Any]
    learning_rate: float
    folder: Path
    steps: int | None
    minutes: float

    def fraction(self, state: State) -> float:
        """Returns how much of the run is done, from 0 to 1 and beyond."""
        return state.step / self.steps if self.steps else state.elapsed_s / (self.minutes * 60)

    def new_model(self, seed: int) -> LlamaForCausalLM:
        """Returns the untrained model."""
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**self.config))


def make_recipes(args: argparse.Namespace) -> tuple[Recipe, Recipe]:
    """Returns the main model's recipe and the draft's; both together stay under 12 MiB."""
    layer = {"num_attention_heads": 4, "num_key_value_heads": 2}
    main = LLAMA | layer | {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 6, "head_dim": 64}
    draft = LLAMA | layer | {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 1, "head_dim": 32}
    return (
        Recipe(name="demo", config=main, learning_rate=2.5e-3, folder=args.out, steps=args.steps, minutes=args.minutes),
        Recipe(
            name="demo-draft",
            config=draft,
            learning_rate=5e-3,
            folder=args.draft_out,
            steps=args.draft_steps,
            minutes=args.draft_minutes,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class State:
    """How far a run has come; kept in the metadata of its resume file, so that one rename saves everything."""

    step: int = 0
    elapsed_s: float = 0.0


class TrainedModel(NamedTuple):
    """A model and how far it has come."""

    model: LlamaForCausalLM
    state: State


def sample_batch(corpus: Corpus, seed: int, step: int, context: int) -> Tensor:
    """Returns [B, context + 1] tokens: bos, then text from the start of some line, as a served prompt looks."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    num_rows = TOKENS_PER_STEP // context
    picks = torch.randint(len(corpus.starts), (num_rows,), generator=generator)
    rows = corpus.train[corpus.starts[picks][:, None] + torch.arange(context)]
    return torch.cat([torch.full((num_rows, 1), BOS), rows], dim=1)


def loss_function(model: LlamaForCausalLM, teacher: LlamaForCausalLM | None) -> Callable[[Tensor], Tensor]:
    """Returns the loss of a batch [B, T + 1]: against the text or, with a teacher, against the teacher's distribution.

    A draft earns its keep by agreeing with the main model, mistakes included, hence the second form.
    """

    def loss(batch: Tensor) -> Tensor:
        logits = report.logits_of(model, batch[:, :-1]).flatten(0, 1)
        if teacher is None:
            return functional.cross_entropy(logits, batch[:, 1:].flatten())
        with torch.no_grad():
            target = report.logits_of(teacher, batch[:, :-1]).flatten(0, 1).softmax(dim=-1)
        return functional.cross_entropy(logits, target)

    return loss


def make_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """Returns AdamW that decays matrices and leaves norm weights alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def learning_rate(peak: float, step: int, fraction: float) -> float:
    """Returns the rate of a step: linear warm-up times a cosine that ends at FINAL_LEARNING_RATE of the peak."""
    cosine = (1 + math.cos(math.pi * min(1.0, fraction))) / 2
    return peak * min(1.0, (step + 1) / WARM_UP_STEPS) * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine)


def context_of(step: int, fraction: float) -> int:
    """Returns the length of a step's rows."""
    is_long = fraction >= LONG_CONTEXT_AFTER and step % LONG_CONTEXT_EVERY == 0
    return LONG_CONTEXT if is_long else SHORT_CONTEXT


def save_state(path: Path, state: State, model: LlamaForCausalLM, optimizer: torch.optim.AdamW) -> None:
    """Writes all that a resumed run needs, atomically."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for kind in ("exp_avg", "exp_avg_sq"):
            tensors[f"{kind}.{name}"] = optimizer.state[parameter][kind]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"state": json.dumps(vars(state))})
    partial.replace(path)


def load_state(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW) -> State:
    """Restores what save_state wrote."""
    with safe_open(path, framework="pt") as file:
        state = State(**json.loads(file.metadata()["state"]))
        for name, parameter in model.named_parameters():
            parameter.data.copy_(file.get_tensor(f"model.{name}"))
            moments = {kind: file.get_tensor(f"{kind}.{name}") for kind in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(float(state.step)), **moments}
    return state


class Reporter:
    """Shows progress: a bar on a terminal, a plain line every 50 steps elsewhere."""

    def __init__(self, name: str) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.1f} % {task.fields[text]}"),
        )
        self._bar = Progress(*columns) if sys.stdout.isatty() else None
        self._name = name
        self._task = self._bar.add_task(name, total=1.0, text="") if self._bar else None

    def __enter__(self) -> Reporter:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, state: State, fraction: float, loss: float, tokens_per_s: float) -> None:
        """Reports a finished step."""
        eta_s = state.elapsed_s / max(fraction, 1e-6) * max(0.0, 1 - fraction)
        text = f"step {state.step}  loss {loss:.3f}  {tokens_per_s:,.0f} tokens/s  ETA {eta_s / 60:.0f} min"
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=min(1.0, fraction), text=text)
        elif state.step % 50 == 0:
            print(f"{self._name}: {fraction:6.1%}  {text}", flush=True)

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        (self._bar.console.print if self._bar else print)(f"{self._name}: {text}")
        sys.stdout.flush()


def train(recipe: Recipe, corpus: Corpus, args: argparse.Namespace, teacher: LlamaForCausalLM | None) -> TrainedModel:
    """Trains one model to the end of its recipe, from its resume file if asked to and there is one."""
    model = recipe.new_model(args.seed)
    optimizer, state, state_path = make_optimizer(model), State(), args.state / f"{recipe.name}.safetensors"
    if args.resume and state_path.exists():
        state = load_state(state_path, model, optimizer)
    loss_of = loss_function(model, teacher)
    if args.compile:
        loss_of = torch.compile(loss_of, dynamic=False)
    saved_s = state.elapsed_s
    with Reporter(recipe.name) as reporter:
        while (fraction := recipe.fraction(state)) < 1:
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe.learning_rate, state.step, fraction)
            context = context_of(state.step, fraction)
            loss = loss_of(sample_batch(corpus, args.seed, state.step, context))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            spent_s = time.perf_counter() - began
            state = State(step=state.step + 1, elapsed_s=state.elapsed_s + spent_s)
            reporter.step(state, recipe.fraction(state), loss.item(), TOKENS_PER_STEP / spent_s)
            if state.elapsed_s - saved_s > args.save_every_s or recipe.fraction(state) >= 1:
                saved_s = state.elapsed_s
                save_state(state_path, state, model, optimizer)
                nll = report.held_out_nll(model, corpus.held_out)
                reporter.say(f"step {state.step} saved; held-out perplexity {math.exp(nll):.2f}")
    return TrainedModel(model, state)


def export(recipe: Recipe, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """Writes a checkpoint; each file is replaced by a rename, so a reader never sees half of one."""
    folder = recipe.folder
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    partial = folder / "model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # save_file leaves it private to its writer
    partial.replace(folder / "model.safetensors")
    generation = {"bos_token_id": BOS, "eos_token_id": [EOS, END], "pad_token_id": PAD}
    documents = {
        "config.json": recipe.config,
        "generation_config.json": {**generation, "do_sample": True, "temperature": 0.7, "top_p": 0.95},
        "tokenizer_config.json": TOKENIZER_CONFIG,
    }
    report.write_text(folder / "tokenizer.json", tokenizer.to_str())
    for name, document in documents.items():
        report.write_text(folder / name, json.dumps(document, indent=2) + "\n")


def make_facts(
    corpus: Corpus, args: argparse.Namespace, recipes: tuple[Recipe, ...], states: list[State]
) -> report.Facts:
    """Collects what the cards tell of the run."""
    return report.Facts(
        num_files=corpus.num_files,
        num_bytes=corpus.num_bytes,
        num_train_tokens=len(corpus.train),
        held_out_files=corpus.held_out_files,
        held_out_bytes=corpus.held_out_bytes,
        steps=states[0].step,
        draft_steps=states[1].step,
        tokens_per_step=TOKENS_PER_STEP,
        minutes=states[0].elapsed_s / 60,
        draft_minutes=states[1].elapsed_s / 60,
        threads=args.threads,
        seed=args.seed,
        learning_rates=(recipes[0].learning_rate, recipes[1].learning_rate),
        contexts=(SHORT_CONTEXT, LONG_CONTEXT),
    )


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    root = Path(__file__).resolve().parents[1]
    models_folder = root / "model_repository" / "engine" / "1"
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=models_folder / "demo", help="checkpoint folder of the main model")
    parser.add_argument("--draft-out", type=Path, default=models_folder / "demo-draft", help="and of the draft")
    parser.add_argument("--minutes", type=float, default=60, help="training time of the main model")
    parser.add_argument("--draft-minutes", type=float, default=10, help="and of the draft")
    parser.add_argument("--steps", type=int, help="steps of the main model, instead of --minutes: repeatable")
    parser.add_argument("--draft-steps", type=int, help="and of the draft")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of the matrix products")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="needs a C++ compiler")
    parser.add_argument("--state", type=Path, default=root / "build" / "demo-model", help="folder of the resume files")
    parser.add_argument("--save-every-s", type=float, default=300, help="training time between two resume files")
    parser.add_argument("--resume", action="store_true", help="go on from the resume files")
    return parser.parse_args()


def load_or_train_tokenizer(files: dict[str, str], args: argparse.Namespace) -> Tokenizer:
    """Returns the tokenizer that the resume files were made with, or a new one, which it keeps beside them."""
    kept = args.state / "tokenizer.json"
    if args.resume and kept.exists():
        return Tokenizer.from_file(str(kept))
    tokenizer = train_tokenizer([text for text in files.values() if not is_held_out(text)])
    args.state.mkdir(parents=True, exist_ok=True)
    report.write_text(kept, tokenizer.to_str())
    return tokenizer


def main() -> None:
    """Trains both models, writes both checkpoints, measures what was written, writes both cards."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    files = read_files()
    tokenizer = load_or_train_tokenizer(files, args)
    corpus = build_corpus(tokenizer, files, args.seed)
    print(
        f"{corpus.num_files} files, {len(corpus.train):,} training tokens, {len(corpus.held_out):,} held out",
        flush=True,
    )
    recipes = make_recipes(args)
    for recipe in recipes:
        if not recipe.folder.exists():  # untrained but complete: the checkpoint can be wired up while it learns
            export(recipe, recipe.new_model(args.seed), tokenizer)
    model, state = train(recipes[0], corpus, args, teacher=None)
    export(recipes[0], model, tokenizer)
    draft, draft_state = train(recipes[1], corpus, args, teacher=model)
    export(recipes[1], draft, tokenizer)
    facts = make_facts(corpus, args, recipes, [state, draft_state])
    figures = report.measure(args.out, args.draft_out, corpus.files, corpus.held_out, corpus.held_out_bytes)
    print(figures)
    report.write_text(args.out / "README.md", report.card(args.out, facts, figures))
    report.write_text(args.draft_out / "README.md", report.draft_card(args.draft_out, figures))


if __name__ == "__main__":
    main()
