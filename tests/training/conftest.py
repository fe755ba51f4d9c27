"""A tiny base that every test of the trainer can load, and the number of threads of its tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from weft_training.demo.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread for models so small that threads mostly wait for each other, especially on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama checkpoint in float32 with the demo's tokenizer; its sizes suit NF4 on a CPU."""
    path = tmp_path_factory.mktemp("tiny-base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.1,  # larger than usual, so that logits of different adapters are far apart
        bos_token_id=None,
        eos_token_id=3,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    build_tokenizer(model_max_length=64).save_pretrained(path)
    return path
