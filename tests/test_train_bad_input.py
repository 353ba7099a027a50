"""What is wrong with the files or options of a run ends it with status 2 and a message that helps."""

import io
import logging
import shutil

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from pseudoseg_fast import checkpoint, evaluate, train


@pytest.fixture
def root(tmp_path):
    return tiny.make_set(tmp_path / "pictures")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run; its folder must be left as it is."""
    folder = tmp_path_factory.mktemp("trained")
    root = tiny.make_set(folder / "pictures")
    assert train.main(tiny.options(root, folder / "run", {"optim.steps": 1})) == 0
    return folder / "run"


def append(root, name, line):
    with (root / name).open("a") as file:
        file.write(f"{line}\n")


def save(path, array):
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def damaged_jpeg(path):
    """A picture whose header is whole and whose pixels are not."""
    buffer = io.BytesIO()
    Image.fromarray(tiny.picture(1)[0]).save(buffer, "JPEG")
    path.write_bytes(buffer.getvalue()[:-200])


def missing_files(root):
    append(root, "labeled.txt", "images/9.png masks/0.png")
    append(root, "labeled.txt", "images/0.png masks/9.png")


def mask_of_another_size(root):
    save(root / "masks/4.png", np.zeros((tiny.WIDTH, tiny.HEIGHT)))


def wrong_ids(root):
    ids = tiny.picture(5)[1]
    ids[:3, :4] = [3, 7, 255, 254]
    save(root / "masks/5.png", ids)


def colour_mask(root):
    save(root / "masks/0.png", tiny.COLORS[tiny.picture(0)[1]])


def no_mask_column(root):
    append(root, "val.txt", "images/6.png")


def empty_val_picture(root):
    (root / "images/5.png").write_bytes(b"")


def damaged_unlabeled_picture(root):
    damaged_jpeg(root / "images/2.jpg")
    append(root, "unlabeled.txt", "images/2.jpg")


def damaged_val_picture(root):
    damaged_jpeg(root / "images/5.jpg")
    append(root, "val.txt", "images/5.jpg masks/5.png")


BEFORE_THE_FIRST_STEP = {
    "missing files": (
        missing_files,
        {"data.layout": "lists"},
        ["labeled.txt: 2", "line 3: ", "images/9.png", "line 4: ", "masks/9.png"],
    ),
    "missing list": (None, {"data.val": "vall.txt"}, ["no file at", "vall.txt"]),
    "missing root": (None, {"data.root": "nowhere"}, ["data.root expects a folder", "nowhere"]),
    "empty list": (lambda root: tiny.write(root / "val.txt", ["# none"]), {}, ["val.txt is empty"]),
    "empty unlabelled list": (
        lambda root: tiny.write(root / "unlabeled.txt", []),
        {},
        ["unlabeled.txt is empty"],
    ),
    "no mask column": (
        no_mask_column,
        {"data.layout": "lists"},
        ["val.txt, line 4", "expected 'image mask'", "'images/6.png'"],
    ),
    "mask of another size": (
        mask_of_another_size,
        {},
        ["masks/4.png has 40 x 48", "images/4.png has 48 x 40"],
    ),
    "mask ids without a class": (wrong_ids, {}, ["masks/5.png holds the ids 3, 7, 254;", "expected 0 to 2"]),
    "colour mask": (colour_mask, {}, ["masks/0.png is a colour picture (mode RGB)", "one class id a pixel"]),
    "background of no class": (None, {"data.background": 3}, ["data.background", "from 0 to 2", "got 3"]),
    "tags of no class": (
        lambda root: tiny.write(root / "tags.csv", ["image,tags", "images/1.png,disk"]),
        {"method.image_labels": "true", "data.tags": "tags.csv"},
        ["tags.csv, line 2", "'disk' is not a class; did you mean 'disc'?"],
    ),
    "tags of other pictures": (
        lambda root: tiny.write(root / "tags.csv", ["image,tags", "1.png,disc"]),
        {"method.image_labels": "true", "data.tags": "tags.csv"},
        ["tags no picture of unlabeled.txt", "such as images/0.png, got 1.png"],
    ),
    "mean of another number of channels": (None, {"model.mean": [0.5]}, ["mean must hold 3 values", "[0.5]"]),
    "unknown architecture": (None, {"model.arch": "Unett"}, ["unknown arch 'Unett'", "did you mean Unet"]),
    "missing weights": (None, {"model.weights": "none.safetensors"}, ["none.safetensors"]),
    "crop size": (None, {"data.crop_size": 0}, ["crop_size must be at least 1 pixel, got 0"]),
    "cut-out": (None, {"data.cutout": 1.5}, ["cutout is a fraction", "got 1.5"]),
    "channels": (
        None,
        {"model.in_channels": 2},
        [".png has 3 channels, expected 2", "--model.in_channels 3"],
    ),
    "workers": (None, {"data.workers": -1}, ["data.workers must not be negative, got -1"]),
    "colour jitter": (
        None,
        {"data.color_jitter": [0.5, 0.5, 0.5, 0.9]},
        ["data.color_jitter", "hue from 0 to 0.5"],
    ),
    "devices": (None, {"run.devices": -1}, ["run.devices must be auto, or at least 1 process, got -1"]),
    "seed": (None, {"run.seed": 2**63}, ["run.seed must be from 0 to 2**63 - 1"]),
    "rate": (None, {"optim.lr": ".inf"}, ["optim.lr must be positive and finite, got inf"]),
    "mean of 8 bits": (
        None,
        {"model.mean": [124, 116, 104]},
        ["mean must be from 0 to 1", "[124.0, 116.0, 104.0]"],
    ),
    "infinite class weight": (
        None,
        {"method.class_weight": [1, ".inf", 1]},
        ["method.class_weight must be finite"],
    ),
    "no class weight": (None, {"method.class_weight": [0, 0, 0]}, ["not all 0, got [0.0, 0.0, 0.0]"]),
    "accelerator": (None, {"run.accelerator": "abacus"}, ["accelerator", "abacus"]),
    "resume without a folder": (None, {"run.resume": "auto", "run.dir": None}, ["give --run.dir DIR"]),
    "resume nowhere": (
        None,
        {"run.resume": "x.ckpt"},
        ["expects a checkpoint of a run, or its folder, found no file x.ckpt"],
    ),
    "gamma": (None, {"method.gamma": -1}, ["method.gamma must be in [0, 1], got -1"]),
    "class weights": (None, {"method.class_weight": [1, 2]}, ["a weight for each of the 3 classes", "got 2"]),
    "a pass of one picture": (
        None,
        {"optim.batch_size": 1},
        ["optim.batch_size 1 makes passes of one picture", "of DeepLabV3Plus need", "--optim.batch_size 2"],
    ),
    "a late pass of one picture": (
        None,
        {"optim.unlabeled_batch_size": 1, "method.start_u": 2},
        ["optim.unlabeled_batch_size 1 makes passes of one picture", "give --optim.unlabeled_batch_size 2"],
    ),
    "unlabelled pictures from after the last step": (
        None,
        {"method.start_u": 3},
        ["method.start_u", "below optim.steps, got 3 and 3", "lower it, such as to 1,"],
    ),
    "unlabelled pictures of no weight": (None, {"method.weight_u": 0}, ["method.weight_u 0", "supervised"]),
    "no unlabelled pictures": (
        None,
        {"data.unlabeled": None, "data.layout": "lists"},
        ["give --data.unlabeled LIST_OR_DIR"],
    ),
    "a val picture that is no picture": (empty_val_picture, {}, ["images/5.png cannot be read as a picture"]),
    "a constant channel": (None, {"model.std": [0.2, 0, 0.2]}, ["std must be positive", "[0.2, 0.0, 0.2]"]),
    "pictures that the network cannot take": (
        None,
        {"model.arch": "PAN", "data.crop_size": 128},
        ["PAN with test_efficientnet cannot take val pictures of 48 x 40 pixels: ", "choose another"],
    ),
    "one class": (
        lambda root: tiny.write(root / "classes.txt", ["person"]),
        {},
        ["expected two classes at least, got person alone"],
    ),
    "tags from masks that are not there": (
        None,
        {"method.image_labels": "true", "data.tags": "masks", "data.layout": "lists"},
        ["none has one", "second column of --data.unlabeled LIST"],
    ),
    "no tags": (None, {"method.image_labels": "true"}, ["give --data.tags FILE"]),
}


@pytest.mark.parametrize(
    ("damage", "changes", "expected"), BEFORE_THE_FIRST_STEP.values(), ids=BEFORE_THE_FIRST_STEP
)
def test_bad_input_is_refused_before_anything_is_written(root, tmp_path, capsys, damage, changes, expected):
    if damage:
        damage(root)
    folder = tmp_path / "run"
    assert tiny.status(train.main, tiny.options(root, folder, changes)) == 2
    message = capsys.readouterr().err
    assert message.startswith("python -m pseudoseg_fast.train: error: ")
    for part in expected:
        assert part in message
    assert not folder.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"model.arch": "FPN", "optim.batch_size": 1, "data.crop_size": 64},
        {"method.name": "supervised", "optim.unlabeled_batch_size": 1},
        {"method.joint": "true", "method.ema": 0.9, "optim.unlabeled_batch_size": 1},
    ],
    ids=["norms over pixels", "no unlabelled pictures", "joint passes"],
)
def test_a_batch_of_one_picture_that_norms_can_take_is_not_refused(root, tmp_path, changes):
    assert train.main(tiny.options(root, tmp_path / "run", {"optim.steps": 1, **changes})) == 0


def test_supervised_training_reads_no_unlabelled_list(root, tmp_path):
    (root / "unlabeled.txt").unlink()
    changes = {"method.name": "supervised", "optim.steps": 1}
    assert train.main(tiny.options(root, tmp_path / "run", changes)) == 0


def test_a_picture_that_cannot_be_read_is_skipped_and_counted(root, tmp_path, caplog):
    damaged_jpeg(root / "images/00.jpg")
    for index in range(1, 100):
        shutil.copy(root / "images/0.png", root / f"images/{index:02}.png")
    pictures = ["images/00.jpg", *(f"images/{index:02}.png" for index in range(1, 100))]
    tiny.write(root / "labeled.txt", [f"{picture} masks/0.png" for picture in pictures])
    changes = {
        "method.name": "supervised",
        "optim.steps": 1,
        "optim.batch_size": len(pictures),
        "data.crop_size": 16,
    }
    with caplog.at_level(logging.WARNING, "pseudoseg_fast"):
        assert train.main(tiny.options(root, tmp_path / "run", changes)) == 0
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == ["images/00.jpg cannot be read: another picture takes its place"]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_pictures_that_cannot_be_read_stop_the_run(root, tmp_path, capsys, workers):
    damaged_unlabeled_picture(root)
    changes = {"optim.unlabeled_batch_size": 5, "data.workers": workers}
    assert train.main(tiny.options(root, tmp_path / "run", changes)) == 2
    message = capsys.readouterr().err
    assert "1 of 6 training pictures cannot be read, more than 1 %" in message
    assert "images/2.jpg" in message


def test_a_val_picture_that_cannot_be_read_stops_the_run(root, tmp_path, capsys):
    damaged_val_picture(root)
    assert train.main(tiny.options(root, tmp_path / "run")) == 2
    assert "images/5.jpg cannot be read as a picture" in capsys.readouterr().err


def another_program(path):
    torch.save({"state_dict": {}}, path)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def no_checkpoint(path):
    path.write_text("hello")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncated, "it is damaged or of another kind"),
        (no_checkpoint, "it is damaged or of another kind"),
        (another_program, f"expected format {checkpoint.FORMAT!r}, found None"),
    ],
    ids=["truncated", "text", "another program's"],
)
def test_a_bad_checkpoint_is_refused(root, tmp_path, trained, capsys, damage, expected):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    path = folder / "checkpoints" / "last.ckpt"
    damage(path)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert train.main(tiny.options(root, folder, {"optim.steps": 1, "run.resume": path})) == 2
    message = capsys.readouterr().err
    assert str(path) in message
    assert expected in message
    assert message.endswith("beside it are step-1.ckpt, best.ckpt\n")
    assert files == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert tiny.status(evaluate.main, [f"--checkpoint={path}"]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"data.classes": "four.txt"},
            ["names 4 classes: ", "the checkpoint has 3: background, disc, square"],
        ),
        (
            {"data.classes": "turned.txt"},
            ["names 3 classes: square, disc, background", "--data.classes FILE"],
        ),
        ({"data.val": "vall.txt"}, ["no file at", "vall.txt"]),
        ({"data.root": "."}, ["data.val is val.txt, as in the run, and no file at", "give --data.val null"]),
        ({"data.root": "nowhere"}, ["data.root expects a folder"]),
        ({"data.vall": "val.txt"}, ["--data.vall", "did you mean '--data.val'?"]),
    ],
    ids=[
        "other classes",
        "another order",
        "missing list",
        "a list of the run's",
        "missing root",
        "unknown option",
    ],
)
def test_evaluation_refuses_other_data(root, trained, capsys, changes, expected):
    tiny.write(root / "four.txt", [*tiny.CLASSES, "unicorn"])
    tiny.write(root / "turned.txt", tiny.CLASSES[::-1])
    options = {"data.root": root, "data.workers": 0, **changes}
    arguments = [f"--checkpoint={trained / 'checkpoints' / 'best.ckpt'}", "--accelerator=cpu"]
    arguments += [f"--{name}={value}" for name, value in options.items()]
    assert tiny.status(evaluate.main, arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("python -m pseudoseg_fast.evaluate: error: ")
    for part in expected:
        assert part in message


def test_evaluation_needs_neither_training_lists_nor_their_files(root, trained, capsys):
    for name in ("labeled.txt", "unlabeled.txt", "images/0.png"):
        (root / name).unlink()
    path = trained / "checkpoints" / "last.ckpt"
    options = [f"--checkpoint={path}", f"--data.root={root}", "--data.workers=0", "--accelerator=cpu"]
    assert evaluate.main(options) == 0
    assert f"{path}, step 1, on 3 pictures of val.txt" in capsys.readouterr().out
