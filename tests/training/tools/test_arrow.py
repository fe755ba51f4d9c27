"""Arrow's rows against the dense singular vectors that they stand for, on the modules that really read a norm."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from tests.bases import Bases, load
from torch import Tensor
from typer.testing import CliRunner

from weft.adapters.versions import digest_at
from weft.cli import app
from weft.config import AdapterLimits, Quantization
from weft.methods import mixture
from weft.methods.checkpoint import directory
from weft.methods.checkpoint import mixture as mixture_files
from weft.methods.lora.math import LoraParams
from weft.model.loader import Base
from weft_training.tools import arrow
from weft_training.tools.arrow import NormReader

READERS = {
    "llama": {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"},
    "phi3": {"qkv_proj", "gate_up_proj"},
    "gpt2": {"c_attn", "c_fc"},
}


def spread(base: Base) -> Base:
    """Change the gains of a base's norms: gains of 1 would hide what folding them in does."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in base.model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.copy_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))
    return base


@pytest.mark.parametrize("architecture", list(READERS))
def test_the_modules_that_read_a_norm_are_found_by_what_they_read(bases: Bases, architecture: str) -> None:
    base = spread(bases.fresh(architecture, attention="eager"))
    readers = arrow.norm_readers(base.model, base.shape)
    assert {base.shape.sites[one.site].suffix for one in readers} == READERS[architecture]
    assert len(readers) == 2 * len(READERS[architecture])
    assert {one.layer for one in readers} == {0, 1}
    assert all(f".{one.layer}." in one.site for one in readers)
    assert all(one.centers is (architecture == "gpt2") for one in readers)

    # What the first layer's first reader is given is gain ⊙ h / rms(h), with the bias that a layer norm has.
    seen: dict[str, Tensor] = {}
    first = readers[0]
    base.model.get_submodule(first.site).register_forward_pre_hook(lambda _, x: seen.update(x=x[0]))
    layers = base.model.transformer.h if architecture == "gpt2" else base.model.model.layers
    layers[0].register_forward_pre_hook(lambda _, x: seen.update(h=x[0]))
    with torch.inference_mode():
        base.model(input_ids=torch.tensor([[5, 9, 40]]))
    h = seen["h"][0].double()
    h = h - h.mean(-1, keepdim=True) if first.centers else h
    expected = first.gain * h / h.square().mean(-1, keepdim=True).sqrt()
    difference = seen["x"][0].double() - expected
    assert (difference - difference[:1]).abs().max() < 2e-3  # a constant: the bias; and the norm's epsilon
    assert (seen["x"][0] - seen["x"][0][:1]).abs().max() > 0.1  # the control


@pytest.mark.parametrize("centers", [False, True])
def test_a_direction_is_the_first_singular_vector_of_the_stacked_updates(centers: bool) -> None:
    torch.manual_seed(0)
    updates = [
        (
            NormReader(str(i), 0, 1 + 0.5 * torch.randn(12).double(), centers),
            LoraParams(torch.randn(rank, 12), torch.randn(out, rank), 0.7),
        )
        for i, (rank, out) in enumerate([(2, 9), (5, 4), (3, 20)])
    ]
    dense = []
    for reader, p in updates:
        whole = p.scaling * p.b.double() @ p.a.double() @ torch.diag(reader.gain)
        dense.append(whole @ (torch.eye(12).double() - 1 / 12) if centers else whole)
    _, sizes, right = torch.linalg.svd(torch.cat(dense))
    found = arrow.direction(updates)
    assert isinstance(found, Tensor)
    assert abs(abs(found.double() @ right[0]) - 1) < 1e-6
    assert sizes[0] > 1.05 * sizes[1]  # or the vector would not be one
    plain = torch.cat([p.b.double() @ p.a.double() for _, p in updates])
    assert abs(torch.linalg.svd(plain)[2][0] @ found.double()) < 0.999  # the control: without the gains


def test_an_expert_is_chosen_where_the_state_lies_along_its_direction(bases: Bases) -> None:
    base = spread(bases.fresh())
    experts = [tiny.random_lora(base.shape, rank=1, seed=seed).sites for seed in range(3)]
    router = arrow.router(arrow.norm_readers(base.model, base.shape), experts, base.shape)
    assert router.weight.shape == (2, 3, 64)
    torch.testing.assert_close(router.weight.norm(dim=-1), torch.ones(2, 3))
    for layer in range(2):
        states = 7 * torch.cat([router.weight[layer], -router.weight[layer]])
        gates = mixture.gates(arrow.config(3, top_k=1, temperature=1.0), router.at(layer), states)
        assert gates.argmax(-1).tolist() == [0, 1, 2] * 2  # either way along it
    partly = [experts[0], {name: p for name, p in experts[1].items() if ".1." in name or "down" in name}]
    weight = arrow.router(arrow.norm_readers(base.model, base.shape), partly, base.shape).weight
    assert not weight[0, 1].any()
    assert weight[1, 1].any()
    with pytest.raises(ValueError, match=r"experts\[1\]: adapts no module that reads a norm"):
        arrow.router(
            arrow.norm_readers(base.model, base.shape),
            [experts[0], {name: p for name, p in experts[1].items() if "down" in name}],
            base.shape,
        )


def test_the_command_makes_a_mixture_that_servers_read(bases: Bases, tmp_path: Path) -> None:
    base = bases("llama", Quantization.NF4)
    for seed in range(2):
        directory.write(tiny.random_lora(base.shape, rank=2 + seed, seed=seed), tmp_path / f"e{seed}", base.shape)
    directory.write(tiny.random_ia3(base.shape, seed=1), tmp_path / "scaled", base.shape)

    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["adapters", "arrow", *arguments, "--base", str(bases.path())])
        assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
        return done.exit_code, done.output

    code, said = run(str(tmp_path / "made"), f"one={tmp_path}/e0", f"two={tmp_path}/e1")
    assert code == 0, said
    config = json.loads((tmp_path / "made" / mixture_files.CONFIG_FILE).read_text())
    made = mixture_files.read(
        config, load_file(tmp_path / "made" / mixture_files.WEIGHTS_FILE), base.shape, AdapterLimits()
    )
    assert made.config == arrow.config(2, top_k=2, temperature=1.0)
    assert {one.adapter_id: one.digest for one in made.experts} == {
        "one": digest_at(tmp_path / "e0"),
        "two": digest_at(tmp_path / "e1"),
    }
    other = load(tiny.save_base(tmp_path / "other", seed=1))
    directory.write(tiny.random_lora(base.shape, rank=2, seed=0), tmp_path / "foreign", other.shape)
    for arguments, refusal in (
        ((f"one={tmp_path}/e0", f"two={tmp_path}/foreign"), "trained on other weights"),
        ((f"one={tmp_path}/e0", f"two={tmp_path}/scaled"), "two: must be a LoRA"),
        ((f"one={tmp_path}/e0", "two"), "expert: must be ID=PATH, given 'two'"),
        ((f"one={tmp_path}/e0",), "top_k: must be 1 to 1, given 2"),
        ((f"No.Id={tmp_path}/e0", "--top-k", "1"), "adapter_id"),
    ):
        code, said = run(str(tmp_path / "refused"), *arguments)
        assert code == 1
        assert refusal in said
        assert not (tmp_path / "refused").exists()
