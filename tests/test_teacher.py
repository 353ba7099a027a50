"""The moving average of the weights that makes the labels."""

import copy

import pytest
import tiny
import torch

from pseudoseg_fast.network import Network
from pseudoseg_fast.teacher import Teacher


@pytest.fixture
def model():
    return Network("DeepLabV3Plus", tiny.ENCODER, None, classes=3, background=0, attention_dim=4).train()


def test_the_teacher_starts_as_a_frozen_copy(model):
    teacher = Teacher(model, 0.9).model
    assert not teacher.training
    assert model.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
        assert value.data_ptr() != model.state_dict()[name].data_ptr()


def test_what_a_network_keeps_of_its_weights_is_forgotten(model):
    """As timm's TinyViT keeps attention biases in evaluation mode, until it is put into a mode again."""
    teacher = Teacher(model, 0.9)
    modes = []
    teacher.model.train = lambda mode=True: modes.append(mode)
    teacher.update(model, 0)
    assert modes == [False]


@pytest.mark.parametrize(
    ("updates", "decay"), [(0, 0.1), (8, 0.5), (80, 0.9), (1000, 0.9)], ids=lambda value: str(value)
)
def test_it_averages_floats_and_copies_integers(model, updates, decay):
    teacher = Teacher(model, 0.9)
    before = copy.deepcopy(teacher.model.state_dict())
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        for _ in range(3):
            model(images)  # moves the running statistics
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    teacher.update(model, updates)

    after, new = teacher.model.state_dict(), model.state_dict()
    kinds = {"running_mean": 0, "num_batches_tracked": 0, "weight": 0}
    for name, value in after.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, decay * before[name] + (1 - decay) * new[name])
        else:
            assert torch.equal(value, new[name])
        for kind in kinds:
            kinds[kind] += name.endswith(kind) and not torch.equal(before[name], new[name])
    assert all(kinds.values()), f"{kinds}: the test compares tensors that did not move"


def test_it_follows_a_network_without_integers():
    model = torch.nn.Linear(2, 1)
    teacher = Teacher(model, 0.9)
    before = teacher.model.weight.clone()
    torch.nn.init.zeros_(model.weight)
    teacher.update(model, 1000)
    torch.testing.assert_close(teacher.model.weight, 0.9 * before)
