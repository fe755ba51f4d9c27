"""`python -m benchmarks.training`: steps per second of our trainer beside PEFT under transformers.Trainer.

Base, precision, examples, order, batch size, LoRA and optimizer are the same. Each turn trains from the start, and the
two sides alternate. Both run transformers' loop; how the adapter meets the base differs, and the attention on a CPU.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import peft
import torch
from rich.console import Console
from rich.progress import Progress
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PrinterCallback, Trainer
from transformers import logging as transformers_logging

from benchmarks import report
from weft.config import ModelConfig, Quantization
from weft.methods.lora.math import LoraConfig
from weft_training import data
from weft_training.config import TrainConfig
from weft_training.data import Example
from weft_training.demo.document import table
from weft_training.demo.tasks import TASKS, Split, examples, prompt
from weft_training.shipped import BASE
from weft_training.trainer import arguments, train

_RANK = 8
_BATCH = 32
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Steps per second of each turn."""

    name: str
    weft: list[float]
    peft: list[float]

    @property
    def ratio(self) -> float:
        """Median of the ratios of each turn."""
        return statistics.median(a / b for a, b in zip(self.weft, self.peft, strict=True))


def _config(quantization: Quantization, output: Path, num_steps: int) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(path=BASE, quantization=quantization, device="cpu", dtype="bfloat16"),
        adapter=LoraConfig(rank=_RANK, alpha=2.0 * _RANK, target_modules=_TARGETS),
        output=output,
        num_steps=num_steps,
        batch_size=_BATCH,
        learning_rate=5e-3,
        overwrite=True,
    )


class _Rows(Dataset[data.Row]):
    def __init__(self, rows: list[data.Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> data.Row:
        return self._rows[index]


def _peft_run(config: TrainConfig, rows: list[Example], scratch: Path) -> float:
    quantized = None
    if config.model.quantization is Quantization.NF4:
        quantized = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16, quantization_config=quantized)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    lora = peft.LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules=list(_TARGETS), task_type="CAUSAL_LM")
    encoded = data.encode(rows, tokenizer, max_length=128)
    trainer = Trainer(
        model=peft.get_peft_model(base, lora),
        args=arguments(config, scratch, use_cpu=True),
        train_dataset=_Rows(encoded),
        data_collator=lambda batch: data.collate(batch, pad_token_id=0),
    )
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    trainer.train()
    return config.num_steps / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="turns per row (default 5)")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of a turn (default 60)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    given = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers|torch|peft")
    rows = [Example(prompt(one), one.output) for one in examples(TASKS["reverse"], 2000, 0, Split.TRAIN)]
    console = Console()
    found = []
    with tempfile.TemporaryDirectory() as directory, Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=2 * (given.repeats + 1))
        for name, quantization in (("LoRA (bfloat16)", Quantization.NONE), ("QLoRA (NF4)", Quantization.NF4)):
            ours, theirs = [], []
            for turn in range(given.repeats + 1):
                progress.update(bar, description=f"{name}, turn {turn} of {given.repeats}")
                config = _config(quantization, Path(directory, "adapter"), given.steps if turn else 3)
                weft_speed = config.num_steps / train(config, examples=rows).seconds
                peft_speed = _peft_run(config, rows, Path(directory, "peft"))
                if turn:  # the first one only warms up
                    ours.append(weft_speed)
                    theirs.append(peft_speed)
                progress.advance(bar)
            found.append(Measured(name=name, weft=ours, peft=theirs))
    cells = [["method", "Weft, steps/s", "PEFT + Trainer, steps/s", "Weft ÷ PEFT"]]
    for one in found:
        speeds = (statistics.median(one.weft), statistics.median(one.peft))
        cells.append([one.name, *(f"{speed:.1f}" for speed in speeds), f"{one.ratio:.2f}"])
    console.print(table(f"demo base, batch {_BATCH}, rank {_RANK} on all linears", cells))
    under = report.conditions("peft", "transformers")
    console.print(report.line(under) + f", median of {given.repeats} turns", highlight=False)
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        record = {"command": "python -m benchmarks.training", **under, "rows": [asdict(one) for one in found]}
        given.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
