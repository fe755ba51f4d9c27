"""Adapters trained together equal those trained alone: gradients, whole runs, files."""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from tests.bases import Bases
from torch import Tensor
from typer.testing import CliRunner

from weft.config import ModelConfig, Quantization
from weft.errors import InvalidAdapter
from weft.methods.checkpoint import directory
from weft.methods.driver import ReferenceDriver, Segment
from weft.methods.ia3.math import Ia3Config
from weft.methods.lora.math import LoraConfig
from weft.methods.prefix.math import PrefixConfig
from weft.methods.protocol import Adapter, BaseShape, MethodConfig
from weft.model.loader import Base
from weft_training import adapter, base, command, joint_model
from weft_training.adapter import AdaptedModel
from weft_training.config import TrainConfig
from weft_training.data import Example, InvalidData, Row, collate
from weft_training.history import Diverged
from weft_training.joint import buckets, train_many
from weft_training.joint_model import Share, SpanDriver
from weft_training.progress import Step
from weft_training.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ("abc", "dragon", "loom", "weave", "threads", "hi", "warp", "weft", "x")
REVERSED = [Example(f"{word} = ", word[::-1]) for word in WORDS]
ANSWERED = [Example(f"Is {word} the longest word of all? ", "yes" if len(word) > 4 else "no") for word in WORDS]
WHOLE = [Example("", f"the {word} of the loom") for word in WORDS]  # learned whole: the first token is no target

IA3 = Ia3Config(target_modules=("k_proj", "v_proj", "down_proj"), feedforward_modules=("down_proj",))


# --- one step -------------------------------------------------------------------------------------------------------

# Ranks, lengths, sites, rows and widths differ, and methods alternate, so that nothing lines up by chance.
MADE: Sequence[Callable[[BaseShape], Adapter]] = (
    lambda shape: tiny.random_prefix(shape, length=7, seed=3),
    lambda shape: tiny.random_lora(shape, rank=3, seed=1),
    lambda shape: tiny.random_ia3(shape, seed=2),
    lambda shape: tiny.random_prefix(shape, length=2, seed=4),
    lambda shape: tiny.random_lora(shape, rank=5, seed=5, targets=tuple({s.suffix for s in shape.sites.values()})[:1]),
    lambda shape: tiny.random_ia3(shape, seed=6),
)
LENGTHS = ((30, 11), (5, 30, 8), (26,), (9, 12, 4, 28), (30, 2), (17, 29))


