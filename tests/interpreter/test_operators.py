"""The Triton operators as torch sees them: opcheck, torch.compile, the choice of the backend."""

import pytest
import torch

from pseudoseg_fast import backends, functional


def operator_calls():
    query, key, cam = (torch.randn(1, 4, n).requires_grad_() for n in (4, 4, 2))
    permuted = query.detach().mT.contiguous().mT.requires_grad_()
    mask = torch.rand(1, 4) > 0.3
    ops = torch.ops.pseudoseg_triton
    yield ops.refine_cam.default, (query, key, cam, mask, 0.5, True)
    yield ops.refine_cam.default, (permuted, key, cam, None, 0.5, True)
    attended, log_total = ops.refine_cam(query, key, cam, mask, 0.5, True)[1:]
    inputs = (torch.randn(1, 4, 2), query.detach(), key.detach(), cam.detach(), mask, 0.5)
    yield ops.refine_cam_backward.default, (*inputs, attended.detach(), log_total.detach(), True, False)
    decoder, logits = torch.randn(1, 3, 5, 4), torch.randn(1, 3, 2, 2)
    yield ops.fuse_predictions.default, (decoder, logits, 7, 4, 0.5, 0.5, "image", False)
    label = (query, key, torch.rand(1, 2, 2, 2), decoder, torch.eye(3), torch.zeros(3), True, mask)
    label = tuple(value.detach() if isinstance(value, torch.Tensor) else value for value in label)
    yield ops.pseudo_label.default, (*label, 7, 4, 0.5, 0.5, "none", True)
    maps, filters = torch.randn(2, 7, 6, 5), torch.randn(5, 1, 3, 2)
    geometry = ([2, 1], [1, 2], [1, 2])
    given = (maps.requires_grad_(), filters.requires_grad_(), torch.randn(5).requires_grad_())
    yield ops.depthwise_conv2d.default, (*given, *geometry)
    upstream = ops.depthwise_conv2d(*given, *geometry).detach()
    yield (
        ops.depthwise_conv2d_backward.default,
        (upstream, maps.detach(), filters.detach(), *geometry, True, True),
    )


def test_operators_pass_opcheck(monkeypatch):
    monkeypatch.undo()  # memory without guards: opcheck compares strides and storage
    functional.refine_cam(*(torch.zeros(1, 1, 1) for _ in range(3)), backend="triton")  # registers them
    for operator, arguments in operator_calls():
        results = torch.library.opcheck(operator, arguments)
        assert set(results.values()) == {"SUCCESS"}, (operator, results)


def test_compiles_without_graph_breaks(monkeypatch):
    monkeypatch.undo()

    def step(query, key, cam, decoder, mask):
        refined = functional.refine_cam(query, key, cam.flatten(2).mT, mask=mask, backend="triton")
        options = {"projection": torch.eye(4), "shift": torch.zeros(4), "background": True}
        options |= {"mask": mask, "norm": "none"}
        label = functional.pseudo_label(query, key, cam, decoder, **options, backend="triton")
        fused = functional.fuse_predictions(
            decoder, decoder.detach(), size=(7, 9), norm="pixel", backend="triton"
        )
        return refined.square().sum(), label, fused

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for images in (2, 3):
        query, key = (torch.randn(images, 9, 4).requires_grad_() for _ in range(2))
        cam = torch.rand(images, 3, 3, 3).requires_grad_()
        inputs = (query, key, cam, torch.randn(images, 4, 5, 4), torch.rand(images, 9) > 0.3)
        results = []
        for function in (step, compiled):
            loss, label, fused = function(*inputs)
            results.append((loss.detach(), label, fused, *torch.autograd.grad(loss, inputs[:3])))
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


def test_refuses_what_it_cannot_run():
    x = torch.zeros(1, 4, 8)
    for tensors, message in (
        ((x.double(), x, x), "needs float32, float16 or bfloat16, got torch.float64"),
        ((x.new_zeros(1, 4, 257),) * 3, "1 to 256 channels of query, got 257"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backends.choose("refine_cam", tensors, "triton")
        assert backends.choose("refine_cam", tensors) is backends.eager.refine_cam
    assert backends.choose("refine_cam", (x, x, x)) is backends.triton.refine_cam
    many = torch.zeros(1, 1025, 1, 1)
    with pytest.raises(RuntimeError, match="1 to 1024 classes, got 1025"):
        functional.fuse_predictions(many, many, backend="triton")
    with pytest.raises(RuntimeError, match="it has kernels for depthwise_conv2d"):
        functional.predict_labels(many, (1, 1), backend="triton")


def test_a_label_that_needs_64_bits_for_its_pixels_is_refused():
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="has at most"):
        functional.fuse_predictions(x, x, size=(2**16, 2**16), backend="triton")
