"""Train the embedded model from scratch: ``python -m bench.embedded.train RUN_DIR``.

Masked-diffusion training as LLaDA's fine-tuning has it: the prompt stays, a random share of the response is masked, and
the response is padded with end-of-text to the end of the canvas. Tasks go from easy to hard (:data:`RECIPES`). Matrices
are trained with Muon, everything else with AdamW. A run resumes from ``RUN_DIR/state.pt`` when interrupted; progress is
judged by exact answers on held-out problems and written to ``RUN_DIR/log.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from . import tasks
from .model import LLaDA, config_dict
from .vocabulary import BOS, EOS, MASK, build_tokenizer, chat

SEPARATOR = "\n---\n"


@dataclass(frozen=True)
class Phase:
    """A stretch of training: until which share of all steps, on which canvases, with which mix of tasks."""

    until: float
    lengths: tuple[tuple[int, float], ...]  # (canvas length, weight)
    tokens: int  # a batch
    mix: dict[str, float]
    rows: tuple[int, int] = (3, 7)
    columns: tuple[int, int] = (2, 4)
    fields: str | None = None  # of records: their kinds, where fixed
    variable: float = 0.0  # share of record problems with variable fields


@dataclass(frozen=True)
class Recipe:
    """A whole training run: the model's size, the optimiser's pace, and the phases from easy to hard."""

    phases: tuple[Phase, ...]
    steps: int
    rate: float
    layers: int
    max_length: int
    warm_up: int = 200
    decay: float = 0.5  # share of the steps over which the rate falls to zero


EASY = {"records": 0.8, "drill": 0.2}
MIXED = {"records": 0.6, "words": 0.1, "countdown": 0.05, "drill": 0.25}
RECORDS_FIRST = {"records": 0.8, "words": 0.08, "countdown": 0.04, "drill": 0.08}
EVEN = {"records": 0.35, "words": 0.3, "countdown": 0.15, "drill": 0.2}

RECIPES = {
    # after the run that made the shipped model, which changed course on the way (its card): not run as it stands
    "cpu": Recipe(
        phases=(
            Phase(0.06, ((96, 1.0),), 3072, EASY, rows=(1, 2), columns=(1, 2)),
            Phase(0.25, ((160, 1.0),), 5120, MIXED, rows=(2, 4), columns=(1, 3)),
            Phase(0.65, ((128, 0.2), (192, 0.6), (256, 0.17), (512, 0.03)), 5120, RECORDS_FIRST, (2, 6), (1, 3)),
            Phase(1.0, ((160, 0.2), (208, 0.5), (256, 0.28), (512, 0.02)), 5120, RECORDS_FIRST, (3, 10), fields="wn"),
        ),
        steps=11300,
        rate=3e-3,
        layers=4,
        max_length=512,
    ),
    # not run yet: every field variable, canvases up to a prompt of 1,100 and a response of 1,024
    "gpu": Recipe(
        phases=(
            Phase(0.05, ((96, 1.0),), 24576, EASY, rows=(1, 2), columns=(1, 2)),
            Phase(0.2, ((160, 1.0),), 32768, MIXED, rows=(2, 4), columns=(1, 3), variable=0.2),
            Phase(0.85, ((192, 0.3), (256, 0.5), (512, 0.2)), 49152, EVEN, rows=(2, 8), columns=(1, 4), variable=0.5),
            Phase(1.0, ((256, 0.4), (512, 0.2), (1024, 0.2), (2124, 0.2)), 65536, EVEN, (2, 8), (1, 4), variable=0.5),
        ),
        steps=20000,
        rate=2e-3,
        layers=8,
        max_length=2176,
    ),
}


class Batches:
    """Training batches by step: token ids ``[B, L]`` and prompt lengths ``[B]``, a pure function of (seed, step)."""

    def __init__(self, tokenizer, recipe: Recipe, seed: int):
        self.tokenizer, self.recipe, self.seed = tokenizer, recipe, seed
        self.eos = tokenizer.token_to_id(EOS)

    def __len__(self) -> int:
        return self.recipe.steps

    def phase(self, step: int) -> Phase:
        phases = self.recipe.phases
        return next(p for p in phases if step < p.until * self.recipe.steps or p is phases[-1])

    def _problem(self, rng: random.Random, phase: Phase) -> tasks.Problem:
        kind = rng.choices(list(phase.mix), weights=phase.mix.values())[0]
        options = {}
        if kind == "records":
            options = {
                "rows": phase.rows,
                "columns": phase.columns,
                "fields": phase.fields,
                "variable": rng.random() < phase.variable,
            }
        elif kind == "countdown" and rng.random() < 0.3:
            options = {"largest": 20}
        return tasks.sample(kind, rng, held_out=False, **options)

    def _row(self, rng: random.Random, phase: Phase, length: int) -> tuple[list[int], int]:
        """One training example of exactly ``length`` tokens and the length of its prompt.

        Long ones are packed: solved examples before the question, and several questions answered in one response.
        """
        while True:
            problem = self._problem(rng, phase)
            question, answer = problem.question, problem.answer
            shots = ""
            while length >= 512 and rng.random() < 1 - 128 / length:
                other = self._problem(rng, phase)
                if rng.random() < 0.5:
                    shots += chat(other.question)[len(BOS) if shots else 0 :] + other.answer + "<|eot_id|>"
                else:
                    question, answer = question + SEPARATOR + other.question, answer + SEPARATOR + other.answer
            text = shots + chat(question)[len(BOS) if shots else 0 :]
            prompt = self.tokenizer.encode(text, add_special_tokens=False).ids
            response = self.tokenizer.encode(answer, add_special_tokens=False).ids
            room = length - len(prompt) - len(response)
            if room >= 1:
                return prompt + response + [self.eos] * room, len(prompt)

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = random.Random(f"{self.seed}-{step}")
        phase = self.phase(step)
        length = rng.choices([n for n, _ in phase.lengths], weights=[w for _, w in phase.lengths])[0]
        rows = [self._row(rng, phase, length) for _ in range(phase.tokens // length)]
        return torch.tensor([r for r, _ in rows]), torch.tensor([p for _, p in rows])


def mask_response(ids: torch.Tensor, prompt: torch.Tensor, mask_id: int, generator: torch.Generator):
    """Mask a random share of each response: ``(noised ids, masked [B, L])``.

    A quarter of the rows keep everything before a random position, which is how a canvas looks when it is decoded from
    left to right.
    """
    batch, length = ids.shape
    position = torch.arange(length)
    share = (torch.rand(batch, 1, generator=generator) + torch.arange(batch)[:, None] / batch) % 1
    share = share.clamp(min=0.02)
    masked = torch.rand(batch, length, generator=generator) < share
    start = prompt[:, None] + torch.rand(batch, 1, generator=generator) * (length - prompt[:, None]) * 0.8
    ordered = torch.rand(batch, 1, generator=generator) < 0.25
    masked = torch.where(ordered, (masked | (share > 0.5)) & (position >= start), masked)
    masked &= position >= prompt[:, None]
    return ids.masked_fill(masked, mask_id), masked


def optimisers(model: LLaDA, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embedding, head and norms."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        (matrices if ".blocks." in name and parameter.dim() == 2 else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate(step: int, recipe: Recipe) -> float:
    """Warm-up, constant, and linear decay over the last part."""
    falling = (recipe.steps - step) / (recipe.decay * recipe.steps)
    return recipe.rate * min(1.0, (step + 1) / recipe.warm_up, max(0.02, falling))


@torch.no_grad()
def quick_exact(model: LLaDA, tokenizer, kind: str, n: int, threshold: float = 0.9, **options) -> float:
    """Share of ``n`` held-out problems answered exactly by simple threshold decoding on a canvas of 256."""
    mask_id, eos = tokenizer.token_to_id(MASK), tokenizer.token_to_id(EOS)
    rng, rows, problems = random.Random(1), [], []
    while len(rows) < n:
        problem = tasks.sample(kind, rng, held_out=True, **options)
        prompt = tokenizer.encode(chat(problem.question), add_special_tokens=False).ids
        if len(prompt) + len(tokenizer.encode(problem.answer).ids) < 256:
            problems.append(problem)
            rows.append(prompt + [mask_id] * (256 - len(prompt)))
    prompts = [row.index(mask_id) for row in rows]
    ids = torch.tensor(rows, device=model.cos.device)
    masked = ids == mask_id
    while masked.any():
        logits = model(ids, masked).float()
        confidence = torch.full(ids.shape, -1.0, device=ids.device)
        token = torch.zeros_like(ids)
        confidence[masked], token[masked] = logits.softmax(-1).max(-1)
        commit = (confidence > threshold) | ((confidence == confidence.amax(1, keepdim=True)) & masked)
        ids = torch.where(commit, token, ids)
        masked = masked & ~commit
    right = 0
    for row, start, problem in zip(ids.tolist(), prompts, problems, strict=True):
        answer = row[start:]
        right += tasks.correct(problem, tokenizer.decode(answer[: answer.index(eos)] if eos in answer else answer))
    return right / n


class Run:
    """Model, optimisers and counters of one training run, saved and resumed as a whole."""

    def __init__(self, folder: Path, recipe: Recipe, seed: int = 0, device: str = "cpu"):
        self.folder, self.recipe, self.seed, self.device = folder, recipe, seed, torch.device(device)
        torch.manual_seed(seed)
        self.tokenizer = build_tokenizer()
        ids = {f"{k}_id": self.tokenizer.token_to_id(t) for k, t in (("mask", MASK), ("eos", EOS), ("bos", BOS))}
        size = math.ceil(self.tokenizer.get_vocab_size() / 128) * 128
        self.config = config_dict(size, layers=recipe.layers, max_length=recipe.max_length, **ids)
        self.model = LLaDA(self.config).to(self.device)
        self.optimisers = optimisers(self.model, recipe.rate)
        self.step = self.tokens = 0
        self.seconds = 0.0

    def save(self) -> None:
        state = {
            "identity": self.identity(),
            "model": self.model.state_dict(),
            "optimisers": [o.state_dict() for o in self.optimisers],
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }
        partial = self.folder / "state.pt.partial"
        torch.save(state, partial)
        os.replace(partial, self.folder / "state.pt")

    def identity(self) -> dict:
        """Return the settings in which a saved state and the run that resumes it must agree."""
        return {"config": self.config, "seed": self.seed, "tokenizer": self.tokenizer.to_str()}

    def resume(self) -> None:
        """Take up ``state.pt`` where there is one; refuse one of another model, tokenizer or seed."""
        path = self.folder / "state.pt"
        if path.exists():
            state = torch.load(path, weights_only=True, map_location=self.device)
            for name, mine in self.identity().items():
                if state["identity"][name] != mine:
                    raise SystemExit(f"error: {path} was saved with another {name}")
            self.model.load_state_dict(state["model"])
            for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
            self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]

    def log(self, **entry) -> None:
        entry = {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds), **entry}
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
        print(entry, flush=True)

    def train_step(self, ids: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """One optimiser step; the loss, still on the device."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        noised, masked = mask_response(ids, prompt, self.config["mask_token_id"], generator)
        wanted = ids[masked].to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(noised.to(self.device), masked.to(self.device))
        loss = F.cross_entropy(logits.float(), wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(self.step, self.recipe)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.model.pin_constant_channel()
        self.step += 1
        self.tokens += ids.numel()
        return loss.detach()

    def evaluate(self) -> dict[str, float]:
        """Share of held-out problems answered exactly, a few of each kind at the last phase's difficulty."""
        last = self.recipe.phases[-1]
        records = {"rows": last.rows, "columns": last.columns, "fields": last.fields}
        with torch.autocast(self.device.type, torch.bfloat16):
            exact = {
                "records": quick_exact(self.model, self.tokenizer, "records", 32, **records),
                "words": quick_exact(self.model, self.tokenizer, "words", 16),
                "countdown": quick_exact(self.model, self.tokenizer, "countdown", 16),
                "drill": quick_exact_drill(self.model, self.tokenizer),
            }
        return {name: round(share, 4) for name, share in exact.items()}

    def train(self, log_every: int = 50, save_every: int = 250, evaluate_every: int = 1000, workers: int = 0) -> None:
        """Go on to the last step. ``workers`` processes prepare batches; 0 does it in between."""
        batches = Batches(self.tokenizer, self.recipe, self.seed)
        loader = DataLoader(batches, batch_size=None, sampler=range(self.step, len(batches)), num_workers=workers)
        losses, began = [], time.monotonic()
        for ids, prompt in loader:
            losses.append(self.train_step(ids, prompt))
            if self.step % log_every == 0:
                mean = round(torch.stack(losses).mean().item(), 4)
                self.seconds += time.monotonic() - began
                began = time.monotonic()
                self.log(loss=mean, length=ids.shape[1])
                losses = []
            if self.step % save_every == 0 or self.step == len(batches):
                self.save()
            if self.step % evaluate_every == 0 or self.step == len(batches):
                self.log(**self.evaluate())
                began = time.monotonic()


@torch.no_grad()
def quick_exact_drill(model: LLaDA, tokenizer, n: int = 256) -> float:
    """Share of single equations ``a+b=?`` whose result is the argmax, over sums and differences."""
    rng, rows, wanted = random.Random(2), [], []
    mask_id, eos = tokenizer.token_to_id(MASK), tokenizer.token_to_id(EOS)
    for _ in range(n):
        a, b = sorted((rng.randint(1, 99), rng.randint(1, 99)), reverse=True)
        op = rng.choice("+-")
        text = chat(f"Solve:\n{a}{op}{b}\n2*3") + f"{a}{op}{b}={MASK}\n2*3=6"
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        rows.append(ids + [eos] * (64 - len(ids)))
        wanted.append(tokenizer.token_to_id(str(a + b if op == "+" else a - b)))
    ids = torch.tensor(rows, device=model.cos.device)
    return (model(ids, ids == mask_id).argmax(-1).cpu() == torch.tensor(wanted)).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate-every", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare batches")
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.recipe]
    if arguments.steps:
        recipe = replace(recipe, steps=arguments.steps)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = Run(arguments.folder, recipe, arguments.seed, device)
    run.resume()
    run.log(parameters=sum(p.numel() for p in run.model.parameters()), recipe=arguments.recipe, device=device)
    run.train(evaluate_every=arguments.evaluate_every, workers=arguments.workers)


if __name__ == "__main__":
    main()
