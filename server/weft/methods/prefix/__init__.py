"""Prefix tuning: trained keys and values before the first token."""

from weft.methods.prefix import files, math
from weft.methods.protocol import Fitted, Format, Method

METHOD = Method(
    name="prefix",
    usual=math.PrefixConfig(),
    begin=lambda config, base, generator: Fitted(config, prefix=math.init(config, base, generator)),
    formats=(
        Format("PREFIX_TUNING", files.SCHEMA, files.read),
        Format("CARTRIDGE", files.CARTRIDGE, files.read),
    ),
    write=files.write,
    virtual=math.virtual,
    count=math.count,
    norms=math.norms,
)
