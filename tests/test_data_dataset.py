import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pseudoseg_fast.data.dataset import CorruptCounter, SegmentationDataset, collate
from pseudoseg_fast.data.labels import Labels
from pseudoseg_fast.data.lists import DataError, Sample
from pseudoseg_fast.data.read import UnreadableImage
from pseudoseg_fast.data.sampler import StepSampler


def make_samples(folder, count, corrupt=()):
    samples = []
    for number in range(count):
        image, mask = folder / f"{number}.png", folder / f"{number}_mask.png"
        Image.new("RGB", (5, 4), (number, 0, 0)).save(image)
        Image.fromarray(np.full((4, 5), number % 3, np.uint8)).save(mask)
        if number in corrupt:
            image.write_bytes(b"no picture")
        samples.append(Sample(f"{number}.png", image, mask))
    return samples


def noise(image, mask):
    views = {"image": image + 0.0, "noise": torch.rand(2)}
    return views if mask is None else {**views, "mask": mask}


def batches(samples, workers, start=0):
    dataset = SegmentationDataset(samples, Labels(3), noise, on_corrupt="skip")
    sampler = StepSampler(len(dataset), 3, seed=1, steps=4, start_step=start)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate)
    return list(loader)


def test_item_without_transform(tmp_path):
    labeled = make_samples(tmp_path, 2)
    item = SegmentationDataset(labeled, Labels(3))[1]
    assert item["image"].dtype == item["mask"].dtype == torch.uint8
    assert item["image"][:, 0, 0].tolist() == [1, 0, 0]
    assert item["mask"].tolist() == [[1] * 5] * 4
    assert (item["name"], item["corrupt"]) == ("1.png", ())
    assert "mask" not in SegmentationDataset([labeled[0]._replace(mask=None)], 3)[0]


def test_workers_and_start_change_no_batch(tmp_path):
    samples = make_samples(tmp_path, 5, corrupt=[2])
    alone, spread, resumed = batches(samples, 0), batches(samples, 2), batches(samples, 0, start=2)
    assert any(batch["corrupt"] == ["2.png"] for batch in alone)
    for one, other in [*zip(alone, spread, strict=True), *zip(alone[2:], resumed, strict=True)]:
        assert one["name"] == other["name"]
        assert one["corrupt"] == other["corrupt"]
        assert torch.equal(one["noise"], other["noise"])
        assert torch.equal(one["image"], other["image"])


def test_seeded_item_leaves_the_generator_alone(tmp_path):
    dataset = SegmentationDataset(make_samples(tmp_path, 1), Labels(3), noise)
    before = torch.random.get_rng_state()
    first, second, other = dataset[0, 7], dataset[0, 7], dataset[0, 8]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first["noise"], second["noise"])
    assert not torch.equal(first["noise"], other["noise"])


def test_cache_survives_changed_files_and_written_items(tmp_path):
    samples = make_samples(tmp_path, 1)
    dataset = SegmentationDataset(samples, Labels(3), cache=True)
    expected = dataset[0]["image"].clone()
    samples[0].image.unlink()
    for _ in range(2):
        item = dataset[0]
        assert torch.equal(item["image"], expected)
        item["image"].zero_()
        item["image"] += 1


def test_corrupt_picture_stops_evaluation(tmp_path):
    dataset = SegmentationDataset(make_samples(tmp_path, 2, corrupt=[1]), Labels(3))
    with pytest.raises(UnreadableImage, match=r"1.png cannot be read"):
        dataset[1]


def test_corrupt_picture_is_replaced_by_the_seed_alone(tmp_path):
    dataset = SegmentationDataset(make_samples(tmp_path, 6, corrupt=[0, 1]), Labels(3), on_corrupt="skip")
    items = [dataset[0, seed] for seed in range(20)]
    assert all(item["corrupt"][0] == "0.png" for item in items)
    assert {item["name"] for item in items} == {"2.png", "3.png", "4.png", "5.png"}
    assert [item["name"] for item in items] == [dataset[0, seed]["name"] for seed in range(20)]


def test_wrong_mask_is_never_skipped(tmp_path):
    samples = make_samples(tmp_path, 2)
    Image.fromarray(np.full((4, 5), 9, np.uint8)).save(samples[0].mask)
    with pytest.raises(DataError, match="holds the ids 9"):
        SegmentationDataset(samples, Labels(3), on_corrupt="skip")[0]


def test_set_without_readable_pictures_ends(tmp_path):
    dataset = SegmentationDataset(make_samples(tmp_path, 2, corrupt=[0, 1]), Labels(3), on_corrupt="skip")
    with pytest.raises(DataError, match="no readable picture"):
        dataset[0, 3]


def test_counter_warns_once_and_stops_above_its_limit(caplog):
    counter = CorruptCounter(total=200)
    with caplog.at_level(logging.WARNING):
        counter.update(["a.jpg", "a.jpg"])
        counter.update(["b.jpg", "a.jpg"])
    assert [record.getMessage().split()[0] for record in caplog.records] == ["a.jpg", "b.jpg"]
    with pytest.raises(DataError, match=r"3 of 200 .*more than 1 %.*\n  a.jpg\n  b.jpg\n  c.jpg"):
        counter.update(["c.jpg"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        pytest.param({"in_channels": 0}, "in_channels must be at least 1", id="channels"),
        pytest.param({"short_side": 0}, "short_side must be at least 1", id="short-side"),
        pytest.param({"on_corrupt": "ignore"}, "got 'ignore'", id="on-corrupt"),
    ],
)
def test_wrong_arguments(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        SegmentationDataset(make_samples(tmp_path, 1), Labels(3), **options)
    with pytest.raises(ValueError, match="at least one sample"):
        SegmentationDataset([], Labels(3))
