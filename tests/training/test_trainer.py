"""The parameters that training changes, that it learns, that it repeats, and that gradients pass a quantized base."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from safetensors.torch import load_file
from tests.bases import load
from torch import Tensor
from typer.testing import CliRunner

from weft.config import ModelConfig, Quantization
from weft.errors import InvalidAdapter
from weft.methods.checkpoint import directory
from weft.methods.ia3.math import Ia3Config
from weft.methods.lora.math import LoraConfig
from weft.methods.prefix.math import PrefixConfig
from weft.methods.prompt.math import PromptConfig, PromptInit
from weft.methods.protocol import MethodConfig
from weft.methods.ptuning.math import Encoder, PtuningConfig
from weft.model.loader import Base
from weft_training import adapter, base, command, plan
from weft_training.adapter import USUAL, AdaptedModel
from weft_training.config import Optimizer, SaveDtype, TrainConfig
from weft_training.data import Example, InvalidData, collate, encode
from weft_training.progress import Step
from weft_training.run import TrainResult
from weft_training.trained import CONFIGS
from weft_training.trainer import make_loop, prepare, train

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ("abc", "dragon", "loom", "weave", "threads", "hi", "warp", "weft")
EXAMPLES = [Example(f"{word} = ", word[::-1]) for word in WORDS]
LEARNABLE = [Example(f"{word} = ", "yes") for word in WORDS]
PREFIX = PrefixConfig(num_virtual_tokens=5)
NUM_STEPS = {"ptuning": 80}  # a random encoder first leads all rows to one place
LEARNING_RATES = {
    "lora": 2e-2,
    "dora": 2e-2,
    "vera": 1e-1,
    "bitfit": 1e-1,
    "bottleneck": 2e-2,
    "ia3": 2e-1,
    "prefix": 2e-1,
    "prompt": 1e-1,
    "ptuning": 6e-3,
}  # rough, for few steps on a tiny base


def nf4(path: Path, dtype: str = "auto") -> ModelConfig:
    return ModelConfig(path=path, device="cpu", dtype=dtype)


@pytest.fixture
def fit(tiny_base: Path, tmp_path: Path) -> Callable[..., TrainResult]:
    """Train on the tiny NF4 base; keywords change the config."""

    def run(name: str = "out", *, examples: list[Example] = EXAMPLES, **changes: object) -> TrainResult:
        knobs: dict[str, object] = {
            "adapter": LoraConfig(rank=4),
            "num_steps": 4,
            "batch_size": 4,
            "learning_rate": 1e-2,
            **changes,
        }
        config = TrainConfig(model=nf4(tiny_base), output=tmp_path / name, **knobs)  # pyright: ignore
        return train(config, examples=examples)

    return run


def random_adapter(config: MethodConfig, on: Base) -> AdaptedModel:
    """An adapter far from its start, where LoRA's A would have no gradient."""
    generator = torch.Generator().manual_seed(1)
    made = adapter.initial(config, on.shape, generator)
    return AdaptedModel(on, adapter.map_tensors(made, lambda t: 0.3 * torch.randn(t.shape, generator=generator)))


def gradients(model: AdaptedModel) -> Tensor:
    """All of the adapter's gradients for one batch, end to end."""
    model.zero_grad()
    model(**collate(encode(EXAMPLES, model.base.tokenizer, max_length=64), pad_token_id=0)).loss.backward()
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# --- what training touches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(USUAL))
@pytest.mark.parametrize("quantization", [Quantization.NF4, Quantization.NONE])
def test_gradients_reach_the_adapter_and_nothing_else(tiny_base: Path, method: str, quantization: Quantization) -> None:
    ours = base.load(ModelConfig(path=tiny_base, quantization=quantization, device="cpu"))
    model = random_adapter(USUAL[method], ours)
    before = {name: t.clone() for name, t in _stored(ours).items()}
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) == model.adapter.num_parameters > 0
    assert {id(p) for p in parameters} == {id(t) for t in model.adapter.tensors()}

    gradients(model)
    torch.optim.SGD(parameters, lr=0.1).step()

    assert all(p.dtype is torch.float32 and p.grad is not None and p.grad.abs().max() > 0 for p in parameters)
    assert all(not p.requires_grad and p.grad is None for p in ours.model.parameters())
    after = _stored(ours)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not ours.model.training


