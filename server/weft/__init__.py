"""Weft: one quantized base model, many adapters of any PEFT method, one continuous batch."""

__version__ = "0.1.0"
