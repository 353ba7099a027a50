"""The pictures that a run draws at its evaluations."""

import warnings

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pseudoseg_fast import visualize
from pseudoseg_fast.config import parse_config
from pseudoseg_fast.data.samples import spread
from pseudoseg_fast.data.sets import read_data
from pseudoseg_fast.event_log import EventLog
from pseudoseg_fast.examples import SUPERVISED_TITLES, TITLES, Examples
from pseudoseg_fast.networks import build_network

CHANGES = {"data.scales": [0.5, 1.5], "data.crop_size": 40, "data.cutout": 0.3, "optim.steps": 50}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.make_set(tmp_path_factory.mktemp("set") / "pictures")


@pytest.fixture(scope="module")
def make(root):
    """Examples and the network that they are drawn with; one network for all."""
    networks = {}

    def examples(changes=None):
        config = parse_config(tiny.options(root, "unused", CHANGES | (changes or {})), "", "")
        data = read_data(config.data)
        if not networks:
            torch.manual_seed(0)
            networks["one"] = build_network(config.model, len(data.classes), data.background)
        return Examples(config, data, networks["one"]), networks["one"]

    return examples


@pytest.mark.parametrize("views", [1, 2])
def test_a_row_shows_one_geometry_and_what_the_label_leaves_out(make, views):
    examples, network = make({"method.strong_views": views})
    panels = examples.panels(network)
    assert tuple(panels) == TITLES
    mean_pixel = visualize.as_color(np.round(255 * network.mean.numpy()).astype(np.uint8)[None, None])
    cut = 0
    for index in range(3):
        weak, strong, label, truth = (
            panels[title][index] for title in ("weak view", "strong view", "fused label", "truth")
        )
        # The disc of the pictures is red, the square green, and the mask goes with them; scaled, but for the edges.
        brightest = weak.astype(int)[..., :2] - weak.astype(int)[..., [1, 0]]
        for channel, ids in ((0, 1), (1, 2)):
            seen = (brightest[..., channel] > 100) == (truth == examples.colors[ids]).all(2)
            assert seen.mean() > 0.95
        unlearnt = (label == visualize.IGNORED).all(2)
        padding = (truth == visualize.IGNORED).all(2)
        assert (strong[unlearnt] == mean_pixel).all()
        assert unlearnt[padding].all()
        cut += (unlearnt & ~padding).sum()
    assert cut > 0


def test_the_same_weights_give_the_same_pictures_and_training_is_not_disturbed(make):
    examples, network = make()
    for training in (True, False):
        network.train(training)
        state, before = (
            torch.get_rng_state(),
            {name: value.clone() for name, value in network.state_dict().items()},
        )
        one, other = examples.draw(network), make()[0].draw(network)
        assert np.array_equal(one, other)
        assert network.training is training
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_pixels_below_the_threshold_teach_nothing(make):
    examples, network = make(
        {"method.threshold": 0.6, "data.cutout": 0.0, "data.scales": [2.0], "data.crop_size": 48}
    )
    panels = examples.panels(network)
    for label, confidence in zip(panels["fused label"], panels["confidence"], strict=True):
        clear = confidence[..., 0] != round(0.6 * 255)  # which stands for values on both sides
        assert np.array_equal(
            (label == visualize.IGNORED).all(2)[clear], (confidence[..., 0] < 0.6 * 255)[clear]
        )


def test_tags_that_unlabelled_pictures_have_are_taken_from_the_masks(make, root):
    tiny.write(root / "tags.csv", ["image,tags", "images/1.png,disc", "images/2.png,disc;square"])
    tagged = {
        "method.image_labels": True,
        "method.exclude_untagged": True,
        "method.norm": "none",
        "data.tags": "tags.csv",
    }
    for changes, absent in (({}, False), (tagged, True)):
        examples, network = make({"method.gamma": 1} | changes)
        torch.nn.init.constant_(network.segmentation_head[0].bias, 0)
        network.segmentation_head[0].bias.data[2] = 9  # a decoder that takes everything for a square
        examples.batch = examples._read()
        examples.batch["mask"][examples.batch["mask"] == 2] = 1  # which no picture shows
        panels = examples.panels(network)
        square = examples.colors[2]
        labelled = np.concatenate(panels["fused label"])
        assert (labelled == square).all(2).any() != absent
        assert (np.concatenate(panels["decoder"]) == square).all(2).any()


def test_a_class_that_no_tag_names_has_a_label_where_it_is(make, root):
    tiny.write(root / "tags.csv", ["image,tags", "images/1.png,disc", "images/2.png,disc"])
    changes = {"method.image_labels": True, "method.exclude_untagged": True, "method.norm": "none"}
    examples, network = make(changes | {"data.tags": "tags.csv"})
    assert examples.frequency.tolist() == [1.0, 0.5]  # as if one picture had a square
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        panels = examples.panels(network)
    assert all((confidence >= 255 // 3).all() for confidence in panels["confidence"])


def test_a_supervised_run_has_no_label_to_show(make):
    examples, network = make({"method.name": "supervised"})
    sheet = examples.draw(network, cell=100)
    assert sheet.width == len(SUPERVISED_TITLES) * (100 + visualize.MARGIN) + visualize.MARGIN


def test_what_learns_nothing_is_not_drawn(make):
    weights = {"method.gamma": 1.0, "method.weight_sa": 0.0, "method.weight_x": 0.0}
    assert make(weights)[0].titles == tuple(title for title in TITLES if title not in ("CAM", "SGC"))
    assert make()[0].titles == TITLES


def test_pictures_of_other_channels_and_classes_without_background(make, root, tmp_path):
    tiny.write(tmp_path / "classes.txt", ["ground", "disc", "square"])
    config = parse_config(
        tiny.options(root, "unused", {"model.in_channels": 1, "data.classes": tmp_path / "classes.txt"}),
        "",
        "",
    )
    data = read_data(config.data)
    network = build_network(config.model, 3, data.background)
    panels = Examples(config, data, network, [2]).panels(network)
    assert [picture.shape for pictures in panels.values() for picture in pictures] == [(32, 32, 3)] * len(
        TITLES
    )


def test_they_are_written_for_people_and_for_tensorboard(make, tmp_path):
    examples, network = make()
    log = EventLog(tmp_path, name="", version="log")
    examples.publish(network, tmp_path, 20, log)
    log.finalize("success")
    with Image.open(tmp_path / "pictures" / "step_000020.png") as written:
        sheet = np.asarray(written)
    assert sheet.shape[1] == len(TITLES) * (160 + visualize.MARGIN) + visualize.MARGIN
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    (image,) = events.Images("eval/pictures")
    assert (image.step, image.width, image.height) == (20, sheet.shape[1], sheet.shape[0])


@pytest.mark.parametrize(
    ("every", "expected"),
    [(0, []), (1, [10, 20, 30, 40, 45]), (3, [30, 45])],
    ids=["never", "always", "every third evaluation"],
)
def test_they_are_drawn_as_often_as_is_wanted(make, every, expected):
    examples, _ = make({"optim.steps": 45, "run.eval_every": 10, "run.draw_every": every})
    assert [step for step in (10, 20, 30, 40, 45) if examples.due(step)] == expected


@pytest.mark.parametrize(("total", "expected"), [(1, [0]), (3, [0, 1, 2]), (101, [0, 33, 67, 100])])
def test_pictures_are_spread_over_the_list(total, expected):
    assert spread(total, 4) == expected
