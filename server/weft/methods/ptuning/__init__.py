"""P-tuning: prompt rows that an encoder makes."""

from functools import partial

from weft.methods.prompt.files import read
from weft.methods.prompt.math import count, virtual
from weft.methods.protocol import Fitted, Format, Method
from weft.methods.ptuning import files, math

METHOD = Method(
    name="ptuning",
    usual=math.PtuningConfig(),
    begin=lambda config, base, generator: Fitted(config, prefix=math.init(config, base, generator)),
    formats=(Format("P_TUNING", files.SCHEMA, partial(read, config_of=math.PtuningConfig, method="P-tuning")),),
    write=files.write,
    virtual=virtual,
    count=count,  # of the rows that are saved and served; the encoder's own parameters are gone by then
)
