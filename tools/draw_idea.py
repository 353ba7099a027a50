"""Draw docs/idea.png, the method in one picture: what the network of a checkpoint makes of val pictures.

python -m tools.draw_idea RUN/checkpoints/last.ckpt docs/idea.png --pictures 3 7
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from pseudoseg_fast.data.sets import read_data
from pseudoseg_fast.examples import Examples
from pseudoseg_fast.networks import load_network

TITLES = ("weak view", "CAM", "SGC", "decoder", "fused label", "truth")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--pictures", type=int, nargs="+", required=True, help="places in the val list, from 0"
    )
    options = parser.parse_args()
    network, config, _ = load_network(options.checkpoint)
    # Whole pictures, and whole labels.
    config = replace(config, data=replace(config.data, scales=(1.0,), cutout=0.0))
    data = read_data(config.data, labeled=False, unlabeled=False)
    examples = Examples(config, data, network, options.pictures)
    examples.draw(network, TITLES, cell=144).save(options.out, optimize=True)


if __name__ == "__main__":
    main()
