"""`weft adapters merge` makes directories that servers and PEFT take, and says what it cannot merge."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
from tests import tiny
from tests.cli.conftest import Weft
from transformers import AutoModelForCausalLM

from weft.cli import adapter_directory
from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.methods.checkpoint import directory
from weft.model import loader
from weft_training import adapter

_DIGEST = "ab" * 32


class Held(NamedTuple):
    """A base, and directories of adapters for it."""

    path: Path
    base: loader.Base
    root: Path

    def part(self, name: str) -> str:
        return str(self.root / name)


@pytest.fixture(scope="module")
def held(path: Path, base: loader.Base, tmp_path_factory: pytest.TempPathFactory) -> Held:
    root = tmp_path_factory.mktemp("merge")
    bound = replace(base.shape, digest=_DIGEST)  # as if trained on the base in another quantization
    directory.write(tiny.random_lora(base.shape, rank=4, seed=1), root / "bound", bound)
    directory.write(tiny.random_lora(base.shape, rank=6, seed=2), root / "free", replace(base.shape, digest=""))
    directory.write(tiny.random_lora(base.shape, rank=6, seed=3), root / "a=b", bound)
    directory.write(tiny.random_lora(base.shape, rank=252, seed=4), root / "large", bound)
    directory.write(tiny.random_lora(base.shape, rank=4, seed=5), root / "other", replace(bound, digest="cd" * 32))
    directory.write(tiny.random_ia3(base.shape, seed=6), root / "ia3", bound)
    return Held(path, base, root)


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(range(40, 70))])).logits


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ((), 10),
        (("--strategy", "svd", "--rank", "3"), 3),
        (("--strategy", "ties", "--rank", "3", "--density", "0.5"), 3),
        (("--strategy", "magnitude_prune", "--rank", "3", "--density", "0.5"), 3),
        (("--strategy", "dare_ties", "--rank", "3", "--density", "0.5", "--seed", "1"), 3),
        (("--strategy", "dare_linear", "--rank", "3", "--density", "0.5", "--seed", "1"), 3),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) and value else "",
)
def test_every_strategy_makes_a_directory_that_is_taken(
    weft: Weft, held: Held, tmp_path: Path, options: Sequence[str], rank: int
) -> None:
    parts = (f"{held.part('bound')}=0.5", f"{held.part('free')}=-1")
    outputs = [tmp_path / "once", tmp_path / "again"]
    for output in outputs:
        result = weft("adapters", "merge", *parts, str(output), "--base", str(held.path), *options)
        assert result.exit_code == 0, result.stderr
        assert f"lora, rank {rank}, " in result.stdout
        assert ("of the norm" in result.stderr) == bool(options)
    assert {file.name: file.read_bytes() for file in outputs[0].iterdir()} == {
        file.name: file.read_bytes() for file in outputs[1].iterdir()
    }, "equal content is equal bytes"
    # Bound to the base that a part was bound to: read there, refused elsewhere.
    merged = adapter.read(outputs[0], replace(held.base.shape, digest=_DIGEST))
    assert merged.rank == rank
    with pytest.raises(Exception, match=r"trained on other weights: on .*abababababab"):
        adapter.read(outputs[0], held.base.shape)
    stock = AutoModelForCausalLM.from_pretrained(held.path, dtype=torch.float32)
    plain = _logits(stock)
    model = peft.PeftModel.from_pretrained(stock, str(outputs[0])).eval()
    assert not _logits(model).allclose(plain, atol=1e-2)


def test_exact_equals_peft_s_concatenation(weft: Weft, held: Held, tmp_path: Path) -> None:
    parts = (f"{held.part('bound')}=0.5", f"{held.part('a=b')}=-1", held.part("free"))
    result = weft("adapters", "merge", *parts, str(tmp_path / "sum"), "--base", str(held.path))
    assert result.exit_code == 0, result.stderr

    def stock() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(held.path, dtype=torch.float32)

    merged = peft.PeftModel.from_pretrained(stock(), str(tmp_path / "sum")).eval()
    model = peft.PeftModel.from_pretrained(stock(), held.part("bound"), adapter_name="a")
    model.load_adapter(held.part("a=b"), adapter_name="b")
    model.load_adapter(held.part("free"), adapter_name="c")
    for name, weights in {"sum": [0.5, -1.0, 1.0], "other": [0.5, -1.0, 0.9]}.items():
        model.add_weighted_adapter(["a", "b", "c"], weights, name, combination_type="cat")
        model.set_adapter(name)
        error = (_logits(model.eval()) - _logits(merged)).norm() / _logits(merged).norm()
        assert (error < 1e-5) == (name == "sum"), error


def test_parts_of_the_same_weights_held_otherwise_are_merged(weft: Weft, held: Held, tmp_path: Path) -> None:
    """As serving takes them; the sum is bound to the base as the first part's was held, and says so."""
    shape = held.base.shape
    digests = {holding: digest for digest, holding in shape.same_weights.items()}
    parts = []
    for seed, digest in enumerate((digests["nf4"], shape.digest, digests["int8"])):
        parts.append(str(tmp_path / f"part-{seed}"))
        directory.write(tiny.random_lora(shape, rank=2, seed=seed), Path(parts[-1]), replace(shape, digest=digest))
    result = weft("adapters", "merge", *parts, str(tmp_path / "sum"), "--base", str(held.path))
    assert result.exit_code == 0, result.stderr
    assert "the base was held as nf4, none and int8 in their training" in " ".join(result.stderr.split())
    adapter.read(tmp_path / "sum", replace(shape, digest=digests["nf4"], same_weights={}))  # refuses another
    result = weft("adapters", "merge", *parts, held.part("other"), str(tmp_path / "no"), "--base", str(held.path))
    assert result.exit_code == 1  # the negative control: other weights
    assert "the parts were trained for different bases: " in " ".join(result.stderr.split())


