"""The kernel of torch that attention calls on a GPU, and the arguments that it gets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sfs_triton.ops.torch.attention import attend_on_gpu, attention, sdpa_kernel

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
T4, A100, RTX4090, H100, B200 = (7, 5), (8, 0), (8, 9), (9, 0), (10, 0)
ATEN = torch.ops.aten


class StandIn(TorchDispatchMode):
    """Compute on a CPU, from their own arguments, the two kernels that exist for GPUs only; checks what they demand."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is ATEN._scaled_dot_product_flash_attention.default:
            (q, k, v), bias = args, None
        elif func is ATEN._scaled_dot_product_efficient_attention.default:
            q, k, v, bias, log_sum = args
            assert not log_sum and q.shape[1] == k.shape[1] == v.shape[1]
        else:
            return func(*args, **kwargs)
        self.called.append(func.overloadpacket.__name__)
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        if bias is not None:
            assert bias.shape == (*q.shape[:3], k.shape[2]) and bias.dtype == q.dtype
            assert bias.stride(-1) == 1 and bias.stride(0) % 8 == 0
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scale = q.shape[-1] ** -0.5 if kwargs.get("scale") is None else kwargs["scale"]
        logits = q.double() @ k.double().transpose(-1, -2) * scale
        probabilities = (logits if bias is None else logits + bias).softmax(-1)
        out = (probabilities @ v.double()).to(q.dtype)
        return (out,) * 4 if len(args) == 5 else (out, out, out, out, 0, 0, out, out, out)


@pytest.mark.parametrize("capability", [A100, RTX4090, H100, B200])
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
@pytest.mark.parametrize("masked", [False, True])
def test_no_dtype_of_a_model_is_left_to_torch(capability, dtype, masked):
    name = sdpa_kernel(dtype, 128, masked=masked, capability=capability, flash=True)
    assert name == ("efficient" if masked or dtype == F32 else "flash")


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "flash", "wanted"),
    [
        (BF16, 128, H100, False, "efficient"),  # a build without flash attention
        (BF16, 264, H100, True, "efficient"),  # too wide for it
        (BF16, 20, H100, True, "any"),  # not aligned
        (F32, 20, H100, True, "efficient"),
        (F32, 18, H100, True, "any"),
        (F64, 128, H100, True, "any"),
        (F16, 128, T4, True, "efficient"),
        (BF16, 128, T4, True, "any"),
        (F32, 128, T4, True, "efficient"),
        (F16, 128, (0, 0), False, "efficient"),
    ],
)
def test_other_cases(dtype, head_dim, capability, flash, wanted):
    assert sdpa_kernel(dtype, head_dim, masked=False, capability=capability, flash=flash) == wanted


def inputs(kv_heads: int, n_keys: int = 37):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 5, 4, 16, generator=generator)
    k, v = (torch.randn(3, n_keys, kv_heads, 16, generator=generator) for _ in range(2))
    ranges = torch.tensor([[0, 20, 0, 0], [3, 9, 11, 30], [4, 4, 7, 7]], dtype=torch.int32)
    return q, k, v, ranges


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("kernel", ["flash", "efficient", "any"])
def test_each_kernel_gets_what_gives_the_result_of_a_cpu(kernel, kv_heads, masked, scale):
    if kernel == "flash" and masked:
        pytest.skip("takes no mask")
    q, k, v, ranges = inputs(kv_heads)
    wanted = attention(q, k, v, key_range=ranges if masked else None, scale=scale)
    inside = None
    if masked:
        at = torch.arange(37)
        inside = torch.stack([(at >= a) & (at < b) | (at >= c) & (at < d) for a, b, c, d in ranges.tolist()])
    with StandIn() as stand_in:
        out = attend_on_gpu(*(x.transpose(1, 2) for x in (q, k, v)), inside, scale, kernel).transpose(1, 2)
    assert stand_in.called == ([] if kernel == "any" else [f"_scaled_dot_product_{kernel}_attention"])
    some = slice(None) if inside is None else inside.any(-1)  # a query without keys is zeroed by the caller
    torch.testing.assert_close(out[some], wanted[some])


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
def test_torch_has_the_kernels_under_these_names_and_with_these_arguments(kernel):
    q, k = torch.empty(2, 8, 5, 64, dtype=BF16, device="meta"), torch.empty(2, 8, 70, 64, dtype=BF16, device="meta")
    inside = torch.empty(2, 70, dtype=torch.bool, device="meta") if kernel == "efficient" else None
    assert attend_on_gpu(q, k, k, inside, None, kernel).shape == q.shape


def test_groups_are_expanded_before_torch_would_choose_its_slowest_kernel(monkeypatch):
    seen = []
    real = F.scaled_dot_product_attention

    def noted(q, k, v, **options):
        seen.append((k.shape[1], options.get("enable_gqa", False)))
        return real(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    q, k, v, _ = inputs(2)
    attend_on_gpu(*(x.transpose(1, 2) for x in (q, k, v)), torch.ones(3, 37, dtype=torch.bool), None, "any")
    assert seen == [(4, False)]


@pytest.mark.parametrize(("n", "n_keys"), [(0, 5), (3, 0)])
def test_nothing_to_attend_is_left_to_torch(n, n_keys):
    q, k = torch.ones(2, 4, n, 16), torch.ones(2, 4, n_keys, 16)
    for kernel in ("flash", "efficient"):
        assert torch.equal(attend_on_gpu(q, k, k, None, None, kernel), torch.zeros(2, 4, n, 16))
