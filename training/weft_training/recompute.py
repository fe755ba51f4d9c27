"""Gradient checkpointing on a frozen base: memory for time, and the same gradients."""

import contextlib
from collections.abc import Iterator

from weft_training.trained import TrainedModel


@contextlib.contextmanager
def recomputing(model: TrainedModel) -> Iterator[None]:
    """Inside the block, layers keep their input alone, and the backward pass computes the rest again.

    The adapter must be in place then too: the forward pass has left the base's context by that time.
    """
    base = model.base
    base.model.gradient_checkpointing_enable(
        {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), base.context.use(model.driver))}
    )
    # transformers checkpoints layers in training mode only. Their parts stay as they are served, without dropout.
    layers = [module for module in base.model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in layers:
        module.training = True
    try:
        yield
    finally:
        base.model.gradient_checkpointing_disable()
        for module in layers:
            module.training = False
