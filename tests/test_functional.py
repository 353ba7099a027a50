"""Every public function on every backend against the float64 reference, and the promises made about them."""

import logging

import pytest
import torch
from comparison import assert_as_good_as_eager
from targets import on_all_targets, on_attention_targets, on_fusion_targets

from pseudoseg_fast import backends, functional, reference
from pseudoseg_fast.arguments import NORMS

# (student or logits, decoder, cam, label size, classes)
SHAPES = [
    pytest.param((2, 3, 5, 4, 3, 2, 9, 14), id="odd"),
    pytest.param((1, 2, 1, 1, 1, 1, 1, 1), id="one-pixel"),
    pytest.param((2, 1, 3, 4, 2, 2, 7, 5), id="one-class"),
    pytest.param((1, 21, 17, 33, 9, 9, 65, 65), id="21-classes"),
    pytest.param((1, 150, 8, 9, 4, 5, 33, 36), id="150-classes"),
    pytest.param((2, 19, 21, 35, 3, 3, 21, 35), id="size-of-input"),
    pytest.param((1, 5, 12, 10, 3, 3, 12, 37), id="height-of-input"),
    pytest.param((1, 5, 12, 10, 3, 3, 29, 10), id="width-of-input"),
    pytest.param((1, 4, 9, 8, 5, 5, 4, 3), id="down"),
    pytest.param((0, 3, 4, 4, 2, 2, 8, 8), id="empty-batch"),
]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
# Losses and float32 maps: torch.testing's float32 rule. Half-precision results carry one rounding.
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-12},
    torch.float32: {"rtol": 1.3e-6, "atol": 1e-5},
    torch.float16: {"rtol": 1e-3, "atol": 1e-5},
    torch.bfloat16: {"rtol": 8e-3, "atol": 1e-5},
}


class Case:
    """Arguments of the four losses, fusion and prediction for one shape, dtype and device."""

    def __init__(self, shape, dtype=torch.float32, device="cpu", spread=1.5):
        images, classes, h, w, h2, w2, height, width = shape
        self.size = (height, width)
        self.student = (spread * torch.randn(images, classes, h, w)).to(device, dtype)
        self.decoder = (spread * torch.randn(images, classes, h, w)).to(device, dtype)
        self.cam = (spread * torch.randn(images, classes, h2, w2)).to(device, dtype)
        self.target = torch.rand(images, classes, height, width).softmax(1).to(device, dtype)
        self.labels = torch.randint(0, classes, (images, height, width), device=device)
        self.labels[torch.rand(images, height, width) < 0.2] = 255
        self.valid = (torch.rand(images, height, width) > 0.3).to(device)
        self.weight = torch.rand(images, height, width).to(device)
        self.class_weight = (0.1 + torch.rand(classes)).to(device)

    def losses(self):
        """Name, differentiable argument, the others, and the options of each loss."""
        yield "soft_cross_entropy", self.student, (self.target,), {"weight": self.weight}
        yield "cross_entropy", self.student, (self.labels,), {"class_weight": self.class_weight}
        options = {"size": self.size, "valid": self.valid}
        yield "consistency_loss", self.student, (self.decoder, self.cam), options


def to_double(value):
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().double() if value.is_floating_point() else value.cpu()
    return value


def loss_and_gradient(function, logits, args, options, upstream=None):
    logits = logits.detach().requires_grad_()
    loss = function(logits, *args, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss)
    (gradient,) = torch.autograd.grad(loss, logits, upstream)
    return loss.detach(), gradient


def check_losses(case, target, reduction="mean", align_corners=False, fusion=None):
    for name, logits, args, options in case.losses():
        options = options | {"reduction": reduction, "align_corners": align_corners}
        if name == "consistency_loss":
            options = options | (fusion or {})
        upstream = 3 * torch.rand(case.weight.shape) if reduction == "none" else None
        check_loss(target, name, logits, args, options, upstream)


