"""Going on with other options, lists or classes: what is refused, what is told of, and what becomes of the best."""

import csv
import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from same_runs import CHANGES, assert_same

from pseudoseg_fast import checkpoint, train
from pseudoseg_fast.config import from_dict, parse_config, to_dict
from pseudoseg_fast.run_state import MAY_CHANGE, check_same_run, keep_start
from pseudoseg_fast.trainer import Trainer

KEPT = "the best is chosen anew, and the one so far is kept as former-best.ckpt"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.make_set(tmp_path_factory.mktemp("set") / "pictures")


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """A run of six steps in one go."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main(tiny.options(root, folder, CHANGES)) == 0
    return folder


def test_another_configuration_is_refused_with_what_differs(root, whole, capsys):
    changes = CHANGES | {"run.seed": 5, "method.gamma": 1, "model.attention_dim": 4, "run.resume": "auto"}
    before = (whole / "config.yaml").read_text()
    assert train.main(tiny.options(root, whole, changes)) == 2
    message = capsys.readouterr().err
    assert f"resume with the same one ({whole / 'config.yaml'})" in message
    assert "run.seed: 0 there, 5 here" in message
    assert "method.gamma: 0.5 there, 1.0 here" in message
    assert "model.attention_dim: 8 there, 4 here" in message
    assert message.count(" there, ") == 3
    assert (whole / "config.yaml").read_text() == before


EVERYTHING = {
    "optim.lr": 0.001,
    "optim.encoder_lr": 0.5,
    "optim.sgc_lr": 2.0,
    "optim.weight_decay": 0.01,
    "optim.warmup": 8,
    "optim.power": 2.0,
    "optim.steps": 8,
    "optim.batch_size": 3,
    "optim.unlabeled_batch_size": 2,
    "optim.accumulate": 2,
    "run.precision": "bf16-mixed",
    "data.short_side": 36,
    "data.crop_size": 24,
}


def test_what_decides_how_a_run_goes_on_may_change(root, whole, tmp_path, caplog):
    assert EVERYTHING.keys() == MAY_CHANGE
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    before = tiny.checkpoint(folder)
    with caplog.at_level(logging.WARNING, "pseudoseg_fast"):
        assert train.main(tiny.options(root, folder, CHANGES | EVERYTHING | {"run.resume": "auto"})) == 0
    (warning,) = [message for message in caplog.messages if "changed options" in message]
    for part in ("optim.lr 0.007 -> 0.001", "optim.steps 6 -> 8", "data.short_side None -> 36"):
        assert part in warning
    assert warning.count(" -> ") == len(EVERYTHING)
    assert "data.short_side decides at which size val pictures are scored, too" in caplog.text
    assert warning.endswith("the result is not that of one run")
    state = tiny.checkpoint(folder)
    assert state["step"] == 8
    assert state["config"]["optim"]["batch_size"] == 3
    assert not torch.equal(state["model"]["classifier.weight"], before["model"]["classifier.weight"])


def momenta(folder, changes, root):
    """The momentum of each parameter, and the groups, of a trainer that has restored the last checkpoint."""
    ours = Trainer(parse_config(tiny.options(root, folder, CHANGES | changes), "", ""), folder)
    ours.restore([folder / "checkpoints" / "last.ckpt"])
    names = {parameter: name for name, parameter in ours.network.named_parameters()}
    state = ours.optimizer.optimizer.state
    found = {names[parameter]: state[parameter]["momentum_buffer"] for parameter in state}
    return found, ours.optimizer.param_groups


def test_every_parameter_keeps_its_momentum_when_rates_and_decay_change(root, whole):
    one, _ = momenta(whole, {}, root)
    changes = {"optim.encoder_lr": 0.5, "optim.sgc_lr": 3.0, "optim.weight_decay": 0.1}
    other, groups = momenta(whole, changes, root)
    assert_same(one, other)
    assert {(group["scale"], group["weight_decay"]) for group in groups} == {
        (scale, decay) for scale in (0.5, 1.0, 3.0) for decay in (0.0, 0.1)
    }


def test_unlabelled_pictures_are_used_from_the_step_on_that_a_run_of_other_steps_had(root, tmp_path, caplog):
    folder, changes = tmp_path / "run", {"optim.steps": 4, "method.start_u": 0.5, "method.ramp_u": 0.25}
    assert train.main(tiny.options(root, folder, changes)) == 0
    for steps in (8, 8, 12, 12):  # each twice, as the same command after a restart
        caplog.clear()
        again = changes | {"optim.steps": steps, "run.resume": "auto"}
        assert train.main(tiny.options(root, folder, again)) == 0
        said = f"method.start_u stays 2 (not {steps // 2}, its share of {steps} steps), method.ramp_u stays 1 (not "
        assert said in caplog.text
        state = tiny.checkpoint(folder)
        method = state["config"]["method"]
        assert (state["step"], method["start_u"], method["ramp_u"]) == (steps, 2, 1)


def test_the_share_that_a_run_went_on_with_is_known_like_its_first(tmp_path):
    config = from_dict({"data": {"root": "photos"}, "optim": {"steps": 1000}, "method": {"start_u": 0.4}})
    saved, shares_of = to_dict(config), {}
    for steps, share in ((2000, 0.2), (3000, 0.2), (3000, 0.2), (4000, 0.2)):
        config = from_dict(
            {"data": {"root": "photos"}, "optim": {"steps": steps}, "method": {"start_u": share}}
        )
        shares_of, _ = keep_start(config, saved, shares_of)
        assert config.method.start_u == 400
        saved = to_dict(config)
    config.method.start_u = 500
    keep_start(config, saved, shares_of)
    assert config.method.start_u == 500


def test_another_start_of_as_many_steps_is_refused_like_any_option(root, whole, capsys):
    changes = CHANGES | {"method.start_u": 1, "run.resume": "auto"}
    assert train.main(tiny.options(root, whole, changes)) == 2
    assert "method.start_u: 0 there, 1 here" in capsys.readouterr().err


def test_a_run_does_not_go_on_to_fewer_steps_than_it_has_taken(root, whole, capsys):
    assert train.main(tiny.options(root, whole, CHANGES | {"optim.steps": 5, "run.resume": "auto"})) == 2
    assert "is of step 6; expected optim.steps to be no less, got 5" in capsys.readouterr().err


def test_another_precision_has_a_scale_of_its_own(root, whole):
    config = parse_config(tiny.options(root, whole, CHANGES), "", "")
    ours = Trainer(config, whole)
    ours.fabric.strategy.precision.load_state_dict = lambda state: pytest.fail("there is none to load")
    ours.restore([whole / "checkpoints" / "last.ckpt"])


def test_an_option_younger_than_the_checkpoint_had_its_default_there(tmp_path):
    config = from_dict({"data": {"root": "photos"}})
    state = {"config": to_dict(config), "classes": ["sky"], "background": None, "generators": [None]}
    del state["config"]["method"]["dice_unlabeled"]
    trainer = SimpleNamespace(
        config=config,
        fabric=SimpleNamespace(world_size=1),
        data=SimpleNamespace(classes=["sky"], background=None),
    )
    check_same_run(trainer, tmp_path, state)
    config.method.dice_unlabeled = True
    with pytest.raises(ValueError, match=r"method\.dice_unlabeled: False there, True here"):
        check_same_run(trainer, tmp_path, state)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (None, []),
        ("labeled", ["the labelled pictures are others"]),
        ("unlabeled", ["the unlabelled pictures are others"]),
        (
            "val",
            [
                "the val pictures are others",
                "the best is chosen anew, and the one so far is kept as former-best.ckpt",
            ],
        ),
    ],
)
def test_lists_that_have_changed_are_told_of(tmp_path, caplog, name, said):
    root, folder = tiny.make_set(tmp_path / "pictures"), tmp_path / "run"
    assert train.main(tiny.options(root, folder, CHANGES | {"optim.steps": 2})) == 0
    if name:
        lines = (root / f"{name}.txt").read_text().splitlines()
        tiny.write(root / f"{name}.txt", lines[:-1])
    caplog.clear()
    changes = CHANGES | {"optim.steps": 2, "run.resume": "auto"}
    assert train.main(tiny.options(root, folder, changes)) == 0
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert "nothing is left to train" in warnings.pop()
    assert [message.split(" than when")[0] for message in warnings] == said


@pytest.mark.parametrize("changed", ["the val list", "short_side"])
def test_the_best_is_chosen_anew_where_scores_no_longer_compare(tmp_path, changed):
    root, folder = tiny.make_set(tmp_path / "pictures"), tmp_path / "run"
    changes = CHANGES | {"optim.steps": 2}
    assert train.main(tiny.options(root, folder, changes)) == 0
    path = folder / "checkpoints" / "best.ckpt"
    state = checkpoint.load(path)
    checkpoint.save(path, state | {"best": state["best"] | {"miou": 0.99}})
    assert train.main(tiny.options(root, folder, changes | {"run.resume": "auto"})) == 0
    assert checkpoint.load(path)["best"]["miou"] == 0.99
    if changed == "short_side":
        changes["data.short_side"] = 40
    else:
        tiny.write(root / "val.txt", (root / "val.txt").read_text().splitlines()[:-1])
    assert train.main(tiny.options(root, folder, changes | {"run.resume": "auto"})) == 0
    scores = json.loads((folder / "result.json").read_text())["miou"]
    assert scores["best"] == scores["last"] == checkpoint.load(path)["best"]["miou"]
    assert checkpoint.load(folder / "checkpoints" / "former-best.ckpt")["best"]["miou"] == 0.99


def test_the_order_of_the_val_list_changes_nothing(tmp_path, caplog):
    root, folder = tiny.make_set(tmp_path / "pictures"), tmp_path / "run"
    options = tiny.options(root, folder, CHANGES | {"optim.steps": 2, "run.resume": "auto"})
    assert train.main(options) == 0
    content = (folder / "checkpoints" / "best.ckpt").read_bytes()
    tiny.write(root / "val.txt", (root / "val.txt").read_text().splitlines()[::-1])
    caplog.clear()
    assert train.main(options) == 0
    assert "val pictures are others" not in caplog.text
    assert (folder / "checkpoints" / "best.ckpt").read_bytes() == content


def test_the_report_has_the_best_that_was_chosen_anew(tmp_path):
    root, folder = tiny.make_set(tmp_path / "pictures"), tmp_path / "run"
    changes = CHANGES | {"optim.steps": 4, "run.resume": "auto", "run.eval_every": 1}
    assert train.main(tiny.options(root, folder, changes | {"optim.steps": 2})) == 0
    log = folder / "log" / "metrics.csv"
    rows = list(csv.reader(log.open(newline="")))
    scored = rows[0].index("eval/mIoU")
    first = next(row for row in rows[1:] if row[scored])
    first[scored] = "0.99"
    with log.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    tiny.write(root / "val.txt", (root / "val.txt").read_text().splitlines()[:-1])
    assert train.main(tiny.options(root, folder, changes)) == 0
    result = json.loads((folder / "result.json").read_text())["miou"]
    assert f"{100 * result['best']:.2f}" in (folder / "report.html").read_text()
    assert "99.00" not in (folder / "report.html").read_text()


def test_what_is_the_background_now_is_told_of(root, tmp_path, capsys, monkeypatch):
    """An older run of a class bg had none."""
    folder = tmp_path / "run"
    tiny.write(tmp_path / "classes.txt", ["bg", "disc", "square"])
    changes = CHANGES | {"data.classes": tmp_path / "classes.txt", "optim.steps": 2, "run.resume": "auto"}
    with monkeypatch.context() as patch:
        patch.setattr("pseudoseg_fast.data.labels.BACKGROUNDS", ("background",))
        assert train.main(tiny.options(root, folder, changes)) == 0
    assert train.main(tiny.options(root, folder, changes)) == 2
    assert "the background: class null there, 0 here; give --data.background null" in capsys.readouterr().err
    changes |= {"optim.steps": 3, "data.background": "null"}
    assert train.main(tiny.options(root, folder, changes)) == 0


def test_other_classes_are_refused(root, whole, tmp_path, capsys):
    tiny.write(tmp_path / "classes.txt", ["background", "disc", "cube"])
    changes = CHANGES | {"data.classes": tmp_path / "classes.txt", "run.resume": "auto"}
    assert train.main(tiny.options(root, whole, changes)) == 2
    assert "'square'] there, ['background', 'disc', 'cube'] here" in capsys.readouterr().err
