"""The CPU kernels under AddressSanitizer and UBSan: no byte outside a tensor is read or written."""

import os
import platform
import subprocess
import sys
from dataclasses import replace

import pytest
import side_by_side

from pseudoseg_fast.build.compile import compile_library
from pseudoseg_fast.build.spec import cpu_spec, instruction_sets
from pseudoseg_fast.build.toolchain import find_toolchain

SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")

CALLS = """
import sys
import torch
from pseudoseg_fast import build, functional

build.load_cpu = lambda: torch.ops.load_library(sys.argv[1])
torch.manual_seed(0)
sizes = [(1, 1, 1, 1, 1, 1), (2, 3, 5, 2, 9, 11), (1, 21, 9, 3, 33, 35), (3, 150, 4, 7, 15, 1), (2, 5, 17, 33, 6, 40)]
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    for images, classes, side, cam, height, width in sizes:
        size = (height, width)
        student, decoder = (torch.randn(images, classes, side, side + 1, dtype=dtype) for _ in "ab")
        maps = torch.randn(images, classes, cam, cam, dtype=dtype)
        target = torch.rand(images, classes, *size, dtype=dtype)
        labels = torch.randint(0, 256, (images, *size), dtype=torch.uint8)
        valid = torch.rand(images, *size) > 0.3
        student.requires_grad_()
        for align_corners in (False, True):
            options = {"align_corners": align_corners, "backend": "cpp"}
            functional.predict_labels(decoder, size, **options)
            for norm in ("batch", "image", "pixel", "none"):
                fusion = {"size": size, "norm": norm, **options}
                functional.fuse_predictions(decoder, maps, **fusion)
                for reduction in ("mean", "none"):
                    weak = (decoder, maps)
                    loss = functional.consistency_loss(student, *weak, valid=valid, reduction=reduction, **fusion)
                    loss.sum().backward()
            for loss in (
                functional.soft_cross_entropy(student, target, weight=valid, **options),
                functional.cross_entropy(student, labels, **options),
                functional.cross_entropy(student, labels.long() - 1, reduction="none", **options).sum(),
                functional.dice_loss(student, labels % classes, **options),
                functional.dice_loss(student, labels.long() - 1, **options),
            ):
                loss.backward()
geometries = [  # input, filter, stride, padding, dilation
    ((2, 19, 9, 7), (3, 3), (1, 1), (1, 1), (1, 1)),
    ((1, 16, 8, 8), (5, 5), (1, 1), (4, 4), (2, 2)),
    ((2, 5, 8, 8), (3, 3), (1, 1), (12, 12), (12, 12)),
    ((2, 33, 12, 17), (5, 3), (2, 3), (2, 0), (1, 1)),
    ((1, 4, 20, 21), (3, 3), (2, 2), (0, 0), (3, 1)),
    ((1, 17, 21, 23), (11, 9), (1, 1), (5, 4), (1, 1)),
    ((1, 8, 6, 6), (2, 4), (1, 1), (5, 6), (1, 1)),
    ((1, 40, 90, 41), (3, 3), (2, 1), (1, 1), (1, 1)),
    ((3, 8, 1, 1), (3, 3), (1, 1), (1, 1), (1, 1)),
]
for dtype in (torch.float32, torch.float64):
    for shape, taps, stride, padding, dilation in geometries:
        input = torch.randn(shape, dtype=dtype, requires_grad=True)
        weight = torch.randn(shape[1], 1, *taps, dtype=dtype, requires_grad=True)
        bias = torch.randn(shape[1], dtype=dtype, requires_grad=True)
        geometry = {"stride": stride, "padding": padding, "dilation": dilation}
        functional.depthwise_conv2d(input, weight, bias, **geometry, backend="cpp").sum().backward()
print("done")
"""


def runtime(toolchain, name):
    """Where the compiler has a library of its runtime."""
    command = [*toolchain.cxx, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if sys.platform != "linux":
        pytest.skip("the sanitizer's library is preloaded as Linux does it")
    toolchain = find_toolchain()
    sanitizer = runtime(toolchain, "libasan.so")
    if not os.path.isabs(sanitizer):
        pytest.skip(f"{toolchain.version} comes without libasan.so")
    spec = cpu_spec()
    spec = replace(spec, flags=(*spec.flags, "-O1", "-g1", *SANITIZE), link_flags=SANITIZE)
    # The sanitizer goes first. As it starts it looks up __cxa_throw to wrap it, and Python alone brings none: the first
    # exception of any library, ours or one that torch imports, would end the process.
    preload = f"{sanitizer} {runtime(toolchain, 'libstdc++.so.6')}"
    return preload, compile_library(spec, toolchain, tmp_path_factory.mktemp("library"))


def test_kernels_stay_inside_their_tensors(library):
    preload, path = library
    sanitizing = {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    isas = instruction_sets(platform.machine())
    calls = [(("-c", CALLS, path), {**sanitizing, "PSEUDOSEG_ISA": isa}) for isa in isas]
    assert side_by_side.run(*calls) == ["done\n"] * len(isas)