def check_loss(target, name, logits, args, options, upstream=None):
    loss, gradient = loss_and_gradient(
        lambda *a, **o: getattr(functional, name)(*a, **o, backend=target.backend),
        logits,
        args,
        options,
        upstream,
    )
    truth, true_gradient = loss_and_gradient(
        getattr(reference, name),
        to_double(logits),
        [to_double(value) for value in args],
        {key: to_double(value) for key, value in options.items()},
        upstream,
    )
    message = f"{name} {options.keys()}: {{}}".format
    expected_dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert loss.dtype == expected_dtype, name
    assert gradient.dtype == logits.dtype, name
    tolerance = dict(TOLERANCE[expected_dtype])
    # interpolate rounds source coordinates to float32: off by up to side * 2**-23 of a node's step
    rounding = max(logits.shape[2:]) * 2**-23 if expected_dtype == torch.float32 else 0.0
    if logits.numel():
        tolerance["atol"] += float(2 * logits.abs().max()) * rounding
    torch.testing.assert_close(loss.cpu().double(), truth, **tolerance, msg=message)
    # of one class the true gradient is zero, and the rounding of softmax - target remains
    scale = true_gradient.abs().max() if true_gradient.any() else 1.0
    tolerance = {"rtol": TOLERANCE[logits.dtype]["rtol"], "atol": 4e-6 * float(scale)}
    if target.backend == "eager":
        # the weights of a node over its 2n pixels sum to n, and each is off by that much
        tolerance["atol"] += 2 * rounding * float(scale)
    if logits.dtype == torch.float64:
        tolerance = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(gradient.cpu().double(), true_gradient, **tolerance, msg=message)


@on_all_targets
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("align_corners", [False, True])
def test_losses_and_gradients(target, shape, align_corners):
    case = Case(shape, device=target.device)
    for reduction in ("mean", "none"):
        check_losses(case, target, reduction=reduction, align_corners=align_corners)


@on_all_targets
@pytest.mark.parametrize("dtype", [*FLOATS[1:], torch.float64], ids=str)
def test_losses_in_other_dtypes(target, dtype):
    case = Case((2, 5, 6, 5, 3, 4, 20, 23), dtype, target.device)
    for reduction in ("sum", "none"):
        check_losses(case, target, reduction=reduction)


@on_all_targets
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("align_corners", [False, True])
def test_dice_loss_and_gradient(target, shape, align_corners):
    case = Case(shape, device=target.device)
    options = {"align_corners": align_corners, "ignore_index": 1}
    check_loss(target, "dice_loss", case.student, (case.labels,), options)
    check_loss(target, "dice_loss", case.student, (case.labels.byte(),), options)


@on_all_targets
@pytest.mark.parametrize("dtype", [*FLOATS[1:], torch.float64], ids=str)
def test_dice_loss_in_other_dtypes(target, dtype):
    case = Case((2, 5, 6, 5, 3, 4, 20, 23), dtype, target.device)
    # a gradient divided by so many pixels would be subnormal in float16
    check_loss(target, "dice_loss", case.student, (case.labels,), {}, upstream=torch.tensor(1000.0))


@on_all_targets
@pytest.mark.parametrize("far", [76.0, 1000.0])
def test_dice_loss_with_a_logit_far_above_the_others(target, far):
    """Where exponentials are as small as float32 can hold, a small gradient must not be lost."""
    case = Case((1, 3, 8, 8, 4, 4, 64, 64), device=target.device, spread=0.3)
    case.student[:, 0, :, 0] = far
    check_loss(target, "dice_loss", case.student, (case.labels,), {}, upstream=torch.tensor(1e-4))


@on_all_targets
def test_dice_loss_at_its_ends(target):
    masks = torch.tensor([[[0, 1, 255]]], dtype=torch.uint8, device=target.device)
    right = torch.tensor([[[[50.0, -50.0, -50.0]], [[-50.0, 50.0, 50.0]]]], device=target.device)
    assert functional.dice_loss(right, masks, backend=target.backend) < 1e-6
    assert float(functional.dice_loss(-right, masks, backend=target.backend)) == pytest.approx(1)
    right[0, 0] = -torch.inf
    options = {"backend": target.backend}
    loss, gradient = loss_and_gradient(functional.dice_loss, right, (masks,), options)
    assert float(loss) == pytest.approx((1 + 1 / 3) / 2)
    assert gradient.isfinite().all()


