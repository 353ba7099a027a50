import pytest
import tiny
import torch

from pseudoseg_fast.config import OptimConfig
from pseudoseg_fast.network import Network
from pseudoseg_fast.optim import learning_rate, make_optimizer, set_learning_rate


@pytest.fixture(scope="module")
def network():
    return Network("FPN", tiny.ENCODER, None, classes=3, attention_dim=4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 0.75, 0.5, 0.25]),
        ({"power": 0.0}, [1, 1, 1, 1]),
        ({"power": 2.0}, [1, 0.5625, 0.25, 0.0625]),
        ({"warmup": 2}, [0.5, 0.75, 0.5, 0.25]),
        ({"warmup": 8, "power": 0.0}, [0.125, 0.25, 0.375, 0.5]),
    ],
    ids=str,
)
def test_learning_rate_warms_up_and_decays(options, expected):
    config = OptimConfig(**{"lr": 2.0, "steps": 4, "power": 1.0, **options})
    assert [learning_rate(config, step) for step in range(4)] == [2 * factor for factor in expected]


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_groups(network, name, kind):
    config = OptimConfig(name=name, lr=0.5, encoder_lr=0.1, sgc_lr=10.0, weight_decay=0.01)
    optimizer = make_optimizer(network, config)
    assert type(optimizer) is kind
    if name == "sgd":
        assert {group["momentum"] for group in optimizer.param_groups} == {0.9}

    options = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(options) == sum(len(group["params"]) for group in optimizer.param_groups)
    set_learning_rate(optimizer, 0.25)
    scales = {"encoder": 0.1, "sgc": 10.0}
    for parameter_name, parameter in network.named_parameters():
        group = options.pop(id(parameter))
        assert group["lr"] == 0.25 * scales.get(parameter_name.split(".")[0], 1.0)
        is_weight = parameter_name.endswith(("weight", "projection")) and parameter.ndim > 1
        assert group["weight_decay"] == (0.01 if is_weight else 0.0)
    assert not options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "optim.lr must be positive and finite, got 0.0"),
        ({"lr": float("nan")}, "optim.lr must be positive"),
        ({"steps": 0}, "optim.steps must be positive"),
        ({"unlabeled_batch_size": 0}, "optim.unlabeled_batch_size must be positive"),
        ({"encoder_lr": -1.0}, "optim.encoder_lr must not be negative"),
        ({"warmup": -1}, "optim.warmup must not be negative"),
    ],
    ids=str,
)
def test_values_outside_their_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**options)
