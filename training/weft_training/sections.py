"""How a run's config is laid out in a recipe: which section has which field, and by which name."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from weft_training.schema import plain
from weft_training.trained import name_of

# Recipe key → field of TrainConfig. Whatever has no place here belongs to `optimization`, under its own name.
_PLACES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "model": {"max_model_len": "max_model_len"},  # beside ModelConfig's
        "data": {
            "train": "data",
            "evaluation": "evaluation_data",
            "evaluation_share": "evaluation_share",
            "max_length": "max_length",
            "packing": "packing",
        },
        "output": {
            "path": "output",
            "overwrite": "overwrite",
            "checkpoint_every": "checkpoint_every",
            "resume": "resume",
            "tensorboard": "tensorboard",
            "save_dtype": "save_dtype",
        },
    }
)
_OWN = ("model", "adapter", "distillation")  # fields that are sections themselves


def places(fields: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Recipe key → field by section, of the fields of TrainConfig that are no section themselves."""
    placed = {field for keys in _PLACES.values() for field in keys.values()}
    rest = {name: name for name in fields if name not in placed and name not in _OWN}
    return {
        "model": dict(_PLACES["model"]),
        "data": dict(_PLACES["data"]),
        "optimization": rest,
        "output": dict(_PLACES["output"]),
    }


def recipe_of(config: Any) -> dict[str, Any]:
    """The sections of a TrainConfig, for YAML."""
    values = plain(config)
    laid_out = {
        section: {key: values[field] for key, field in keys.items()} for section, keys in places(values).items()
    }
    recipe = {
        "model": {**values["model"], **laid_out.pop("model")},
        "adapter": {"method": name_of(config.adapter), **values["adapter"]},
        **laid_out,
    }
    if config.distillation is not None:
        recipe["distillation"] = values["distillation"]
    return recipe
