"""Train the embedded model: ``python -m bench.embedded.train RUN_DIR --start CHECKPOINT``.

Masked-diffusion training as LLaDA's fine-tuning has it: the prompt stays, a share of the response is masked, and the
response is padded with end-of-text. Tasks go from easy to hard (:data:`RECIPES`), a new run may start from a
checkpoint's weights, and matrices are trained with Muon, everything else with AdamW. The same command resumes an
interrupted run from ``RUN_DIR/state.pt``; progress is judged by exact answers on held-out problems and written to
``RUN_DIR/log.jsonl``. The rate stays constant until the last ``--decay`` steps before ``--steps``, so a run can be made
longer by a larger ``--steps``.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from sfs_triton.text.codec import TextCodec

from . import problems, tasks
from .model import LLaDA, config_dict
from .vocabulary import BOS, CHAT_TEMPLATE, EOS, MASK, TURN_END, build_tokenizer, chat

GROUP = 8  # batches whose problems are drawn together and sorted by length: little padding


@dataclass(frozen=True)
class Phase:
    """A stretch of training up to step ``until``, with a mix of :data:`KINDS` and canvases of up to ``longest``.

    ``packed`` is the share of examples with solved examples before the question or with several questions.
    """

    until: int
    mix: dict[str, float]
    longest: int = 256
    packed: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """A whole training run: the model's size, the optimiser's pace, and the phases from easy to hard."""

    phases: tuple[Phase, ...]
    steps: int
    rate: float
    tokens: int  # per batch, about
    layers: int = 4
    max_length: int = 512
    warm_up: int = 100
    guide: float = 0.3  # weight of the guided attention's loss
    decay: int = 3000  # steps over which the rate falls to zero at the end


# The measured sets, and easier tasks that show the way there.
KINDS: dict[str, tuple[str, dict]] = {
    **{name: (kind, options) for name, (kind, options, _) in problems.SECOND_EDITION.items()},
    "records-short": ("records", {"rows": (1, 4), "columns": (1, 4)}),
    "ledger-short": ("ledger", {"movements": (1, 6)}),
    "ledger-check-short": ("ledger", {"movements": (1, 12), "check": True}),
    "ledger-middle": ("ledger", {"movements": (6, 12)}),
    "sums": ("drill", {"ledger": True}),
    "copy": ("copy", {}),
}
FIRST = {
    "copy": 0.35,
    "ledger-short": 0.2,
    "ledger-check-short": 0.05,
    "sums": 0.1,
    "records-short": 0.15,
    "fill-4": 0.1,
    "ledger-middle": 0.05,
}
EVEN = {
    "copy": 0.04,
    "records": 0.12,
    "records-variable": 0.12,
    "records-short": 0.04,
    "ledger-check-short": 0.06,
    "ledger-short": 0.06,
    "ledger-middle": 0.12,
    "ledger": 0.1,
    "sums": 0.1,
    "fill-4": 0.09,
    "fill-6": 0.15,
}

RECIPES = {
    "cpu": Recipe(
        phases=(
            Phase(4000, FIRST, longest=200),
            Phase(12000, EVEN, longest=448),
            Phase(10**9, EVEN, longest=512, packed=0.1),
        ),
        steps=40000,
        rate=3e-3,
        tokens=3072,
    ),
}


class Batches:
    """Training batches by step, a pure function of (seed, step).

    Token ids ``[B, L]``, prompt lengths ``[B]`` and, for each response token that is copied from the prompt, its
    source's position, -1 elsewhere ``[B, L]``.
    """

    def __init__(self, tokenizer, recipe: Recipe, seed: int):
        self.tokenizer, self.recipe, self.seed = tokenizer, recipe, seed
        self.eos = tokenizer.token_to_id(EOS)
        pieces = (tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size()))
        values = {word for words in tasks.WORD_COLUMNS.values() for word in words}
        self.value = [piece.isdigit() or piece in values for piece in pieces]
        self.tail = len(tokenizer.encode(chat("").partition(TURN_END)[1] + chat("").partition(TURN_END)[2]).ids)
        self._group: tuple[int, list] = (-1, [])

    def __len__(self) -> int:
        return self.recipe.steps

    def _sources(self, kind: str, prompt: list[int], response: list[int]) -> list[int]:
        """The prompt's position that each response token is copied from, -1 for none.

        Values have the same order on both sides, so they are aligned; a grid's cells have the same places.
        """
        if kind == "fill":
            start = len(prompt) - len(response) - self.tail
            return [start + at for at in range(len(response))]
        ours, theirs = ([at for at, i in enumerate(ids) if self.value[i]] for ids in (prompt, response))
        matcher = difflib.SequenceMatcher(None, [prompt[at] for at in ours], [response[at] for at in theirs], False)
        sources = [-1] * len(response)
        for block in matcher.get_matching_blocks():
            for step in range(block.size):
                sources[theirs[block.b + step]] = ours[block.a + step]
        return sources

    def _example(self, rng: random.Random, phase: Phase) -> tuple[list[int], int, list[int]]:
        """Token ids of one example with one end-of-text, the length of its prompt, and the response's sources."""
        while True:
            kind, options = KINDS[rng.choices(list(phase.mix), weights=phase.mix.values())[0]]
            parts = [tasks.sample(kind, rng, held_out=False, **options)]
            packed = rng.random() < phase.packed
            while packed and len(parts) < 4 and (len(parts) < 2 or rng.random() < 0.5):
                parts.append(tasks.sample(kind, rng, held_out=False, **options))
            shots = ""
            if len(parts) > 1 and rng.random() < 0.5:
                shots = "".join(chat(p.question)[len(BOS) :] + p.answer + TURN_END for p in parts[:-1])
                parts = parts[-1:]
            problem = tasks.several(parts)
            text = BOS + shots + chat(problem.question)[len(BOS) :]
            prompt = self.tokenizer.encode(text, add_special_tokens=False).ids
            response = self.tokenizer.encode(problem.answer, add_special_tokens=False).ids
            if len(prompt) + len(response) < phase.longest:
                alone = len(parts) == 1 and not shots
                sources = self._sources(kind, prompt, response) if alone else [-1] * len(response)
                return prompt + response + [self.eos], len(prompt), sources

    def _draw(self, group: int) -> list[tuple[torch.Tensor, ...]]:
        """The batches of one group: equally many tokens each, sorted by length, in random order."""
        rng = random.Random(f"{self.seed}-{group}")
        phase = next(p for p in self.recipe.phases if group * GROUP < p.until)
        examples, total, wanted = [], 0, GROUP * self.recipe.tokens
        while total < wanted or len(examples) < GROUP:
            examples.append(self._example(rng, phase))
            total += len(examples[-1][0])
        examples.sort(key=lambda example: len(example[0]))
        cuts, at = [[] for _ in range(GROUP)], 0
        for example in examples:
            cuts[min(GROUP - 1, at * GROUP // total)].append(example)
            at += len(example[0])
        cuts = [cut for cut in cuts if cut] or [examples]
        batches = [self._padded(rng, cuts[i % len(cuts)], phase) for i in range(GROUP)]
        rng.shuffle(batches)
        return batches

    def _padded(self, rng: random.Random, examples: list, phase: Phase) -> tuple[torch.Tensor, ...]:
        """Pad with end-of-text, now and then by far more than is needed: that is what a canvas looks like."""
        longest = max(len(ids) for ids, _, _ in examples)
        tail = rng.randint(8, 160) if rng.random() < 0.15 else rng.randint(0, 8)
        length = min(longest + tail, max(phase.longest, longest))
        examples = rng.sample(examples, max(1, min(len(examples), self.recipe.tokens * 5 // 4 // length)))
        rows = [ids + [self.eos] * (length - len(ids)) for ids, _, _ in examples]
        sources = [[-1] * prompt + found + [-1] * (length - prompt - len(found)) for _, prompt, found in examples]
        return torch.tensor(rows), torch.tensor([prompt for _, prompt, _ in examples]), torch.tensor(sources)

    def __getitem__(self, step: int) -> tuple[torch.Tensor, ...]:
        if self._group[0] != step // GROUP:
            self._group = (step // GROUP, self._draw(step // GROUP))
        return self._group[1][step % GROUP]


def mask_response(
    ids: torch.Tensor,
    prompt: torch.Tensor,
    mask_id: int,
    numbers: torch.Tensor,
    words: torch.Tensor,
    generator: torch.Generator,
):
    """Mask a share of each response: ``(noised ids, masked [B, L])``.

    A quarter of the rows mask mainly the ids marked in ``numbers [vocabulary]``, and another one those and ``words``:
    the tokens that depend on others are not punctuation, and decoding by confidence leaves them to the end. A quarter
    masks every fourth number alone, which in a ledger is every other balance: the one before each is seen, so that each
    is a sum to be learnt.
    Half of the other rows keep everything before a random position, as a canvas decoded from left to right does.
    Small shares are drawn more often than large ones, for the same reason.
    """
    batch, length = ids.shape

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    position = torch.arange(length)
    inside = position >= prompt[:, None]
    share = ((draw(batch, 1) + torch.arange(batch)[:, None] / batch) % 1) ** 1.5
    share = share.clamp(min=0.02).expand(batch, length)
    pattern, ordered = draw(batch, 1), draw(batch, 1) < 0.5
    content, fourth = pattern < 0.5, pattern > 0.75
    chosen = torch.where(pattern < 0.25, numbers[ids], numbers[ids] | words[ids])
    rare = share**3
    share = torch.where(content, torch.where(chosen, share.sqrt(), rare), share)
    start = prompt[:, None] + draw(batch, 1) * (length - prompt[:, None])
    after = torch.where(draw(batch, 1) < 0.5, share.clamp(min=0.9), share)  # as it is, or nearly all that follows
    after = torch.where(content & ~chosen, share, after)
    share = torch.where(ordered, torch.where(position >= start, after, 0.0), share)
    masked = (draw(batch, length) < share) & inside
    number = numbers[ids] & inside
    masked = torch.where(fourth, number & ((number.cumsum(1) + (draw(batch, 1) * 4).long()) % 4 == 0), masked)
    first = torch.where(inside, draw(batch, length), -1.0).argmax(1)  # at least one position of each row
    masked[torch.arange(batch), first] |= ~masked.any(1)
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
    falling = (recipe.steps - step) / recipe.decay
    return recipe.rate * min(1.0, (step + 1) / recipe.warm_up, max(0.02, falling))


@torch.no_grad()
def exact(model: LLaDA, tokenizer, chosen: list[tasks.Problem], one_step: bool) -> float:
    """Share of problems answered exactly: the most confident token per step, or all tokens in one step.

    A canvas is a little longer than its answer, to save time; the final measure (``evaluate``) has a fixed length.
    """
    mask_id, eos = tokenizer.token_to_id(MASK), tokenizer.token_to_id(EOS)
    prompts = [tokenizer.encode(chat(p.question), add_special_tokens=False).ids for p in chosen]
    rooms = [8 + len(tokenizer.encode(p.answer).ids) for p in chosen]
    length = max(len(prompt) + room for prompt, room in zip(prompts, rooms, strict=True))
    rows = [p + [mask_id] * room + [eos] * (length - room - len(p)) for p, room in zip(prompts, rooms, strict=True)]
    ids = torch.tensor(rows, device=model.cos.device)
    while (masked := ids == mask_id).any():
        active = masked.any(1)
        part, masked = ids[active], masked[active]
        confidence = torch.full(part.shape, -1.0, device=ids.device)
        token = torch.zeros_like(part)
        confidence[masked], token[masked] = model(part, masked).float().softmax(-1).max(-1)
        best = torch.zeros_like(masked).scatter(1, confidence.argmax(1, keepdim=True), True)
        ids[active] = torch.where(masked if one_step else best, token, part)
    answers = [row[len(p) : len(p) + room] for row, p, room in zip(ids.tolist(), prompts, rooms, strict=True)]
    texts = [tokenizer.decode(a[: a.index(eos)] if eos in a else a) for a in answers]
    return sum(tasks.correct(p, text) for p, text in zip(chosen, texts, strict=True)) / len(chosen)


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
        pieces = [self.tokenizer.id_to_token(i) or "" for i in range(size)]
        self.numbers = torch.tensor([piece.isdigit() for piece in pieces])
        self.words = torch.tensor([piece.strip().isalpha() for piece in pieces])
        self.step = self.tokens = 0
        self.seconds = 0.0

    def start(self, checkpoint: Path) -> None:
        """Take a checkpoint's weights; layers that it lacks start as the identity."""
        tensors = load_file(checkpoint / "model.safetensors")
        missing, unexpected = self.model.load_state_dict({k: t.float() for k, t in tensors.items()}, strict=False)
        if unexpected:
            raise SystemExit(f"error: {checkpoint} has tensors that the model lacks: {unexpected[:3]}")
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in missing and "out.weight" in name:
                    parameter.zero_()

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

    def train_step(self, ids: torch.Tensor, prompt: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """One optimiser step; its loss and that of the guided attention, still on the device."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        mask_id = self.config["mask_token_id"]
        noised, masked = mask_response(ids, prompt, mask_id, self.numbers, self.words, generator)
        wanted = ids[masked].to(self.device)
        # between a mean over tokens, in which rows with few masks vanish, and a mean over rows, which is noisy
        weight = (masked.sum(1, keepdim=True) ** -0.5).expand_as(masked)[masked].to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            source = source.to(self.device)
            logits, pointed = self.model(noised.to(self.device), masked.to(self.device), source.clamp(min=0))
        loss = (F.cross_entropy(logits.float(), wanted, reduction="none") * weight).sum() / weight.sum()
        # looking up is learnt much sooner when the attention is told where to look
        copied = (source[masked] >= 0) * weight
        guide = -(pointed[masked] * copied).sum() / copied.sum().clamp(min=1e-6)
        (loss + self.recipe.guide * guide).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(self.step, self.recipe)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.model.pin_constant_channel()
        self.step += 1
        self.tokens += ids.numel()
        return torch.stack((loss.detach(), guide.detach()))

    def evaluate(self, n: int = 12) -> dict[str, list[float]]:
        """Share of held-out problems answered exactly by one token per step and by one step, for each set.

        Of one step it takes four times as many problems. The seed is not that of the final measure.
        """
        text, result = TextCodec(self.tokenizer, CHAT_TEMPLATE, {}), {}
        for name in problems.SECOND_EDITION:
            chosen = problems.second_edition(name, 4 * n, text, seed=1)
            with torch.autocast(self.device.type, torch.bfloat16):
                shares = (
                    exact(self.model, self.tokenizer, chosen[:n], False),
                    exact(self.model, self.tokenizer, chosen, True),
                )
            result[name] = [round(share, 4) for share in shares]
        return result

    def train(self, log_every: int = 50, save_every: int = 100, evaluate_every: int = 1000, workers: int = 0) -> None:
        """Go on to the last step. ``workers`` processes prepare batches; 0 does it in between."""
        batches = Batches(self.tokenizer, self.recipe, self.seed)
        loader = DataLoader(batches, batch_size=None, sampler=range(self.step, len(batches)), num_workers=workers)
        losses, began = [], time.monotonic()
        for batch in loader:
            losses.append(self.train_step(*batch))
            if self.step % log_every == 0:
                loss, guide = (round(mean, 4) for mean in torch.stack(losses).mean(0).tolist())
                self.seconds += time.monotonic() - began
                began = time.monotonic()
                self.log(loss=loss, guide=guide)
                losses = []
            if self.step % save_every == 0 or self.step == len(batches):
                self.save()
            if self.step % evaluate_every == 0 or self.step == len(batches):
                self.log(**self.evaluate())
                began = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="cpu")
    parser.add_argument("--start", type=Path, metavar="CHECKPOINT", help="weights that a new run starts from")
    parser.add_argument("--steps", type=int, help="at which the rate reaches zero; default: the recipe's")
    parser.add_argument("--decay", type=int, help="steps over which the rate falls; default: the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate-every", type=int, default=1000)
    parser.add_argument("--compile", action="store_true", help="by torch.compile: 1.4 times as fast on a CPU")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare batches")
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.recipe]
    given = {name: getattr(arguments, name) for name in ("steps", "decay") if getattr(arguments, name)}
    recipe = replace(recipe, **given)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = Run(arguments.folder, recipe, arguments.seed, device)
    if arguments.start:
        run.start(arguments.start)
    run.resume()
    if arguments.compile:
        for block in run.model.model["transformer"]["blocks"]:
            block.compile(dynamic=True)
    run.log(parameters=sum(p.numel() for p in run.model.parameters()), recipe=arguments.recipe, device=device)
    run.train(evaluate_every=arguments.evaluate_every, workers=arguments.workers)


if __name__ == "__main__":
    main()
