"""Bottleneck adapters: a small network after a sublayer."""

from weft.methods.bottleneck import files, math
from weft.methods.protocol import Format, Method

METHOD = Method(
    name="bottleneck",
    usual=math.BottleneckConfig(),
    begin=math.begin,
    formats=(Format("BOTTLENECK", files.SCHEMA, files.read),),
    write=files.write,
    after=math.delta,
    pack=math.pack,
    unpack=math.unpack,
    rank=lambda params: len(params.down),
    count=math.count,
    reads_residual=lambda params: params.form.reads_residual,
)
