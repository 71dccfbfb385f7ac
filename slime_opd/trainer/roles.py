"""The roles of trainer groups: the model that a group trains, its objective, and its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.optimizer import MegatronOptimizer

from slime_opd.config import Config
from slime_opd.config.training_stages import CheckpointConfig
from slime_opd.head.output_layer import Head
from slime_opd.head.settings import HeadSettings
from slime_opd.trainer.heads import head_settings, make_head
from slime_opd.trainer.optimizer import make_optimizer


@dataclass(frozen=True)
class Role:
    """What a trainer is given: its objective (settings and head), its optimizer, its checkpoints."""

    settings: Callable[[Config, float], HeadSettings]
    make_head: Callable[..., Head]
    make_optimizer: Callable[[Config, Any], MegatronOptimizer]
    checkpoint: Callable[[Config], CheckpointConfig]


ROLES: dict[str, Role] = {
    "actor": Role(head_settings, make_head, make_optimizer, lambda config: config.checkpoint),
}
