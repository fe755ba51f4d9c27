"""Whatever a run trains: one adapter, or a mixture of several. The loop and its checkpoints know no more."""

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

# What each method is trained with when nothing else is said, by its name.
CONFIGS: Mapping[str, TrainedConfig] = MappingProxyType({**USUAL, mixture.NAME: MixtureTrainConfig()})


def name_of(config: TrainedConfig) -> str:
    """The name of the method that `config` configures."""
    return mixture.NAME if isinstance(config, MixtureTrainConfig) else adapters.method_of(config).name


def begin(config: TrainedConfig, base: Base, generator: torch.Generator) -> TrainedModel:
    """A base with what is to be trained on it. Raises what `adapter.begin` and `mixture.begin` raise."""
    if isinstance(config, MixtureTrainConfig):
        return mixture.begin(config, base, generator)
    return adapters.begin(config, base, generator)
