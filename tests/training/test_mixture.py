"""Training a router: its gradient against an independent textbook, trained parameters, files, refusals."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.bases import Bases
from torch import Tensor

from weft.adapters.identifiers import check_adapter_id
from weft.adapters.store import AdapterStore
from weft.adapters.versions import digest_at
from weft.config import AdapterLimits, ModelConfig
from weft.methods import mixture as gating
from weft.methods.checkpoint import directory
from weft.methods.checkpoint.mixture import CONFIG_FILE
from weft.methods.mixture import Level, MixtureConfig, MixtureParams
from weft.methods.protocol import Adapter, BaseShape
from weft.model.loader import Base
from weft_training import output, publish, recipe
from weft_training.base import load
from weft_training.data import Example, Row, collate
from weft_training.expert import TrainedExpert
from weft_training.mixture import MixtureModel, MixtureTrainConfig, TrainedMixture
from weft_training.publish import PublishConfig
from weft_training.recipe import Given
from weft_training.trained import CONFIGS
from weft_training.trainer import TrainConfig, train

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [Row(list(range(40, 52)), 5), Row([7, 9, 100, 34], 2), Row([50, 51, 52, 53, 54, 55, 56], 3)]
EXAMPLES = [Example(f"{letter}{number} = ", letter * 3) for letter in "abcde" for number in range(6)]


@pytest.fixture
def exact(bases: Bases) -> Base:
    """A Llama of two layers in float64."""
    base = bases.fresh(attention="eager")
    base.model.double()
    return replace(base, dtype=torch.float64)


def expert_set(shape: BaseShape) -> list[Adapter]:
    return [
        tiny.random_lora(shape, rank=2, seed=1),
        tiny.random_lora(shape, rank=5, seed=2, targets=("q_proj", "down_proj")),
        tiny.random_lora(shape, rank=3, seed=3, targets=("v_proj", "gate_proj")),
    ]


def mixed(base: Base, config: MixtureConfig, *, balance_weight: float = 0.0) -> MixtureModel:
    """A mixture whose router is random and all of whose numbers are float64."""
    experts = [TrainedExpert(f"e{i}", one, f"{i:064x}") for i, one in enumerate(expert_set(base.shape))]  # type: ignore[arg-type]
    params = gating.init(config, base.shape.num_layers, base.shape.embedding_size, torch.Generator().manual_seed(5))
    made = TrainedMixture(config, MixtureParams(params.weight * 50), experts, writes_experts=True)
    return MixtureModel(base, made, balance_weight=balance_weight).double()


class Textbook:
    """The same mixture with hooks on transformers' own modules: sums over tokens and experts, written out."""

    def __init__(self, base: Base, config: MixtureConfig, weight: Tensor, prompts: Tensor) -> None:
        self.weight = weight.detach().clone().requires_grad_()
        self.gates: list[Tensor] = []
        self._config = config
        self._prompts = prompts
        self._experts = expert_set(base.shape)
        self._pooled: Tensor | None = None
        layers = base.model.model.layers
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda _, inputs, index=index: self._enter(index, inputs[0]))
        for name in base.shape.sites:
            base.model.get_submodule(name).register_forward_hook(
                lambda _, inputs, out, name=name: self._add(name, inputs[0], out)
            )

    def _enter(self, layer: int, hidden: Tensor) -> None:
        config = self._config
        if config.level is Level.SEQUENCE:
            if self._pooled is None:
                rows = [hidden[b, self._prompts[b].bool()].mean(0) for b in range(len(hidden))]
                self._pooled = torch.stack(rows)[:, None].expand_as(hidden)
            hidden = self._pooled
        weight = self.weight[0 if config.shared else layer]
        found = torch.zeros(*hidden.shape[:2], len(self._experts), dtype=hidden.dtype)
        for b in range(hidden.shape[0]):
            for t in range(hidden.shape[1]):
                h = hidden[b, t]
                if config.rms_norm:
                    h = h / (h.square().mean() + 1e-6).sqrt()
                scores = ((weight * h).sum(-1) / config.temperature).exp()
                chances = scores / scores.sum()
                kept = chances.argsort(descending=True)[: config.top_k].tolist()
                total = sum(chances[i] for i in kept) if config.normalize else 1.0
                for i in kept:
                    if i < len(self._experts):  # the last may be the null expert
                        found[b, t, i] = chances[i] / total
        self.gates.append(found)

    def _add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        for i, expert in enumerate(self._experts):
            if name in expert.sites:
                p = expert.sites[name]
                y = y + self.gates[-1][..., i, None] * p.scaling * (x @ p.a.double().mT @ p.b.double().mT)
        return y


