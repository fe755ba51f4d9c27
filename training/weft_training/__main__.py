"""Entry point of `python -m weft_training`."""

from weft_training.command import app

app()
