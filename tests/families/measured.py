"""Weft's result for one configuration: served as transformers and PEFT compute it, or refused in one sentence.

Weft decodes greedily over pages, base and LoRA requests of different lengths together, prompts in chunks. The oracle is
transformers' own `generate` with eager attention, in float32, one request at a time.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.families.configurations import VOCAB_SIZE, Configuration
from tests.tiny import save_tokenizer
from weft.adapters import packed_adapter
from weft.adapters.identifiers import AdapterDigest
from weft.config import AdapterLimits, ModelConfig, Quantization
from weft.engine.batch import Stepper
from weft.engine.block_manager import BlockManager
from weft.engine.request import AdapterUse, Request, RequestId, SamplingParams
from weft.engine.runner import ModelRunner
from weft.engine.scheduler import Scheduled
from weft.errors import InvalidAdapter
from weft.kernels.selection import select
from weft.methods.checkpoint import directory
from weft.methods.protocol import Adapter
from weft.model import loader, paged_attention, rope, self_test, serving_form
from weft.model.families import Family
from weft.model.gate import BaseRefused
from weft.model.loader import Base

EQUAL, REFUSED = "equal", "refused"
TOLERANCE = 1e-4  # of log-probabilities of the chosen tokens
_PROMPT_LENGTHS = (5, 37, 66)
_NUM_NEW = 8
_CHUNK = 32
_BLOCK_SIZE = 16
_ATTENTION_ONLY = r".*(attn|attention).*\.(q_proj|k_proj|v_proj|o_proj|qkv_proj|c_attn|query_key_value)"


class Answer(NamedTuple):
    """Greedy tokens and their log-probabilities."""

    token_ids: list[int]
    logprobs: Tensor


def measure(configuration: Configuration, directory_: Path) -> Family:
    """Make the model of a configuration in `directory_`, serve it and compare. Raises AssertionError if they differ."""
    save(configuration, directory_)
    model: Any = AutoModelForCausalLM.from_pretrained(directory_, dtype=torch.float32, attn_implementation="eager")
    about = {"family": configuration.family, "variant": configuration.variant, "model_class": type(model).__name__}
    try:
        base = load(directory_)
    except BaseRefused as error:
        sentence = str(error).replace(directory_.name, "BASE")
        require_sentence(sentence)
        return Family(**about, base=REFUSED, lora=REFUSED, note=sentence)
    prompts = [_prompt(length) for length in _PROMPT_LENGTHS]
    adapter, lora, note = None, EQUAL, ""
    rope.fix(model, base.max_model_len)  # what depends on the length is fixed for the oracle as it is for the server
    wanted = [_generate(model, prompt) for prompt in prompts]
    for targets in ("all-linear", _ATTENTION_ONLY):
        written = directory_ / "lora" / targets[:3]
        adapted = _with_lora(AutoModelForCausalLM.from_pretrained(directory_, dtype=torch.float32), targets, written)
        try:
            adapter = directory.load(written, base.shape, AdapterLimits())
        except InvalidAdapter as error:
            require_sentence(error.message)
            lora, note = f"{EQUAL} on attention", error.message
            continue
        model = adapted
        rope.fix(model, base.max_model_len)
        break
    assert adapter is not None, lora
    wanted_lora = [_generate(model, prompt) for prompt in prompts]
    assert any(one.token_ids != other.token_ids for one, other in pairwise([*wanted, *wanted_lora])), "nothing to see"
    found = decode(base, [*((prompt, None) for prompt in prompts), *((prompt, adapter) for prompt in prompts)])
    for answer, right in zip(found, [*wanted, *wanted_lora], strict=True):
        assert answer.token_ids == right.token_ids, (configuration.name, answer.token_ids, right.token_ids)
        error = (answer.logprobs - right.logprobs).abs().max().item()
        assert error < TOLERANCE, (configuration.name, error)
    return Family(**about, base=EQUAL, lora=lora, note=note)


def save(configuration: Configuration, directory_: Path) -> None:
    """Write a random checkpoint of the configuration with a tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration.make()).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
    model.save_pretrained(directory_)
    save_tokenizer(directory_, VOCAB_SIZE)


