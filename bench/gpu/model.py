"""A model of LLaDA-8B's sizes with random weights, made where it runs, and its steps in the middle of a generation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from bench.cost.step_count import Kind, Setting
from bench.shapes.geometry import REAL
from sfs_triton.decoding.step_plan import Forward
from sfs_triton.kernels.control import COLUMN
from sfs_triton.models import ModelSpec, Transformer, Weights
from sfs_triton.models.weights import LayerWeights
from sfs_triton.runner import CudaGraphs, ModelRunner
from sfs_triton.runner.cuda_graph import capture_graph, capturing
from sfs_triton.runner.state import DecodeState

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


def stand_in(runner: ModelRunner, shape: Forward) -> Callable[[], None]:
    """Replace a captured graph where there is no GPU."""
    return lambda: runner.run_padded(shape)


class Rig:
    """Steps of one policy by one model; each starts in the middle of a generation, half of its response decided."""

    def __init__(self, model: Transformer, setting: Setting, name: str):
        self.model, self.setting, self.device = model, setting, model.device
        self.key = setting.key(name)
        canvas = prompt_ids(model.spec, setting.prompt) + [model.spec.mask_id] * setting.response
        length = CudaGraphs().canvas_length(len(canvas), model.spec.max_length)
        self.runner = ModelRunner(model, self.key, setting.batch, length, setting.response)
        sampler = setting.sampler(self.key.cache)
        for slot in range(setting.batch):
            self.runner.put(slot, canvas, setting.prompt, sampler, seed=0, step_cap=2**31)
        self._fresh: dict[str, torch.Tensor] = {}

    @property
    def state(self) -> DecodeState:
        return self.runner.state

    def shape(self, kind: Kind) -> Forward:
        """Return the padded shape of a step of this kind."""
        (shape,) = self.setting.plan(self.key, self.runner.length, kind).forwards
        return shape

    @torch.inference_mode()
    def put(self, kind: Kind) -> None:
        """Set the state to the start of a step of this kind; :meth:`restore` returns to it."""
        state, setting = self.state, self.setting
        decided = slice(setting.prompt, setting.middle)
        undecided = slice(setting.middle, setting.prompt + setting.response)
        ids = prompt_ids(self.model.spec, setting.middle - setting.prompt, 1)
        state.tokens[:, decided] = torch.tensor(ids).to(self.device)
        state.masked[:, decided] = False
        state.masked[:, undecided] = True
        state.commit_step[:, decided] = 0
        progress = setting.progress(kind, self.key.sampler.by_stage)
        state.control.copy_(torch.tensor([progress] * setting.batch))
        for tensor, value in ((state.dirty, 0), (state.history, 0), (state.forwarded, -1), (state.choice_score, 0.0)):
            tensor.fill_(value)
        state.candidate.copy_(state.masked)
        self._fresh = {name: tensor.clone() for name, tensor in self._tensors().items()}

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors of the state that are no views of others."""
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

    def run(self, shape: Forward) -> None:
        """Run a step as eager execution does: launch it, and wait for its output."""
        self.runner.run_padded(shape)
        self.runner.ring.count_launch()
        self.wait()

    def wait(self) -> None:
        self.runner.ring.wait(self.runner.ring.launched, LIMIT)

    def capture(self, shape: Forward) -> Callable[[], None]:
        """Capture a step of this shape by the engine's own code; return its replay."""
        self.runner.end()
        self.runner.warm_up(shape)
        with capturing():
            replay = (capture_graph if self.device.type == "cuda" else stand_in)(self.runner, shape)

        def counted() -> None:
            replay()
            self.runner.ring.count_launch()

        return counted
