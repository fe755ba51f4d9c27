"""LoRA: a low-rank update of a linear layer."""

from weft.methods.lora import adalora, files, math
from weft.methods.protocol import Format, Method

METHOD = Method(
    name="lora",
    usual=math.LoraConfig(),
    begin=math.begin,
    formats=(
        Format("LORA", files.SCHEMA, files.read),
        Format("ADALORA", adalora.SCHEMA, adalora.read),  # read as the LoRA that it folds into
    ),
    write=files.write,
    post=math.delta,
    pack=math.pack,
    unpack=math.unpack,
    rank=lambda params: params.rank,
    count=math.count,
    norms=math.norms,
)