CONFIGS_OF_GATES = {
    "token": {},
    "softmax over all": {"normalize": False, "top_k": 1},
    "null expert, shared": {"null_expert": True, "shared": True, "rms_norm": True},
    "sequence, sharp": {"level": Level.SEQUENCE, "temperature": 0.3},
}


@pytest.mark.parametrize("knobs", CONFIGS_OF_GATES.values(), ids=list(CONFIGS_OF_GATES))
def test_the_routers_gradient_is_the_textbooks(exact: Base, knobs: dict[str, object]) -> None:
    config = MixtureConfig(num_experts=3, **{"top_k": 2, **knobs})  # type: ignore[arg-type]
    model = mixed(exact, config)
    batch = collate(ROWS, pad_token_id=0)
    loss = model(**batch).loss
    loss.backward()
    assert model.weight.grad is not None

    prompts = torch.stack([torch.arange(batch["input_ids"].shape[1]) < row.num_prompt_tokens for row in ROWS])
    textbook = Textbook(exact, config, model.weight, prompts)
    expected = exact.model(**batch, use_cache=False).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=1e-9)
    assert textbook.weight.grad is not None
    torch.testing.assert_close(model.weight.grad, textbook.weight.grad, atol=1e-9, rtol=1e-8)
    assert model.weight.grad.norm() > 1e-3
    gates = torch.cat(textbook.gates)
    assert gates[gates > 0].std() > 0.02  # the control: gates that were all alike would show nothing


def test_the_balance_loss_is_added_over_real_tokens(exact: Base) -> None:
    config = MixtureConfig(num_experts=3, top_k=2)
    batch = collate(ROWS, pad_token_id=0)
    plain = mixed(exact, config)(**batch).loss
    model = mixed(exact, config, balance_weight=0.5)
    loss = model(**batch).loss
    real = batch["attention_mask"].reshape(-1).bool()
    layers = list(zip(model.router.chances, model.router.gates, strict=True))
    terms, padded = [], []
    for chances, gates in layers:
        share = (gates[real] > 0).double().mean(0) / 2
        terms.append(3 * (share * chances[real].mean(0)).sum())
        padded.append(gating.balance_loss(chances, gates))
    torch.testing.assert_close(loss - plain, 0.5 * sum(terms) / 2)
    assert abs(loss - plain - 0.5 * sum(padded) / 2) > 1e-5  # the control: padding would show
    assert gating.balance_loss(torch.tensor([[0.8, 0.2]] * 4), torch.tensor([[1.0, 0.0]] * 4)) == pytest.approx(1.6)
    assert gating.balance_loss(torch.full((4, 2), 0.5), torch.eye(2).repeat(2, 1)) == pytest.approx(1.0)


