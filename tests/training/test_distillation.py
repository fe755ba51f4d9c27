"""The distillation loss against the textbook in float64, and a teacher on the student's own base."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from weft.config import ModelConfig, Quantization
from weft.methods.ia3.math import Ia3Config
from weft.methods.lora.math import LoraConfig
from weft_training import adapter, base
from weft_training.adapter import AdaptedModel
from weft_training.config import TrainConfig
from weft_training.data import Example, collate, encode
from weft_training.distillation import Direction, DistillationConfig, DistilledModel, divergence, load_teacher
from weft_training.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ("abc", "dragon", "loom", "weave", "threads", "hi", "warp", "weft")
EXAMPLES = [Example(f"{word} = ", "yes") for word in WORDS]
STUDENT = Ia3Config(target_modules=("k_proj", "v_proj", "down_proj"), feedforward_modules=("down_proj",))


def textbook(student: Tensor, teacher: Tensor, temperature: float, direction: Direction) -> Tensor:
    s, t = torch.softmax(student / temperature, -1), torch.softmax(teacher / temperature, -1)
    kl = (t * (t / s).log()).sum(-1) if direction is Direction.FORWARD else (s * (s / t).log()).sum(-1)
    return kl * temperature * temperature


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergence_and_its_gradient_are_the_textbooks(direction: Direction, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 11, dtype=torch.float64, generator=generator) * 2 for _ in range(2))
    student.requires_grad_()
    found = divergence(student, teacher, temperature=temperature, direction=direction)
    expected = textbook(student, teacher, temperature, direction)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    (found_grad,) = torch.autograd.grad(found.sum(), student)
    (expected_grad,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(found_grad, expected_grad, atol=1e-12, rtol=1e-10)
    if direction is Direction.FORWARD:  # in closed form: τ (softmax(s / τ) - softmax(t / τ))
        closed = temperature * (torch.softmax(student / temperature, -1) - torch.softmax(teacher / temperature, -1))
        torch.testing.assert_close(found_grad, closed, atol=1e-12, rtol=1e-10)
    other = next(each for each in Direction if each is not direction)
    assert (found - divergence(student, teacher, temperature=temperature, direction=other)).abs().max() > 1e-3


class Fixed(nn.Module):
    """A model whose logits are given."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, labels: Tensor | None = None, num_items_in_batch: int | None = None, **_: object) -> object:
        if labels is None:
            return SimpleNamespace(logits=self.logits)
        loss = nn.functional.cross_entropy(self.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return SimpleNamespace(logits=self.logits, loss=loss / (num_items_in_batch or (labels[:, 1:] != -100).sum()))


@pytest.mark.parametrize("num_items", [None, 50])
def test_loss_is_alpha_ce_and_the_rest_kl_over_learned_tokens(num_items: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 4, 7, generator=generator) for _ in range(2))
    labels = torch.tensor([[-100, -100, 3, 4], [-100, 2, 1, -100]])
    config = DistillationConfig(teacher=Path("t"), alpha=0.3, temperature=2.0)
    taught = Fixed(teacher)
    model = DistilledModel(Fixed(student), taught, config)  # pyright: ignore
    loss = model(labels=labels, num_items_in_batch=num_items).loss
    count = num_items or 4
    rows = [(0, 1), (0, 2), (1, 0), (1, 1)]  # what predicts a learned token
    kl = sum(textbook(student[b, t], teacher[b, t], 2.0, Direction.FORWARD) for b, t in rows) / count
    ce = sum(-student[b, t].log_softmax(-1)[labels[b, t + 1]] for b, t in rows) / count
    torch.testing.assert_close(loss, 0.3 * ce + 0.7 * kl)
    loss.backward()
    assert taught.logits.grad is None
    assert len(list(model.parameters())) == 1  # the student's


@pytest.mark.slow
def test_a_student_of_another_method_learns_its_teachers_behaviour(tiny_base: Path, tmp_path: Path) -> None:
    """The data is wrong on purpose: with alpha 0 the answer can come only from the teacher."""
    config = ModelConfig(path=tiny_base, quantization=Quantization.NONE, device="cpu")
    knobs = {"model": config, "batch_size": 8}
    teacher = train(
        TrainConfig(adapter=LoraConfig(), output=tmp_path / "t", num_steps=40, learning_rate=1e-2, **knobs),
        examples=EXAMPLES,
    )
    distillation = DistillationConfig(teacher=teacher.output, alpha=0.0, temperature=1.0)
    student = train(
        TrainConfig(
            adapter=STUDENT,
            output=tmp_path / "s",
            num_steps=120,
            learning_rate=1e-1,
            distillation=distillation,
            **knobs,
        ),
        examples=EXAMPLES,
    )
    ours = base.load(config)
    batch = collate(encode(EXAMPLES, ours.tokenizer, max_length=64), pad_token_id=0)
    learned = batch.pop("labels")[:, 1:] != -100

    def predicted(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(**batch).logits[:, :-1][learned]

    of_teacher = predicted(AdaptedModel(ours, adapter.read(teacher.output, ours.shape)))
    of_student = predicted(AdaptedModel(ours, adapter.read(student.output, ours.shape)))
    untrained = predicted(AdaptedModel(ours, adapter.initial(STUDENT, ours.shape, torch.Generator())))

    def agreement(logits: Tensor) -> float:
        return (logits.argmax(-1) == of_teacher.argmax(-1)).float().mean().item()

    assert agreement(of_student) > 0.95
    assert agreement(untrained) < 0.5  # the control
    assert student.losses[-1] < 0.2 * student.losses[0]


def test_teachers_are_adapters_or_models_of_the_same_vocabulary(tiny_base: Path, tmp_path: Path) -> None:
    config = ModelConfig(path=tiny_base, quantization=Quantization.NONE, device="cpu")
    ours = base.load(config)
    batch = collate(encode(EXAMPLES, ours.tokenizer, max_length=64), pad_token_id=0)
    del batch["labels"]
    whole = load_teacher(tiny_base, ours, config)
    assert list(whole.parameters()) == []
    with torch.no_grad():
        torch.testing.assert_close(whole(**batch).logits, ours.model(**batch).logits)
    with pytest.raises(FileNotFoundError, match=r"teacher: .* holds neither"):
        load_teacher(tmp_path, ours, config)
    demo = Path(__file__).parents[2] / "models" / "weft-demo"
    narrow = base.load(config)
    narrow.tokenizer.add_tokens(["<more>"])
    with pytest.raises(ValueError, match="teacher: must have the base's vocabulary"):
        load_teacher(demo, narrow, config)