@on_all_targets
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 0.37])
def test_consistency_loss_options(target, norm, temperature):
    case = Case((2, 6, 7, 5, 3, 4, 20, 23), device=target.device)
    fusion = {"norm": norm, "temperature": temperature, "gamma": 0.3}
    check_losses(case, target, fusion=fusion)
    check_losses(case, target, fusion=fusion | {"hard": True, "threshold": 0.3})
    check_losses(case, target, "none", fusion=fusion | {"threshold": 0.5})


@on_fusion_targets
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fuse_predictions(target, shape, dtype):
    case = Case(shape, dtype, target.device)
    for options in ({}, {"norm": "image", "align_corners": True, "temperature": 1.0, "gamma": 0.8}):
        options["size"] = case.size
        label = functional.fuse_predictions(case.decoder, case.cam, **options, backend=target.fusing)
        assert label.dtype == dtype
        truth = reference.fuse_predictions(to_double(case.decoder), to_double(case.cam), **options)
        torch.testing.assert_close(label.cpu().double(), truth, **TOLERANCE[dtype])


@on_all_targets
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("align_corners", [False, True])
def test_predict_labels(target, shape, align_corners):
    case = Case(shape, device=target.device)
    labels = functional.predict_labels(
        case.student, case.size, align_corners=align_corners, backend=target.backend
    )
    assert labels.dtype == torch.uint8
    logits = reference.upsample(to_double(case.student), case.size, align_corners)
    chosen = logits.gather(1, labels.cpu().long()[:, None])[:, 0]
    torch.testing.assert_close(chosen, logits.amax(1), rtol=0, atol=1e-5)


@on_all_targets
def test_predict_labels_of_many_classes_are_int64_and_ties_go_to_the_first(target):
    logits = torch.zeros(1, 300, 2, 3, device=target.device)
    logits[:, 299, 1] = logits[:, 280, 1] = 2.0
    labels = functional.predict_labels(logits, (2, 3), backend=target.backend)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [[[0, 0, 0], [280, 280, 280]]]


@on_all_targets
def test_no_valid_pixel_gives_zero_loss_and_zero_gradient(target):
    case = Case((2, 4, 3, 3, 2, 2, 9, 8), device=target.device)
    none = torch.zeros_like(case.valid)
    calls = [
        ("soft_cross_entropy", (case.target,), {"weight": none}),
        ("cross_entropy", (torch.full_like(case.labels, 255),), {}),
        ("dice_loss", (torch.full_like(case.labels, 255),), {}),
        ("consistency_loss", (case.decoder, case.cam), {"valid": none, "size": case.size}),
    ]
    for name, args, options in calls:
        function = getattr(functional, name)
        loss, gradient = loss_and_gradient(
            function, case.student, args, options | {"backend": target.backend}
        )
        assert loss == 0, name
        assert not gradient.any(), name


@on_all_targets
def test_labels_out_of_range_are_ignored(target):
    logits = torch.randn(1, 3, 2, 2, device=target.device)
    labels = torch.tensor([[[0, -7], [2**40, 3]]], device=target.device)
    loss = functional.cross_entropy(logits, labels, backend=target.backend)
    torch.testing.assert_close(loss, -logits.log_softmax(1)[0, 0, 0, 0])
    small = torch.tensor([[[0, 254], [3, 255]]], dtype=torch.uint8, device=target.device)
    assert functional.cross_entropy(logits, small, backend=target.backend) == loss
    dice = functional.dice_loss(logits, labels, backend=target.backend)
    torch.testing.assert_close(dice, 1 - 2 / (1 + 1 / logits.softmax(1)[0, 0, 0, 0]))
    assert functional.dice_loss(logits, small, backend=target.backend) == dice
    many = torch.randn(1, 300, 2, 2, device=target.device)
    for ignore_index in (-1, -100, 300):  # a uint8 cannot be any of them
        options = {"ignore_index": ignore_index, "backend": target.backend}
        for name in ("cross_entropy", "dice_loss"):
            loss, same = (getattr(functional, name)(many, y, **options) for y in (small, small.long()))
            assert loss == same, name


