"""What a run trains: one adapter, or a mixture of several. The loop and its checkpoints distinguish no further."""

from collections.abc import Mapping
from types import MappingProxyType

import torch

from weft.methods.protocol import MethodConfig
from weft.model.loader import Base
from weft_training import adapter as adapters
from weft_training import mixture
from weft_training.adapter import USUAL, AdaptedModel
from weft_training.mixture import MixtureModel, MixtureTrainConfig

TrainedConfig = MethodConfig | MixtureTrainConfig
TrainedModel = AdaptedModel | MixtureModel

# Default training config of each method, by name.
CONFIGS: Mapping[str, TrainedConfig] = MappingProxyType({**USUAL, mixture.NAME: MixtureTrainConfig()})


def name_of(config: TrainedConfig) -> str:
    """Return the name of the method that `config` configures."""
    return mixture.NAME if isinstance(config, MixtureTrainConfig) else adapters.method_of(config).name


def begin(config: TrainedConfig, base: Base, generator: torch.Generator) -> TrainedModel:
    """Return a base with the adapter or mixture to train. Raises the errors of `adapter.begin` and `mixture.begin`."""
    if isinstance(config, MixtureTrainConfig):
        return mixture.begin(config, base, generator)
    return adapters.begin(config, base, generator)
