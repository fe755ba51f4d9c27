"""AdapterHub directories become ours, pickled or not; a pickle that does more than hold tensors is refused unrun."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.cli.conftest import Weft
from tests.training.tools import adapterhub_files

from weft.config import AdapterLimits
from weft.methods.protocol import BaseShape
from weft_training import adapter
from weft_training.tools import adapterhub


@pytest.fixture
def hub(tmp_path: Path) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor]]:
    """A directory with AdapterHub's config, and what its tensors are."""
    config, tensors, _ = adapterhub_files.made("double_seq_bn", "model.layers")
    made = tmp_path / "hub"
    made.mkdir()
    (made / "adapter_config.json").write_text(json.dumps(config))
    return made, config, {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


@pytest.mark.parametrize("is_pickled", [False, True])
def test_a_bottleneck_of_adapterhub_is_converted_exactly(
    weft: Weft, path: Path, shape: BaseShape, hub: Any, tmp_path: Path, is_pickled: bool
) -> None:
    made, config, tensors = hub
    if is_pickled:
        torch.save(tensors, made / "pytorch_adapter.bin")
    else:
        save_file(tensors, made / "adapter.safetensors")
    result = weft("adapters", "convert", str(made), str(tmp_path / "ours"), "--base", str(path))
    assert result.exit_code == 0, result.stderr
    assert "ours: bottleneck," in result.stdout
    wanted = adapterhub.read(config, tensors, shape, AdapterLimits())
    again = adapter.read(tmp_path / "ours", shape)
    assert again.config == wanted.config
    assert all(torch.equal(one, other) for one, other in zip(again.tensors(), wanted.tensors(), strict=True))
    taken = weft("adapters", "convert", str(made), str(tmp_path / "ours"), "--base", str(path))
    assert taken.exit_code == 2
    assert "exists" in taken.stderr


class _Hostile:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("was-run"),))


@pytest.mark.parametrize("content", [_Hostile(), {"a": _Hostile()}, {"a": 1}, [torch.zeros(1)]])
def test_a_pickle_of_anything_else_is_refused_and_never_run(
    weft: Weft, path: Path, hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    made, _, _ = hub
    torch.save(content, made / "pytorch_adapter.bin")
    result = weft("adapters", "convert", str(made), "ours", "--base", str(path))
    assert result.exit_code == 1
    assert "pytorch_adapter.bin" in result.stderr
    assert "Traceback" not in result.stderr
    assert not Path("ours").exists()
    assert not Path("was-run").exists()
    pickle.loads(pickle.dumps(_Hostile()))
    assert Path("was-run").exists(), "the control: it would have been seen"


def test_a_directory_without_weights_says_what_it_wants(weft: Weft, path: Path, hub: Any, tmp_path: Path) -> None:
    result = weft("adapters", "convert", str(hub[0]), str(tmp_path / "ours"), "--base", str(path))
    assert result.exit_code == 1
    assert "adapter.safetensors" in result.stderr
