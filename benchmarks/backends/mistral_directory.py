"""A model directory for mistral.rs, beside the Hugging Face one. Standard library only.

Weights are links to the same files. mistral.rs reads the base of the rotation from where transformers 4 wrote it, and
needs a tokenizer with a decoder that it supports. It also needs a chat template, since only chat requests stream: this
one returns the message itself.
"""

import json
from pathlib import Path

from benchmarks.backends import vocabulary

_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def beside(model: Path) -> Path:
    """Write the directory for mistral.rs beside `model`, and return it."""
    path = model.with_name(f"{model.name}.mistralrs")
    path.mkdir(exist_ok=True)
    for file in model.glob("*.safetensors*"):
        link = path / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(file.resolve())
    config = json.loads((model / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text(json.dumps(_tokenizer(config["vocab_size"])))
    (path / "tokenizer_config.json").write_text(json.dumps({"unk_token": "w0", "chat_template": _CHAT_TEMPLATE}))
    return path


def _tokenizer(vocab_size: int) -> dict[str, object]:
    words = {word: token_id for token_id, word in enumerate(vocabulary.words(vocab_size))}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }
