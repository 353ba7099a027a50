"""The counts of bench.protocols against counts by hand."""

import torch
from torch import nn

from bench import protocols
from pseudoseg_fast.config import parse_config
from pseudoseg_fast.networks import build_network

OPTIONS = "--data.root unused --model.encoder_name test_efficientnet --model.encoder_weights null --method.joint false"


def configuration(arch, crop):
    return parse_config(f"{OPTIONS} --model.arch {arch} --data.crop_size {crop}".split(), "", "")


def test_operations_are_those_of_products_and_convolutions():
    config = configuration("DeepLabV3Plus", 64)
    network = build_network(config.model, 3, 0)
    counted = []

    def count(module, inputs, output):
        taps = module.kernel_size[0] * module.kernel_size[1]
        counted.append(2 * output.numel() * module.in_channels // module.groups * taps)

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        outputs = network.eval()(torch.zeros(1, 3, 64, 64), sgc=True, image_labels=torch.ones(1, 2))
    _, foreground, height, width = outputs.cam.shape
    positions, features = height * width, network.classifier.in_features
    maps = 2 * foreground * features * (positions + 1)  # class activation maps and the classifier
    attention = 2 * positions**2 * (network.sgc.query.out_channels + foreground) + 2 * positions * 3 * 3
    expected = sum(counted) + maps + attention
    assert protocols.operations(network, config) == expected


def test_attention_of_a_vision_transformer_counts(monkeypatch):
    config = configuration("DPT", 224)
    config.model.encoder_name, config.model.decoder = "test_vit", {"img_size": [224, 224], "patch_size": 16}
    network = build_network(config.model, 3, 0)
    attended = []
    attend = nn.functional.scaled_dot_product_attention

    def count(query, key, value, **options):
        attended.append(4 * query.numel() * key.shape[-2])  # scores and means
        return attend(query, key, value, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", count)
    with_attention = protocols.operations(network, config)
    assert len(attended) > 1
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", lambda query, key, value, **_: value)
    assert with_attention - protocols.operations(network, config) == sum(attended)
