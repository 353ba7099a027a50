"""Steps whose loss or gradient is not finite: which they are, without waiting for the device at each of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pseudoseg_fast.data.lists import shorten

LAG = 1
"""Steps that may be under way on the device before the result of one is looked at."""


@dataclass
class _Pending:
    """A step whose result may still be under way."""

    step: int
    names: list[str]
    losses: dict[str, Tensor]
    flag: Tensor
    event: torch.cuda.Event | None


class NotFinite(RuntimeError):
    """A loss or gradient became NaN or infinite."""


class Watch:
    """Looks at the result of each step when the device has it, which is while it computes the next."""

    def __init__(self) -> None:
        self.pending: deque[_Pending] = deque()

    def add(self, step: int, names: Iterable[Sequence[str]], losses: dict[str, Tensor], flag: Tensor) -> None:
        """Note a step.

        Args:
            step: its number.
            names: pictures of its batches.
            losses: its terms.
            flag: scalar bool on the device, True if the step is sound.

        Raises:
            NotFinite: an earlier step was not.
        """
        event = None
        if flag.is_cuda:
            flag = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending.append(_Pending(step, [name for batch in names for name in batch], losses, flag, event))
        self.check(LAG if event else 0)

    def check(self, lag: int = 0) -> None:
        """Look at all steps but the ``lag`` newest, waiting for them if need be.

        Raises:
            NotFinite: one of them was not sound; the message names its pictures.
        """
        while len(self.pending) > lag:
            oldest = self.pending.popleft()
            if oldest.event is not None:
                oldest.event.synchronize()
            if not oldest.flag:
                raise NotFinite(describe(oldest.step, oldest.names, oldest.losses))


def describe(step: int, names: Sequence[str], losses: dict[str, Tensor]) -> str:
    """Return in words what is wrong with a step."""
    values = {name: float(loss) for name, loss in losses.items()}
    wrong = [
        f"{name} is {value}" for name, value in values.items() if not torch.isfinite(torch.tensor(value))
    ]
    return (
        f"step {step}: {', '.join(wrong) or 'the losses are finite, but the gradient is not'}, on these pictures:\n"
        + shorten(list(dict.fromkeys(names)), shown=32)
    )


def sound(losses: dict[str, Tensor], parameters: Iterable[nn.Parameter] | None) -> Tensor:
    """Return a scalar bool, True if the losses and, unless None, the gradients of ``parameters`` are finite."""
    flag = torch.stack([loss.isfinite() for loss in losses.values()]).all()
    if parameters is not None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flag &= torch.nn.utils.get_total_norm(gradients, foreach=True).isfinite()
    return flag