def _stored(of: Base) -> dict[str, Tensor]:
    """Everything the base holds, quantization state included."""
    tensors = dict([*of.model.named_parameters(), *of.model.named_buffers()])
    for name, module in of.model.named_modules():
        if isinstance(module, Linear4bit):
            tensors[f"{name}.absmax"] = module.weight.quant_state.absmax
    return tensors


# --- that it learns and repeats -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(USUAL))
def test_loss_goes_down(fit: Callable[..., TrainResult], method: str) -> None:
    result = fit(
        examples=LEARNABLE,
        adapter=USUAL[method],
        num_steps=NUM_STEPS.get(method, 20),
        batch_size=8,
        learning_rate=LEARNING_RATES[method],
    )
    assert len(result.losses) == NUM_STEPS.get(method, 20)
    # On a random base a bias makes the answer's letters likely, and can hardly say which comes next.
    share = 0.75 if method == "bitfit" else 0.5
    assert sum(result.losses[-5:]) < share * sum(result.losses[:5])


def test_the_paged_optimizer_is_the_8_bit_one_on_a_cpu_and_says_so(
    fit: Callable[..., TrainResult], caplog: pytest.LogCaptureFixture
) -> None:
    wide = LoraConfig(rank=64, target_modules=("q_proj",))  # matrices of 4,096 numbers, the smallest in 8 bits
    plain, packed = fit("plain", adapter=wide), fit("packed", adapter=wide, optimizer="adamw_8bit")
    assert not caplog.records  # the control
    paged = fit("paged", adapter=wide, optimizer="paged_adamw_8bit")
    assert "paged_adamw_8bit pages a GPU's memory, and this run has none; adamw_8bit runs" in caplog.text
    assert (plain.optimizer, packed.optimizer, paged.optimizer) == ("adamw", "adamw_8bit", "adamw_8bit")
    assert paged.losses == packed.losses != plain.losses
    assert paged.losses == pytest.approx(plain.losses, rel=0.05)


def test_moments_are_held_in_8_bits_and_take_what_the_plan_says(tiny_base: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        model=nf4(tiny_base),
        adapter=LoraConfig(rank=64, target_modules=("q_proj", "k_proj")),  # k_proj's B, 32 x 64, stays in float32
        output=tmp_path / "adapter",
        optimizer=Optimizer.PAGED_ADAMW_8BIT,
        num_steps=1,
        batch_size=8,
    )
    prepared = prepare(config, examples=EXAMPLES)
    loop = make_loop(config, prepared, tmp_path)
    loop.resume(None)
    held: Any = loop.optimizer
    states = list(held.state.values())
    assert {state["state1"].dtype for state in states} == {torch.uint8, torch.float32}
    num_bytes = sum(
        state[name].nbytes for state in states for name in ("state1", "state2", "absmax1", "absmax2") if name in state
    )
    assert plan.make(config, prepared).optimizer_bytes == num_bytes


@pytest.mark.parametrize(
    "config",
    [
        PREFIX,
        PrefixConfig(num_virtual_tokens=5, prefix_projection=True),
        PrefixConfig(num_virtual_tokens=5, prefix_projection=True, separate=True, rows_size=6),
        PromptConfig(num_virtual_tokens=5),
        PtuningConfig(num_virtual_tokens=5, encoder=Encoder.LSTM),
    ],
)
def test_the_same_seed_gives_the_same_adapter(fit: Callable[..., TrainResult], config: MethodConfig) -> None:
    one, same, other = (
        load_file(fit(str(i), adapter=config, seed=seed).output / directory.WEIGHTS_FILE)
        for i, seed in enumerate((7, 7, 8))
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)  # the control: it does depend on the seed


