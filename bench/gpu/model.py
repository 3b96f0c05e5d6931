"""A model of LLaDA-8B's sizes with random weights, made where it runs, and its steps in the middle of a generation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from bench.cost.step_count import Kind, Setting
from bench.shapes.geometry import REAL
from sfs_triton.decoding.caching import Shape
from sfs_triton.kernels.control import COLUMN, CONTROL, FAST, SLOW
from sfs_triton.models import ModelSpec, Transformer, Weights
from sfs_triton.models.weights import LayerWeights
from sfs_triton.runner.choose import LoopChoice
from sfs_triton.runner.cuda_graph import ReplayLoop, capture_graph
from sfs_triton.runner.state import DecodeState
from sfs_triton.runner.step import Step
from sfs_triton.scheduling.lane import Lane
from sfs_triton.scheduling.request import Kind as RowKind

LIMIT = 15.0  # seconds that a step may take
TOY_SETTING = Setting(prompt=40, response=32, capacity=16, span_cap=8, block_length=8, span=6)
TOY_SIZES = {"n_layers": 2, "d_model": 64, "n_heads": 4, "n_kv_heads": 4, "mlp": 96, "vocab_size": 500}
TOY_IDS = {"mask_id": 499, "eos_id": 498, "pad_id": 498, "max_length": 256}


def sizes(toy: bool) -> tuple[ModelSpec, Setting, torch.dtype]:
    """Sizes of the model and of its decoding, and the number format."""
    spec = REAL["llada-8b"]
    if toy:
        return replace(spec, **TOY_SIZES, **TOY_IDS), TOY_SETTING, torch.float32
    return spec, Setting(), torch.bfloat16


def random_weights(spec: ModelSpec, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Weights:
    """Normal numbers of the size that keeps activations near 1; layer by layer, so that nothing is there twice."""
    generator = torch.Generator(device).manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        out = torch.empty((rows, columns), device=device, dtype=dtype)
        return out.normal_(0.0, columns**-0.5, generator=generator)

    def gain() -> torch.Tensor:
        return torch.empty(spec.d_model, device=device, dtype=dtype).uniform_(0.5, 1.5, generator=generator)

    def layer() -> LayerWeights:
        return LayerWeights(
            attn_norm=gain(),
            qkv=matrix(spec.d_model + 2 * spec.kv_width, spec.d_model),
            qkv_bias=None,
            out=matrix(spec.d_model, spec.d_model),
            mlp_norm=gain(),
            gate_up=matrix(2 * spec.mlp, spec.d_model),
            down=matrix(spec.d_model, spec.mlp),
        )

    embedding = matrix(spec.vocab_size, spec.d_model)
    layers = tuple(layer() for _ in range(spec.n_layers))
    return Weights(embedding=embedding, layers=layers, norm=gain(), head=matrix(spec.vocab_size, spec.d_model))


def prompt_ids(spec: ModelSpec, length: int, seed: int = 0) -> list[int]:
    """Token ids that are none of the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, min(spec.mask_id, spec.eos_id), (length,), generator=generator).tolist()


def stand_in(step: Step, shape: Shape) -> Callable[[], None]:
    """Replace a captured graph where there is no GPU."""
    step.run([shape])
    step.mailbox.posted += 1
    return lambda: step.run([shape])


