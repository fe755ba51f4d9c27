"""AdapterHub directories become ours, pickled or not; a pickle that does more than hold tensors is refused unrun."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests import tiny
from tests.cli.conftest import Weft
from tests.training.tools import adapterhub_files

from weft.config import AdapterLimits, ModelConfig, Quantization
from weft.model import loader
from weft_training import adapter
from weft_training.tools import adapterhub


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("convert") / "base")


@pytest.fixture
def hub(tmp_path: Path) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor]]:
    """A directory with AdapterHub's config, and what its tensors are."""
    config, tensors, _ = adapterhub_files.made("double_seq_bn", "model.layers")
    path = tmp_path / "hub"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path, config, {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


@pytest.mark.parametrize("is_pickled", [False, True])
def test_a_bottleneck_of_adapterhub_is_converted_exactly(
    weft: Weft, base_path: Path, hub: Any, tmp_path: Path, is_pickled: bool
) -> None:
    path, config, tensors = hub
    if is_pickled:
        torch.save(tensors, path / "pytorch_adapter.bin")
    else:
        save_file(tensors, path / "adapter.safetensors")
    result = weft("adapters", "convert", str(path), str(tmp_path / "ours"), "--base", str(base_path))
    assert result.exit_code == 0, result.stderr
    assert "ours: bottleneck," in result.stdout
    held = loader.load(ModelConfig(path=base_path, quantization=Quantization.NONE, device="cpu"), attention="sdpa")
    wanted = adapterhub.read(config, tensors, held.shape, AdapterLimits())
    again = adapter.read(tmp_path / "ours", held.shape)
    assert again.config == wanted.config
    assert all(torch.equal(one, other) for one, other in zip(again.tensors(), wanted.tensors(), strict=True))
    taken = weft("adapters", "convert", str(path), str(tmp_path / "ours"), "--base", str(base_path))
    assert taken.exit_code == 2
    assert "exists" in taken.stderr


class _Hostile:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("was-run"),))


@pytest.mark.parametrize("content", [_Hostile(), {"a": _Hostile()}, {"a": 1}, [torch.zeros(1)]])
def test_a_pickle_of_anything_else_is_refused_and_never_run(
    weft: Weft, base_path: Path, hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    path, _, _ = hub
    torch.save(content, path / "pytorch_adapter.bin")
    result = weft("adapters", "convert", str(path), "ours", "--base", str(base_path))
    assert result.exit_code == 1
    assert "pytorch_adapter.bin" in result.stderr
    assert "Traceback" not in result.stderr
    assert not Path("ours").exists()
    assert not Path("was-run").exists()
    pickle.loads(pickle.dumps(_Hostile()))
    assert Path("was-run").exists(), "the control: it would have been seen"


def test_a_directory_without_weights_says_what_it_wants(weft: Weft, base_path: Path, hub: Any, tmp_path: Path) -> None:
    result = weft("adapters", "convert", str(hub[0]), str(tmp_path / "ours"), "--base", str(base_path))
    assert result.exit_code == 1
    assert "adapter.safetensors" in result.stderr
