"""The host ring: the kernels and their torch twin against a list of the published outputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.common.testing import Guards, poison
from sfs_triton.kernels import publish as kernel
from sfs_triton.kernels.launch import recording
from sfs_triton.kernels.publish import PublishConfig, publish, publish_config
from sfs_triton.ops.torch import publish as twin

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64)


def values(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(shape, generator=generator) * 100).to(torch.int64 if dtype == torch.bool else dtype).to(dtype)


def assert_publish(shapes: list[tuple[int, ...]], dtypes: list[torch.dtype], depth: int, start: int, n: int, **options):
    """Publish ``n`` times from ``start`` copies on: a slot holds the last that was published to it, or still poison."""
    generator = torch.Generator().manual_seed(depth)
    for function in (publish, twin.publish):
        guards = Guards(DEVICE)
        kinds = list(zip(shapes, dtypes, strict=True))
        sources = [guards.empty(*shape, dtype=dtype) for shape, dtype in kinds]
        rings = [guards.empty(depth, *shape, dtype=dtype) for shape, dtype in kinds]
        counter, published = guards.empty(1, dtype=torch.int64).fill_(start), guards.empty(1, dtype=torch.int64)
        slots = [[torch.full(shape, poison(dtype), dtype=dtype)] * depth for shape, dtype in kinds]
        for time in range(start, start + n):
            for source, ring in zip(sources, slots, strict=True):
                ring[time % depth] = values(generator, source.shape, source.dtype)
                source.copy_(ring[time % depth])
            function(sources, rings, counter, published, **(options if function is publish else {}))
            assert counter.item() == published.item() == time + 1
            for source, ring, slot in zip(sources, rings, slots, strict=True):
                assert torch.equal(_bits(ring.cpu()), _bits(torch.stack(slot)))
                assert torch.equal(_bits(source.cpu()), _bits(slot[time % depth]))
        guards.check()


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


SHAPES = st.sampled_from([(), (1,), (0,), (7,), (2, 22), (3, 0), (3, 1, 5), (2, 300)])


@settings(max_examples=30, deadline=None)
@given(
    kinds=st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=3),
    depth=st.integers(1, 5),
    start=st.sampled_from([0, 3, 2**40]),
    size=st.sampled_from([None, 4, 64]),
    with_bell=st.booleans(),
)
def test_equals_its_twin_and_a_list(kinds, depth, start, size, with_bell):
    options = {} if size is None else {"config": PublishConfig(size, 1, with_bell)}
    assert_publish([shape for shape, _ in kinds], [dtype for _, dtype in kinds], depth, start, 3, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_large_sources(dtype):
    assert_publish([(2, 40_000), (16, 22)], [dtype, torch.int64], 3, 2, 2)


@pytest.mark.parametrize(
    ("sizes", "launches"),
    [([], ["publish"]), ([0], ["publish"]), ([8192], ["publish"]), ([8193], ["copy", "publish"]),
     ([50, 9000], ["copy", "publish"]), ([9000, 9000], ["copy", "copy", "publish"]), ([50, 60], ["copy", "publish"])],
)  # fmt: skip
def test_the_smallest_source_goes_with_the_bell(sizes, launches):
    sources = [torch.empty(size, dtype=torch.int64, device="meta") for size in sizes]
    rings = [torch.empty((4, size), dtype=torch.int64, device="meta") for size in sizes]
    counter, published = (torch.empty(1, dtype=torch.int64, device="meta") for _ in range(2))
    with recording() as recorded:
        publish(sources, rings, counter, published)
    assert [launch.kernel.__name__.strip("_").removesuffix("_kernel") for launch in recorded] == launches
    together = [size for size in sizes if 0 < size <= 8192]
    last = recorded[-1].arguments
    assert last["n"] == min(together, default=0) and last["HAS_SOURCE"] == bool(together)


def test_configuration():
    assert [publish_config(n, itemsize) for n, itemsize in ((0, 1), (44, 8), (8192, 8), (8193, 8), (65536, 1))] == [
        PublishConfig(1, 1, True),
        PublishConfig(64, 1, True),
        PublishConfig(4096, 16, True),
        PublishConfig(1024, 4, False),
        PublishConfig(32768, 16, True),
    ]


def test_the_twin_needs_no_data():
    source, ring = torch.empty((2, 3), device="meta"), torch.empty((4, 2, 3), device="meta")
    counter, published = (torch.empty(1, dtype=torch.int64, device="meta") for _ in range(2))
    twin.publish([source], [ring], counter, published)


def test_refuses_what_it_cannot_take(device):
    source = torch.zeros((2, 3), device=device)
    ring = torch.zeros((4, 2, 3), device=device)
    counter, published = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
    fine = {"sources": [source], "rings": [ring], "counter": counter, "published": published}
    publish(**fine)
    for message, changes in {
        "1 sources and 0 rings": {"rings": []},
        r"sources\[0\] has dtype float16": {"sources": [source.half()], "rings": [ring.half()]},
        r"sources\[0\] has strides": {"sources": [torch.zeros((3, 2), device=device).T]},
        r"sources\[0\] is on device 'meta'": {"sources": [source.to("meta")]},
        r"rings\[0\] has shape \[4, 2, 2\]": {"rings": [torch.zeros((4, 2, 2), device=device)]},
        r"rings\[0\] has shape \[\]": {"rings": [torch.zeros((), device=device)]},
        r"rings\[0\] has dtype int32": {"rings": [ring.int()]},
        r"rings\[0\] has strides": {"rings": [torch.zeros((8, 2, 3), device=device)[::2]]},
        r"rings\[0\] is on device 'meta'": {"rings": [ring.to("meta")]},
        r"rings\[1\] has shape \[3, 2, 3\], not \[4, 2, 3\]": {"sources": [source] * 2, "rings": [ring, ring[:3]]},
        r"rings\[0\] has no slots": {"rings": [ring[:0]]},
        "counter has shape": {"counter": torch.zeros((), dtype=torch.int64, device=device)},
        "counter has dtype int32": {"counter": counter.int()},
        "published has dtype float32": {"published": published.float()},
        "published is on device 'meta'": {"published": published.to("meta")},
    }.items():
        with pytest.raises(ValueError, match=message):
            publish(**{**fine, **changes})
    assert published.item() == 1


def test_places_that_kernels_can_reach():
    """Memory of their own device, and pinned memory of the host; the last is not to be had without a GPU."""

    class Place:
        def __init__(self, device: str, pinned: bool = False):
            self.device, self.is_pinned = torch.device(device), lambda: pinned

    gpu = torch.device("cuda", 0)
    kernel._check_place("published", Place("cuda:0"), gpu)
    kernel._check_place("published", Place("cpu", pinned=True), gpu)
    kernel._check_place("published", Place("cpu"), torch.device("cpu"))
    for place, device, message in (
        (Place("cpu"), gpu, "published is in memory of the host that is not pinned"),
        (Place("cuda:1"), gpu, "published is on device 'cuda:1'"),
        (Place("cuda:0"), torch.device("cpu"), "published is on device 'cuda:0'"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel._check_place("published", place, device)


@pytest.mark.gpu
def test_a_host_reads_the_number_and_finds_what_was_published():
    """The host only reads memory while a graph publishes; a slot is complete once its number is there."""
    sources = [torch.zeros(n, dtype=torch.int64, device="cuda") for n in (50, 100_000)]
    rings = [torch.zeros((64, len(source)), dtype=torch.int64, pin_memory=True) for source in sources]
    counter, published = (
        torch.zeros(1, dtype=torch.int64, device="cuda"),
        torch.zeros(1, dtype=torch.int64, pin_memory=True),
    )
    publish(sources, rings, counter, published)  # compiled before it is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for source in sources:
            source.add_(1)
        publish(sources, rings, counter, published)
    for _ in range(60):
        graph.replay()
    seen = published.numpy()  # the same memory
    last = 1
    while last < 61:
        now = int(seen[0])
        for time in range(last, now):
            assert all((ring[time] == time).all() for ring in rings)
        last = now
    torch.cuda.synchronize()
    assert counter.item() == published.item() == 61
