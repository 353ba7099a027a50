"""Score a checkpoint or an exported model on pictures with masks.

python -m pseudoseg_fast.evaluate --checkpoint FILE [--data...]
python -m pseudoseg_fast.evaluate --onnx FILE --checkpoint FILE | --data...
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from pseudoseg_fast.config import Config, DataConfig, Parser, choose_accelerator, to_dict
from pseudoseg_fast.data.lists import DataError, find_file
from pseudoseg_fast.data.sets import Data, data_root, read_data
from pseudoseg_fast.depthwise import use_depthwise_kernels
from pseudoseg_fast.loaders import val_loader
from pseudoseg_fast.network import Network
from pseudoseg_fast.networks import load_network
from pseudoseg_fast.scoring import Scores, evaluate, labels_of_answer, score
from pseudoseg_fast.stop import end_quietly
from pseudoseg_fast.whole_file import replace_text


def parse_command(
    parser: Parser, arguments: list[str]
) -> tuple[Any, Network | None, Config | None, dict[str, Any]]:
    """Parse a command line with ``--checkpoint`` and ``--data...``: the run's own data are the defaults.

    Returns:
        The options, and the checkpoint's network, configuration and state; None, None and {} without a checkpoint.

    Raises:
        ValueError, OSError: see :func:`load_network`.
    """
    # The checkpoint is read before the rest of the command line can be.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--checkpoint")
    path = first.parse_known_args(arguments)[0].checkpoint
    if path is None:
        return parser.instantiate(parser.parse_args(arguments)), None, None, {}
    network, config, state = load_network(path)
    parser.set_defaults({f"data.{name}": value for name, value in to_dict(config)["data"].items()})
    options = parser.instantiate(parser.parse_args(arguments))
    given = {argument.partition("=")[0] for argument in arguments}
    if "--data.root" in given:
        check_lists(options.data, given)
    return options, network, config, state


def check_lists(config: DataConfig, given: set[str]) -> None:
    """Raise DataError for a list of the run that another root does not have.

    Args:
        config: the run's data, but for what was given.
        given: the options of the command line.
    """
    root = data_root(config)
    for name in ("val", "classes"):
        value = getattr(config, name)
        if value and f"--data.{name}" not in given:
            try:
                find_file(value, root)
            except DataError as error:
                raise DataError(
                    f"data.{name} is {value}, as in the run, and {error}; give --data.{name} null for what "
                    f"{config.root} holds, or a file of its own"
                ) from error


def check_classes(data: Data, classes: Sequence[str], owner: str) -> None:
    """Raise DataError unless the classes of the data are those of the network, in this order."""
    if data.classes != list(classes):
        raise DataError(
            f"data.classes names {len(data.classes)} classes: {', '.join(data.classes)}\n"
            f"{owner} has {len(classes)}: {', '.join(classes)}\n"
            "give --data.classes FILE with the latter in this order, and --data.label_map where ids in the masks differ"
        )


def score_onnx(path: str, device: str, config: DataConfig, data: Data) -> Scores:
    """Score an exported model on the val pictures, resized as in its training.

    Raises:
        ValueError, RuntimeError, OSError: see :class:`pseudoseg_fast.deploy.model.Model`.
    """
    try:
        from pseudoseg_fast.deploy.model import Model
    except ImportError as error:
        raise RuntimeError(f"--onnx needs ONNX Runtime: pip install onnxruntime ({error})") from error
    model = Model(path, device)
    check_classes(data, model.metadata.classes, "the model")
    trained = {name: getattr(model.metadata, name) for name in ("short_side", "white")}
    for name, value in trained.items():
        if (given := getattr(config, name)) not in (None, value):
            raise DataError(
                f"data.{name} is {given}, the model was trained with {'none' if value is None else value}; "
                "leave the option out"
            )
    config = replace(config, **trained)

    def label(images: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return labels_of_answer(torch.from_numpy(model(images.numpy(), size)))

    return score(label, val_loader(config, data, model.metadata.channels), data.classes)


def check_new(path: Path) -> None:
    """Refuse a file that is there already, or whose folder is not, before anything is computed for it.

    Raises:
        ValueError: it is so.
    """
    if path.exists():
        raise ValueError(f"--json {path} is there already; remove it, or choose another name")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--json {path}: there is no folder {path.absolute().parent}; make it first")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; bad input ends with a message and status 2."""
    prog = "python -m pseudoseg_fast.evaluate"
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(prog=prog, description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", type=str, help="a file such as RUN/checkpoints/best.ckpt")
    parser.add_argument("--onnx", type=str, help="score this exported model instead")
    parser.add_argument(
        "--accelerator", type=str, default="auto", help="cpu, cuda, or auto for the best there is"
    )
    parser.add_argument(
        "--json", type=str, help="write all scores and the confusion matrix to this new file, too"
    )
    parser.add_class_arguments(DataConfig, "data", help="the run's own unless given")
    given = {argument.partition("=")[0] for argument in arguments}
    try:
        if given.isdisjoint({"--checkpoint", "--onnx", "-h", "--help"}):
            parser.error("expected --checkpoint FILE, such as RUN/checkpoints/best.ckpt, or --onnx FILE")
        if "--onnx" in given and given.isdisjoint({"--checkpoint", "--data.root", "-h", "--help"}):
            parser.error(
                "expected pictures with masks to score the model on: --checkpoint FILE, for the val pictures of its "
                "run, or --data.root DIR"
            )
        options, network, config, state = parse_command(parser, arguments)
        if options.json is not None:
            check_new(Path(options.json))
        data = read_data(options.data, labeled=False, unlabeled=False)
        if options.onnx is not None:
            scored: dict[str, Any] = {"onnx": options.onnx}
            title = f"{options.onnx},"
            scores = score_onnx(options.onnx, options.accelerator, options.data, data)
        else:
            assert network is not None
            assert config is not None
            scored = {"checkpoint": options.checkpoint, "step": state["step"]}
            title = f"{options.checkpoint}, step {state['step']},"
            check_classes(data, state["classes"], "the checkpoint")
            fabric = Fabric(
                accelerator=choose_accelerator(options.accelerator),
                devices=1,
                precision=config.run.precision,
            )
            network.to(fabric.device).to(memory_format=torch.channels_last)
            use_depthwise_kernels(network, fabric.device)
            with fabric.autocast():
                loader = val_loader(options.data, data, config.model.in_channels)
                scores = evaluate(network, loader, data.classes, align_corners=config.method.align_corners)
        if options.json is not None:
            scored |= {"pictures": len(data.val), **scores.as_dict()}
            replace_text(Path(options.json), json.dumps(scored, indent=2, allow_nan=False) + "\n")
    except (ValueError, RuntimeError, OSError) as error:
        parser.error(str(error))
    print(f"{title} on {len(data.val)} pictures of {options.data.val or data.root}")
    print(scores.table())
    return 0


if __name__ == "__main__":
    end_quietly()
    sys.exit(main())
