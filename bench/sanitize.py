"""Run every CUDA kernel once on small odd shapes, for compute-sanitizer.

compute-sanitizer --tool memcheck --error-exitcode 1 python bench/sanitize.py
compute-sanitizer --tool racecheck --error-exitcode 1 python bench/sanitize.py

The results are compared with eager, so a run that does nothing fails. PYTORCH_NO_CUDA_MEMORY_CACHING=1 lets memcheck
see the end of every tensor.
"""

import sys

import torch

from pseudoseg_fast import functional
from pseudoseg_fast.arguments import NORMS

# images, classes, sides of the student's and the SGC's map, of the label
SHAPES = [
    (2, 5, (7, 6), (3, 4), (25, 22)),
    (1, 150, (6, 5), (2, 3), (11, 9)),
    (1, 200, (3, 3), (2, 2), (5, 7)),
]


def compare(name: str, *args: torch.Tensor, **options: object) -> None:
    """Run a function on the CUDA kernels and in eager mode, with its gradient if it has one."""
    results = []
    for backend in ("cuda", "eager"):
        leaf = args[0].detach().requires_grad_(name != "predict_labels")
        result = getattr(functional, name)(leaf, *args[1:], **options, backend=backend)
        gradient = torch.autograd.grad(result.sum(), leaf) if result.requires_grad else ()
        results.append((result.detach(), *gradient))
    for actual, expected in zip(*results, strict=True):
        if actual.is_floating_point():
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
        else:
            assert (actual == expected).float().mean() > 0.99


def main() -> int:
    """Run everything and return the exit status."""
    if not torch.cuda.is_available():
        print("no CUDA device: torch.cuda.is_available() is False", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    for images, classes, side, cam_side, size in SHAPES:
        student, decoder = (torch.randn(images, classes, *side, device="cuda") for _ in "ab")
        cam = torch.randn(images, classes, *cam_side, device="cuda")
        labels = torch.randint(0, classes + 1, (images, *size), device="cuda")
        valid = torch.rand(images, *size, device="cuda") > 0.3
        target = torch.rand(images, classes, *size, device="cuda").softmax(1)
        for reduction in ("mean", "none"):
            common = {"reduction": reduction, "align_corners": reduction == "none"}
            compare("soft_cross_entropy", student, target, weight=valid, **common)
            compare("cross_entropy", student, labels, **common)
            compare("dice_loss", student, labels, align_corners=common["align_corners"])
            for norm in NORMS:
                options = {"valid": valid, "size": size, "norm": norm, **common}
                compare("consistency_loss", student, decoder, cam, **options)
            options = {"size": size, "hard": True, "threshold": 0.01, "temperature": 0.7, **common}
            compare("consistency_loss", student, decoder, cam, **options)
        compare("predict_labels", student, size=size)
    torch.cuda.synchronize()
    print("every kernel ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
