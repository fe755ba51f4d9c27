"""DoRA: a low-rank update of a weight's direction, with a trained length for each of its rows."""

from functools import partial

from weft.methods.dora import files, math
from weft.methods.lora.math import begin
from weft.methods.protocol import Format, Method

METHOD = Method(
    name="dora",
    usual=math.DoraConfig(),
    begin=partial(begin, start=math.init),
    formats=(Format("LORA", files.SCHEMA, files.read, switch=files.SWITCH),),
    write=files.write,
    post=math.delta,
    pack=math.pack,
    unpack=math.unpack,
    rank=lambda params: len(params.a),
    count=math.count,
)
