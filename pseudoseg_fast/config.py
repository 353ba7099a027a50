"""What a run is made of: dataclasses, named presets, and the command line over both.

Defaults are those of the authors' code, but for the batch, ``align_corners``, the encoder, the rates of ASPP and the
start of SGC. A preset or a file given with ``--config`` replaces some, options replace more.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace

from pseudoseg_fast import augment
from pseudoseg_fast.method import MethodConfig
from pseudoseg_fast.sgc import Attention

PRESET_FOLDER = resources.files("pseudoseg_fast.presets")

ADDED = ("cpu", "fixmatch", "tagged", "untagged")
"""Presets that are given after another one."""


@dataclass
class DataConfig:
    """Where the pictures are and how they are cut.

    Args:
        root: folder of the data set; "demo" is the embedded one.
        layout: how pictures and masks are arranged below root: lists (the lists say it all), folder, voc, cityscapes,
            coco, ade20k, mmseg, yolo or labelme; auto takes the obvious one. What a layout finds stands in for lists
            and class names that are not given, and explains the bare ids of published lists.
        labeled: list of labelled pictures, one "image mask" a line.
        unlabeled: list of unlabelled pictures, one "image" a line, or a folder, or tar shards such as
            "shards/pool-{000..099}.tar", which are indexed once, or URLs of shards, which webdataset streams; a
            layout's are its training pictures that are not labelled. Not needed by method.name supervised.
        unlabeled_size: number of pictures behind URLs.
        val: list of labelled pictures to evaluate on.
        classes: file of class names, one a line, in the order of their ids; null means classes.txt, or the layout's.
        tags: CSV file "image,tags" with tags separated by ";", for method.image_labels; or the word masks: the classes
            that the hidden masks of unlabelled pictures show, read for that alone, to simulate such a file.
        background: id of the class that is no object; "auto" is the class named background (or bg, _background_), where
            there is one.
        ignore_index: id of pixels without a label in the masks.
        label_map: what ids in the masks mean: pairs such as "7:1,9:255", 255 being ignored, or a YAML file of them;
            others stay, or are what reduce_zero_label makes of them, or the layout, where it has as many classes.
        reduce_zero_label: id 0 means ignored and the others count from 1; null leaves it to the layout.
        color_map: file of the colours of RGB masks, a line "r g b class" for each.
        mask_orientation: how masks without an EXIF orientation lie: upright, or as the pictures are stored.
        white: value that becomes 255 in pictures of more than 8 bits; null keeps the high byte of 16.
        short_side: resize pictures so that their shorter side has this many pixels, before all else; JPEGs of more than
            four times that are decoded at a fraction of their size, several times faster.
        crop_size: side of the training crops in pixels.
        scales: factors of the random scale.
        color_jitter: strengths of the strong view's brightness, contrast, saturation and hue.
        cutout: side of the strong view's square, as a fraction of the crop.
        cache: keep decoded pictures in memory.
        reuse_labeled: where a layout tells which pictures are unlabelled, the labelled ones are among them.
        workers: processes that read and augment; 0 does it in the main one.
    """

    root: str
    layout: Literal[
        "auto", "lists", "folder", "voc", "cityscapes", "coco", "ade20k", "mmseg", "yolo", "labelme"
    ] = "auto"
    labeled: str | None = None
    unlabeled: str | None = None
    unlabeled_size: int | None = None
    val: str | None = None
    classes: str | None = None
    tags: str | None = None
    background: Literal["auto"] | int | None = "auto"
    ignore_index: int = 255
    label_map: dict[int, int] | str | None = None
    reduce_zero_label: bool | None = None
    color_map: str | None = None
    mask_orientation: Literal["upright", "stored"] = "upright"
    white: float | None = None
    short_side: int | None = None
    crop_size: int = 513
    scales: tuple[float, ...] = augment.SCALES
    color_jitter: tuple[float, float, float, float] = augment.COLOR_JITTER
    cutout: float = augment.CUTOUT
    cache: bool = False
    reuse_labeled: bool = False
    workers: int = 2

    def __post_init__(self) -> None:
        """Refuse values outside their range, and conversions of both colours and ids."""
        for name in ("white", "unlabeled_size"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"data.{name} must be positive, got {value}")
        if self.workers < 0:
            raise ValueError(
                f"data.workers must not be negative, got {self.workers}; 0 reads in the main process"
            )
        *factors, hue = self.color_jitter
        if not (all(0 <= factor < math.inf for factor in factors) and 0 <= hue <= 0.5):
            raise ValueError(
                "data.color_jitter expects brightness, contrast and saturation of 0 or more, and hue from 0 to 0.5, "
                f"got {list(self.color_jitter)}"
            )
        given = [name for name in ("label_map", "reduce_zero_label") if getattr(self, name)]
        if self.color_map and given:
            raise ValueError(
                f"expected masks of colours or of ids, got data.color_map and data.{' and data.'.join(given)}; "
                "leave one kind out"
            )


@dataclass
class ModelConfig:
    """The segmentation network, in the words of segmentation-models-pytorch.

    Args:
        arch: architecture, such as DeepLabV3Plus, Unet, FPN, Segformer.
        encoder_name: encoder of segmentation-models-pytorch or timm.
        encoder_weights: name of pretrained weights that a hub has, such as imagenet; null starts at random.
        weights: local file of encoder weights, or package:NAME for the file that an installed package ships;
            replaces encoder_weights.
        init: checkpoint of another run, such as RUN/checkpoints/best.ckpt, whose evaluated network a new run starts
            from, with step 0, schedule and optimiser of its own. The network must be of the same kind; rows of the last
            layers are taken by class name, and classes that the checkpoint does not know start anew. encoder_weights
            and weights are then neither downloaded nor read, and a run that goes on does not need the file.
        in_channels: channels of a picture.
        output_stride: stride of the encoder's last stage, where the architecture can choose it; null for its usual one.
        attention_dim: width of query and key in the attention of SGC.
        attention: residual (as in the authors' code) adds the activation maps to what attention makes of them, plain
            leaves them out, none has no attention; the last two are for ablations.
        decoder: further arguments of the architecture.
        mean: mean pixel in [0, 1] per channel that the encoder was trained with; null for ImageNet's.
        std: standard deviation per channel, likewise.
    """

    arch: str = "DeepLabV3Plus"
    encoder_name: str = "resnet50"
    encoder_weights: str | None = "imagenet"
    weights: str | None = None
    init: str | None = None
    in_channels: int = 3
    output_stride: int | None = None
    attention_dim: int = 128
    attention: Attention = "residual"
    decoder: dict[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass
class OptimConfig:
    """How the weights move.

    Args:
        name: sgd (momentum 0.9) or adamw.
        lr: learning rate of decoder and classifier; falls as (1 - step / steps) ** power.
        encoder_lr: factor on lr for the encoder.
        sgc_lr: factor on lr for the attention head.
        weight_decay: on all weights that are matrices or filters; not on biases and norms.
        power: exponent of the polynomial decay.
        warmup: steps over which lr first grows linearly.
        steps: number of steps.
        batch_size: labelled pictures in a forward pass of one process.
        unlabeled_batch_size: unlabelled pictures in a forward pass of one process; null means as many as labelled ones.
        accumulate: passes whose gradients are added up before a step is taken: a step sees batch_size x accumulate x
            processes labelled pictures.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.007
    encoder_lr: float = 1.0
    sgc_lr: float = 1.0
    weight_decay: float = 4e-5
    power: float = 0.9
    warmup: int = 0
    steps: int = 30_000
    batch_size: int = 8
    unlabeled_batch_size: int | None = None
    accumulate: int = 1

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name in ("lr", "steps", "batch_size", "unlabeled_batch_size", "accumulate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"optim.{name} must be positive and finite, got {value}")
        for name in ("encoder_lr", "sgc_lr", "weight_decay", "power", "warmup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"optim.{name} must not be negative and must be finite, got {getattr(self, name)}"
                )


@dataclass
class RunConfig:
    """Where results go, and on what the run runs.

    Args:
        dir: folder of the run; null makes one under runs/ named after the method and the time.
        seed: of weights, order of pictures and views.
        resume: go on with the newest whole checkpoint in dir, or begin where there is none (auto; so does the bare
            option), or with the checkpoint, or that of the run folder, at this path. Rates, steps, batch sizes,
            precision and sizes of pictures may be others then.
        overwrite: let a new run replace the one that dir holds.
        eval_every: steps between evaluations; the last step is always evaluated.
        draw_every: evaluations between two drawings of a few val pictures, and one at the last step; 0 draws none.
        checkpoint_every: steps between checkpoints; a crash loses the steps since the last one.
        keep: number of checkpoints kept, the newest ones; the best one is kept besides.
        log_every: steps between lines of the log.
        accelerator: cpu, cuda (or gpu, which is the same), or auto for the best there is.
        devices: processes to start on this machine, each on a GPU of its own; auto is one, or as many as torchrun or
            srun started.
        precision: 32-true, bf16-mixed or 16-mixed.
        sync_batchnorm: batch norms take statistics over the pictures of all processes; auto does so on GPUs.
        compile: compile the network with torch.compile, which takes a minute or more before the first step; evaluation,
            whose pictures may be of many sizes, stays eager.
        cuda_graphs: record the passes of a step as CUDA graphs, so that a GPU need not wait for launches; auto does so
            on one GPU, without compile, in 32-true or bf16-mixed. A network that is seen to draw on the CPU or to wait
            for the device is left as it is, others that cannot be recorded end the run at its first steps, and ask for
            false. So does, by itself, one whose Python code does something else at every pass: only what it gave the
            device is repeated.
        nonfinite: what a NaN or infinite loss or gradient, or a loss above 10 000, does: stop the run, or skip the
            step, which waits for the device at every step.
    """

    dir: str | None = None
    seed: int = 0
    resume: bool | str | None = None
    overwrite: bool = False
    eval_every: int = 1000
    draw_every: int = 1
    checkpoint_every: int = 500
    keep: int = 2
    log_every: int = 10
    accelerator: Literal["auto", "cpu", "cuda", "gpu"] = "auto"
    devices: Literal["auto"] | int = "auto"
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    sync_batchnorm: Literal["auto"] | bool = "auto"
    compile: bool = False
    cuda_graphs: Literal["auto"] | bool = "auto"
    nonfinite: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name in ("eval_every", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"run.{name} must be at least 1 step, got {getattr(self, name)}")
        if self.draw_every < 0:
            raise ValueError(f"run.draw_every must not be negative, got {self.draw_every}; 0 draws nothing")
        if self.devices != "auto" and self.devices < 1:
            raise ValueError(f"run.devices must be auto, or at least 1 process, got {self.devices}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"run.seed must be from 0 to 2**63 - 1, got {self.seed}")
        if self.keep < 1:
            raise ValueError(f"run.keep must be at least 1 checkpoint, got {self.keep}")
        if self.accelerator == "gpu":
            self.accelerator = "cuda"
        if isinstance(self.resume, bool):
            self.resume = "auto" if self.resume else None


@dataclass
class Config:
    """One run.

    Shares of the run, such as ``method.start_u`` 0.4, become steps of ``optim.steps`` when a Config is made. What
    :func:`to_dict` gives, and a run writes to ``config.yaml``, has the steps: other ``optim.steps`` do not change them.
    """

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        """Turn shares of the run into steps, and refuse groups that contradict each other."""
        steps = self.optim.steps
        start, ramp = (
            round(value * steps) if value < 1 else int(value)
            for value in (self.method.start_u, self.method.ramp_u)
        )
        self.method = dataclasses.replace(self.method, start_u=start, ramp_u=ramp)
        if self.method.cutmix and (self.optim.unlabeled_batch_size or self.optim.batch_size) == 1:
            raise ValueError(
                "method.cutmix mixes the pictures of a batch, expected at least 2 unlabelled ones, got 1; raise "
                "optim.batch_size or optim.unlabeled_batch_size"
            )
        if self.method.image_labels and self.method.cutmix and self.method.weight_x:
            raise ValueError(
                "method.cutmix mixes pictures, whose tags L_x could no longer learn; with method.image_labels set "
                f"method.weight_x to 0, got {self.method.weight_x}, or method.cutmix to 0"
            )
        if self.method.image_labels and self.data.tags is None:
            raise ValueError(
                "method.image_labels needs tags of the unlabelled pictures: give --data.tags FILE"
            )


def choose_accelerator(name: str) -> str:
    """Return the accelerator that ``name`` means to Fabric; "auto" is cuda where there is one, else the CPU.

    Apple's MPS is left out: it has no float64, which scores and the mean of squares are computed in.

    Raises:
        ValueError: it means none.
    """
    known = {
        "cpu": "cpu",
        "cuda": "cuda",
        "gpu": "cuda",
        "auto": "cuda" if torch.cuda.is_available() else "cpu",
    }
    if name not in known:
        raise ValueError(f"accelerator expects one of {', '.join(known)}, got {name!r}")
    return known[name]


def presets() -> list[str]:
    """Return the names that ``--config`` knows."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in PRESET_FOLDER.iterdir() if entry.name.endswith(".yaml")
    )


def config_path(name: str) -> Path:
    """Return the file that ``--config name`` means: an existing file, else a preset.

    Raises:
        ValueError: it is neither; the message names the nearest preset.
    """
    if Path(name).is_file():
        return Path(name)
    preset = Path(str(PRESET_FOLDER / f"{name}.yaml"))
    if preset.is_file():
        return preset
    raise ValueError(
        f"--config expects a file or one of the presets {', '.join(presets())}; got {name!r}, which is neither"
        + nearest(name, presets())
    )


def nearest(word: str, words: list[str]) -> str:
    """Return "; did you mean ...?" for the word that is most alike, or nothing."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


class Parser(ArgumentParser):
    """An argument parser that says in a line what is wrong and, for a mistyped option, what was meant."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message, with a way out where there is one, and exit with status 2.

        Raises:
            ValueError: the message, in place of the exit, where the parser was made with ``exit_on_error=False``.
        """
        if unknown := re.search(r"unrecognized arguments: ([^\s=]+)", message):
            message += self._meant(unknown.group(1))
        elif unknown := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
            message += self._meant(f"--{unknown.group(1)}.{unknown.group(2)}")
        elif unknown := re.search(r"Option '([\w.]+)' is not accepted", message):
            message += self._meant(f"--{unknown.group(1)}")
        elif "arguments are required: data." in message:
            message += (
                f"\nfor a first run on pictures that come with the package: {self.prog} --config demo\n"
                "for your own: --data.root DIR, with images/train, images/val, masks/train, masks/val and classes.txt "
                "in it, or with --data.labeled LIST --data.val LIST --data.classes FILE --data.unlabeled LIST_OR_DIR"
            )
        if not self.exit_on_error:
            raise ValueError(message) from ex
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help lists all options\n")

    def _meant(self, unknown: str) -> str:
        """Return which option was meant, be it typed with its group or without, or that a preset needs --config."""
        if unknown in presets():
            return f"; did you mean '--config {unknown}'?"
        known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        if "." not in unknown:
            bare = {f"--{name.split('.')[-1].removeprefix('--')}": name for name in known}
            close = difflib.get_close_matches(unknown, bare, n=1)
            return f"; did you mean {bare[close[0]]!r}?" if close else ""
        return nearest(unknown, known)


def make_parser(prog: str, description: str, *, exit_on_error: bool = True) -> Parser:
    """Return the parser of a whole :class:`Config`."""
    parser = Parser(prog=prog, description=description, allow_abbrev=False, exit_on_error=exit_on_error)
    parser.add_argument("--config", action="config", help=f"a YAML file or a preset: {', '.join(presets())}")
    parser.add_class_arguments(Config)
    return parser


def parse_config(arguments: list[str], prog: str, description: str) -> Config:
    """Parse a command line into a :class:`Config`; exits with status 2 and a message on bad input.

    Options count for more than ``--config``, wherever they stand. ``--run.resume`` without a value means auto.
    """
    return parse(make_parser(prog, description), arguments)[0]


def parse(parser: Parser, arguments: list[str]) -> tuple[Config, Namespace]:
    """Parse a command line as :func:`parse_config` does, with a parser that may have been given more options.

    Returns:
        The configuration, and the values of all options.
    """
    configs: list[str] = []
    others: list[str] = []
    rest = iter(arguments)
    try:
        for argument in rest:
            option, equals, name = argument.partition("=")
            if option != "--config":
                others.append(argument)
            elif equals or (name := next(rest, "")):
                configs.append(f"--config={config_path(name)}")
            else:
                others.append(argument)  # without a value: the parser says so
        for index, (argument, following) in enumerate(zip(others, [*others, "--"][1:], strict=True)):
            if argument == "--run.resume" and following.startswith("--"):
                others[index] = "--run.resume=auto"
        return _build(parser, parser.parse_args([*configs, *others]))
    except ValueError as error:
        parser.error(str(error))


def preset_hint(arguments: Sequence[str]) -> str | None:
    """Return what a user should know of the presets in a command line, or None where nothing is amiss.

    Args:
        arguments: as :func:`parse_config` takes them.
    """
    following = [*arguments[1:], ""]
    names = [
        value if argument == "--config" else argument.removeprefix("--config=")
        for argument, value in zip(arguments, following, strict=True)
        if argument.partition("=")[0] == "--config"
    ]
    given = {argument.partition("=")[0] for argument in arguments}
    if not names and "--optim.steps" not in given:
        return (
            "no --config: the schedule is the paper's; for tens to hundreds of masks of your own give --config small, "
            "and to train in minutes on a CPU --config small --config cpu"
        )
    for place, name in enumerate(names):
        later = [other for other in names[place + 1 :] if other in presets() and other not in ADDED]
        if name in ADDED and (later or not place):
            base = later[0] if later else "small"
            return (
                f"--config {name} changes what a preset before it says, and "
                + (f"--config {base}, which comes after it, changes it back" if later else "there is none")
                + f": give --config {' --config '.join([base, *(other for other in names if other in ADDED)])}"
            )
    return None


def from_dict(values: dict[str, Any]) -> Config:
    """Build a :class:`Config` of the plain values that :func:`to_dict` gives.

    Raises:
        ValueError: an option is unknown, missing or has a bad value.
    """
    parser = make_parser("config", "", exit_on_error=False)
    return _build(parser, parser.parse_object(values))[0]


def _build(parser: ArgumentParser, namespace: Namespace) -> tuple[Config, Namespace]:
    values = parser.instantiate(namespace)
    return Config(**{group.name: values[group.name] for group in dataclasses.fields(Config)}), values


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration dataclass as plain dictionaries and lists, ready for YAML."""
    return yaml.safe_load(yaml.safe_dump(_plain(dataclasses.asdict(config))))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