class Rig:
    """The steps of one policy by one model, half of whose response is decided; every one starts from there."""

    def __init__(self, model: Transformer, setting: Setting, name: str):
        self.setting, self.policy = setting, setting.policy(name)
        self.sampler = setting.sampler(self.policy)
        self.device = model.device
        canvas = prompt_ids(model.spec, setting.prompt) + [model.spec.mask_id] * setting.response
        length = ReplayLoop().canvas_length(len(canvas), model.spec.max_length)
        kind = RowKind(self.sampler.form(), self.policy, trace=False, frames=False)
        lane = Lane(model, kind, setting.batch, length, setting.response, LoopChoice("eager", model.device))
        self.model, self.step = model, lane.step
        self.step.expect([setting.prompt], [setting.response])
        for slot in range(setting.batch):
            self.step.join(
                slot,
                canvas,
                setting.prompt,
                block_length=getattr(self.sampler, "block_length", None),
                seed=0,
                cap=2**31,
                sampling=self.sampler.sampling_values(),
            )
        self._fresh: dict[str, torch.Tensor] = {}

    @property
    def state(self) -> DecodeState:
        return self.step.state

    def control(self, kind: Kind) -> list[int]:
        """Return a sequence's control values before a step of this kind: the response is decided up to its middle."""
        setting, blocks = self.setting, not self.step.by_stage
        start, end = setting.prompt, setting.prompt + setting.response
        half = self._half()
        values = {
            **{"start": start, "end": end, "limit": end, "cap": 2**31 - 1, "estimate": -1},
            "block": (half - start) // setting.block_length if blocks else 0,
            "block_start": half if blocks else start,
            "block_end": min(half + setting.block_length, end) if blocks else end,
            "span_start": half,
            "span_end": min(half + setting.span, end) if kind.fast else -1,
            "stage": FAST if kind.fast else SLOW,
            **{"stage_step": kind.k, "step": kind.step, "masks_left": end - half},
        }
        return [values.get(column, 0) for column in CONTROL]

    def _half(self) -> int:
        setting = self.setting
        return setting.prompt + setting.response // 2 // setting.block_length * setting.block_length

    def shape(self, kind: Kind) -> Shape:
        """Return the fixed shape of a step of this kind."""
        return self.step.fixed(self.step.views([self.control(kind)] * self.setting.batch), kind.step)

    @torch.inference_mode()
    def put(self, kind: Kind) -> None:
        """Set the state to the start of a step of this kind; :meth:`restore` returns to it."""
        state, half = self.state, self._half()
        decided = slice(self.setting.prompt, half)
        state.tokens[:, decided] = torch.tensor(prompt_ids(self.model.spec, half - self.setting.prompt, 1)).to(
            self.device
        )
        state.masked[:, decided] = False
        state.masked[:, half : self.setting.prompt + self.setting.response] = True
        state.commit_step[:, decided] = 0
        state.control.copy_(torch.tensor([self.control(kind)] * self.setting.batch))
        for tensor, value in ((state.dirty, 0), (state.history, 0), (state.forwarded, -1), (state.choice_score, 0.0)):
            tensor.fill_(value)
        state.candidate.copy_(state.masked)
        self._fresh = {name: tensor.clone() for name, tensor in self._tensors().items()}

    def _tensors(self) -> dict[str, torch.Tensor]:
        """All that a state consists of, views of other tensors left out."""
        views = {*COLUMN, "token", "score"}
        found = {name: getattr(self.state, name, None) for name in DecodeState.__slots__ if name not in views}
        return {name: x for name, x in found.items() if isinstance(x, torch.Tensor)}

    @torch.inference_mode()
    def restore(self) -> None:
        for name, tensor in self._tensors().items():
            tensor.copy_(self._fresh[name])

    def outcome(self) -> dict[str, list]:
        """Return the state's values after a step."""
        return {"control": self.state.control.tolist(), "tokens": self.state.tokens.tolist()}

    def run(self, shape: Shape) -> None:
        """Run a step as the eager loop does: start it, and wait for its output."""
        self.step.run([shape])
        self.step.mailbox.posted += 1
        self.wait()

    def wait(self) -> None:
        self.step.mailbox.wait(self.step.mailbox.posted, LIMIT)

    def capture(self, shape: Shape) -> Callable[[], None]:
        """Capture a step of this shape by the replay loop's own code; return its replay."""
        with torch.inference_mode():
            self.state.done.fill_(1)
            replay = (capture_graph if self.device.type == "cuda" else stand_in)(self.step, shape)

        def counted() -> None:
            replay()
            self.step.mailbox.posted += 1

        counted.graph = getattr(replay, "__self__", None)
        return counted
