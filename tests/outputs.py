"""Outputs of a network of three classes, for the tests of what is made of them."""

import torch

from pseudoseg_fast.network import Outputs

BATCH, CLASSES, FOREGROUND = 2, 3, 2


def random_outputs():
    """Decoder logits at 5 x 7 and SGC logits at 2 x 3, float64, with confident and with doubtful pixels."""
    return Outputs(
        2 * torch.randn(BATCH, CLASSES, 5, 7, dtype=torch.float64),
        torch.randn(BATCH, FOREGROUND, dtype=torch.float64),
        None,
        torch.randn(BATCH, CLASSES, 2, 3, dtype=torch.float64),
    )
