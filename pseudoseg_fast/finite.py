"""Steps whose loss or gradient is not sound: which they are, without waiting for the device at each of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from pseudoseg_fast.data.lists import shorten

LAG = 1
"""Steps that may be under way on the device before the result of one is looked at."""

EXPLODED = 1e4
"""A loss term above this, times its own weight where that is above 1, is no training.

A term is what one pass of one process has, before it is given its share of the step.
Over C classes cross-entropy begins near log C, which is 5 for 150 of them; to be at 10 000 a network must be that sure,
in nats a pixel, of what is wrong.
"""

NO_LIMITS: Mapping[str, float] = MappingProxyType({})


@dataclass
class _Pending:
    """A step whose result may still be under way."""

    step: int
    names: Sequence[str]
    losses: dict[str, Tensor]
    flags: Tensor
    event: torch.cuda.Event | None


class NotFinite(RuntimeError):
    """A loss or gradient became NaN or infinite, or a loss exploded.

    Args:
        message: says at which step.
        pictures: whether it names pictures that may be the reason.
    """

    def __init__(self, message: str = "", *, pictures: bool = False) -> None:
        super().__init__(message)
        self.pictures = pictures


class Watch:
    """Looks at the result of each step when the device has it, which is while it computes the next.

    Args:
        limits: of loss terms, by name; ``EXPLODED`` of any other.
    """

    def __init__(self, limits: Mapping[str, float] = NO_LIMITS) -> None:
        self.limits = limits
        self.pending: deque[_Pending] = deque()

    def add(self, step: int, names: Sequence[str], losses: dict[str, Tensor], flags: Tensor) -> None:
        """Note a step.

        Args:
            step: its number.
            names: pictures of its batches.
            losses: its terms.
            flags: what :func:`sound` says of it, in all processes.

        Raises:
            NotFinite: an earlier step was not.
        """
        event = None
        if flags.is_cuda:
            flags = torch.empty(2, dtype=torch.bool, pin_memory=True).copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending.append(_Pending(step, names, losses, flags, event))
        self.check(LAG if event else 0)

    def check(self, lag: int = 0) -> None:
        """Look at all steps but the ``lag`` newest, waiting for them if need be.

        Raises:
            NotFinite: one of them was not sound, see :func:`unsound`.
        """
        while len(self.pending) > lag:
            oldest = self.pending.popleft()
            if oldest.event is not None:
                oldest.event.synchronize()
            if not oldest.flags.all():
                raise unsound(oldest.step, oldest.names, oldest.losses, oldest.flags, self.limits)


def unsound(
    step: int,
    names: Sequence[str],
    losses: dict[str, Tensor],
    flags: Tensor,
    limits: Mapping[str, float] = NO_LIMITS,
) -> NotFinite:
    """Return an error that says what is wrong with a step; pictures are named where they may be the reason.

    Args:
        step: its number.
        names: this process's pictures.
        losses: this process's terms.
        flags: what :func:`sound` says of it, in all processes.
        limits: of loss terms, by name.
    """
    known = [(name, float(loss), limits.get(name, EXPLODED)) for name, loss in losses.items()]
    wrong = [
        f"{name} is {value:.4g}" + (f", above the limit of {limit:g}" if value > limit else "")
        for name, value, limit in known
        if not abs(value) <= limit
    ]
    if not wrong and not flags[0]:
        return NotFinite(
            f"step {step}: a loss of another process is NaN, infinite or exploded; that process names its pictures"
        )
    return NotFinite(
        f"step {step}: {', '.join(wrong) or 'the losses are finite, but the gradient is not'}, on these pictures:\n"
        + shorten(list(dict.fromkeys(names)), shown=32),
        pictures=True,
    )


def sound(
    losses: dict[str, Tensor],
    parameters: Iterable[nn.Parameter] | None,
    limits: Mapping[str, float] = NO_LIMITS,
) -> Tensor:
    """Return whether the losses of a step, and its gradient, are sound: bool [2].

    Args:
        losses: its terms, none of which may be above its limit, or not finite.
        parameters: have the gradients, which must be finite; None does not look at them.
        limits: of loss terms, by name.
    """
    shares = [loss / limits.get(name, EXPLODED) for name, loss in losses.items()]
    fine = (torch.stack(shares).abs() <= 1).all()  # no NaN is
    if parameters is None:
        return torch.stack([fine, torch.ones_like(fine)])
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.stack([fine, torch.nn.utils.get_total_norm(gradients, foreach=True).isfinite()])


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Return a scalar bool, True if no value of the floating-point tensors, of one device, is NaN or infinite."""
    values = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    largest = torch._foreach_norm(values, float("inf"))
    return torch.stack([norm.float() for norm in largest]).isfinite().all()
