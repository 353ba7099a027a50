"""What an exported file says about itself: its metadata properties, written and read (no torch)."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

FORMAT = "pseudoseg_fast onnx 1"
Output = Literal["labels", "probabilities", "logits"]
Precision = Literal["fp32", "fp16", "int8"]
OUTPUTS = get_args(Output)
PRECISIONS = get_args(Precision)
INPUT = "uint8 [batch, channels, height, width], 0 to 255, any height and width, 3 channels are RGB, not normalised"
_JSON = ("classes", "palette", "background", "channels", "white", "short_side", "stride", "run", "versions")


@dataclass(frozen=True)
class Metadata:
    """The properties of a model.

    Args:
        classes: names, in the order of ids.
        palette: colour of each class, red, green and blue in 0..255.
        output: what the graph's first output is, one of ``OUTPUTS``.
        precision: of the network's arithmetic, one of ``PRECISIONS``.
        background: id of the background class, or None.
        channels: of a picture; 1 is grey, 3 RGB.
        white: value that becomes 255 in pictures of more than 8 bits; None keeps the high byte of 16.
        short_side: pictures were resized in training so that their shorter side has this many pixels; None: never.
        stride: the network works on sides that are multiples of it; the graph pads to them.
        run: the training run: checkpoint, step, architecture, encoder, method, score.
        versions: of the programs that made the file.
    """

    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    output: str
    precision: str = "fp32"
    background: int | None = None
    channels: int = 3
    white: float | None = None
    short_side: int | None = None
    stride: int = 1
    run: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def colors(self) -> NDArray[np.uint8]:
        """The palette as uint8 [classes, 3]."""
        return np.array(self.palette, np.uint8)

    def properties(self) -> dict[str, str]:
        """Return the properties as texts, which is what ONNX keeps; lists, numbers and mappings as JSON."""
        return {
            "format": FORMAT,
            "input": INPUT,
            "output": self.output,
            "precision": self.precision,
            **{name: json.dumps(getattr(self, name)) for name in _JSON},
        }


def read_metadata(properties: Mapping[str, str]) -> Metadata:
    """Read the properties of a model and check every one that inference relies on.

    Raises:
        ValueError: they are not those of a file that ``python -m pseudoseg_fast.export`` made.
    """
    found = properties.get("format")
    if found != FORMAT:
        raise ValueError(
            f"expected a model made by python -m pseudoseg_fast.export (format {FORMAT!r}), "
            f"found {'no format' if found is None else repr(found[:40])} in its metadata; export the checkpoint again"
        )
    try:
        values = {name: json.loads(properties[name]) for name in _JSON}
        metadata = Metadata(
            **{
                **values,
                "classes": tuple(values["classes"]),
                "palette": tuple(tuple(color) for color in values["palette"]),
            },
            output=properties["output"],
            precision=properties["precision"],
        )
        check_metadata(metadata)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"the model's metadata is damaged ({type(error).__name__}: {error}); export the checkpoint again"
        ) from error
    return metadata


def check_metadata(metadata: Metadata) -> None:
    """Raise ValueError for values that a file of this program never has."""
    classes, palette = metadata.classes, metadata.palette
    if not classes or not all(isinstance(name, str) and _is_name(name) for name in classes):
        raise ValueError(f"classes must be names without control characters, got {list(classes)}")
    if len(classes) > 256:
        raise ValueError(f"at most 256 classes have ids of one byte, got {len(classes)}")
    if len(palette) != len(classes) or not all(
        len(color) == 3 and all(type(value) is int and 0 <= value <= 255 for value in color)
        for color in palette
    ):
        raise ValueError("palette must have red, green and blue in 0..255 for each class")
    if metadata.output not in OUTPUTS or metadata.precision not in PRECISIONS:
        raise ValueError(f"output {metadata.output!r} or precision {metadata.precision!r} is unknown")
    for name, allowed in (("channels", range(1, 1025)), ("stride", range(1, 1025))):
        if getattr(metadata, name) not in allowed:
            raise ValueError(f"{name} must be {' or '.join(map(str, (allowed[0], allowed[-1])))}")
    white = metadata.white
    if white is not None and not (type(white) in (int, float) and 0 < white < float("inf")):
        raise ValueError("white must be a positive number or null")
    short_side = metadata.short_side
    if short_side is not None and not (type(short_side) is int and 0 < short_side <= 1 << 16):
        raise ValueError("short_side must be a number of pixels or null")


def _is_name(text: str) -> bool:
    """Say whether a text is free of control characters, tabs aside, which would do something to a terminal."""
    return all(character == "\t" or unicodedata.category(character) != "Cc" for character in text)