@on_all_targets
def test_ruled_out_and_huge_logits_stay_finite_and_nan_shows(target):
    logits = 50 * torch.randn(1, 4, 5, 5, device=target.device)
    labels = torch.randint(0, 3, (1, 14, 13), device=target.device)
    three = functional.cross_entropy(logits[:, :3], labels, backend=target.backend)
    logits[:, 3] = -torch.inf
    torch.testing.assert_close(functional.cross_entropy(logits, labels, backend=target.backend), three)
    loss, gradient = loss_and_gradient(
        functional.cross_entropy, 1e20 * logits, (labels,), {"backend": target.backend}
    )
    assert loss.isfinite()
    assert gradient.isfinite().all()
    logits[0, 1, 2, 2] = torch.nan
    assert functional.cross_entropy(logits, labels, backend=target.backend).isnan()
    case = Case((1, 4, 5, 5, 3, 3, 9, 9), device=target.device)
    case.decoder[0, 1, 2, 2] = torch.nan
    args = (case.student, case.decoder, case.cam)
    assert functional.consistency_loss(*args, backend=target.backend).isnan()


@on_all_targets
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.2, 4.0])
def test_a_ruled_out_class_has_no_share_at_any_temperature(target, temperature):
    case = Case((2, 4, 5, 6, 3, 4, 17, 14), device=target.device)
    for maps in (case.student, case.decoder, case.cam):
        maps[:, 1] = -torch.inf
    fusion = {"temperature": temperature, "norm": "none", "backend": target.fusing}
    assert not functional.fuse_predictions(case.decoder, case.cam, size=case.size, **fusion)[:, 1].any()
    options = fusion | {"size": case.size, "backend": target.backend}
    loss, gradient = loss_and_gradient(
        functional.consistency_loss, case.student, (case.decoder, case.cam), options
    )
    kept = [maps[:, [0, 2, 3]].double().cpu() for maps in (case.student, case.decoder, case.cam)]
    del options["backend"]
    truth = loss_and_gradient(reference.consistency_loss, kept[0], kept[1:], options)
    torch.testing.assert_close(loss.cpu().double(), truth[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient[:, [0, 2, 3]].cpu().double(), truth[1], rtol=1e-4, atol=1e-6)
    assert not gradient[:, 1].abs().max() > 1e-6


def test_shapes_are_known_of_meta_tensors():
    q, cam = torch.empty(1, 6, 8, device="meta"), torch.empty(1, 2, 2, 3, device="meta")
    assert functional.refine_cam(q, q, cam.flatten(2).mT).shape == (1, 6, 2)
    maps = torch.empty(1, 3, 2, 3, device="meta")
    options = {"projection": torch.empty(3, 3, device="meta"), "shift": torch.empty(3, device="meta")}
    label = functional.pseudo_label(q, q, cam, maps, background=True, size=(4, 6), **options)
    assert label.shape == (1, 3, 4, 6)


@on_all_targets
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed"])
def test_losses_of_strided_arguments(target, layout):
    case = Case((3, 5, 6, 6, 4, 4, 18, 18), device=target.device)

    def restride(x):
        if layout == "channels_last" and x.dim() == 4:
            return x.contiguous(memory_format=torch.channels_last)
        if layout == "sliced":
            return torch.stack([x, x], -1)[..., 0]
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)

    for name in ("student", "decoder", "cam", "target", "labels", "valid", "weight"):
        setattr(case, name, restride(getattr(case, name)))
    check_losses(case, target)
    check_losses(case, target, reduction="none")
    check_loss(target, "dice_loss", case.student, (case.labels,), {})
    label = functional.fuse_predictions(case.decoder, case.cam, size=(18, 18), backend=target.fusing)
    truth = reference.fuse_predictions(to_double(case.decoder), to_double(case.cam), size=(18, 18))
    torch.testing.assert_close(label.cpu().double(), truth, **TOLERANCE[torch.float32])


