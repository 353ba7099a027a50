import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from pseudoseg_fast.augment import CUTOUT, ColorJitter, WeakStrongViews, WeakView, random_square, turn_hue

MEAN = (0.5, 0.25, 0.75)
MEAN_PIXEL = torch.tensor([128, 64, 191], dtype=torch.uint8)


def coordinates(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An image whose every pixel says which class it has: the mask repeats the red channel."""
    rows = torch.arange(height)[:, None].expand(height, width)
    columns = torch.arange(width)[None].expand(height, width)
    red = ((rows // 8 + columns // 8) % 2 * 200).to(torch.uint8)
    return torch.stack([red, columns.to(torch.uint8), rows.to(torch.uint8)]), (red == 200).to(torch.uint8)


@pytest.mark.parametrize("crop", [33, 64], ids=lambda crop: f"crop{crop}")
@pytest.mark.parametrize("size", [(50, 70), (20, 90), (200, 30)], ids=str)
def test_mask_follows_the_image(size, crop):
    image, mask = coordinates(*size)
    view = WeakView(crop, scales=(1.0,), mean=MEAN)
    for seed in range(20):
        torch.manual_seed(seed)
        out = view(image, mask)
        assert out["image"].shape == (3, crop, crop)
        assert out["mask"].shape == out["valid"].shape == (crop, crop)
        inside = out["valid"]
        assert torch.equal(out["mask"][inside] == 1, out["image"][0][inside] == 200)
        assert (out["mask"][~inside] == 255).all()
        assert torch.equal(out["image"][:, ~inside], MEAN_PIXEL[:, None].expand(3, int((~inside).sum())))


def test_ignored_pixels_of_a_mask_stay_valid():
    image, mask = coordinates(40, 40)
    out = WeakView(40, scales=(1.0,))(image, torch.full_like(mask, 255))
    assert out["valid"].all()
    assert (out["mask"] == 255).all()


def test_crop_is_padded_to_a_multiple_of_the_stride():
    image, mask = coordinates(100, 100)
    out = WeakView(33, stride=16, scales=(1.0,), mean=MEAN)(image, mask)
    assert out["image"].shape == (3, 48, 48)
    assert out["valid"][:33, :33].all()
    assert out["valid"].sum() == 33 * 33
    assert (out["mask"][33:] == 255).all()


@pytest.mark.parametrize("scale", [0.75, 1.25, 1.5], ids=str)
def test_masks_keep_their_place_when_scaled(scale):
    """On a ramp whose mask is the ramp itself, the two differ by rounding to either side, never by a shift."""
    ramp = torch.arange(0, 240, 2, dtype=torch.uint8)[:, None].expand(120, 120)
    view = WeakView(round(120 * scale), scales=(scale,))(ramp.expand(3, -1, -1), ramp)
    shift = (view["mask"].float() - view["image"][0].float())[4:-4].mean()
    assert abs(shift) < 0.6


def test_every_scale_is_drawn_and_masks_are_never_blended():
    image, mask = coordinates(64, 64)
    view = WeakView(128, scales=(0.5, 1.0, 2.0))
    seen = set()
    for seed in range(30):
        torch.manual_seed(seed)
        out = view(image, mask)
        seen.add(int(out["valid"].sum()))
        assert set(out["mask"].unique().tolist()) <= {0, 1, 255}
    assert seen == {32 * 32, 64 * 64, 128 * 128}


def test_weak_and_strong_share_their_geometry():
    image, _ = coordinates(90, 60)
    views = WeakStrongViews(WeakView(48, mean=MEAN), color_jitter=(0, 0, 0, 0))
    for seed in range(20):
        torch.manual_seed(seed)
        out = views(image)
        strong, valid = out["strong"][0], out["valid"][0]
        assert torch.equal(out["weak"][:, valid], strong[:, valid])
        outside = strong[:, ~valid]
        assert torch.equal(outside, MEAN_PIXEL[:, None].expand_as(outside))


def test_strong_view_jitters_colours_and_leaves_the_weak_one_alone():
    image, _ = coordinates(64, 64)
    torch.manual_seed(0)
    out = WeakStrongViews(WeakView(64, scales=(1.0,)))(image)
    flipped = torch.equal(out["weak"], image.flip(-1))
    assert flipped or torch.equal(out["weak"], image)
    assert (out["strong"][0] != out["weak"])[:, out["valid"][0]].float().mean() > 0.5


@pytest.mark.parametrize(("crop", "side"), [(513, 100), (321, 63), (128, 25)])
def test_cutout_scales_with_the_crop(crop, side):
    square = random_square((crop, crop), CUTOUT)
    rows, columns = torch.where(square)
    assert square.sum() == side * side
    assert rows.max() - rows.min() == columns.max() - columns.min() == side - 1


def test_cutout_keeps_to_the_crop_when_the_view_is_padded():
    image, _ = coordinates(100, 100)
    views = WeakStrongViews(WeakView(33, stride=16, scales=(1.0,)), cutout=1.0)
    assert not views(image)["valid"].any()
    views = WeakStrongViews(WeakView(33, stride=16, scales=(1.0,)), cutout=0.3)
    for seed in range(10):
        torch.manual_seed(seed)
        assert views(image)["valid"].sum() == 33 * 33 - 10 * 10


def test_strong_views_share_the_weak_ones_geometry_and_nothing_else():
    image, _ = coordinates(64, 64)
    out = WeakStrongViews(WeakView(48, mean=MEAN), (0.5, 0.5, 0, 0), cutout=0.25, views=2)(image)
    assert out["strong"].shape == (2, 3, 48, 48)
    assert out["valid"].shape == (2, 48, 48)
    both = out["valid"].all(0)
    assert not torch.equal(out["valid"][0], out["valid"][1])
    assert not torch.equal(out["strong"][0][:, both], out["strong"][1][:, both])
    for strong, valid in zip(out["strong"], out["valid"], strict=True):
        assert torch.equal(strong[:, ~valid], MEAN_PIXEL[:, None].expand_as(strong[:, ~valid]))
        # brighter or darker as a whole, and in the same place: pixels keep their order along the ramp
        seen = torch.stack([out["weak"][0][valid], strong[0][valid]]).float()
        assert torch.corrcoef(seen)[0, 1] > 0.9


def test_cutout_is_invalid():
    image, _ = coordinates(64, 64)
    out = WeakStrongViews(WeakView(64, scales=(1.0,)), cutout=0.25)(image)
    assert (~out["valid"]).sum() == 16 * 16


def test_a_hidden_mask_does_not_reach_the_unlabelled_views():
    image, mask = coordinates(64, 64)
    views = WeakStrongViews(WeakView(32))
    torch.manual_seed(0)
    with_mask = views(image, mask)
    torch.manual_seed(0)
    without = views(image)
    assert with_mask.keys() == without.keys() == {"weak", "strong", "valid"}
    assert all(torch.equal(with_mask[name], without[name]) for name in without)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeakView(0), "crop_size must be at least 1"),
        (lambda: WeakView(8, scales=()), "scales must be positive"),
        (lambda: WeakView(8, scales=(0.0, 1.0)), "scales must be positive"),
        (lambda: WeakStrongViews(WeakView(8), cutout=1.5), r"in \[0, 1\], got 1.5"),
        (
            lambda: WeakStrongViews(WeakView(8), color_jitter=(0.5,)),
            "brightness, contrast, saturation and hue",
        ),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("turns", [-0.25, 0.0, 0.1, 0.5])
def test_hue_is_turned_as_torchvision_does(turns):
    """Within one level, which rounding to the nearest and cutting off differ by; not at all where nothing turns."""
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    image[:, 0] = 128  # grey has no hue
    turned = turn_hue(image, turns)
    expected = functional.adjust_hue(image, turns)
    assert (turned.int() - expected.int()).abs().max() <= 1
    assert torch.equal(turned[:, 0], image[:, 0])
    if turns == 0:
        assert torch.equal(turned, image)


def test_jitter_draws_and_does_what_torchvisions_does():
    image = torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8)
    for seed in range(8):
        views = []
        for jitter in (ColorJitter, v2.ColorJitter):
            torch.manual_seed(seed)
            views.append(jitter(0.5, 0.5, 0.5, 0.25)(image).int())
        assert (views[0] - views[1]).abs().float().mean() < 1
    assert torch.equal(ColorJitter(0, 0, 0, 0)(image), image)


def test_pictures_of_many_channels_are_jittered_in_brightness_and_contrast():
    image = torch.arange(5 * 16 * 16, dtype=torch.float32).reshape(5, 16, 16).remainder(251).to(torch.uint8)
    weak = WeakView(16, scales=[1.0], mean=[0.5] * 5)
    views = WeakStrongViews(weak, (0.0, 0.0, 0.5, 0.25), cutout=0.0)(image)
    assert torch.equal(views["strong"][0], views["weak"])
    views = WeakStrongViews(weak, (0.5, 0.5, 0.5, 0.25), cutout=0.0)(image)
    assert views["strong"].shape == (1, *image.shape)
    assert views["strong"].dtype == torch.uint8
    assert not torch.equal(views["strong"][0], views["weak"])