def test_progress_hears_every_step(tiny_base: Path, tmp_path: Path) -> None:
    steps: list[Step] = []
    config = TrainConfig(model=nf4(tiny_base), adapter=LoraConfig(rank=2), output=tmp_path / "a" / "b", num_steps=3)
    result = train(config, examples=EXAMPLES, progress=steps.append)
    assert [(step.number, step.num_steps) for step in steps] == [(1, 3), (2, 3), (3, 3)]
    assert tuple(step.loss for step in steps) == result.losses
    assert result.num_parameters == adapter.read(result.output, load(tiny_base, Quantization.NF4).shape).num_parameters


# --- where soft prompts begin, and what makes them -------------------------------------------------------------------


def test_a_prompt_begins_as_tokens_of_the_base(tiny_base: Path) -> None:
    ours = base.load(nf4(tiny_base))
    embedding = ours.model.get_input_embeddings().weight.float()

    def rows(**config: object) -> Tensor:
        made = PromptConfig(num_virtual_tokens=5, **config)  # pyright: ignore
        return adapter.begin(made, ours, torch.Generator().manual_seed(1)).adapter.prefix.embeddings.detach()

    text = PromptInit.TEXT
    assert torch.equal(rows(prompt_init=text, init_text="ab"), embedding[[97, 98, 97, 98, 97]])
    assert torch.equal(rows(prompt_init=text, init_text="abcdefgh"), embedding[[97, 98, 99, 100, 101]])
    drawn = rows(prompt_init=PromptInit.VOCABULARY)
    assert all((embedding == row).all(1).any() for row in drawn)
    noise = rows(prompt_init=PromptInit.RANDOM)  # the control
    assert not any((embedding == row).all(1).any() for row in noise)
    for wrong in ({"prompt_init": text}, {"init_text": "ab"}):
        with pytest.raises(ValueError, match="init_text: is given exactly where"):
            rows(**wrong)


def test_keys_and_values_may_have_an_mlp_each_as_in_the_owners_document(tiny_base: Path) -> None:
    """P_K = MLP_K(R), P_V = MLP_V(R), R of [l, d_r] with d_r < d: by the formula, and apart but for R."""
    config = PrefixConfig(
        num_virtual_tokens=5, prefix_projection=True, separate=True, rows_size=6, encoder_hidden_size=24
    )
    model = adapter.begin(config, base.load(nf4(tiny_base)), torch.Generator().manual_seed(1))
    r, w1, b1, w2, b2, *of_values = model.parameters()
    assert [list(t.shape) for t in (r, w1, w2)] == [[5, 6], [24, 6], [2 * 2 * 16, 24]]
    made = model.virtual()
    assert made is not None
    for (w_in, b_in, w_out, b_out), part in zip(((w1, b1, w2, b2), of_values), made, strict=True):
        wanted = torch.tanh(r.double() @ w_in.double().T + b_in.double()) @ w_out.double().T + b_out.double()
        shaped = wanted.view(5, 2, 2, 16).transpose(0, 1)  # [L, P, H, D]
        torch.testing.assert_close(part.double(), shaped, atol=1e-5, rtol=0)
    made.keys.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in (r, w1, b1, w2, b2))
    assert all(p.grad is not None and not p.grad.any() for p in of_values)
    assert model.num_trained == 5 * 2 * 2 * 2 * 16  # only P is written
    with pytest.raises(ValueError, match="separate: is of the MLP, so prefix_projection must be true"):
        PrefixConfig(separate=True)
    with pytest.raises(ValueError, match="rows_size: must be at least 1, given 0"):
        PrefixConfig(prefix_projection=True, rows_size=0)


