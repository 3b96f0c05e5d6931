"""Tensors on their way from a file to a device: no fused copy on the host, and few bytes sent."""

from __future__ import annotations

import json
from dataclasses import fields
from itertools import cycle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sfs_triton
from sfs_triton.models import load_weights, read_spec
from sfs_triton.models import upload as module
from sfs_triton.models import weights as weights_module
from sfs_triton.models.upload import Upload

META = torch.device("meta")  # a device without data: what is sent there can be counted
BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16


class Sent(TorchDispatchMode):
    """Tensors that were sent from the CPU to the meta device, as (dtype before, dtype after, bytes); and host reads."""

    def __init__(self):
        super().__init__()
        self.copies, self.names = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.numel()]
        if isinstance(result, torch.Tensor) and result.is_meta:
            self.copies += [(x.dtype, result.dtype, x.nbytes) for x in given if x.device.type == "cpu" and x.dim()]
        return result


@pytest.fixture
def spec(checkpoint):
    return read_spec(json.loads((checkpoint / "config.json").read_text()))


def bytes_of(checkpoint) -> int:
    return sum(x.nbytes for x in load_file(checkpoint / "model.safetensors").values())


def tensors_of(weights):
    """Return every tensor of a record of weights, in order."""
    if isinstance(weights, torch.Tensor):
        return [weights]
    if isinstance(weights, tuple):
        return [x for part in weights for x in tensors_of(part)]
    return [x for field in fields(weights) for x in tensors_of(getattr(weights, field.name))] if weights else []


def in_16_bits(checkpoint) -> None:
    path = checkpoint / "model.safetensors"
    save_file({name: x.to(BF16) for name, x in load_file(path).items()}, path)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_parts_are_copied_to_their_place_on_the_device(checkpoint, spec, dtype):
    with Sent() as sent:
        made = load_weights(checkpoint, spec, META, dtype)
    assert made.layers[0].qkv.is_meta and made.layers[0].qkv.dtype == dtype
    assert "cat" not in sent.names  # nothing is fused on the host
    assert {(before, after) for before, after, _ in sent.copies} == {(dtype, dtype)}
    assert sum(size for *_, size in sent.copies) == bytes_of(checkpoint) * dtype.itemsize // 4


@pytest.mark.parametrize("quantised", [None, "fp8"])
def test_16_bits_of_a_file_are_widened_on_the_device(monkeypatch, checkpoint, spec, quantised):
    in_16_bits(checkpoint)
    checks = []
    monkeypatch.setattr(weights_module, "AT_ONCE", 256)
    monkeypatch.setattr(weights_module, "_check_finite", lambda *_: checks.append(1))  # meta has no numbers to read
    with Sent() as sent:
        load_weights(checkpoint, spec, META, F32, quantization=quantised)
    assert {(before, after) for before, after, _ in sent.copies} == {(BF16, BF16)}
    assert sum(size for *_, size in sent.copies) == bytes_of(checkpoint)
    assert len(checks) == (4 * spec.n_layers + 1) * bool(
        quantised
    )  # nothing else reads the device: that would raise here


@pytest.mark.parametrize(("given", "wanted", "sent_as"), [(F32, BF16, BF16), (BF16, F32, BF16), (BF16, F16, BF16)])
def test_copies_send_the_narrower_dtype_in_pieces(monkeypatch, given, wanted, sent_as):
    monkeypatch.setattr(module, "STAGED", 64)
    target, values = torch.empty(30, 7, dtype=wanted, device="meta"), torch.randn(7, 30).T.to(given)
    with Sent() as sent:
        Upload(META).copy(target, values)
    assert {(before, after) for before, after, _ in sent.copies} == {(sent_as, sent_as)}
    assert max(size for *_, size in sent.copies) == 64
    assert sum(size for *_, size in sent.copies) == values.numel() * sent_as.itemsize


def test_a_pinned_buffer_is_filled_when_its_last_content_has_left(monkeypatch):
    log = []

    class Event:
        def __init__(self, name: int):
            self.name = name

        def synchronize(self):
            log.append(("wait", self.name))

        def record(self, stream):
            log.append(("sent", self.name))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    upload = Upload(torch.device("cpu"))
    upload._staging = cycle((torch.empty(64, dtype=torch.uint8), Event(name)) for name in range(2))
    for size in (32, 5, 7):
        values = torch.randn(size)
        assert torch.equal(upload._send(values, BF16), values.to(BF16))
    assert log == [("wait", 0), ("sent", 0), ("wait", 1), ("sent", 1), ("wait", 0), ("sent", 0)]


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", [None, "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_holds_the_weights_that_a_cpu_holds(monkeypatch, checkpoint, dtype, quantization):
    monkeypatch.setattr(module, "STAGED", 1024)
    in_16_bits(checkpoint)
    engines = [sfs_triton.load(checkpoint, device, dtype, quantization=quantization) for device in ("cuda", "cpu")]
    there, here = (engine.model.weights for engine in engines)
    for a, b in zip(tensors_of(there), tensors_of(here), strict=True):
        assert a.is_cuda and a.dtype == b.dtype and torch.equal(a.cpu().view(torch.uint8), b.view(torch.uint8))
