"""How close a kernel must come to the truth."""

import os

import torch

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def assert_as_good_as_eager(actual, eager, truth, name=""):
    """Hold float32 to torch.testing's rule, half precision to twice the error of eager in the same dtype.

    Triton's interpreter cuts bfloat16 off where a GPU rounds to nearest, which doubles the error of every rounding.
    """
    actual, eager = actual.cpu(), eager.cpu()
    assert actual.dtype == eager.dtype, name
    assert actual.shape == truth.shape, name
    if actual.dtype == torch.float32:
        torch.testing.assert_close(
            actual.double(), truth, rtol=1.3e-6, atol=1e-5, msg=lambda m: f"{name}: {m}"
        )
        return
    if not actual.numel():
        return
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    allowed = 4 if interpreted and actual.dtype == torch.bfloat16 else 2
    error, of_eager = ((values.double() - truth).abs().max() for values in (actual, eager))
    rounding = torch.finfo(actual.dtype).eps * truth.abs().max() / 2
    assert error <= allowed * max(of_eager, rounding), (name, float(error), float(of_eager))