def test_a_sequences_gates_are_those_of_its_prompt(exact: Base) -> None:
    """For every token, whatever is answered and however wide the batch is; also for tokens that are generated."""
    model = mixed(exact, MixtureConfig(num_experts=3, top_k=2, level=Level.SEQUENCE))
    model(**collate(ROWS, pad_token_id=0))
    gates = model.router.gates[0].view(3, -1, 3)
    assert torch.equal(gates, gates[:, :1].expand_as(gates))
    other = Row([*ROWS[1].input_ids[:2], 90, 91, 92], 2)
    model(**collate([other], pad_token_id=0))
    torch.testing.assert_close(model.router.gates[0][0], gates[1, 0])
    prompt = torch.tensor([[0, 0, 0, *ROWS[1].input_ids[:2]]])
    model.generate(prompt, torch.tensor([[0, 0, 0, 1, 1]]), do_sample=False, max_new_tokens=3)
    (last,) = model.router.gates[0]
    torch.testing.assert_close(last, gates[1, 0])
    assert (gates[0, 0] - gates[1, 0]).abs().max() > 0.01  # the control: prompts differ


# --- from a recipe to a directory ---------------------------------------------------------------------------------


@pytest.fixture
def nf4(tiny_base: Path) -> ModelConfig:
    return ModelConfig(path=tiny_base, device="cpu")


@pytest.fixture
def paths(nf4: ModelConfig, tmp_path: Path) -> tuple[Path, ...]:
    base = load(nf4)
    adapters = [*expert_set(base.shape), tiny.random_bitfit(base.shape, seed=4)]
    for index, adapter in enumerate(adapters):
        directory.write(adapter, tmp_path / f"e{index}", base.shape)
    directory.write(tiny.random_prefix(base.shape, length=3, seed=1), tmp_path / "virtual", base.shape)
    return tuple(tmp_path / f"e{index}" for index in range(len(adapters)))


def config_of(nf4: ModelConfig, output: Path, adapter: MixtureTrainConfig, **knobs: object) -> TrainConfig:
    return TrainConfig(
        model=nf4, adapter=adapter, output=output, num_steps=12, batch_size=6, learning_rate=2e-2, **knobs
    )  # type: ignore[arg-type]


def test_a_router_is_trained_and_its_experts_are_left_alone(
    nf4: ModelConfig, paths: tuple[Path, ...], tmp_path: Path
) -> None:
    before = {path: digest_at(path) for path in paths}
    result = train(config_of(nf4, tmp_path / "made", MixtureTrainConfig(experts=paths)), examples=EXAMPLES)
    assert result.losses[-1] < result.losses[0]
    assert result.num_parameters == 2 * 4 * 64
    assert {path: digest_at(path) for path in paths} == before
    written = json.loads((tmp_path / "made" / CONFIG_FILE).read_text())
    assert [one["digest"] for one in written["experts"]] == sorted(before.values())
    assert {one["adapter_id"] for one in written["experts"]} == {path.name for path in paths}
    assert sorted(file.name for file in (tmp_path / "made").iterdir()) == [
        "README.md",
        "loss.png",
        "mixture_config.json",
        "mixture_router.safetensors",
    ]
    again = train(config_of(nf4, tmp_path / "again", MixtureTrainConfig(experts=paths[::-1])), examples=EXAMPLES)
    assert again.losses == result.losses  # the order of the experts' names does not matter


def test_experts_train_with_their_router(nf4: ModelConfig, paths: tuple[Path, ...], tmp_path: Path) -> None:
    adapter = MixtureTrainConfig(experts=paths, train_experts=True)
    train(config_of(nf4, tmp_path / "made", adapter), examples=EXAMPLES)
    base = load(nf4)
    made = output.read_mixture(tmp_path / "made", base.shape)
    new = {path.name: digest_at(path) for path in (tmp_path / "made" / output.EXPERTS).iterdir()}
    assert {one.adapter_id: one.digest for one in made.experts} == new
    assert not set(new.values()) & {digest_at(path) for path in paths}


