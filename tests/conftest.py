"""Shared fixtures: the golden models, loaded once. Without a GPU, Triton's kernels run in its interpreter."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so before anything imports it
os.environ.setdefault("SFS_TRITON_CHECK", "0")  # engines of tests on a GPU are not what the check is for

import sfs_triton  # noqa: E402
from tests.support.paths import GOLDEN, MODELS  # noqa: E402

# The same examples in every run, so that a failure depends on the code alone. HYPOTHESIS_PROFILE=default draws others.
settings.register_profile("fixed", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

# Files whose tests on plain torch are marked quick: the decode core, and the package as a whole.
QUICK = {
    Path(__file__).parent / room / f"test_{name}.py"
    for room, name in (
        ("decoding", "params"),
        ("engine", "generate"),
        ("models", "checkpoints"),
        ("ops", "ops"),
        ("project", "package"),
    )
}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import nothing else for ``-m quick...``: other files need extras that the quick tests do without."""
    only_quick = config.getoption("markexpr").startswith("quick") and collection_path.name.startswith("test_")
    return True if only_quick and collection_path not in QUICK else None


# They start first, so that no worker is left with one of them when the others have finished.
LONGEST = (
    "test_representative_variants_fit_their_gpu[attention]",
    "test_a_share_of_the_recorded_cases",
    "test_every_kernel_executes",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.name.startswith(LONGEST))
    seen: Counter[str] = Counter()
    for item in items:
        sampled = item.get_closest_marker("sampled")
        if sampled and not item.get_closest_marker("slow"):
            function = item.nodeid.partition("[")[0]
            if seen[function] % sampled.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[function] += 1
    for item in items:
        if item.path in QUICK and "triton" not in item.name:
            item.add_marker(pytest.mark.quick)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Leave thousands of tests and modules out of every garbage collection: a tenth of the time of all tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries report as leaks what lives until the end


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The models are tiny: a second thread only adds noise, here and in processes that tests start.

    ``make test-cpus`` asks for two, for another order of summation.
    """
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def engines() -> dict[str, sfs_triton.Engine]:
    return {name: sfs_triton.load(GOLDEN / "models" / name, "cpu", "float32") for name in MODELS}


@pytest.fixture(scope="session")
def embedded() -> sfs_triton.Engine:
    return sfs_triton.load("embedded", "cpu", "float32")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A writable copy of a tiny LLaDA checkpoint."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "models" / "llada-mha" / name, folder / name)
    return folder


@pytest.fixture
def edit_config():
    """Change keys of a checkpoint's config.json; None removes a key."""

    def edit(folder: Path, **changes) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for key, value in changes.items():
            if value is None:
                config.pop(key, None)
            else:
                config[key] = value
        path.write_text(json.dumps(config))

    return edit
