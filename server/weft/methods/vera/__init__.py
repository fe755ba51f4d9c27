"""VeRA: trained vectors that scale two frozen random matrices, the same at every site."""

from weft.methods.lora.math import unpack
from weft.methods.protocol import Format, Method
from weft.methods.vera import files, math

METHOD = Method(
    name="vera",
    usual=math.VeraConfig(),
    begin=math.begin,
    formats=(Format("VERA", files.SCHEMA, files.read),),
    write=files.write,
    post=math.delta,
    pack=math.pack,
    unpack=unpack,
    rank=lambda params: len(params.lambda_d),
    count=math.count,
    norms=math.norms,
)