def shares(ours: Base, dtype: torch.dtype) -> list[Share]:
    """A step of random adapters on random rows."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for make, lengths in zip(MADE, LENGTHS, strict=True):
        rows = [
            Row(torch.randint(1, tiny.VOCAB_SIZE, (length,), generator=generator).tolist(), length // 3)
            for length in lengths
        ]
        model = AdaptedModel(ours, make(ours.shape)).to(dtype)
        made.append(Share(model, collate(rows, pad_token_id=0)))
    return made


def gradient(model: AdaptedModel, loss: Tensor) -> Tensor:
    """Of every parameter, end to end."""
    model.zero_grad()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("architecture", list(tiny.ARCHITECTURES))
def test_a_step_is_that_of_every_adapter_alone(architecture: str, bases: Bases) -> None:
    """In float64, on rows longer than the window where the base slides one."""
    ours = bases.fresh(architecture, attention="sdpa")  # eager attention takes its softmax in float32
    ours.model.double()
    ours = replace(ours, dtype=torch.float64)
    step = shares(ours, torch.float64)
    together = joint_model.losses(ours, step)
    torch.stack(together).sum().backward()
    found = [torch.cat([p.grad.flatten() for p in share.model.parameters() if p.grad is not None]) for share in step]
    for share, loss, grad in zip(step, together, found, strict=True):
        assert grad.dtype is torch.float64
        alone = share.model(**share.batch).loss
        assert abs(loss.item() - alone.item()) < 1e-9
        assert distance(grad, gradient(share.model, alone)) < 1e-9

    # The control: the same adapter on another's rows.
    other = Share(step[0].model, step[1].batch)
    assert distance(gradient(other.model, other.model(**other.batch).loss), found[0]) > 1e-3


@pytest.mark.parametrize(
    ("quantization", "dtype", "tolerance"),
    [
        (Quantization.NONE, "float32", 1e-5),
        (Quantization.NF4, "float32", 1e-5),
        (Quantization.NF4, "bfloat16", 5e-2),  # the base's own rounding, which differs with the shape of the batch
    ],
)
def test_a_step_on_the_trainers_base(tiny_base: Path, quantization: Quantization, dtype: str, tolerance: float) -> None:
    ours = base.load(ModelConfig(path=tiny_base, quantization=quantization, device="cpu", dtype=dtype))
    step = shares(ours, torch.float32)
    torch.stack(joint_model.losses(ours, step)).sum().backward()
    found = [torch.cat([p.grad.flatten() for p in share.model.parameters() if p.grad is not None]) for share in step]
    for share, grad in zip(step, found, strict=True):
        assert distance(grad, gradient(share.model, share.model(**share.batch).loss)) < tolerance


def test_span_driver_is_the_reference_driver(tiny_base: Path) -> None:
    ours = base.load(ModelConfig(path=tiny_base, quantization=Quantization.NONE, device="cpu"))
    generator = torch.Generator().manual_seed(0)
    everywhere = tiny.random_lora(ours.shape, rank=2, seed=1)
    scaling = tiny.random_ia3(ours.shape, seed=2)
    elsewhere = tiny.random_lora(ours.shape, rank=2, seed=1, targets=("up_proj",))
    adapters = [everywhere, scaling, elsewhere, scaling]
    bounds = [0, 3, 8, 9, 13]
    rows = [torch.arange(begin, end) for begin, end in itertools.pairwise(bounds)]
    spans = SpanDriver([Segment(one.method, one.sites) for one in adapters], [len(own) for own in rows])
    reference = ReferenceDriver([Segment(one.method, one.sites, own) for one, own in zip(adapters, rows, strict=True)])
    for suffix in ("k_proj", "down_proj", "up_proj"):
        site = next(site for site in ours.shape.sites.values() if site.suffix == suffix)
        module = ours.model.get_submodule(site.name).base
        x = torch.randn(13, site.in_features, generator=generator)
        expected = reference.apply(site, module, x)
        torch.testing.assert_close(spans.apply(site, module, x), expected)
        assert (expected - module(x)).abs().max() > 0.1  # the control: there was something to add


def test_rows_of_like_width_go_together() -> None:
    def of(*sizes: tuple[int, int]) -> list[Share]:
        return [Share(None, {"input_ids": torch.zeros(size)}) for size in sizes]  # pyright: ignore

    assert buckets(of((4, 20), (4, 22), (4, 21)), 1000) == [[1, 2, 0]]
    assert buckets(of((16, 20), (4, 400), (16, 24), (2, 398)), 10_000) == [[1, 3], [2, 0]]
    assert buckets(of((4, 20)), 1) == [[0]]


def test_a_pass_has_no_more_tokens_than_allowed() -> None:
    steps = [Share(None, {"input_ids": torch.zeros(4, 20)}) for _ in range(5)]  # pyright: ignore
    assert buckets(steps, 2 * 80) == [[0, 1], [2, 3], [4]]
    assert buckets(steps, 2 * 80 - 1) == [[0], [1], [2], [3], [4]]


def test_a_row_as_long_as_the_base_allows(bases: Bases) -> None:
    """Beside a prefix, whose padded rows then reach beyond the last position."""
    config = ModelConfig(path=bases.path("gpt2"), quantization=Quantization.NONE, device="cpu", dtype="float32")
    ours = base.load(config)
    lengths = (ours.max_model_len, ours.max_model_len - 7)
    made = (tiny.random_lora(ours.shape, rank=3, seed=1), tiny.random_prefix(ours.shape, length=7, seed=3))
    step = [
        Share(AdaptedModel(ours, one), collate([Row([5 + i % 90 for i in range(length)], 1)], pad_token_id=0))
        for one, length in zip(made, lengths, strict=True)
    ]
    for share, loss in zip(step, joint_model.losses(ours, step), strict=True):
        assert loss.item() == pytest.approx(share.model(**share.batch).loss.item(), abs=1e-4)


# --- whole runs -----------------------------------------------------------------------------------------------------

METHODS: dict[str, tuple[MethodConfig, list[Example], dict[str, object]]] = {
    "lora": (LoraConfig(rank=4), REVERSED, {"num_steps": 12, "batch_size": 4, "learning_rate": 1e-2}),
    "ia3": (IA3, ANSWERED, {"num_steps": 7, "batch_size": 2, "learning_rate": 0.1, "seed": 3, "num_warmup_steps": 2}),
    "prefix": (
        PrefixConfig(num_virtual_tokens=5),
        WHOLE,
        {"num_steps": 9, "batch_size": 5, "learning_rate": 0.1, "gradient_norm_max": 0.1, "weight_decay": 0.1},
    ),
    "lora, two ranks": (
        LoraConfig(rank=4, target_modules=("q_proj", "down_proj"), rank_pattern={"down_proj": 2}),
        REVERSED,
        {"num_steps": 12, "batch_size": 3, "learning_rate": 1e-2, "seed": 1},
    ),
}


@pytest.fixture(scope="module")
def exact(tiny_base: Path, one_thread: None) -> ModelConfig:
    return ModelConfig(path=tiny_base, quantization=Quantization.NONE, device="cpu")


def configs(model: ModelConfig, output: Path, names: Sequence[str] = tuple(METHODS)) -> list[TrainConfig]:
    made = {name: METHODS[name] for name in names}
    return [
        TrainConfig(model=model, adapter=method, output=output / name, **knobs)  # pyright: ignore
        for name, (method, _, knobs) in made.items()
    ]


def examples(names: Sequence[str] = tuple(METHODS)) -> list[list[Example]]:
    return [METHODS[name][1] for name in names]


FEW = ("lora", "ia3", "prefix")  # of 12, 7 and 9 steps


def test_a_run_is_that_of_every_adapter_alone(exact: ModelConfig, tmp_path: Path) -> None:
    """Losses to 1e-4, and changes to 1 %: Adam divides by gradients that may be as small as rounding."""
    seen: list[tuple[int, Step]] = []
    together = train_many(
        configs(exact, tmp_path / "together"), examples=examples(), progress=lambda i, step: seen.append((i, step))
    )
    ours = base.load(exact)
    for place, (config, own) in enumerate(zip(configs(exact, tmp_path / "alone"), examples(), strict=True)):
        alone = train(config, examples=own)
        result = together[place]
        assert result.output.name == config.output.name
        assert result.num_parameters == alone.num_parameters
        assert result.losses == pytest.approx(alone.losses, abs=1e-4)
        assert [step for i, step in seen if i == place] == [
            Step(number, config.num_steps, loss) for number, loss in enumerate(result.losses, start=1)
        ]
        generator = torch.Generator().manual_seed(config.seed)
        start = flat(adapter.initial(config.adapter, ours.shape, generator))
        learned, expected = (flat(adapter.read(path, ours.shape)) for path in (result.output, alone.output))
        assert distance(learned - start, expected - start) < 1e-2
        assert expected.norm() > 0.1  # the control: it did learn
        files = [sorted(file.name for file in path.iterdir()) for path in (result.output, alone.output)]
        assert files[0] == files[1]
        configs_written = [(path / directory.CONFIG_FILE).read_bytes() for path in (result.output, alone.output)]
        assert configs_written[0] == configs_written[1]
    assert sorted(path.name for path in (tmp_path / "together").iterdir()) == sorted(METHODS)


def flat(of: Adapter) -> Tensor:
    return torch.cat([t.detach().flatten() for t in of.tensors()])


def test_an_adapter_that_is_finished_is_written_and_leaves(
    exact: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = configs(exact, tmp_path, FEW)
    there: dict[int, set[str]] = {}

    def watch(place: int, step: Step) -> None:
        there.setdefault(step.number, set()).update(path.name for path in tmp_path.iterdir() if path.name in FEW)
        assert step.number <= plan[place].num_steps

    widths: list[int] = []
    losses = joint_model.losses

    def count(ours: Base, step: Sequence[Share]) -> list[Tensor]:
        widths.append(len(step))
        return losses(ours, step)

    monkeypatch.setattr(joint_model, "losses", count)
    train_many(plan, examples=examples(FEW), progress=watch)
    assert sum(widths) == sum(config.num_steps for config in plan)
    assert there[6] == set()
    assert there[8] == {"ia3"}
    assert there[10] == {"ia3", "prefix"}
    assert max(there) == 12


def test_an_interrupted_run_keeps_what_was_finished(exact: ModelConfig, tmp_path: Path) -> None:
    def interrupt(place: int, step: Step) -> None:
        if step.number == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_many(configs(exact, tmp_path, FEW), examples=examples(FEW), progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["ia3"]
    assert load_file(tmp_path / "ia3" / directory.WEIGHTS_FILE)


REFUSED: dict[str, tuple[Callable[[list[TrainConfig]], object], type[Exception], str, str]] = {
    "none": (lambda plan: train_many([]), ValueError, "configs: there are none", ""),
    "too few examples": (
        lambda plan: train_many(plan, examples=examples(FEW)[:2]),
        ValueError,
        "examples: must be one sequence for each of 3 configs, given 2",
        "",
    ),
    "another base": (
        lambda plan: train_many(
            [plan[0], replace(plan[1], model=replace(plan[1].model, quantization=Quantization.NF4))],
            examples=examples(FEW)[:2],
        ),
        ValueError,
        "model: must be one for all adapters, .*none.* given .*nf4",
        "ia3",
    ),
    "the same output": (
        lambda plan: train_many([plan[0], plan[1], plan[0]], examples=examples(FEW)[:3]),
        ValueError,
        "output: must be another for each adapter, given .*lora twice",
        "lora",
    ),
    "a knob of a run alone": (
        lambda plan: train_many([plan[0], replace(plan[1], checkpoint_every=5)], examples=examples(FEW)[:2]),
        ValueError,
        "checkpoint_every must be 0 where adapters train together, given 5",
        "ia3",
    ),
    "no data": (lambda plan: train_many(plan), ValueError, "data: give either a file or the examples", "lora"),
    "too long": (
        lambda plan: train_many(plan[:2], examples=[REVERSED, [Example("a" * 70, "b")]]),
        InvalidData,
        r"examples\[0\]: has too many tokens \(limit 64\)",
        "ia3",
    ),
    "no server takes it": (
        lambda plan: train_many([plan[1], replace(plan[0], adapter=LoraConfig(rank=257))], examples=examples(FEW)[:2]),
        InvalidAdapter,
        r"adapter_config\.r: is too large",
        "lora",
    ),
}


@pytest.mark.parametrize("why", list(REFUSED))
def test_what_cannot_be_trained_together_is_refused(exact: ModelConfig, tmp_path: Path, why: str) -> None:
    """Before the first step, without a trace, and the error names the adapter."""
    attempt, kind, message, name = REFUSED[why]
    with pytest.raises(kind, match=message) as caught:
        attempt(configs(exact, tmp_path, FEW))
    assert getattr(caught.value, "__notes__", []) == ([f"(the adapter {tmp_path / name})"] if name else [])
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_diverges_is_named(exact: ModelConfig, tmp_path: Path) -> None:
    plan = configs(exact, tmp_path, FEW)
    plan[2] = replace(plan[2], learning_rate=1e30, gradient_norm_max=1e30)
    with pytest.raises(Diverged, match=r"step \d+: loss must be finite, given nan") as caught:
        train_many(plan, examples=examples(FEW))
    assert caught.value.__notes__ == [f"(the adapter {tmp_path / 'prefix'})"]
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_replaced(exact: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "prefix").mkdir()
    with pytest.raises(FileExistsError, match="prefix exists"):
        train_many(configs(exact, tmp_path, FEW), examples=examples(FEW))


# --- the command ----------------------------------------------------------------------------------------------------

RECIPE = """\
model: {{path: {base}, quantization: none, device: cpu}}
adapter: {{method: {method}}}
data: {{train: {data}}}
optimization: {{num_steps: 3, batch_size: 2, learning_rate: 1.0e-2}}
output: {{path: {output}}}
"""


def recipes(exact: ModelConfig, directory: Path, *methods: str) -> list[str]:
    rows = directory / "rows.jsonl"
    rows.write_text('{"prompt": "a = ", "completion": "b"}\n{"text": "weft"}\n')
    paths = []
    for method in methods:
        path = directory / f"{method}.yaml"
        path.write_text(RECIPE.format(base=exact.path, method=method, data=rows, output=directory / "out" / method))
        paths.append(str(path))
    return paths


def test_the_command_trains_a_recipe_each(exact: ModelConfig, tmp_path: Path) -> None:
    result = CliRunner().invoke(command.many, recipes(exact, tmp_path, "lora", "ia3", "prefix"))
    assert result.exit_code == 0, result.output
    shape = base.load(exact).shape
    for method in ("lora", "ia3", "prefix"):
        made = adapter.read(tmp_path / "out" / method, shape)
        assert made.method.name == method
        assert f"{method}: {made.num_parameters:,} parameters, loss " in result.output


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("method: lora", "method: lor", r"lora.yaml:2: method: must be one of lora,"),
        ("num_steps: 3", "num_steps: 0", "lora.yaml:4: optimization.num_steps: must be at least 1, given '0'"),
        ("num_steps", "steps", "lora.yaml:4: optimization.steps: no such key; did you mean num_steps"),
        ("quantization: none", "quantization: int3", "lora.yaml:1: model.quantization: must be 'nf4'"),
        ("train: ", "training: ", "lora.yaml:3: data.training: no such key"),
        ("optimization:", "optimizer:", "lora.yaml:4: optimizer: no such section"),
        ("model:", "- model:", "lora.yaml:"),
        ("method: lora", "method: lora, dropout: 0.1", "dropout: an adapter that has some is trained alone"),
        ("rows.jsonl", "none.jsonl", r"No such file .*\(the adapter .*/out/lora\)"),
    ],
)
def test_the_command_says_what_is_wrong(exact: ModelConfig, tmp_path: Path, old: str, new: str, message: str) -> None:
    paths = recipes(exact, tmp_path, "ia3", "lora")
    text = Path(paths[1]).read_text()
    assert old in text
    Path(paths[1]).write_text(text.replace(old, new, 1))
    result = CliRunner().invoke(command.many, paths)
    assert result.exit_code == 1
    assert re.search(message, " ".join(result.stderr.split())), result.stderr
    assert not (tmp_path / "out").exists()
