"""Tokenizer of the demo base: one id per byte, which is its ASCII code.

Text is tab, newline and the printable ASCII characters. Control codes serve as special tokens, with their ASCII
meanings: NUL pads, ETX ends a text, SUB replaces unknown characters. Their spelling is Unicode's picture of the code
(`␀ ␃ ␚`), so a rendered conversation stays readable and no ASCII text can spell a special token. A text that holds the
picture itself can; `split_special_tokens=True` prevents that, and the picture is then unknown like any other non-ASCII
character.
"""

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 128
PAD, EOS, UNK = "␀", "␃", "␚"
PAD_ID, EOS_ID, UNK_ID = 0x00, 0x03, 0x1A

# The system message is the tag, the user message the input. A prompt with the generation prompt is a prefix of the same
# conversation with its answer, so training's loss mask and serving's prompt agree.
CHAT_TEMPLATE = """\
{%- set turn = namespace(tag='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set turn.tag = '[' ~ message['content'] ~ '] ' -%}
{%- elif message['role'] == 'user' -%}
{{- turn.tag ~ message['content'] -}}
{%- elif message['role'] == 'assistant' -%}
{{- ' = ' -}}
{%- generation -%}
{{- message['content'] ~ eos_token -}}
{%- endgeneration -%}
{%- if not loop.last -%}
{{- '\\n' -}}
{%- endif -%}
{%- else -%}
{{- raise_exception('the roles are system, user and assistant') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- ' = ' -}}
{%- endif -%}
"""


def spelling(token_id: int) -> str:
    """Return an id's spelling: the character if it is text, else Unicode's picture of the control code."""
    if token_id == 0x7F:
        return "\u2421"
    character = chr(token_id)
    return character if token_id >= 0x20 or character in "\t\n" else chr(0x2400 + token_id)


def build_tokenizer(*, model_max_length: int) -> PreTrainedTokenizerFast:
    """Build a fast tokenizer that loads without code of ours."""
    vocab = {spelling(token_id): token_id for token_id in range(VOCAB_SIZE)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    backend.normalizer = normalizers.Replace(Regex(r"[^\t\n\x20-\x7e]"), UNK)  # special tokens are cut out before it
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        chat_template=CHAT_TEMPLATE,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
