"""What is common to all launches: their description, the configurations, and how they are run."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether TRITON_INTERPRET=1 was set: kernels run on the CPU, in numpy."""


Arguments = dict[str, Tensor | int | float | None]
"""Arguments of a kernel that are known when it runs, by name."""


class Config(NamedTuple):
    """Tile and resources of a kernel.

    Attributes:
        rows: rows or pixels that a program owns.
        columns: rows or other things that it walks over at a time.
        depth: channels that it multiplies at a time.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    depth: int = 0


class Launch(NamedTuple):
    """One kernel launch: what is known when it runs, and what its binary is specialised for."""

    kernel: Any
    programs: int
    arguments: Arguments
    constants: dict[str, Any]
    config: Config

    @property
    def options(self) -> dict[str, Any]:
        """Options of the compiler."""
        return {
            "num_warps": self.config.warps,
            "num_stages": self.config.stages,
            "enable_fp_fusion": True,
        }

    def run(self) -> None:
        """Launch on the current stream of the device that the tensors are on."""
        tensor = next(value for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device_of(tensor):
            self.kernel[(self.programs,)](**self.arguments, **self.constants, **self.options)


class Plan(NamedTuple):
    """Results, allocated but not yet written, and the launches that write them, in order."""

    results: tuple[Tensor, ...]
    launches: Sequence[Launch]

    def run(self) -> tuple[Tensor, ...]:
        """Run the launches and return the results."""
        for launch in self.launches:
            if launch.programs:
                launch.run()
        return self.results


def operand_dtype(left: Tensor, right: Tensor) -> torch.dtype:
    """Return the narrowest dtype that holds the values of both tensors: the one their products are taken in."""
    return torch.promote_types(left.dtype, right.dtype)


def dense_rows(rows: Tensor) -> Tensor:
    """Return rows [B, L, D] whose channels lie together, a copy of what a convolution left as [B, D, L].

    Every block of queries reads all keys. Of dense rows it reads 16 bytes at a time, of others as little as 2.
    """
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def aligned_rows(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows [B, L, D] such that all begin at multiples of 16 numbers, if one of the tensors is of half precision.

    Rows of other than a power of two channels get zeros behind them, which change no score; views into larger
    tensors and what a convolution left as [B, D, L] are copied. Of others ptxas 12.8, which Triton 3.6 brings, has made
    wrong code for compute capability 9.0: it takes the address of cam from a register which nothing has written.
    ``bench/triton_resources.py`` finds it, in the machine code of 24 and 100 channels, and of 32 and 128 that lie
    otherwise.
    """
    if min(query.itemsize, key.itemsize) > 2:
        return query, key
    depth = query.shape[2]
    width = max(16, triton.next_power_of_2(depth))
    if width > depth:
        query, key = (torch.nn.functional.pad(rows, (0, width - depth)) for rows in (query, key))
        return query, key
    query, key = (
        rows if _is_aligned(rows) else rows.clone(memory_format=torch.contiguous_format)
        for rows in (query, key)
    )
    return query, key


def _is_aligned(rows: Tensor) -> bool:
    image, row, channel = rows.stride()
    return channel == 1 and row % 16 == 0 and image % 16 == 0 and rows.data_ptr() % 16 == 0


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return Triton's name of a floating dtype."""
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def strides(tensor: Tensor, *names: str) -> dict[str, int]:
    """Return the strides of a tensor under the names of the kernel's arguments."""
    return dict(zip(names, tensor.stride(), strict=True))
