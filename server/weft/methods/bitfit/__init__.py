"""BitFit: trained biases and nothing else."""

from weft.methods.bitfit import files, math
from weft.methods.protocol import Format, Method

METHOD = Method(
    name="bitfit",
    usual=math.BitfitConfig(),
    begin=math.begin,
    formats=(Format("BEFT", files.SCHEMA, files.read),),
    write=files.write,
    post=math.delta,
    pack=math.pack,
    unpack=math.unpack,
    count=math.count,
)
