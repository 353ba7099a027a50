"""Networks of configurations and checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pseudoseg_fast import checkpoint
from pseudoseg_fast.config import Config, ModelConfig, from_dict
from pseudoseg_fast.network import Network
from pseudoseg_fast.weights import load_weights

logger = logging.getLogger(__name__)


def build_network(
    config: ModelConfig, classes: int, background: int | None, *, pretrained: bool = True
) -> Network:
    """Return the network that a configuration describes.

    Args:
        config: architecture, encoder and weights.
        classes: number of classes, the background among them.
        background: id of the background class, or None.
        pretrained: load the encoder's weights; a checkpoint's network gets its own instead, and so does one that
            :func:`pseudoseg_fast.warm_start.start_from` starts from a checkpoint, ``config.init``.

    Raises:
        ValueError, RuntimeError, FileNotFoundError: see :class:`Network` and :func:`load_weights`.
    """
    network = Network(
        config.arch,
        config.encoder_name,
        config.encoder_weights if pretrained and config.weights is None else None,
        config.in_channels,
        classes,
        background=background,
        output_stride=config.output_stride,
        attention_dim=config.attention_dim,
        attention=config.attention,
        mean=config.mean,
        std=config.std,
        decoder=config.decoder,
    )
    if pretrained and config.weights is not None:
        logger.info("%s", load_weights(network.encoder, config.weights))
    return network


def load_network(path: Path | str) -> tuple[Network, Config, dict[str, Any]]:
    """Return the network that a checkpoint's run evaluated, its configuration and the checkpoint's whole state.

    Raises:
        FileNotFoundError, ValueError: see :func:`pseudoseg_fast.checkpoint.load`.
    """
    state = checkpoint.load(path)
    config = from_dict(state["config"])
    network = build_network(config.model, len(state["classes"]), state["background"], pretrained=False)
    network.load_state_dict(state["teacher"] or state["model"])
    return network.eval(), config, state
