"""IA³: element-wise scaling of activations."""

from weft.methods.ia3 import files, math
from weft.methods.protocol import Format, Method

METHOD = Method(
    name="ia3",
    usual=math.Ia3Config(target_modules=math.MODULES[0], feedforward_modules=math.MODULES[0][-1:]),
    fit=math.fit,
    begin=math.begin,
    formats=(Format("IA3", files.SCHEMA, files.read),),
    write=files.write,
    pre=math.pre,
    post=math.post,
    pack=math.pack,
    unpack=math.unpack,
    count=math.count,
    norms=math.norms,
)
