"""X-LoRA (Buehler & Buehler 2024, arXiv:2402.07148): known, and refused with the reason.

PEFT writes `adapter_config.json` with peft_type XLORA beside directories of LoRAs; the authors' own library writes
`xlora_config.json` beside `xlora_classifier.safetensors`.
"""

from weft.errors import InvalidAdapter

PEFT_TYPE = "XLORA"
CONFIG_FILE = "xlora_config.json"


def refusal(field: str) -> InvalidAdapter:
    """What to raise where `field` shows that this is X-LoRA."""
    return InvalidAdapter(
        "FEATURE_UNSUPPORTED",
        f"{field}: X-LoRA is not served: it reads its scalings off a first pass through the whole base, two passes a "
        "token. Register its LoRA directories by themselves, and gate them with a mixture: `weft adapters arrow`, or "
        "`weft train` with adapter.method mixture",
        field=field,
        metadata={"given": PEFT_TYPE},
    )
