"""Draw docs/idea.png, the method in one picture: what the network of a checkpoint makes of val pictures.

python -m tools.draw_idea RUN/checkpoints/last.ckpt docs/idea.png --pictures 3 7

It prints how many pixels SGC, the decoder and the label get right in each.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from pseudoseg_fast.data.sets import read_data
from pseudoseg_fast.examples import Examples
from pseudoseg_fast.networks import load_network
from pseudoseg_fast.visualize import IGNORED, Pixels

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
    data = read_data(config.data, labeled=False)
    examples = Examples(config, data, network, options.pictures)
    examples.draw(network, TITLES, cell=144).save(options.out, optimize=True)
    panels = examples.panels(network)
    for title in ("SGC", "decoder", "fused label"):
        print(f"{title}: {' '.join(map(right, panels[title], panels['truth']))} % of the pixels right")


def right(drawn: Pixels, truth: Pixels) -> str:
    """Return the share of the pixels with a label that have its colour, in per cent."""
    known = (truth != IGNORED).any(2)
    return f"{100 * (drawn == truth).all(2)[known].mean():.0f}"


if __name__ == "__main__":
    main()