@pytest.mark.parametrize(
    "config",
    [
        PrefixConfig(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=24),
        PtuningConfig(num_virtual_tokens=5, encoder_hidden_size=24),
        PtuningConfig(num_virtual_tokens=5, encoder_hidden_size=24, encoder=Encoder.LSTM, encoder_num_layers=2),
    ],
)
def test_a_reparameterization_is_what_is_trained_and_its_sizes_are_pefts(tiny_base: Path, config: MethodConfig) -> None:
    ours = base.load(nf4(tiny_base))
    model = adapter.begin(config, ours, torch.Generator().manual_seed(1))
    gradients(model)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    if isinstance(config, PrefixConfig):
        encoder = peft.PrefixEncoder(
            peft.PrefixTuningConfig(
                num_virtual_tokens=5, token_dim=32, num_layers=2, encoder_hidden_size=24, prefix_projection=True
            )
        )
    else:
        made = peft.PromptEncoderConfig(
            num_virtual_tokens=5,
            token_dim=64,
            num_transformer_submodules=1,
            encoder_hidden_size=24,
            encoder_reparameterization_type=config.encoder.name,
        )
        encoder = peft.PromptEncoder(made)
    assert sorted(p.shape for p in model.parameters()) == sorted(p.shape for p in encoder.parameters())
    with torch.no_grad():
        for mine, other in zip(model.parameters(), encoder.parameters(), strict=True):
            other.copy_(mine)
        wanted = encoder(torch.arange(5)[None] if isinstance(config, PtuningConfig) else torch.arange(5))
    found = model.adapter.prefix.embeddings.detach()
    torch.testing.assert_close(found.reshape(5, -1), wanted.reshape(5, -1), atol=1e-6, rtol=0)


# --- through a quantized base ---------------------------------------------------------------------------------------


def dequantized(tiny_base: Path, like: Base, dtype: str) -> Base:
    """A base without quantization that holds exactly the numbers of the NF4 base `like`."""
    plain = base.load(ModelConfig(path=tiny_base, quantization=Quantization.NONE, device="cpu", dtype=dtype))
    for name, module in like.model.named_modules():
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.model.get_submodule(name).weight.data = weight.to(plain.dtype)
    return plain


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("method", list(USUAL))
def test_gradient_through_nf4_is_that_of_the_dequantized_base(
    tiny_base: Path, method: str, dtype: str, tolerance: float
) -> None:
    ours = base.load(nf4(tiny_base, dtype))
    expected = gradients(random_adapter(USUAL[method], dequantized(tiny_base, ours, dtype)))
    assert distance(gradients(random_adapter(USUAL[method], ours)), expected) < tolerance


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit:UserWarning")  # as the unmended base calls it
def test_a_forward_without_gradients_does_not_spoil_the_next_gradient(tiny_base: Path) -> None:
    """bitsandbytes repacks weights for inference; base.py explains why that must not happen here."""
    ours = base.load(nf4(tiny_base))
    model = random_adapter(LoraConfig(rank=4), ours)
    fresh = gradients(model)
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        ours.model(input_ids=ids)
    assert torch.equal(gradients(model), fresh)

    served = load(tiny_base, Quantization.NF4, attention="sdpa")  # the control: as the server loads it
    with torch.no_grad():
        served.model(input_ids=ids)
    linears = [module for module in served.model.modules() if isinstance(module, Linear4bit)]
    if not all(getattr(module.weight.quant_state, "packing_format_for_cpu", False) for module in linears):
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes repacks nothing")
    assert distance(gradients(random_adapter(LoraConfig(rank=4), served)), fresh) > 0.3


# --- what is refused, and what is left behind -----------------------------------------------------------------------


def test_an_adapter_no_server_takes_is_refused_before_training(fit: Callable[..., TrainResult], tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match=r"adapter_config\.r: is too large"):
        fit(adapter=LoraConfig(rank=257), num_steps=10**6)
    with pytest.raises(ValueError, match="feedforward_modules: must name adapted modules"):
        fit(adapter=Ia3Config(target_modules=("k_proj",), feedforward_modules=("down_proj",)), num_steps=10**6)
    assert list(tmp_path.iterdir()) == []


