"""Prompt tuning: trained embedding rows before those of the tokens."""

from weft.methods.prompt import files, math
from weft.methods.protocol import Fitted, Format, Method

METHOD = Method(
    name="prompt",
    usual=math.PromptConfig(),
    begin=lambda config, base, generator: Fitted(config, prefix=math.init(config, base, generator)),
    formats=(Format("PROMPT_TUNING", files.SCHEMA, files.read),),
    write=files.write,
    virtual=math.virtual,
    count=math.count,
)
