"""The conversion of model and adapter directories for servers with formats of their own."""

import json
import time
from pathlib import Path

import pytest
import tokenizers
import torch
from benchmarks import workload
from benchmarks.backends import lora_directory, mistral_directory, tensor_file, vocabulary
from benchmarks.backends.arrivals import Arrivals
from benchmarks.backends.worker import Cannot
from safetensors.torch import save_file

_TOKENS = (3, 17, 0, 31)


def test_tensors_are_read_to_the_last_bit(tmp_path: Path) -> None:
    tensors = {
        "narrow": torch.randn(3, 5).to(torch.bfloat16),
        "half": torch.randn(7).to(torch.float16),
        "full": torch.randn(2, 2, 2),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = dict(tensor_file.read(tmp_path))
    assert found.keys() == tensors.keys()
    for name, values in found.items():
        assert torch.equal(torch.from_numpy(values), tensors[name].float()), name


def test_a_type_that_is_not_known_is_refused(tmp_path: Path) -> None:
    save_file({"counts": torch.arange(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="counts is I64"):
        dict(tensor_file.read(tmp_path))
    with pytest.raises(FileNotFoundError, match="holds no safetensors"):
        dict(tensor_file.read(tmp_path / "nothing"))


def test_mistral_rs_gets_the_same_weights_and_every_token(tmp_path: Path) -> None:
    model = tmp_path / "base"
    model.mkdir()
    save_file({"weight": torch.ones(2)}, model / "model.safetensors")
    (model / "config.json").write_text(json.dumps({"vocab_size": 32, "rope_parameters": {"rope_theta": 5e5}}))
    for _ in range(2):  # a second run finds the first one's
        beside = mistral_directory.beside(model)
    assert (beside / "model.safetensors").resolve() == (model / "model.safetensors").resolve()
    assert json.loads((beside / "config.json").read_text())["rope_theta"] == 5e5
    tokenizer = tokenizers.Tokenizer.from_file(str(beside / "tokenizer.json"))
    assert tuple(tokenizer.encode(vocabulary.text(_TOKENS)).ids) == _TOKENS
    assert vocabulary.token_ids(tokenizer.decode(list(_TOKENS))) == _TOKENS
    assert vocabulary.token_ids(vocabulary.text(_TOKENS)) == _TOKENS


def test_lora_alone_is_taken(tmp_path: Path) -> None:
    def adapter(name: str, **fields: object) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, **fields}))
        return tmp_path / name

    plain = adapter("plain", use_dora=False, alpha_pattern={})
    assert lora_directory.rank_max([plain, adapter("large", r=64)]) == 64
    assert lora_directory.rank_max([]) == 0
    for other, word in ((adapter("ia3", peft_type="IA3"), "IA3"), (adapter("dora", use_dora=True), "use_dora")):
        with pytest.raises(Cannot, match=word):
            lora_directory.rank_max([plain, other])


def test_what_is_due_comes_once_and_in_order() -> None:
    def request(arrival_s: float) -> workload.Request:
        return workload.Request(arrival_s=arrival_s, adapters=(), prompt=(1,), num_new_tokens=1)

    brought = workload.Registration(arrival_s=0.0, adapter_id="one", path="/one")
    far = workload.Registration(arrival_s=1e9, adapter_id="far", path="/far")
    trace = workload.Trace(requests=(request(0.0), request(0.0), request(0.05)), registrations=(brought, far))
    arrivals = Arrivals(trace, time.monotonic())
    assert [number for number, _ in arrivals.requests()] == [0, 1]
    assert arrivals.requests() == [], "the third is still to come"
    assert arrivals.registrations() == [brought]
    assert arrivals.registrations() == []
    arrivals.wait()
    assert [number for number, _ in arrivals.requests()] == [2]
    assert not arrivals.is_left()
