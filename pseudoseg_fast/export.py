"""Export a checkpoint as an ONNX file, checked picture by picture against PyTorch.

python -m pseudoseg_fast.export --checkpoint RUN/checkpoints/best.ckpt --out model.onnx
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pseudoseg_fast
from pseudoseg_fast.config import Config, DataConfig, Parser
from pseudoseg_fast.data.decode import UnreadableImage
from pseudoseg_fast.data.labels import Labels
from pseudoseg_fast.data.lists import DataError, Sample
from pseudoseg_fast.data.read import read_sample
from pseudoseg_fast.data.samples import spread
from pseudoseg_fast.data.sets import Data, read_data
from pseudoseg_fast.data.stream import Stream
from pseudoseg_fast.deploy.files import prepare_folder, write_whole
from pseudoseg_fast.deploy.metadata import Metadata, Output, Precision, check_metadata
from pseudoseg_fast.evaluate import check_classes, parse_command
from pseudoseg_fast.loaders import ResizeShortSide, val_loader
from pseudoseg_fast.network import Network
from pseudoseg_fast.scoring import evaluate, labels_of_answer, score
from pseudoseg_fast.stop import end_quietly
from pseudoseg_fast.visualize import mask_palette, palette

CHECKED_PICTURES = 4


@dataclass(frozen=True)
class ExportOptions:
    """What is exported.

    Args:
        output: what the graph answers: labels (class ids), probabilities or logits, at the picture's size.
        precision: fp32; fp16 halves the file, for GPUs; int8 quantises what lies between pixels and logits, for CPUs.
        with_cam: also answer the class activation maps and the logits of the self-attention head.
        max_loss: points of mIoU that fp16 or int8 may lose on the val list.
        calibration: pictures that int8 takes its ranges from: unlabelled ones, or labelled ones where there are none or
            they are streamed.
    """

    output: Output = "labels"
    precision: Precision = "fp32"
    with_cam: bool = False
    max_loss: float = 1.0
    calibration: int = 64

    def __post_init__(self) -> None:
        """Refuse values that do not go together."""
        if self.with_cam and self.precision == "int8":
            raise ValueError("--with-cam is not for --precision int8: export the maps in fp32 or fp16")
        if self.calibration < 1:
            raise ValueError(f"--calibration expects at least 1 picture, got {self.calibration}")


def export(
    network: Network,
    config: Config,
    state: dict[str, Any],
    options: ExportOptions,
    data: Data | None,
    data_config: DataConfig,
    out: Path,
    run: dict[str, Any],
) -> list[str]:
    """Write the network to ``out`` if it answers as PyTorch does.

    Args:
        network: on the CPU, in evaluation mode.
        config: of its run.
        state: its checkpoint.
        options: what is exported.
        data: pictures to check on and to calibrate with; None checks fp32 on drawn ones.
        data_config: how they are read.
        out: the file; it appears complete, or not at all.
        run: where the network comes from, for the metadata.

    Returns:
        What was checked, line by line.

    Raises:
        VerificationError: it does not; nothing is written.
        RuntimeError: torch cannot export the network, or a package is missing.
        OSError: the file cannot be written.
    """
    try:
        import onnx

        from pseudoseg_fast.deploy import graph, precision, verify
    except ImportError as error:
        raise RuntimeError(
            f"the export needs onnx, onnxscript and onnxruntime: pip install 'pseudoseg-fast[export]' ({error})"
        ) from error
    align_corners = config.method.align_corners
    metadata = Metadata(
        classes=tuple(state["classes"]),
        palette=_palette(data, len(state["classes"]), state["background"]),
        output=options.output,
        precision=options.precision,
        background=state["background"],
        channels=network.in_channels,
        white=config.data.white,
        short_side=config.data.short_side,
        stride=network.stride,
        run=run,
        versions={
            "pseudoseg_fast": pseudoseg_fast.__version__,
            "torch": str(torch.__version__),
            "onnx": onnx.__version__,
            "opset": str(graph.OPSET),
        },
    )
    check_metadata(metadata)
    cores = {"fp32": graph.export_core(graph.Core(network, cam=options.with_cam))}
    if options.precision == "fp16":
        cores["fp16"] = graph.export_core(graph.Core(network, cam=options.with_cam, half=True))
    elif options.precision == "int8":
        assert data is not None
        pool = data.labeled if isinstance(data.unlabeled, Stream) else data.unlabeled or data.labeled
        shown = [pool[index] for index in spread(len(pool), options.calibration)]
        images = _readable(shown, data_config, network.in_channels)
        cores["int8"] = precision.quantize(cores["fp32"], network, images)

    def assemble(kind: str, output: str) -> onnx.ModelProto:
        parts = dataclasses.replace(metadata, output=output, precision=kind)
        return graph.assemble(cores[kind], network, parts, align_corners=align_corners)

    # fp32 is held to the network, whatever is exported: so head, tail and graph are right before precision is spent.
    answers = assemble("fp32", options.output)
    logits = answers if options.output == "logits" else assemble("fp32", "logits")
    onnx.checker.check_model(answers, full_check=True)
    pictures = _pictures(data, data_config, network)
    pictures += verify.odd_sizes(pictures, network.stride)
    differences = verify.compare(
        answers, logits, network, pictures, align_corners=align_corners, cam=options.with_cam
    )
    worst = verify.check(differences)
    lines = [f"checked against PyTorch on {len(differences)} pictures and sizes; worst: {worst}"]
    if options.precision != "fp32":
        assert data is not None
        answers = assemble(options.precision, options.output)
        onnx.checker.check_model(answers, full_check=True)
        lines += _compare_scores(verify.session(answers), network, data, data_config, config, options)
    write_whole(out.parent, out.name, lambda path: path.write_bytes(answers.SerializeToString()))
    return [*lines, f"{out}: {options.precision}, {out.stat().st_size / 2**20:.1f} MiB"]


def _compare_scores(
    session: Any,
    network: Network,
    data: Data,
    data_config: DataConfig,
    config: Config,
    options: ExportOptions,
) -> list[str]:
    """Return mIoU before and after a loss of precision.

    Raises:
        VerificationError: more is lost than allowed.
    """
    from pseudoseg_fast.deploy.verify import VerificationError

    def label(images: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        feed = {"images": images.numpy(), "size": torch.tensor(size).numpy()}
        return labels_of_answer(torch.from_numpy(session.run(None, feed)[0]))

    before = evaluate(
        network,
        val_loader(data_config, data, network.in_channels),
        data.classes,
        align_corners=config.method.align_corners,
    )
    after = score(label, val_loader(data_config, data, network.in_channels), data.classes)
    lost = 100 * (before.miou - after.miou)
    worst = max(
        zip(before.classes, before.iou, after.iou, strict=True),
        key=lambda row: row[1] - row[2] if row[1] == row[1] else 0.0,
    )
    text = (
        f"mIoU on {len(data.val)} val pictures: {100 * before.miou:.2f} before, "
        f"{100 * after.miou:.2f} in {options.precision}; "
        f"{worst[0]} lost most, {100 * worst[1]:.2f} to {100 * worst[2]:.2f}"
    )
    if not lost <= options.max_loss:
        raise VerificationError(
            f"{options.precision} loses {lost:.2f} points of mIoU, expected at most {options.max_loss}; "
            f"use another --precision or raise --max-loss ({text})"
        )
    return [text]


def _pictures(data: Data | None, config: DataConfig, network: Network) -> list[Any]:
    """Return a few val pictures as evaluation sees them, or drawn ones."""
    from pseudoseg_fast.deploy.verify import Case

    if data is not None:
        return [
            Case(data.val[index].name, _read(data.val[index], config, network.in_channels)[None])
            for index in spread(len(data.val), CHECKED_PICTURES)
        ]
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand((CHECKED_PICTURES, network.in_channels, 12, 16), generator=generator)
    drawn = torch.nn.functional.interpolate(patches, scale_factor=20, mode="bicubic").clamp(0, 1)
    return [Case(f"drawn {index}", (255 * image[None]).byte()) for index, image in enumerate(drawn)]


def _read(sample: Sample, config: DataConfig, channels: int) -> Tensor:
    """Return a picture uint8 [channels, H, W] as evaluation sees it."""
    image = read_sample(sample._replace(mask=None), Labels(1), channels=channels, white=config.white)[0]
    return ResizeShortSide(config.short_side)(image, None)["image"]


def _readable(samples: Sequence[Sample], config: DataConfig, channels: int) -> Iterator[Tensor]:
    """Yield the pictures that can be read; training leaves the others out, too.

    Raises:
        UnreadableImage: none can.
    """
    unreadable = []
    for sample in samples:
        try:
            yield _read(sample, config, channels)
        except UnreadableImage as error:
            unreadable.append(error)
    if unreadable and len(unreadable) == len(samples):
        raise unreadable[0]


def _palette(data: Data | None, classes: int, background: int | None) -> tuple[tuple[int, int, int], ...]:
    """Return the colours of the val masks' palette, or those of this program."""
    colors = mask_palette(data.val[0].mask, data.labels, background) if data else palette(classes, background)
    return tuple((int(red), int(green), int(blue)) for red, green, blue in colors)


