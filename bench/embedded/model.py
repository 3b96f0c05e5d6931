"""The embedded model as a trainable ``nn.Module`` with LLaDA's tensor names.

Training needs gradients and nothing else, so this stays apart from the package's inference forward; a test holds the
two to equal logits. One residual channel is a constant: every embedding row carries :data:`CONSTANT_VALUE` in channel
:data:`CONSTANT_CHANNEL`, and nothing ever writes there (:meth:`LLaDA.pin_constant_channel`). Inflation to other shapes
uses it as a bias.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

CONSTANT_CHANNEL, CONSTANT_VALUE = 0, 1.0
POINTER_LAYER, POINTER_HEADS = 2, 2  # whose attention training may guide


def config_dict(
    vocab_size: int,
    layers: int = 4,
    d_model: int = 256,
    heads: int = 8,
    mlp: int = 768,
    *,
    mask_id: int,
    eos_id: int,
    bos_id: int,
    max_length: int = 512,
) -> dict:
    """A ``config.json`` with the keys of LLaDA-8B's own."""
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "block_type": "llama",
        "activation_type": "silu",
        "d_model": d_model,
        "n_heads": heads,
        "n_kv_heads": heads,
        "n_layers": layers,
        "mlp_hidden_size": mlp,
        "vocab_size": vocab_size,
        "embedding_size": vocab_size,
        "max_sequence_length": max_length,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "layer_norm_type": "rms",
        "rms_norm_eps": 1e-5,
        "layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "attention_layer_norm": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "weight_tying": False,
        "scale_logits": False,
        "input_emb_norm": False,
        "alibi": False,
        "block_group_size": 1,
        "multi_query_attention": None,
        "mask_token_id": mask_id,
        "eos_token_id": eos_id,
        "pad_token_id": eos_id,
        "bos_token_id": bos_id,
        "torch_dtype": "bfloat16",
    }


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return (x * cos + torch.cat((-high, low), -1) * sin).to(x.dtype)


class Block(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        d, mlp, eps = config["d_model"], config["mlp_hidden_size"], config["rms_norm_eps"]
        self.heads = config["n_heads"]
        self.attn_norm, self.ff_norm = RMSNorm(d, eps), RMSNorm(d, eps)
        self.q_proj, self.k_proj, self.v_proj, self.attn_out = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.ff_proj, self.up_proj = (nn.Linear(d, mlp, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(mlp, d, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, source: torch.Tensor | None = None):
        """Hidden states ``[B, L, D]``; with ``source [B, L]`` also the log of the attention that its positions get.

        That attention is the mean of the first :data:`POINTER_HEADS` heads.
        """
        batch, length, d = x.shape
        h = self.attn_norm(x)
        q, k, v = (
            p(h).view(batch, length, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        # written out: torch's fused attention has a slow backward on a CPU, by half of a training step in bfloat16
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        mixed = torch.softmax(scores, -1, dtype=scores.dtype) @ v
        x = x + self.attn_out(mixed.transpose(1, 2).reshape(batch, length, d))
        h = self.ff_norm(x)
        x = x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))
        if source is None:
            return x
        logs = scores[:, :POINTER_HEADS].float().log_softmax(-1)
        at = source[:, None, :, None].expand(-1, POINTER_HEADS, -1, -1)
        return x, logs.gather(-1, at)[..., 0].logsumexp(1) - math.log(POINTER_HEADS)


class LLaDA(nn.Module):
    """Logits for token ids ``[B, L]``; ``rows`` (boolean ``[B, L]``) limits the head to those positions."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        d = config["d_model"]
        transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config["vocab_size"], d),
                "blocks": nn.ModuleList(Block(config) for _ in range(config["n_layers"])),
                "ln_f": RMSNorm(d, config["rms_norm_eps"]),
                "ff_out": nn.Linear(d, config["vocab_size"], bias=False),
            }
        )
        self.model = nn.ModuleDict({"transformer": transformer})
        head_dim = d // config["n_heads"]
        inverse = config["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angle = torch.arange(config["max_sequence_length"]).float()[:, None] * inverse
        self.register_buffer("cos", torch.cat((angle.cos(), angle.cos()), -1), persistent=False)
        self.register_buffer("sin", torch.cat((angle.sin(), angle.sin()), -1), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        d, layers = self.config["d_model"], self.config["n_layers"]
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith("attn_out.weight") or ".blocks." in name and (".ff_out." in name)
                std = 1.0 if ".wte." in name else d**-0.5
                nn.init.normal_(p, std=std / (2 * layers) ** 0.5 if residual else std)
        nn.init.zeros_(self.model["transformer"]["ff_out"].weight)
        self.pin_constant_channel()

    @torch.no_grad()
    def pin_constant_channel(self) -> None:
        """Restore the constant channel after an optimiser step, and keep the final norm's gain there positive."""
        transformer = self.model["transformer"]
        transformer["wte"].weight[:, CONSTANT_CHANNEL] = CONSTANT_VALUE
        for block in transformer["blocks"]:
            block.attn_out.weight[CONSTANT_CHANNEL] = 0
            block.ff_out.weight[CONSTANT_CHANNEL] = 0
        transformer["ln_f"].weight[CONSTANT_CHANNEL].clamp_(min=0.1)

    def forward(self, ids: torch.Tensor, rows: torch.Tensor | None = None, source: torch.Tensor | None = None):
        """Logits; with ``source [B, L]`` also the log of the attention to those positions in :data:`POINTER_LAYER`."""
        transformer = self.model["transformer"]
        x = transformer["wte"](ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for index, block in enumerate(transformer["blocks"]):
            if source is None or index != POINTER_LAYER:
                x = block(x, cos, sin)
            else:
                x, pointed = block(x, cos, sin, source)
        x = transformer["ln_f"](x if rows is None else x[rows])
        logits = transformer["ff_out"](x)
        return logits if source is None else (logits, pointed)
