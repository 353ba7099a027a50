"""The backends that a test of a public function runs on: each with the device it needs."""

from typing import NamedTuple

import pytest


class Target(NamedTuple):
    backend: str
    device: str

    @property
    def fusing(self):
        """The backend of fuse_predictions: on a GPU another one has its kernel."""
        return "auto" if self.backend == "cuda" else self.backend


_CUDA = pytest.mark.cuda

ALL = [
    pytest.param(Target("eager", "cpu"), id="eager-cpu"),
    pytest.param(Target("cpp", "cpu"), id="cpp"),
    pytest.param(Target("eager", "cuda"), id="eager-cuda", marks=_CUDA),
    pytest.param(Target("cuda", "cuda"), id="cuda", marks=_CUDA),
]

_TRITON = pytest.param(Target("triton", "cuda"), id="triton", marks=_CUDA)

FUSION = [*ALL, _TRITON]

ATTENTION = [
    pytest.param(Target("eager", "cpu"), id="eager-cpu"),
    pytest.param(Target("eager", "cuda"), id="eager-cuda", marks=_CUDA),
    _TRITON,
]


NATIVE = [
    pytest.param(Target("cpp", "cpu"), id="cpp"),
    pytest.param(Target("cuda", "cuda"), id="cuda", marks=_CUDA),
]


def on_native_targets(test):
    """Run a test with ``target`` = every backend of this project's own kernels."""
    return pytest.mark.parametrize("target", NATIVE)(test)


def on_all_targets(test):
    """Run a test with ``target`` = every backend that implements the losses, fusion and prediction."""
    return pytest.mark.parametrize("target", ALL)(test)


def on_fusion_targets(test):
    """Run a test with ``target`` = every backend that implements fuse_predictions."""
    return pytest.mark.parametrize("target", FUSION)(test)


def on_attention_targets(test):
    """Run a test with ``target`` = every backend that implements refine_cam and pseudo_label."""
    return pytest.mark.parametrize("target", ATTENTION)(test)
