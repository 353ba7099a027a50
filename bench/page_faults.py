"""What does glibc's habit of returning memory cost a training step on the CPU?

python -m bench.page_faults

Times steps of the demo's network, in processes of their own that take turns, with and without
``memory.keep_freed_memory``, and prints seconds and page faults per step.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

import torch

from pseudoseg_fast.memory import keep_freed_memory
from pseudoseg_fast.network import Network

STEPS = 6
REPEATS = 3


def measure(keep: bool) -> dict[str, float]:
    """Return seconds and page faults of one training step."""
    if keep:
        keep_freed_memory()
    network = Network("DeepLabV3Plus", "tf_efficientnet_lite0", None, classes=6, background=None)
    network.to(memory_format=torch.channels_last)
    images = torch.randint(256, (8, 3, 192, 192), dtype=torch.uint8)

    def step() -> None:
        network.zero_grad()
        network(images).decoder_logits.square().mean().backward()

    step()
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(STEPS):
        step()
    seconds = (time.perf_counter() - began) / STEPS
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before.ru_minflt
    return {"seconds": round(seconds, 3), "faults": round(faults / STEPS)}


def main() -> None:
    """Run the command line."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1] == "keep")))
        return
    for _ in range(REPEATS):
        for mode in ("default", "keep"):
            command = [sys.executable, "-m", "bench.page_faults", mode]
            print(mode, subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


if __name__ == "__main__":
    main()