def load(directory_: Path) -> Base:
    """Load a base in float32 as the server does, self-test included."""
    paged_attention.register()
    config = ModelConfig(path=directory_, quantization=Quantization.NONE, device="cpu", dtype="float32")
    checkpoint = loader.read(config, attention=paged_attention.ATTENTION)
    rope.fix(checkpoint.model, checkpoint.max_model_len)
    expected = self_test.expect(checkpoint.model, max_model_len=checkpoint.max_model_len)
    base = loader.wrap(checkpoint)
    kernels = select(base.device, base.dtype)
    serving_form.take(base, kernels)
    self_test.require(base, expected, kernels.attend)
    return base


@torch.inference_mode()
def decode(base: Base, asked: Sequence[tuple[Sequence[int], Adapter | None]]) -> list[Answer]:
    """Decode all requests together, prompts in chunks, as the engine would."""
    kernels = select(base.device, base.dtype)
    blocks = BlockManager(256, _BLOCK_SIZE, enable_prefix_caching=False)
    runner = ModelRunner(base, num_kv_blocks=256, block_size=_BLOCK_SIZE, adapter_bytes=1 << 26, kernels=kernels)
    stepper, slots = Stepper(runner, _BLOCK_SIZE), {}
    requests: list[Request] = []
    for index, (prompt, adapter) in enumerate(asked):
        uses, placed = (), ()
        if adapter is not None:
            slot = runner.slots.put(packed_adapter.build(adapter, base.shape, dtype=base.dtype))
            assert slot is not None
            uses, placed = (AdapterUse(AdapterDigest("0"), 1.0, 0),), (slot,)
        request = Request(
            request_id=RequestId(str(index)), prompt_token_ids=tuple(prompt), params=SamplingParams(), adapters=uses
        )
        requests.append(request)
        slots[request] = placed
    logprobs: dict[Request, list[Tensor]] = {request: [] for request in requests}
    while waiting := [request for request in requests if len(request.output) < _NUM_NEW]:
        step = []
        for request in waiting:
            assert blocks.grow(request, request.num_tokens)
            step.append(Scheduled(request, min(_CHUNK, request.num_tokens - request.num_computed_tokens)))
        logits = stepper.compute(step, slots).float()
        done = [scheduled for scheduled in step if scheduled.samples]
        for scheduled, row in zip(done, logits.log_softmax(-1), strict=True):
            scheduled.request.output.append(int(row.argmax()))
            logprobs[scheduled.request].append(row.max())
        for scheduled in step:
            scheduled.request.num_computed_tokens += scheduled.num_tokens
    return [Answer(list(request.output), torch.stack(logprobs[request])) for request in requests]


def require_sentence(text: str) -> None:
    """Assert that a refusal is one line of one sentence that a person can read."""
    assert "\n" not in text, text
    assert len(text) < 600, text
    assert "Traceback" not in text, text


def _prompt(length: int) -> list[int]:
    return [(17 * place + 5 * length) % (VOCAB_SIZE - 2) + 2 for place in range(length)]


@torch.inference_mode()
def _generate(model: Any, prompt: Sequence[int]) -> Answer:
    out = model.generate(
        input_ids=torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=_NUM_NEW,
        min_new_tokens=_NUM_NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    rows = torch.cat(out.logits).float().log_softmax(-1)
    chosen = out.sequences[0, len(prompt) :]
    return Answer(chosen.tolist(), rows.gather(1, chosen[:, None])[:, 0])


def _with_lora(model: Any, targets: str, written: Path) -> nn.Module:
    """Return PEFT's model with a LoRA whose effect is visible, which is written too."""
    model.set_attn_implementation("eager")
    torch.manual_seed(1)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    adapted.save_pretrained(written)
    return adapted.eval()
