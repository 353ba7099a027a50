"""Kill training 100 times at random moments: is anything lost but the steps since the last checkpoint?

python -m bench.kills [--kills 100] [--seed 0] [--output bench/results/kills.json]

Runs of a network of a few layers, killed (SIGKILL) at a moment drawn from the time that a whole run takes, one time in
three while a checkpoint is being written, and started again by the same command until they have finished. After each
kill every checkpoint, the configuration and the log must be whole and the newest checkpoint no older than the interval;
in the end weights, teacher, optimiser, generators, best score and log must be those of a run in one go, to the bit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import killing


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        kills, runs = killing.Study(Path(folder), options.seed)(options.kills)
    result = {
        "kills": len(kills),
        "runs": runs,
        "all runs as one in one go": True,  # else the study has ended with an error
        "checkpoint_every": killing.CHANGES["run.checkpoint_every"],
        "most steps lost": max(kill.reached - kill.kept for kill in kills),
        "before the first step": sum(not kill.reached for kill in kills),
        "while a checkpoint was written": sum(kill.saving for kill in kills),
        "seconds": round(time.monotonic() - began),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
