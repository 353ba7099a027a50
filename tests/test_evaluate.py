import math

import numpy as np
import pytest
import tiny
import torch
from torch.nn.functional import interpolate

from pseudoseg_fast import evaluate as module
from pseudoseg_fast import scoring
from pseudoseg_fast.finite import NotFinite
from pseudoseg_fast.network import Network
from pseudoseg_fast.scoring import Scores, evaluate, group_by_size, predict


def random_images(batch, height, width):
    """Patches of colour, so that labels differ from place to place."""
    patches = torch.randint(256, (batch, 3, -(-height // 8), -(-width // 8)), dtype=torch.uint8)
    return patches.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, :height, :width].contiguous()


@pytest.fixture(scope="module")
def network():
    """An untrained network that predicts every class somewhere."""
    torch.manual_seed(0)
    network = Network("DeepLabV3Plus", tiny.ENCODER, None, classes=3, attention_dim=4)
    with torch.no_grad():
        for _ in range(20):
            network(random_images(4, 64, 64))  # gives the batch norms their statistics
        logits = network.eval()(random_images(4, 64, 64)).decoder_logits
        network.segmentation_head[0].bias.sub_(logits.mean((0, 2, 3)))
    return network


def random_samples(sizes, classes=3, mask_sizes=None):
    return [
        {
            "name": str(index),
            "image": random_images(1, *size)[0],
            "mask": torch.randint(classes, mask_size, dtype=torch.uint8),
        }
        for index, (size, mask_size) in enumerate(zip(sizes, mask_sizes or sizes, strict=True))
    ]


def test_scores_of_a_confusion_matrix():
    confusion = torch.tensor([[6, 2, 0, 0], [0, 3, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    scores = Scores(("a", "b", "nowhere", "predicted"), confusion)
    nan = pytest.approx(math.nan, nan_ok=True)
    assert scores.iou == (6 / 8, 3 / 6, nan, nan)
    assert scores.dice == (12 / 14, 6 / 9, nan, nan)
    assert scores.precision == (1, 3 / 5, nan, 0)
    assert scores.recall == (6 / 8, 3 / 4, nan, nan)
    assert scores.pixels == (8, 4, 0, 0)
    assert scores.miou == pytest.approx((6 / 8 + 3 / 6) / 2)
    assert scores.accuracy == 9 / 12
    table = scores.table().splitlines()
    assert table[0] == "class      IoU %  Dice %  precision %  recall %  pixels %"
    assert [line.split() for line in table[1:-1]] == [
        ["a", "75.00", "85.71", "100.00", "75.00", "66.67"],
        ["b", "50.00", "66.67", "60.00", "75.00", "33.33"],
        ["nowhere", "-", "-", "-", "-", "0.00"],
        ["predicted", "-", "-", "0.00", "-", "0.00"],
        ["mIoU", "62.50"],
    ]
    assert table[-1] == "not in the mean, since no mask has a pixel of it: nowhere, predicted"
    written = scores.as_dict()
    assert written["classes"][3] == {
        **{"name": "predicted", "iou": None, "dice": None, "precision": 0, "recall": None, "pixels": 0}
    }
    assert (written["miou"], written["confusion"]) == (0.625, confusion.tolist())


def test_unknown_scores_are_none():
    scores = Scores.unknown(tiny.CLASSES)
    assert scores.as_dict()["miou"] is scores.as_dict()["accuracy"] is None
    assert scores.table().splitlines()[-1].split() == ["mIoU", "-"]


def test_a_class_that_is_predicted_where_no_mask_has_it_leaves_the_mean_over_the_same_classes():
    """A mean whose denominator changed would choose the step that happens not to predict it."""
    better = Scores(("a", "b", "absent"), torch.tensor([[9, 1, 0], [0, 8, 2], [0, 0, 0]]))
    worse = Scores(("a", "b", "absent"), torch.tensor([[8, 2, 0], [3, 7, 0], [0, 0, 0]]))
    assert better.miou > worse.miou


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(32, 48), (33, 41), (5, 70)], ids=str)
def test_labels_of_a_padded_image_are_cut_from_the_padded_prediction(network, size, align_corners):
    height, width = size
    images = random_images(2, *size)
    padded = network.pad(images)[0]
    with torch.no_grad():
        logits = network(padded).decoder_logits
        full = interpolate(logits, size=padded.shape[-2:], mode="bilinear", align_corners=align_corners)
        labels, invalid = predict(network, images, size, align_corners=align_corners)
    assert labels.dtype == torch.uint8
    assert invalid.tolist() == [False, False]
    assert torch.equal(labels.long(), full[:, :, :height, :width].argmax(1))
    assert len(labels.unique()) > 1


def test_labels_come_at_the_size_that_is_wanted(network):
    images = random_images(1, 32, 48)
    with torch.no_grad():
        logits = network(images).decoder_logits
        labels, _ = predict(network, images, (64, 96))
    expected = interpolate(logits, size=(64, 96), mode="bilinear").argmax(1)
    assert torch.equal(labels.long(), expected)


def test_groups_have_one_size_of_image_and_of_mask():
    samples = random_samples([(4, 5), (5, 4), (4, 5), (4, 5)], mask_sizes=[(4, 5), (4, 5), (8, 10), (4, 5)])
    groups = [[sample["name"] for sample in group] for group in group_by_size(samples)]
    assert groups == [["0", "3"], ["1"], ["2"]]


def test_scores_are_those_counted_by_hand(network):
    samples = random_samples([(32, 48), (33, 41), (32, 48)])
    samples[0]["mask"][4:20] = 255
    seen = {}
    scores = evaluate(
        network,
        [samples[:2], samples[2:]],
        tiny.CLASSES,
        watch=lambda sample, labels: seen.update({sample["name"]: labels}),
    )

    truth, guess = [], []
    for sample in samples:
        with torch.no_grad():
            labels = predict(network, sample["image"][None], sample["mask"].shape)[0][0]
        assert torch.equal(labels, seen[sample["name"]])
        counted = sample["mask"] != 255
        truth.append(sample["mask"][counted].numpy())
        guess.append(labels[counted].numpy())
    truth, guess = np.concatenate(truth), np.concatenate(guess)
    for index in range(3):
        both, either = (truth == index) & (guess == index), (truth == index) | (guess == index)
        assert scores.iou[index] == pytest.approx(both.sum() / either.sum())
    assert scores.pixels == tuple(int((truth == index).sum()) for index in range(3))
    assert scores.classes == tiny.CLASSES


@pytest.mark.parametrize("training", [True, False])
def test_the_networks_mode_and_statistics_are_left_as_they_were(network, training):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    try:
        network.train(training)
        evaluate(network, [random_samples([(32, 32)])], tiny.CLASSES)
        assert network.training is training
    finally:
        network.eval()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_answers_of_nan_are_not_scored(network):
    """Their argmax is class 0."""
    samples = random_samples([(32, 32)] * 3)
    bias = network.segmentation_head[0].bias
    before = bias.detach().clone()
    try:
        with torch.no_grad():
            bias[1] = float("nan")
        with pytest.raises(NotFinite, match=r"outputs NaN for 3 of the val pictures(?s:.*)\n  0"):
            evaluate(network, [samples], tiny.CLASSES)
    finally:
        with torch.no_grad():
            bias.copy_(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --checkpoint FILE, such as RUN/checkpoints/best.ckpt"),
        (["--checkpoint", "none.ckpt"], "found no file none.ckpt"),
        (["--data.val", "val.txt"], "expected --checkpoint FILE"),
        (["--onnx", "x.onnx"], "expected pictures with masks to score the model on: --checkpoint FILE"),
    ],
    ids=["nothing", "no such file", "data alone", "model alone"],
)
def test_a_command_line_without_a_checkpoint_is_refused(capsys, arguments, message):
    assert tiny.status(module.main, arguments) == 2
    assert message in capsys.readouterr().err


def test_help_needs_no_checkpoint(capsys):
    assert tiny.status(module.main, ["--help"]) == 0
    assert "--data.val" in capsys.readouterr().out


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_batches_that_memory_has_no_room_for_are_evaluated_in_parts(network, monkeypatch, limit):
    samples = random_samples([(32, 40)] * 5 + [(40, 32)] * 3)
    whole = evaluate(network, [samples], tiny.CLASSES)
    sizes = []

    def small(network, images, *arguments, **options):
        sizes.append(len(images))
        if len(images) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(network, images, *arguments, **options)

    monkeypatch.setattr(scoring, "predict", small)
    assert torch.equal(evaluate(network, [samples], tiny.CLASSES).confusion, whole.confusion)
    assert sum(size > limit for size in sizes) <= 2  # what has been found out is kept


def test_pictures_of_nan_are_named_when_memory_has_no_room_for_a_later_part(network, monkeypatch):
    """Parts of a batch that is taken anew were counted twice."""
    samples = random_samples([(32, 40)] * 4)
    samples[3]["image"].zero_()
    failing = [4, 2]  # pictures of the next calls that fail: the whole batch, then the second half of it

    def small(network, images, *arguments, **options):
        if failing and len(images) == failing[0] and (len(images) == 4 or not images[-1].any()):
            failing.pop(0)
            raise torch.OutOfMemoryError("CUDA out of memory")
        labels, invalid = predict(network, images, *arguments, **options)
        return labels, invalid | (images == 0).flatten(1).all(1)

    monkeypatch.setattr(scoring, "predict", small)
    with pytest.raises(NotFinite, match=r"outputs NaN for 1 of the val pictures(?s:.*)\n  3$"):
        evaluate(network, [samples], tiny.CLASSES)
    assert not failing


def test_answers_of_nan_of_an_exported_model_are_told_of():
    values = torch.zeros(2, 3, 4, 5)
    values[0, 1] = 2
    values[1, 0, 0, 0] = float("nan")
    labels, invalid = scoring.labels_of_answer(values)
    assert invalid.tolist() == [False, True]
    assert labels[0].unique().tolist() == [1]
    assert scoring.labels_of_answer(labels)[1].tolist() == [False, False]


def test_a_picture_that_memory_has_no_room_for_is_told_of_with_what_to_do(network, monkeypatch):
    def none(*arguments, **options):
        raise RuntimeError("CUDA error: out of memory\nand much more")

    monkeypatch.setattr(scoring, "predict", none)
    said = r"on a single picture of 40 x 32: give a --data.short_side below 32, .* \(CUDA error: out of memory\)$"
    with pytest.raises(RuntimeError, match=said):
        evaluate(network, [random_samples([(32, 40)] * 2)], tiny.CLASSES)