def test_the_sum_of_parts_keeps_their_rotary_factors(weft: Weft, held: Held, tmp_path: Path) -> None:
    shape = held.base.shape
    factors = {"short": "longrope: short factors", "also": "longrope: short factors", "long": "longrope: long factors"}
    for seed, (name, given) in enumerate(factors.items()):
        directory.write(tiny.random_lora(shape, rank=2, seed=seed), tmp_path / name, replace(shape, rope_factors=given))
    short, also, long = (str(tmp_path / name) for name in factors)
    made = weft("adapters", "merge", short, also, held.part("free"), str(tmp_path / "sum"), "--base", str(held.path))
    assert made.exit_code == 0, made.stderr
    assert adapter_directory.read(tmp_path / "sum", shape).rope_factors == factors["short"]
    refused = weft("adapters", "merge", short, long, str(tmp_path / "no"), "--base", str(held.path))
    assert refused.exit_code == 1
    said = " ".join(refused.stderr.split())
    assert "the parts were trained with different rotary factors of the base: " in said
    assert "long with longrope: long factors" in said
    made = weft("adapters", "merge", held.part("free"), str(tmp_path / "none"), "--base", str(held.path))
    assert made.exit_code == 0  # the negative control: nothing is said where nothing was
    assert adapter_directory.read(tmp_path / "none", shape).rope_factors == ""


def test_a_rank_that_servers_refuse_is_told(weft: Weft, held: Held, tmp_path: Path) -> None:
    parts = (held.part("bound"), held.part("large"))
    result = weft("adapters", "merge", *parts, str(tmp_path / "sum"), "--base", str(held.path))
    assert result.exit_code == 0
    assert "a server takes rank 256 only" not in result.stderr
    result = weft("adapters", "merge", *parts, held.part("free"), str(tmp_path / "more"), "--base", str(held.path))
    assert result.exit_code == 0
    assert "a server takes rank 262 only with --adapter-rank-max 262" in result.stderr
    config = json.loads((tmp_path / "more" / "adapter_config.json").read_text())
    with pytest.raises(InvalidAdapter) as caught:
        directory.read(config, {}, {}, held.base.shape, AdapterLimits())
    assert caught.value.reason == "RANK_TOO_LARGE"


_SVD, _TIES, _DARE = (("--strategy", name, "--rank", "2") for name in ("svd", "ties", "dare_ties"))


@pytest.mark.parametrize(
    ("parts", "options", "code", "says"),
    [
        (("bound=much",), (), 2, "must be DIR or DIR=WEIGHT, given "),
        (("bound=",), (), 2, "must be DIR or DIR=WEIGHT"),
        (("bound=nan",), (), 2, "finite and other than 0"),
        (("bound=0",), (), 2, "finite and other than 0"),
        (("bound",), ("--strategy", "svd"), 2, "--strategy svd needs --rank"),
        (("bound",), _TIES, 2, "--strategy ties needs --density"),
        (("bound",), (*_DARE, "--density", "1"), 2, "--strategy dare_ties needs --seed"),
        (("bound",), ("--rank", "2"), 2, "--rank means nothing with --strategy exact"),
        (("bound",), (*_SVD, "--seed", "1"), 2, "--seed means nothing with --strategy svd"),
        (("bound",), (*_TIES, "--density", "0"), 2, "--density must be above 0 and at most 1, given 0.0"),
        (("bound",), (*_TIES, "--density", "nan"), 2, "--density must be above 0"),
        (("bound",), (*_SVD, "--rank", "0"), 2, "--rank"),
        (("bound",), ("--strategy", "linear"), 2, "linear"),
        (("bound", "ia3"), (), 1, "part 1: only LoRAs can be merged, given ia3"),
        (("bound", "other"), (), 1, "the parts were trained for different bases: "),
        (("bound", "nowhere"), (), 1, "nowhere"),
        (("base",), (), 1, "adapter_config.json"),
    ],
)
def test_what_cannot_be_merged(
    weft: Weft, held: Held, tmp_path: Path, parts: Sequence[str], options: Sequence[str], code: int, says: str
) -> None:
    output = tmp_path / "out"
    result = weft("adapters", "merge", *map(held.part, parts), str(output), "--base", str(held.path), *options)
    assert result.exit_code == code, result.stderr
    assert says in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not output.exists()


def test_what_exists_stays(weft: Weft, held: Held) -> None:
    before = {file: file.read_bytes() for file in Path(held.part("free")).iterdir()}
    result = weft("adapters", "merge", held.part("bound"), held.part("free"), "--base", str(held.path))
    assert result.exit_code == 2
    assert "exists" in result.stderr
    assert {file: file.read_bytes() for file in Path(held.part("free")).iterdir()} == before