def test_a_mixture_is_published_into_a_store(nf4: ModelConfig, paths: tuple[Path, ...], tmp_path: Path) -> None:
    config = config_of(nf4, tmp_path / "made", MixtureTrainConfig(experts=paths))
    train(config, examples=EXAMPLES)
    published = publish.publish(PublishConfig(publish=str(tmp_path / "store")), config.output, nf4)
    assert published.digest == digest_at(tmp_path / "made")
    assert AdapterStore(tmp_path / "store", AdapterLimits()).read_manifest(check_adapter_id("made")).method == "mixture"


def test_a_name_that_no_adapter_can_have_is_no_hint(nf4: ModelConfig, paths: tuple[Path, ...], tmp_path: Path) -> None:
    odd = paths[0].rename(tmp_path / "No.Id")
    train(config_of(nf4, tmp_path / "made", MixtureTrainConfig(experts=(odd, paths[1]))), examples=EXAMPLES)
    made = output.read_mixture(tmp_path / "made", load(nf4).shape)
    assert {one.adapter_id: one.digest for one in made.experts} == {
        "": digest_at(odd),
        "e1": digest_at(paths[1]),
    }


def test_an_experts_digest_is_what_registering_it_gives(paths: tuple[Path, ...], tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store", AdapterLimits(), allowed_sources=(tmp_path,))
    store.recover()
    with store.stage_copy(str(paths[0])) as staging:
        manifest = store.commit(staging.seal(), adapter_id=check_adapter_id("e0"), method="lora")
    assert manifest.digest == digest_at(paths[0])
    assert manifest.digest != digest_at(paths[1])


def test_a_recipe_says_it_all(nf4: ModelConfig, paths: tuple[Path, ...], tmp_path: Path) -> None:
    given = [
        Given("--base", str(nf4.path)),
        Given("--data", "rows.jsonl"),
        Given("--output", str(tmp_path / "made")),
        Given("--experts", ",".join(map(str, paths))),
        Given("--level", "sequence"),
    ]
    loaded = recipe.load(Path("training/recipes/mixture.yaml"), given).train
    assert isinstance(loaded.adapter, MixtureTrainConfig)
    assert loaded.adapter.experts == paths
    assert loaded.adapter.level is Level.SEQUENCE
    assert set(recipe.keys("mixture")["adapter"]) == {"method", *(f.name for f in fields(CONFIGS["mixture"]))}


@pytest.mark.parametrize(
    ("experts", "knobs", "error"),
    [
        ((), {}, "experts must name at least 1 directory"),
        (("e0", "virtual"), {}, "experts: must act at modules while a router is trained, given virtual, a prefix"),
        (("e0", "e0"), {}, "experts: must differ"),
        (("e0", "e1"), {"top_k": 1}, "top_k must be at least 2 if normalize is true"),
        (("e0", "e1"), {"top_k": 3}, "top_k: must be 1 to 2, given 3"),
        (("e0", "e1"), {"temperature": 0.0}, "temperature: must be above 0"),
        (("e0", "e1"), {"balance_weight": -1.0}, r"balance_weight\n.* greater than or equal to 0 .*input_value=-1\.0"),
    ],
)
def test_what_no_router_can_be_is_refused(
    nf4: ModelConfig, paths: tuple[Path, ...], tmp_path: Path, experts: tuple[str, ...], knobs: dict, error: str
) -> None:
    def run() -> None:
        adapter = MixtureTrainConfig(experts=tuple(tmp_path / name for name in experts), **knobs)
        train(config_of(nf4, tmp_path / "made", adapter), examples=EXAMPLES)

    with pytest.raises(ValueError, match=error):
        run()
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("knob", ["packing", "gradient_checkpointing"])
def test_what_mixtures_lack_is_refused(nf4: ModelConfig, paths: tuple[Path, ...], tmp_path: Path, knob: str) -> None:
    adapter = MixtureTrainConfig(experts=paths)
    with pytest.raises(ValueError, match=f"{knob} must be false for a mixture"):
        train(config_of(nf4, tmp_path / "made", adapter, **{knob: True}), examples=EXAMPLES)
