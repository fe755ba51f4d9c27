"""Gradient checkpointing on a frozen base: less memory for more time, with the same gradients."""

import contextlib
from collections.abc import Iterator

from weft_training.trained import TrainedModel


@contextlib.contextmanager
def recomputing(model: TrainedModel) -> Iterator[None]:
    """Keep only the inputs of layers inside the block; the backward pass computes the rest again.

    The adapter must still be in place during the backward pass: the forward pass has left the base's context by then.
    """
    base = model.base
    base.model.gradient_checkpointing_enable(
        {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), base.context.use(model.driver))}
    )
    # transformers checkpoints only layers in training mode. Their parts stay in evaluation mode, without dropout.
    layers = [module for module in base.model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in layers:
        module.training = True
    try:
        yield
    finally:
        base.model.gradient_checkpointing_disable()
        for module in layers:
            module.training = False