@on_all_targets
def test_arguments_are_not_modified(target):
    case = Case((2, 3, 4, 4, 2, 2, 9, 9), device=target.device)
    tensors = {name: value for name, value in vars(case).items() if isinstance(value, torch.Tensor)}
    before = {name: value.clone() for name, value in tensors.items()}
    for name, logits, args, options in case.losses():
        loss_and_gradient(getattr(functional, name), logits, args, options | {"backend": target.backend})
    functional.fuse_predictions(case.decoder, case.cam, size=case.size, backend=target.fusing)
    functional.predict_labels(case.student, case.size, backend=target.backend)
    for name, value in tensors.items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_refine_cam_masks_in_any_dtype_and_under_autocast(dtype):
    q, k, cam = (torch.randn(2, 9, d).to(dtype) for d in (4, 4, 3))
    mask = torch.rand(2, 9) > 0.5
    truth = reference.refine_cam(q.double(), k.double(), cam.double(), mask=mask)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            actual = functional.refine_cam(q, k, cam, mask=mask)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), truth, **TOLERANCE[dtype])


ATTENTION_SHAPES = [
    pytest.param((2, 5, 7, 24, 3), id="odd"),
    pytest.param((1, 9, 15, 128, 21), id="21-classes"),
    pytest.param((1, 8, 9, 200, 150), id="150-classes"),
]


@on_attention_targets
@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_refine_cam_and_its_gradients(target, shape, dtype):
    images, height, width, depth, channels = shape
    length = height * width
    tensors = [torch.randn(images, length, depth).to(dtype) for _ in range(2)]
    tensors.append(torch.rand(images, length, channels).to(dtype))
    upstream = torch.randn(images, length, channels).to(dtype)
    mask = torch.rand(images, length) > 0.3

    def run(function, to, **options):
        leaves = [to(tensor).requires_grad_() for tensor in tensors]
        result = function(*leaves, mask=to(mask), **options)
        return result.detach(), *torch.autograd.grad(result, leaves, to(upstream))

    actual = run(functional.refine_cam, lambda x: x.to(target.device, copy=True), backend=target.backend)
    eager = run(reference.refine_cam, torch.clone)
    truth = run(reference.refine_cam, to_double)
    for name, *values in zip(("result", "query", "key", "cam"), actual, eager, truth, strict=True):
        assert_as_good_as_eager(*values, name)


@on_attention_targets
@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pseudo_label(target, shape, dtype):
    images, height, width, depth, classes = shape
    tensors = [torch.randn(images, depth, height * width).to(dtype).mT for _ in range(2)]
    tensors.append(torch.rand(images, classes - 1, height, width).to(dtype))
    tensors.append(torch.randn(images, classes, 12, 14).to(dtype))
    given = {
        "projection": torch.eye(classes) + 0.1 * torch.randn(classes, classes),
        "shift": torch.randn(classes),
        "mask": torch.rand(images, height * width) > 0.2,
    }
    for norm in NORMS:
        options = {"background": True, "size": (33, 41), "norm": norm}
        actual = functional.pseudo_label(
            *(tensor.to(target.device) for tensor in tensors),
            **{name: value.to(target.device) for name, value in given.items()},
            **options,
            backend=target.backend,
        )
        eager = reference.pseudo_label(*tensors, **given, **options)
        double = {name: to_double(value) for name, value in given.items()}
        truth = reference.pseudo_label(*map(to_double, tensors), **double, **options)
        assert_as_good_as_eager(actual, eager, truth, norm)


@on_all_targets
def test_compiles_without_graph_breaks(target):
    case = Case((2, 3, 4, 5, 2, 2, 9, 8), device=target.device)
    options = {"backend": target.backend}

    def step(student, decoder, cam, labels, valid):
        label = functional.fuse_predictions(decoder, cam, size=case.size, backend=target.fusing)
        return (
            functional.soft_cross_entropy(student, label, weight=valid, **options)
            + functional.cross_entropy(student, labels, **options)
            + functional.dice_loss(student, labels, **options)
            + functional.consistency_loss(student, decoder, cam, valid=valid, size=case.size, **options)
        ), functional.predict_labels(student, case.size, **options)

    args = (case.decoder, case.cam, case.labels, case.valid)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, expected_gradient = loss_and_gradient(lambda *a: step(*a)[0], case.student, args, {})
    actual, gradient = loss_and_gradient(lambda *a: compiled(*a)[0], case.student, args, {})
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert torch.equal(compiled(case.student, *args)[1], step(case.student, *args)[1])


