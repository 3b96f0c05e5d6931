"""Error budget of a kernel: as much as plain torch errs in the same dtype, and a little more."""

from __future__ import annotations

import torch


def assert_within_budget(
    actual: torch.Tensor, truth: torch.Tensor, same_dtype: torch.Tensor, *, tolerance: float = 1e-6
) -> tuple[float, float]:
    """``actual`` may err as much as torch does in its own dtype, and ``tolerance`` of the largest value more.

    Args:
        actual: the kernel's result.
        truth: the same in float32 or float64.
        same_dtype: torch's result in the kernel's dtype.

    Returns:
        The largest error, and the error that was allowed.

    Raises:
        AssertionError: says which of the two differ, or the error and the allowed one.
    """
    _require(actual.shape == truth.shape, f"shape {tuple(actual.shape)}, not {tuple(truth.shape)}")
    _require(actual.dtype == same_dtype.dtype, f"dtype {actual.dtype}, not {same_dtype.dtype}")
    wide = truth.double()
    finite = wide.isfinite()
    _require(torch.equal(actual.double()[~finite].nan_to_num(), wide[~finite].nan_to_num()), "other NaN or infinities")
    error = (actual.double() - wide)[finite].abs()
    _require(not error.isnan().any(), "NaN where there should be none")
    if error.numel() == 0:
        return 0.0, 0.0
    allowed = (same_dtype.double() - wide)[finite].abs().max() + tolerance * wide[finite].abs().max()
    # a result is rounded once more than the truth: half a unit in its last place is nobody's error
    allowed = allowed + wide[finite].abs().max() * torch.finfo(actual.dtype).eps / 2
    _require(error.max() <= allowed, f"error {error.max():.3e}, allowed {allowed:.3e}")
    return error.max().item(), allowed.item()


def _require(condition: bool | torch.Tensor, message: str) -> None:
    """Raise AssertionError; unlike a statement, also where Python runs with ``-O``."""
    if not condition:
        raise AssertionError(message)