def test_unknown_targets_and_too_long_examples_are_refused(fit: Callable[..., TrainResult]) -> None:
    with pytest.raises(ValueError, match=r"target_modules: .*down_proj, gate_proj.* given 'c_attn'"):
        fit(adapter=LoraConfig(target_modules=("q_proj", "c_attn")))
    with pytest.raises(InvalidData, match=r"examples\[0\]: has too many tokens \(limit 59\)"):
        fit(adapter=PREFIX, examples=[Example("a" * 55, "b" * 5)])  # 64 positions, 5 of them virtual


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, r"num_steps\n.* greater than or equal to 1 .*input_value=0"),
        ({"batch_size": 0}, r"batch_size\n.* greater than or equal to 1 .*input_value=0"),
        ({"learning_rate": float("nan")}, r"learning_rate\n.* finite number .*input_value=nan"),
        ({"num_warmup_steps": 5}, "num_warmup_steps must be 0 to 4, given 5"),
        ({"weight_decay": -1.0}, r"weight_decay\n.* greater than or equal to 0 .*input_value=-1\.0"),
    ],
)
def test_knobs_are_checked(fit: Callable[..., TrainResult], changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(**changes)


def test_examples_come_from_one_place(tiny_base: Path, tmp_path: Path) -> None:
    config = TrainConfig(model=nf4(tiny_base), adapter=PREFIX, output=tmp_path / "out")
    with pytest.raises(ValueError, match="give either a file or the examples"):
        train(config)


def test_an_existing_adapter_is_kept_unless_overwritten(fit: Callable[..., TrainResult], tmp_path: Path) -> None:
    first = fit(adapter=PREFIX).output
    old = (first / directory.WEIGHTS_FILE).read_bytes()
    with pytest.raises(FileExistsError, match="exists"):
        fit(adapter=PREFIX, seed=1)
    assert (first / directory.WEIGHTS_FILE).read_bytes() == old
    fit(adapter=PREFIX, seed=1, overwrite=True)
    assert (first / directory.WEIGHTS_FILE).read_bytes() != old
    (first / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds other files"):
        fit(adapter=PREFIX, overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]


def test_a_run_that_breaks_leaves_nothing(tiny_base: Path, tmp_path: Path) -> None:
    def interrupt(step: Step) -> None:
        if step.number == 2:
            raise KeyboardInterrupt

    config = TrainConfig(model=nf4(tiny_base), adapter=PREFIX, output=tmp_path / "out", num_steps=4)
    with pytest.raises(KeyboardInterrupt):
        train(config, examples=EXAMPLES, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


# --- the command ----------------------------------------------------------------------------------------------------


def test_command_trains(tiny_base: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a = ", "completion": "b"}\n{"text": "weft"}\n')
    options = f"--base {tiny_base} --method lora --rank 2 --target-modules q_proj,v_proj --data {rows} --steps 2"
    result = CliRunner().invoke(command.app, [*options.split(), "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "out: lora, 896 parameters, loss " in result.output
    made = adapter.read(tmp_path / "out", load(tiny_base, Quantization.NF4).shape)
    assert {site.rpartition(".")[2] for site in made.sites} == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method nothing", f"method: must be one of {', '.join(CONFIGS)}, given 'nothing'"),
        ("--method dora --lora-bias", "lora_bias: DoRA has none, given True"),
        ("--method lora --optimizer sgd", "optimizer"),
        ("--method ia3 --rank 8", "--rank: the method ia3 has none"),
        ("--method prefix --target-modules q_proj", "--target-modules: the method prefix has none"),
        ("--method lora --steps 0", "num_steps: must be at least 1, given '0'"),
        ("--method lora", "No such file or directory"),
    ],
)
def test_command_says_what_is_wrong(tiny_base: Path, tmp_path: Path, options: str, message: str) -> None:
    paths = f"--base {tiny_base} --data {tmp_path}/none.jsonl --output {tmp_path}/out"
    result = CliRunner().invoke(command.app, [*options.split(), *paths.split()])
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())


def test_importing_the_command_stays_cheap() -> None:
    code = "import sys, weft_training.command; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("method", ["lora", "vera", "prefix", "bottleneck"])
def test_an_adapter_is_written_in_the_dtype_that_is_asked_for(fit: Callable[..., TrainResult], method: str) -> None:
    whole, half = (
        load_file(
            fit(dtype.value, adapter=USUAL[method], num_steps=2, save_dtype=dtype).output / directory.WEIGHTS_FILE
        )
        for dtype in (SaveDtype.FLOAT32, SaveDtype.BFLOAT16)
    )
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    assert {name: tensor.bfloat16() for name, tensor in whole.items()}.keys() == half.keys()
    for name, tensor in half.items():
        assert tensor.dtype is torch.bfloat16
        assert torch.equal(tensor, whole[name].bfloat16())
