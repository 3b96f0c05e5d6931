"""Every operation beside its twin: both run on copies of the same arguments, and their results are compared."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch

from ..errors import first_line
from ..kernels.control import COLUMN
from ..ops.dispatch import Ops, Quantised
from ..ops.torch.philox import gumbel
from ..runner.faults import is_lack_of_memory
from ..runner.state import DecodeState
from .budget import assert_within_budget

TOLERANCE = 1e-4  # of the largest value, beyond torch's own error
SCORE_TOLERANCE = 1e-3
_BAND = 1024  # bytes of poison on each side of a copy
_ROWS = 64  # of the head whose logits are computed once more in float64
_EXACT = ("compact", "embedding")  # these only copy
_SCRATCH = {"confidence": ("logits",)}  # arguments whose final values mean nothing


@dataclass(frozen=True)
class Finding:
    """A comparison of an operation with its twin on one set of arguments. ``fault`` is None if they agree."""

    operation: str
    shape: str
    error: float = 0.0
    allowed: float = 0.0
    microseconds: float | None = None  # of the kernel, launched by itself
    torch_microseconds: float | None = None
    fault: str | None = None


class Twins:
    """Operations that compute by the twins, and compare the kernels with them on the way.

    A step that runs on these operations gives the arguments: those of the step, at the model's own sizes. Arguments
    of equal shape are compared once, except where the operation reads a decode state, whose values decide what it does.

    Args:
        shared: addresses of the weights' memory. They are not copied.
        start: called with the operation's name and shape before it runs, since a kernel can end the process.
        found: called with each finding.
        timed: time both sides after they agreed.
    """

    def __init__(
        self,
        kernels: Ops,
        twins: Ops,
        shared: set[int],
        start: Callable[[str, str], None],
        found: Callable[[Finding], None],
        timed: bool,
    ):
        self._kernels, self._twins, self._shared = kernels, twins, shared
        self._start, self._found, self._timed = start, found, timed
        self._seen: set[tuple] = set()
        self._unfinished: tuple[Any, Any] = (None, None)  # the last such result of a kernel, with the twin's

    def ops(self) -> Ops:
        """Return the operations. ``publish`` is the kernels': the host ring shows what it wrote."""
        compared = {field.name: partial(self._call, field.name) for field in fields(Ops)}
        return Ops(**{**compared, "publish": self._kernels.publish})

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        twin = getattr(self._twins, name)
        kwargs.pop("scratch", None)  # memory of plain torch's own, which changes no result
        arguments = inspect.signature(twin).bind(*args, **kwargs).arguments
        on_state = any(isinstance(value, DecodeState) for value in arguments.values())
        taken = any(value is self._unfinished[0] for value in arguments.values() if value is not None)
        key = (name, taken, *((key, _signature(value)) for key, value in arguments.items()))
        if not on_state and key in self._seen:
            return twin(*args, **kwargs)
        self._seen.add(key)
        shape = _shape_of(arguments)
        self._start(name, shape)
        finding, result = self._compare(name, shape, twin, arguments)
        self._found(finding)
        expected = twin(*args, **kwargs)
        if _is_unfinished(result):
            self._unfinished = expected, result
        return expected

    def _compare(self, name: str, shape: str, twin: Callable, arguments: dict[str, Any]) -> tuple[Finding, Any]:
        """Return what was found, and the kernel's result."""
        kernel = getattr(self._kernels, name)
        mine, same = _Copies(self._shared), _Copies(self._shared)
        expected, unfinished = self._unfinished  # a kernel gets from another what that one leaves to it
        given = {name: unfinished if value is expected else value for name, value in arguments.items()}
        mine_in, same_in = mine.of(arguments if expected is None else given), same.of(arguments)
        try:
            result = _apply(kernel, twin, mine_in)
            _synchronise(arguments)
        except Exception as error:  # compilers and drivers raise many kinds
            if is_lack_of_memory(error):
                raise  # it says nothing of the kernel
            return Finding(name, shape, fault=f"{type(error).__name__}: {first_line(error)[:300]}"), None
        expected = _apply(twin, twin, same_in)
        try:
            mine.check_bands()
            if name == "lm_head":
                error, allowed = _compare_head(arguments, result, expected)
            else:
                compared = (_finished(result), mine_in), (expected, same_in)
                error, allowed = self._compare_tensors(name, twin, arguments, *compared)
        except AssertionError as wrong:
            return Finding(name, shape, fault=str(wrong)), None
        pairs = ((kernel, mine_in), (twin, same_in)) if self._timed else ()
        times = [_microseconds(each, twin, given) for each, given in pairs]
        return Finding(name, shape, error, allowed, *times), result

    def _compare_tensors(
        self, name: str, twin: Callable, arguments: dict[str, Any], mine: tuple, same: tuple
    ) -> tuple[float, float]:
        """Compare all that both returned or changed; return the largest error, and the error allowed there."""
        mine, same = (_leaves({"result": result, **given}) for result, given in (mine, same))
        results = [sorted(leaf for leaf in each if leaf.startswith("result")) for each in (mine, same)]
        if results[0] != results[1]:
            raise AssertionError(f"returns {results[0]}, not {results[1]}")
        state = any(isinstance(value, DecodeState) for value in arguments.values())
        truth = same
        if not state and name not in _EXACT:
            wide = _Copies(self._shared, wide=True).of(arguments)
            truth = _leaves({"result": _apply(twin, twin, wide), **wide})
        worst = (0.0, 0.0)
        for leaf, actual in mine.items():
            if leaf in _SCRATCH.get(name, ()) or leaf not in same:  # the latter: of an unfinished argument
                continue
            values = [_live(leaf, x, arguments) for x in (actual, truth[leaf], same[leaf])]
            try:
                if truth is same or not actual.is_floating_point() or actual.dtype.itemsize == 1:
                    _assert_equal(values[0], values[2])
                else:
                    here = assert_within_budget(*values, tolerance=TOLERANCE)
                    worst = max(worst, here, key=lambda pair: pair[0] / (pair[1] or 1.0))
            except AssertionError as error:
                raise AssertionError(f"{leaf}: {error}") from None
        return worst


