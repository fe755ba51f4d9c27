"""The layout of a run's config in a recipe: the section and the name of each field."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic_core import to_jsonable_python

from weft_training.config import TrainConfig
from weft_training.trained import name_of

# The fields of TrainConfig that are sections of their own, and the places of the others. A field without a place here
# is in `optimization`, under its own name.
OWN = ("model", "adapter", "distillation")
_PLACES: Mapping[str, str] = MappingProxyType(
    {
        "max_model_len": "model.max_model_len",  # beside ModelConfig's fields
        "data": "data.train",
        "evaluation_data": "data.evaluation",
        "evaluation_share": "data.evaluation_share",
        "max_length": "data.max_length",
        "packing": "data.packing",
        "output": "output.path",
        "overwrite": "output.overwrite",
        "checkpoint_every": "output.checkpoint_every",
        "resume": "output.resume",
        "tensorboard": "output.tensorboard",
        "save_dtype": "output.save_dtype",
    }
)


def place(field: str) -> tuple[str, str]:
    """Return section and key of a field of TrainConfig that is no section itself."""
    section, _, name = _PLACES.get(field, f"optimization.{field}").partition(".")
    return section, name


def recipe_of(config: TrainConfig) -> dict[str, Any]:
    """Return the sections of a run's config, for YAML."""
    values = to_jsonable_python(config)
    model, adapter, distillation = (values.pop(section) for section in OWN)
    recipe: dict[str, Any] = {
        "model": model,
        "adapter": {"method": name_of(config.adapter), **adapter},
        "data": {},
        "optimization": {},
        "output": {},
    }
    for field, value in values.items():
        section, name = place(field)
        recipe[section][name] = value
    return recipe if distillation is None else recipe | {"distillation": distillation}
