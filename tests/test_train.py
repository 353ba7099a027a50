"""Training from lists to results, in this process and in a few steps."""

import copy
import functools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image

from pseudoseg_fast import backends, evaluate, scoring, step, summary, train, visualize
from pseudoseg_fast.config import parse_config
from pseudoseg_fast.loaders import labeled_loader, unlabeled_loader
from pseudoseg_fast.method import labeled_losses, unlabeled_losses
from pseudoseg_fast.pseudo_labels import exclude_untagged
from pseudoseg_fast.sgc import image_labels_from_mask
from pseudoseg_fast.trainer import Trainer

LEARNING = {
    "data.crop_size": 48,
    "optim.name": "adamw",
    "optim.lr": 0.005,
    "optim.batch_size": 4,
    "optim.steps": 30,
    "run.log_every": 5,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tiny.make_set(tmp_path_factory.mktemp("set") / "pictures")
    tiny.write(root / "tags.csv", ["image,tags", "images/1.png,disc;square", "images/2.png,disc"])
    tiny.write(root / "no_background.txt", ["ground", "disc", "square"])
    return root


def run(root, folder, changes=None):
    assert train.main(tiny.options(root, folder, changes)) == 0


def test_crops_that_are_a_speck_of_the_pictures_are_warned_of(tmp_path, caplog):
    root = tiny.make_set(tmp_path / "set")
    for folder, number in (("images", 0), ("images", 4), ("masks", 0), ("masks", 4)):
        path = root / folder / f"{number}.png"
        Image.open(path).resize((200, 150), Image.Resampling.NEAREST).save(path)
    run(root, tmp_path / "run", {"optim.steps": 1, "method.name": "supervised"})
    assert "a training crop of 32 x 32 pixels is 3.4 % of a picture of 200 x 150" in caplog.text


def percent(pattern, text):
    return float(re.search(pattern, text).group(1))


VARIANTS = {
    "supervised without unlabelled list": {"method.name": "supervised", "data.unlabeled": None},
    "supervised with a teacher": {"method.name": "supervised", "method.ema": 0.9},
    "teacher": {"method.ema": 0.9},
    "no background": {"data.classes": "no_background.txt"},
    "background of another name": {"data.classes": "no_background.txt", "data.background": 0},
    "supervised, no background": {"method.name": "supervised", "data.classes": "no_background.txt"},
    "tags": {"method.image_labels": "true", "data.tags": "tags.csv"},
    "tags that rule classes out": {
        "method.image_labels": "true",
        "data.tags": "tags.csv",
        "method.exclude_untagged": "true",
        "method.norm": "none",
    },
    "label at crop size, aligned corners": {"method.label_size": "crop", "method.align_corners": "true"},
    "hard label over a threshold": {"method.hard": "true", "method.threshold": 0.5, "method.norm": "none"},
    "crop larger than the picture": {"data.crop_size": 64},
    "crop that the stride does not divide": {"data.crop_size": 37, "method.label_size": "crop"},
    "batch larger than the set": {"optim.batch_size": 5},
    "more unlabelled pictures than labelled ones": {"optim.unlabeled_batch_size": 3},
    "mixed pictures": {"method.cutmix": 1.0, "method.ema": 0.9},
    "mixed pictures whose tags rule classes out": {
        "method.image_labels": "true",
        "data.tags": "tags.csv",
        "method.exclude_untagged": "true",
        "method.norm": "none",
        "method.gamma": 1.0,
        "method.cutmix": 1.0,
        "method.weight_x": 0,
    },
    "labels of mirror images, too": {"method.flip_labels": "true", "run.precision": "bf16-mixed"},
    "late and ramped consistency": {"method.start_u": 1, "method.ramp_u": 2},
    "folder of unlabelled pictures": {"data.unlabeled": "images"},
    "resized pictures": {"data.short_side": 24, "data.scales": [0.5, 2.0], "data.cache": "true"},
    "grey pictures": {"model.in_channels": 1},
    "another architecture": {"model.arch": "FPN", "optim.name": "adamw"},
    "weighted classes and Dice": {"method.class_weight": "balanced", "method.weight_dice": 0.5},
    "Dice of tagged labels": {
        "method.image_labels": "true",
        "data.tags": "tags.csv",
        "method.exclude_untagged": "true",
        "method.norm": "none",
        "method.ema": 0.9,
        "method.flip_labels": "true",
        "method.weight_dice": 1,
        "method.dice_unlabeled": "true",
        "run.precision": "bf16-mixed",
    },
    "bfloat16": {"run.precision": "bf16-mixed"},
    "worker processes": {"data.workers": 2},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_run_writes_its_results_and_evaluation_repeats_them(root, tmp_path, capsys, changes):
    folder = tmp_path / "run"
    run(root, folder, {"run.eval_every": 2, "run.draw_every": 1, "run.log_every": 1, **changes})
    printed = capsys.readouterr().out

    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 3
    classes = (root / (changes.get("data.classes") or "classes.txt")).read_text().split()
    assert list(result["iou"]) == classes
    scores = [iou for iou in result["iou"].values() if iou is not None]
    assert result["miou"]["last"] == pytest.approx(np.mean(scores))
    assert 0 <= result["miou"]["last"] <= result["miou"]["best"] <= 1

    for name, trained in (("best", result["miou"]["best_step"]), ("last", 3)):
        printed_score = percent(rf"{name} ([\d.]+) %", printed)
        assert printed_score == round(100 * result["miou"][name], 2)
        path = folder / "checkpoints" / f"{name}.ckpt"
        file = tmp_path / f"{name}.json"
        options = ["--checkpoint", str(path), "--accelerator=cpu", "--data.workers=0", f"--json={file}"]
        assert evaluate.main(options) == 0
        written = json.loads(file.read_text())
        assert (written["checkpoint"], written["step"], written["pictures"]) == (str(path), trained, 3)
        assert written["miou"] == pytest.approx(result["miou"][name])
        assert [entry["name"] for entry in written["classes"]] == classes
        assert [sum(row) for row in written["confusion"]] == [entry["pixels"] for entry in written["classes"]]
        repeated = capsys.readouterr().out
        assert f"{path}, step {trained}, on 3 pictures of val.txt" in repeated
        assert percent(r"mIoU +([\d.]+)", repeated) == printed_score

    content = file.read_text()
    for name, expected in ((file, "is there already"), (tmp_path / "none" / "a.json", "there is no folder")):
        assert tiny.status(evaluate.main, [*options[:-1], f"--json={name}"]) == 2
        assert expected in capsys.readouterr().err
    assert file.read_text() == content

    assert sorted(path.name for path in folder.iterdir()) == [
        *(".lock", "checkpoints", "config.yaml", "log", "pictures", "report.html", "result.json", "run.json")
    ]
    assert sorted(path.name for path in (folder / "pictures").iterdir()) == [
        *("step_000002.png", "step_000003.png")
    ]
    assert f"{printed_score:.2f}" in (folder / "report.html").read_text()
    rows = tiny.log(folder)
    losses = [row for row in rows if "L_s" in row]
    assert [row["step"] for row in losses] == [1, 2, 3]
    assert all(math.isfinite(value) for row in losses for value in row.values())
    assert [row["mIoU"] for row in rows if "mIoU" in row][-1] == pytest.approx(result["miou"]["last"])


@pytest.mark.parametrize(
    ("ema", "excluding"),
    [(0.0, False), (0.9, False), (0.9, True)],
    ids=["model labels", "teacher labels", "teacher labels, untagged classes excluded"],
)
def test_a_step_is_the_methods(root, tmp_path, ema, excluding):
    """The fifth step of an image-level run, written out: passes in their order, losses, SGD, moving average."""
    changes = {
        "method.ema": ema,
        "method.image_labels": "true",
        "method.exclude_untagged": str(excluding).lower(),
        "method.norm": "none",
        "data.tags": "tags.csv",
        "optim.steps": 8,
        "optim.warmup": 10,
        "optim.encoder_lr": 0.5,
        "optim.weight_decay": 0.01,
        "optim.unlabeled_batch_size": 4,
    }
    config = parse_config(tiny.options(root, tmp_path / "run", changes), "", "")
    trainer = Trainer(config, tmp_path / "run")
    trainer.step = 4
    labeled = next(iter(labeled_loader(config, trainer.data, trainer.network, 4)))
    unlabeled = next(iter(unlabeled_loader(config, trainer.data, trainer.network, 4)))
    assert set(unlabeled["tags"].isnan().all(1).tolist()) == {True, False}
    network = copy.deepcopy(trainer.network).train()
    before = copy.deepcopy(network.state_dict())
    torch.manual_seed(1)
    losses = trainer.training_step([(labeled, unlabeled)], 0.5)

    torch.manual_seed(1)  # dropout is active
    image_labels = image_labels_from_mask(labeled["mask"], 3, 0)
    given = network(labeled["image"], sgc=True, image_labels=image_labels, valid=labeled["valid"])
    labeler = network
    if ema:
        labeler = copy.deepcopy(network).eval()
        labeler.load_state_dict(before)
    with torch.no_grad():
        weak = labeler(
            unlabeled["weak"], sgc=True, image_labels=unlabeled["tags"], valid=unlabeled["valid"][:, 0]
        )
    if excluding:  # one of two tagged pictures shows a square, both a disc
        weak = exclude_untagged(weak, unlabeled["tags"], 0, torch.tensor([1.0, 0.5]))
    strong = network(unlabeled["strong"][:, 0])
    expected = labeled_losses(config.method, given, labeled["mask"], image_labels)
    expected |= unlabeled_losses(
        config.method, 0.5, strong, weak, unlabeled["valid"][:, 0], unlabeled["tags"]
    )
    assert set(losses) == set(expected) == {"L_s", "L_sa", "L_x", "L_u"}
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss.detach())

    sum(expected.values()).backward()
    after = trainer.network.state_dict()
    rate = 0.007 * (5 / 10) * (1 - 4 / 8) ** 0.9
    for name, parameter in network.named_parameters():
        decay = 0.01 if parameter.ndim > 1 else 0.0
        factor = rate * (0.5 if name.startswith("encoder.") else 1.0)
        moved = before[name] - factor * (parameter.grad + decay * before[name])
        torch.testing.assert_close(after[name], moved)
        if ema:
            mean = (5 / 14) * before[name] + (9 / 14) * moved
            torch.testing.assert_close(trainer.teacher.model.state_dict()[name], mean)
    for name, buffer in network.named_buffers():
        torch.testing.assert_close(after[name], buffer)


@pytest.mark.parametrize(
    ("classes", "expected"),
    [("classes.txt", {1: [1, 1], 2: [1, 0]}), ("no_background.txt", {1: [0, 1, 1], 2: [0, 1, 0]})],
    ids=["background", "no background"],
)
def test_tags_come_with_their_pictures(root, tmp_path, classes, expected):
    changes = {
        "method.image_labels": "true",
        "data.tags": "tags.csv",
        "data.classes": classes,
        "optim.batch_size": 4,
    }
    config = parse_config(tiny.options(root, tmp_path / "run", changes), "", "")
    trainer = Trainer(config, tmp_path / "run")
    batch = next(iter(unlabeled_loader(config, trainer.data, trainer.network, 0)))
    assert sorted(batch["name"]) == [f"images/{index}.png" for index in range(4)]
    for name, tags in zip(batch["name"], batch["tags"], strict=True):
        index = int(name.removeprefix("images/").removesuffix(".png"))
        if index in expected:
            assert tags.tolist() == expected[index]
        else:
            assert tags.isnan().all()


@pytest.mark.parametrize("used", [False, True])
def test_tags_that_nothing_learns_from_are_called_so(root, tmp_path, capsys, used):
    run(root, tmp_path / "run", {"data.tags": "tags.csv", "method.image_labels": used, "optim.steps": 1})
    assert "2 pictures have tags" in (printed := capsys.readouterr().out)
    assert ("--config tagged" in printed) == (not used)


def test_loss_terms_appear_when_they_are_learnt(root, tmp_path):
    def terms(changes):
        run(root, tmp_path / "run", {"run.log_every": 1, "run.overwrite": "true", **changes})
        rows = [row for row in tiny.log(tmp_path / "run") if "L_s" in row]
        return ["".join(sorted(name[2:] for name in row if name.startswith("L_"))) for row in rows]

    assert terms({}) == ["ssaux"] * 3
    assert terms({"method.name": "supervised", "data.unlabeled": None}) == ["s"] * 3
    assert terms({"method.start_u": 2}) == ["ssax", "ssax", "ssaux"]
    assert terms({"method.weight_x": 0, "method.weight_sa": 0}) == ["su"] * 3


def test_the_log_has_the_learning_rate_of_each_step(root, tmp_path):
    run(root, tmp_path / "run", {"run.log_every": 1, "optim.lr": 0.5, "optim.power": 1, "optim.warmup": 2})
    rates = [row["lr"] for row in tiny.log(tmp_path / "run") if "lr" in row]
    assert rates == pytest.approx([0.25, 0.5 * 2 / 3, 0.5 / 3])


def test_both_methods_start_from_the_same_weights_and_see_the_same_labelled_batches(root, tmp_path):
    first = []
    for name in ("pseudoseg", "supervised"):
        changes = {"method.name": name, "optim.steps": 1, "run.log_every": 1, "run.seed": 3}
        run(root, tmp_path / name, changes)
        first.append(next(row for row in tiny.log(tmp_path / name) if "L_s" in row))
    assert first[0]["L_s"] == first[1]["L_s"]


def test_before_the_first_unlabelled_step_only_sgc_differs_from_supervised(root, tmp_path):
    changes = {"optim.steps": 4, "run.checkpoint_every": 3}
    run(root, tmp_path / "supervised", {**changes, "method.name": "supervised"})
    run(root, tmp_path / "pseudoseg", {**changes, "method.start_u": 3, "method.weight_x": 0})
    one, other = (tiny.checkpoint(tmp_path / name, "step-3")["model"] for name in ("supervised", "pseudoseg"))
    changed = {name.split(".")[0] for name, value in one.items() if not torch.equal(value, other[name])}
    assert changed == {"sgc"}


def test_the_saved_configuration_repeats_the_run(root, tmp_path):
    run(root, tmp_path / "one", {"method.ema": 0.5, "data.scales": [0.5, 1.0], "run.eval_every": 1})
    again = ["--config", str(tmp_path / "one" / "config.yaml"), f"--run.dir={tmp_path / 'two'}"]
    assert train.main(again) == 0

    one, two = (tiny.checkpoint(tmp_path / name) for name in ("one", "two"))
    for part in ("model", "teacher"):
        assert all(torch.equal(value, two[part][name]) for name, value in one[part].items())
    saved = [yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in ("one", "two")]
    assert saved[0].pop("run")["dir"] == str(tmp_path / "one")
    assert saved[1].pop("run")["dir"] == str(tmp_path / "two")
    assert saved[0] == saved[1]


def test_another_seed_is_another_run(root, tmp_path):
    for seed in (0, 1):
        run(root, tmp_path / str(seed), {"run.seed": seed, "optim.steps": 1})
    weights = [tiny.checkpoint(tmp_path / str(seed))["model"]["classifier.weight"] for seed in (0, 1)]
    assert not torch.equal(*weights)


def test_the_teacher_is_what_is_evaluated(root, tmp_path, capsys):
    run(root, tmp_path / "run", {"method.ema": 0.9})
    state = tiny.checkpoint(tmp_path / "run")
    name = "classifier.weight"
    assert not torch.equal(state["teacher"][name], state["model"][name])
    network = evaluate.load_network(tmp_path / "run" / "checkpoints" / "last.ckpt")[0]
    assert torch.equal(network.state_dict()[name], state["teacher"][name])
    assert not network.training


@pytest.mark.parametrize(
    "changes",
    [{"method.name": "supervised"}, {"method.ema": 0.9}],
    ids=["supervised", "pseudoseg with a teacher"],
)
def test_a_run_learns_an_easy_set(root, tmp_path, changes):
    run(root, tmp_path / "run", LEARNING | changes)
    losses = [row["L_s"] for row in tiny.log(tmp_path / "run") if "L_s" in row]
    assert losses[-1] < 0.5 * losses[0]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["miou"]["last"] > 0.6  # predicting the background alone scores 0.27


def test_a_run_that_diverges_stops_before_its_weights_are_saved(root, tmp_path, capsys):
    changes = {"method.name": "supervised", "optim.lr": 1e30, "run.log_every": 1, "run.checkpoint_every": 1}
    assert train.main(tiny.options(root, tmp_path / "run", changes)) == 2
    message = capsys.readouterr().err
    assert re.search(r"error: step 2: L_s is nan, on these pictures:\n  images/[04].png\n", message)
    assert f"the last checkpoint is {tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}" in message
    assert "lower optim.lr" in message
    assert tiny.checkpoint(tmp_path / "run")["step"] == 1


@pytest.mark.parametrize(
    ("environment", "program"),
    [
        ({}, "python -m"),
        ({"TORCHELASTIC_RUN_ID": "1"}, "torchrun [its options as before] -m"),
        (
            {"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "voc", "SLURM_STEP_ID": "0"},
            "srun [its options as before] python -m",
        ),
    ],
    ids=["alone", "torchrun", "srun"],
)
def test_the_command_to_go_on_starts_as_many_processes(monkeypatch, environment, program):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    expected = f"{program} pseudoseg_fast.train --config 'a run/config.yaml' --run.resume auto"
    assert train.command(Path("a run")) == expected


def test_without_a_folder_a_run_makes_one(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(root, None, {"method.name": "supervised", "optim.steps": 1})
    folders = list((tmp_path / "runs").iterdir())
    assert [re.sub(r"\d", "0", folder.name) for folder in folders] == ["supervised-00000000-000000"]
    assert f"run:          runs/{folders[0].name}" in capsys.readouterr().out


def test_a_class_that_is_nowhere_has_no_score(root, tmp_path, monkeypatch):
    tiny.write(tmp_path / "classes.txt", [*tiny.CLASSES, "unicorn"])

    def no_unicorns(*arguments, **options):
        labels, invalid = predict(*arguments, **options)
        return labels * (labels != 3), invalid

    predict = scoring.predict
    monkeypatch.setattr(scoring, "predict", no_unicorns)
    run(root, tmp_path / "run", {"data.classes": tmp_path / "classes.txt"})
    text = (tmp_path / "run" / "result.json").read_text()
    result = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert result["iou"]["unicorn"] is None
    assert result["miou"]["last"] > 0


def test_kernels_and_pytorch_give_the_same_losses_on_the_way(root, tmp_path, monkeypatch):
    # At the same weights: rounding alone drives two runs apart within ten steps, be it through the number of threads.
    steps = []

    def values(losses):
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def both(function):
        def compare(*arguments, **options):
            ours = function(*arguments, **options)
            with monkeypatch.context() as patch:
                patch.setattr(backends, "BACKENDS", {"eager": backends.eager})
                theirs = function(*arguments, **options)
            assert values(ours) == pytest.approx(values(theirs), rel=1e-5)
            steps.append(function)
            return ours

        return compare

    monkeypatch.setattr(step, "labeled_losses", both(labeled_losses))
    monkeypatch.setattr(step, "unlabeled_losses", both(unlabeled_losses))
    run(root, tmp_path / "run", {"optim.steps": 50, "method.label_size": "crop"})
    assert len(steps) == 100


def test_a_compiled_run_is_compiled_for_its_steps_alone(tmp_path, monkeypatch):
    root = tiny.make_set(tmp_path / "pictures")
    for index, size in ((5, (60, 33)), (6, (21, 47))):
        for path in (root / "images" / f"{index}.png", root / "masks" / f"{index}.png"):
            Image.open(path).resize(size, Image.Resampling.NEAREST).save(path)
    shapes = []

    def record(graph, inputs):
        images = [value.shape for value in inputs if isinstance(value, torch.Tensor) and value.ndim == 4]
        shapes.extend(
            tuple(shape) for shape in images if shape[1] == 3 and shape[2] > 3
        )  # no convolution's weights
        return graph

    changes = {"method.ema": 0.9, "optim.steps": 2, "run.eval_every": 1, "run.draw_every": 1}
    run(root, tmp_path / "eager", changes)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend=record))
        patch.setattr(summary, "DEMO", str(root))  # whose map is drawn
        patch.setattr(visualize, "tile_map", lambda *_: Image.new("RGB", (2, 2)))
        run(root, tmp_path / "compiled", {**changes, "run.compile": "true"})
    assert (tmp_path / "compiled" / "map.png").exists()
    assert shapes
    assert set(shapes) == {(2, 3, 32, 32)}  # of a batch, not of pictures to evaluate or draw, or of the map
    eager, compiled = (tiny.checkpoint(tmp_path / name)["model"] for name in ("eager", "compiled"))
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5, msg=name)