def run_metadata(checkpoint: Path, config: Config, state: dict[str, Any]) -> dict[str, Any]:
    """Return what the metadata say of the training run: no path beyond the run's own folder."""
    folder = checkpoint.resolve().parent
    best = state.get("best")
    return {
        "checkpoint": checkpoint.name,
        "folder": folder.parent.name if folder.name == "checkpoints" else folder.name,
        "step": state["step"],
        "steps": config.optim.steps,
        "method": config.method.name,
        "seed": config.run.seed,
        "arch": config.model.arch,
        "encoder_name": config.model.encoder_name,
        "best": best if isinstance(best, int | float | str) else None,
        "weights": "teacher" if state["teacher"] else "model",
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command line: status 0, 1 if the export failed its checks, 2 on bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(prog="python -m pseudoseg_fast.export", description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", type=str, required=True, help="such as RUN/checkpoints/best.ckpt")
    parser.add_argument("--out", type=str, required=True, help="the file to write, such as model.onnx")
    parser.add_argument(
        "--output",
        type=Output,
        default=ExportOptions.output,
        help="what the graph answers at the picture's size: class ids, probabilities or logits",
    )
    parser.add_argument(
        "--precision",
        type=Precision,
        default=ExportOptions.precision,
        help="fp16 halves the file, for GPUs; int8 is for CPUs",
    )
    parser.add_argument(
        "--with-cam", action="store_true", help="also answer the class activation maps and the SGC logits"
    )
    parser.add_argument(
        "--max-loss",
        type=float,
        default=ExportOptions.max_loss,
        help="points of mIoU that fp16 or int8 may lose on the val list",
    )
    parser.add_argument(
        "--calibration",
        type=int,
        default=ExportOptions.calibration,
        help="unlabelled pictures that int8 takes its ranges from",
    )
    parser.add_class_arguments(DataConfig, "data", help="the run's own unless given")
    given = {argument.partition("=")[0] for argument in arguments}
    try:
        if given.isdisjoint({"--checkpoint", "-h", "--help"}):
            parser.error("expected --checkpoint FILE, such as RUN/checkpoints/best.ckpt")
        parsed, network, config, state = parse_command(parser, arguments)
        assert network is not None
        assert config is not None
        names = [field.name for field in dataclasses.fields(ExportOptions)]
        options = ExportOptions(**{name: getattr(parsed, name) for name in names})
        out = Path(parsed.out)
        if not out.parent.is_dir() or out.is_dir():
            raise ValueError(f"--out expects a file in an existing folder, such as model.onnx, got {out}")
        if out.suffix == ".ckpt" or (out.exists() and out.samefile(parsed.checkpoint)):
            raise ValueError(
                f"--out expects a name that is not a checkpoint's, such as model.onnx, got {out}"
            )
        prepare_folder(out.parent)
        int8 = options.precision == "int8"
        own = not any(name.startswith("--data.") for name in given)
        data: Data | None
        try:
            pooled = config.method.name == "pseudoseg" and (own or parsed.data.unlabeled is not None)
            data = read_data(parsed.data, labeled=int8, unlabeled=int8 and pooled)
            check_classes(data, state["classes"], "the checkpoint")
        except (DataError, OSError) as error:
            if options.precision != "fp32" or not own:
                raise
            print(f"the run's pictures cannot be read, so drawn ones are checked: {error}", file=sys.stderr)
            data = None
    except (ValueError, RuntimeError, OSError) as error:
        parser.error(str(error))
    try:
        run = run_metadata(Path(parsed.checkpoint), config, state)
        lines = export(network, config, state, options, data, parsed.data, out, run)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"{parser.prog}: nothing was written to {parsed.out}: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    end_quietly()
    sys.exit(main())