class _Copies:
    """Copies of arguments, each between bands of poison; with ``wide`` in float64, and without bands."""

    def __init__(self, shared: set[int], wide: bool = False):
        self._shared, self._wide, self._bands = shared, wide, []

    def of(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {name: self._copy(value) for name, value in arguments.items()}

    def _copy(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._copy_tensor(value)
        if isinstance(value, DecodeState):
            return replace(value, **{f.name: self._copy(getattr(value, f.name)) for f in fields(value) if f.init})
        if isinstance(value, Quantised) and self._wide:
            return value.values(torch.float64)
        if isinstance(value, dict):
            return {name: self._copy(each) for name, each in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self._copy, value))
        if isinstance(value, (tuple, list)):
            return type(value)(map(self._copy, value))
        return value

    def _copy_tensor(self, x: torch.Tensor) -> torch.Tensor:
        if self._wide:
            return x.double() if x.is_floating_point() and x.dtype.itemsize > 1 else x.clone()
        if x.untyped_storage().data_ptr() in self._shared or x.numel() == 0:
            return x
        # strides are kept, and so is the alignment: kernels take other paths for other ones
        span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        band = _BAND // x.itemsize
        first = band + x.data_ptr() % 16 // x.itemsize
        buffer = torch.empty(first + span + band, dtype=x.dtype, device=x.device)
        buffer.view(torch.uint8).fill_(0xAB)
        buffer[first : first + span] = x.as_strided((span,), (1,))
        self._bands += [buffer[:first], buffer[first + span :]]
        return buffer.as_strided(x.shape, x.stride(), first)

    def check_bands(self) -> None:
        """Raise AssertionError if a band was written."""
        for band in self._bands:
            if not (band.view(torch.uint8) == 0xAB).all():
                raise AssertionError(f"wrote outside a {_name(band.dtype)} tensor")


def _is_unfinished(result: Any) -> bool:
    """Return whether a norm left its factors per row to the product that takes its result."""
    return hasattr(result, "squares")


def _finished(result: Any) -> Any:
    if not _is_unfinished(result):
        return result
    values = result.values.float()
    factor = (result.squares.sum(0) / values.shape[-1] + result.eps).rsqrt().view(*values.shape[:-1], 1)
    return (values * factor).to(result.values.dtype)


def _leaves(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Return the tensors in a value, by their place in it."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, DecodeState):
        value = _state_leaves(value)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (tuple, list)) else ()
    found: dict[str, torch.Tensor] = {}
    for key, each in items:
        found |= _leaves(each, f"{name}.{key}" if name else str(key))
    return found


def _state_leaves(state: DecodeState) -> dict[str, Any]:
    """Return the tensors of a state that mean something after an operation."""
    names = [f.name for f in fields(state) if f.init and f.name != "fill" and not f.name.startswith("choice_")]
    found = {name: getattr(state, name) for name in names}
    found["control"] = state.control.clone()
    found["control"][:, COLUMN["quota"]].masked_fill_(state.done != 0, 0)  # a row that is done has no use for it
    # choices by position: the spare element behind them takes what belongs nowhere
    return {**found, "token": state.token, "score": state.score}


def _live(leaf: str, x: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """Blank the rows of attention's result beyond its ``count``, which may hold anything."""
    count = arguments.get("count")
    if leaf != "result" or count is None or x.dim() != 4:
        return x
    idle = torch.arange(x.shape[1], device=x.device) >= count[:, None]
    return x.masked_fill(idle[:, :, None, None], 0)


def _assert_equal(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    """Raise AssertionError unless all values are equal; NaN equals NaN."""
    if (actual.shape, actual.dtype) != (wanted.shape, wanted.dtype):
        raise AssertionError(f"{_describe(actual)}, not {_describe(wanted)}")
    if actual.is_floating_point() and actual.dtype.itemsize == 1:
        actual, wanted = actual.view(torch.uint8), wanted.view(torch.uint8)
    same = actual == wanted
    if actual.is_floating_point():
        same |= actual.isnan() & wanted.isnan()
    if not same.all():
        raise AssertionError(f"{int((~same).sum())} of {same.numel()} values differ")


def _compare_head(arguments: dict[str, Any], mine: tuple, same: tuple) -> tuple[float, float]:
    """Compare tokens and scores of the head: a token may differ where both logits are within one step of the dtype."""
    hidden, weight, scale = arguments["hidden"], arguments["weight"], arguments.get("scale")
    rows, count, temperature = (arguments.get(name) for name in ("rows", "count", "temperature"))
    n = min(mine[0].shape[0], _ROWS)
    if count is not None:  # the other rows may hold anything
        n = min(n, int(count[0]))
    if n <= 0:
        return 0.0, 0.0
    hidden = (hidden if rows is None else hidden[rows[:n].clamp(min=0)])[:n].double()

    def logits(tokens: torch.Tensor | slice) -> torch.Tensor:
        if scale is None:
            return weight[tokens].double()
        codes = weight.view(torch.uint8)[tokens].view(weight.dtype)  # not every device indexes float8
        return codes.float().double() * scale[tokens].double()[..., None]

    tokens = torch.stack((mine[0][:n], same[0][:n])).long()
    if ((tokens < 0) | (tokens >= weight.shape[0])).any():
        raise AssertionError(f"token: one of {tokens[0].tolist()} is no id below {weight.shape[0]}")
    at = (logits(tokens) * hidden).sum(-1)  # [2, n]
    key = at
    if temperature is not None:
        seed, position, step = (arguments[name][:n] for name in ("seed", "position", "step"))
        key = at + temperature[:n] * gumbel(seed, tokens, position, step)
    allowed = max(torch.finfo(arguments["hidden"].dtype).eps, TOLERANCE) * at.abs().clamp(min=1)
    short = (key[1] - key[0]).abs() - allowed.amax(0)
    if (wrong := (short > 0) & (tokens[0] != tokens[1])).any():
        row = int(wrong.nonzero()[0])
        raise AssertionError(
            f"token: row {row} has {int(tokens[0, row])} at {key[0, row]:.4f}, not {int(tokens[1, row])} at "
            f"{key[1, row]:.4f}"
        )
    total = torch.full((n,), float("-inf"), dtype=torch.float64, device=hidden.device)
    for first in range(0, weight.shape[0], 2**13):
        part = hidden @ logits(slice(first, first + 2**13)).T
        total = torch.logaddexp(total, part.logsumexp(-1))
    truth = (at - total).exp()  # of the tokens that each chose: where these differ, so may the scores
    budget = (truth[1] - same[1][:n].double()).abs().amax() + SCORE_TOLERANCE
    error = (truth[0] - mine[1][:n].double()).abs().amax()
    if not error <= budget:
        raise AssertionError(f"score: error {error:.3e}, allowed {budget:.3e}")
    return error.item(), budget.item()


def _signature(value: Any) -> Any:
    """Return what picks a kernel's variant: shapes, strides and dtypes of tensors, and all else by value."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, Quantised):
        return _signature(value.codes)
    if isinstance(value, dict):
        return tuple((name, _signature(each)) for name, each in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(map(_signature, value))
    return repr(value)


def _shape_of(arguments: dict[str, Any]) -> str:
    """Describe the first tensors of a call, for messages."""
    state = next((value for value in arguments.values() if isinstance(value, DecodeState)), None)
    if state is not None:
        return f"state[{', '.join(map(str, state.tokens.shape))}]"
    tensors = [(name, value) for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    return " ".join(f"{name} {_describe(value)}" for name, value in tensors[:2])


def _describe(x: torch.Tensor) -> str:
    return f"{_name(x.dtype)}{list(x.shape)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _synchronise(arguments: dict[str, Any]) -> None:
    device = next(x.device for x in _leaves(arguments).values())
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _apply(function: Callable, twin: Callable, arguments: dict[str, Any]) -> Any:
    """Call a function with arguments by the twin's names, in its order: the function may have other names."""
    bound = inspect.BoundArguments(inspect.signature(twin), arguments)
    return function(*bound.args, **bound.kwargs)


def _microseconds(function: Callable, twin: Callable, arguments: dict[str, Any]) -> float:
    """Time a call whose kernel is loaded: the least of three, or one where they are interpreted."""
    taken = []
    cuda = any(x.is_cuda for x in _leaves(arguments).values())
    for _ in range(3 if cuda else 1):
        _synchronise(arguments)
        began = time.perf_counter()
        _apply(function, twin, arguments)
        _synchronise(arguments)
        taken.append(1e6 * (time.perf_counter() - began))
    return round(min(taken), 1)