def test_attention_chain_compiles_without_graph_breaks():
    q, k, cam, p = torch.randn(2, 6, 4), torch.randn(2, 6, 4), torch.rand(2, 2, 2, 3), torch.randn(2, 3, 4, 6)
    mask = torch.rand(2, 6) > 0.3

    def label(q, k, cam, p, mask):
        options = {"projection": torch.eye(3), "shift": torch.zeros(3), "background": True, "mask": mask}
        return functional.pseudo_label(q, k, cam, p, **options)

    compiled = torch.compile(label, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, cam, p, mask), label(q, k, cam, p, mask))


def test_auto_logs_its_choice(caplog):
    with caplog.at_level(logging.DEBUG, logger="pseudoseg_fast.backends"):
        functional.refine_cam(*torch.ones(3, 1, 2, 2))
    assert caplog.messages == ["refine_cam runs on backend 'eager'"]


def test_unknown_backend_names_the_known():
    with pytest.raises(ValueError, match=r"\['auto', .*'eager'\], got 'tpu'"):
        backends.choose("refine_cam", (), "tpu")


X = torch.zeros(2, 3, 4, 5)
BAD = [
    ("predict_labels", (X.int(), (4, 5)), {}, TypeError, "logits must be float32"),
    ("predict_labels", (X[0], (4, 5)), {}, ValueError, r"logits must be \[B, C, h, w\]"),
    ("predict_labels", (X[:, :0], (4, 5)), {}, ValueError, "must have classes and pixels"),
    ("predict_labels", (X, (0, 5)), {}, ValueError, "at least 1 x 1"),
    ("predict_labels", (X, 5), {}, ValueError, r"size must be \(height, width\)"),
    ("fuse_predictions", (X, X[:, :2]), {}, ValueError, "must agree in images and classes"),
    ("fuse_predictions", (X, X), {"gamma": 1.5}, ValueError, "gamma"),
    ("fuse_predictions", (X, X), {"temperature": 0.0}, ValueError, "temperature must be positive"),
    ("fuse_predictions", (X, X), {"norm": "layer"}, ValueError, "norm must be one of"),
    ("soft_cross_entropy", (X, X[:1]), {}, ValueError, "target and logits must agree"),
    ("soft_cross_entropy", (X, X), {"weight": X[:, 0, :1]}, ValueError, r"\[B, H, W\] of target"),
    ("soft_cross_entropy", (X, X), {"weight": X[:, 0].int()}, TypeError, "weight must be"),
    ("soft_cross_entropy", (X, X), {"reduction": "avg"}, ValueError, "reduction must be one of"),
    ("cross_entropy", (X, X[:, 0]), {}, TypeError, "labels must be uint8 or int64"),
    ("cross_entropy", (X, X.long()), {}, ValueError, r"labels must be \[B, H, W\]"),
    ("cross_entropy", (X, X[:1, 0].long()), {}, ValueError, "B of logits"),
    ("cross_entropy", (X, X[:, 0].long()), {"class_weight": torch.ones(2)}, ValueError, "class_weight"),
    ("dice_loss", (X, X[:, 0]), {}, TypeError, "labels must be uint8 or int64"),
    ("dice_loss", (X, X[:, 0, :0].long()), {}, ValueError, "at least 1 x 1"),
    ("consistency_loss", (X, X, X), {"valid": X[:, 0]}, TypeError, "valid must be bool"),
    ("consistency_loss", (X, X, X), {"valid": X[:, 0].bool(), "size": (8, 8)}, ValueError, "label size"),
    ("consistency_loss", (X, X, X), {"threshold": 95}, ValueError, "threshold"),
    ("consistency_loss", (X, X, X.to("meta")), {}, RuntimeError, "on one device"),
    ("refine_cam", (X[0], X[0], X[0, :, :2]), {}, ValueError, "cam must have shape"),
    ("refine_cam", (X[0], X[0], X[0]), {"mask": X[0, :, :, 0].bool()[:2]}, ValueError, "mask"),
]


@pytest.mark.parametrize(
    ("name", "args", "options", "error", "message"), BAD, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD)]
)
def test_bad_arguments_are_named(name, args, options, error, message):
    with pytest.raises(error, match=message):
        getattr(functional, name)(*args, **options)
