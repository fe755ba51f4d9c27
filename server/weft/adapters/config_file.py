"""Read `adapter_config.json` as data: an object of plain JSON values, with nothing that could be read in two ways.

`weft.methods.checkpoint` interprets the keys. Here the file's contents never cause an import, compilation or look-up.
"""

from weft.adapters.strict_json import DuplicateKeyFault, JsonFault, parse_object
from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.v1.adapter_files import PEFT_FILES

CONFIG_FILE = PEFT_FILES.config

_DEPTH_MAX = 16  # PEFT's own files reach 3


def read_config(data: bytes, limits: AdapterLimits, *, field: str = CONFIG_FILE) -> dict[str, object]:
    """Return the object in `data`, all numbers finite, or raise InvalidAdapter CONFIG_INVALID, which names `field`."""
    if len(data) > limits.config_bytes_max:
        raise InvalidAdapter.rule(
            "CONFIG_INVALID", field, "has too many bytes", limit=limits.config_bytes_max, given=len(data)
        )
    try:
        return parse_object(data, depth_max=_DEPTH_MAX)
    except DuplicateKeyFault as fault:
        raise InvalidAdapter.rule("CONFIG_INVALID", field, str(fault), given=fault.name) from None
    except JsonFault as fault:
        raise InvalidAdapter("CONFIG_INVALID", f"{field}: {fault}", field=field) from None
