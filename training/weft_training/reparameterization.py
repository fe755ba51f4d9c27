"""Reparameterizations: a module that makes the virtual positions from rows R is trained instead of the positions.

    prefix, MLP (Li and Liang 2021, section 4.3):    P = W₂ tanh(W₁ R)
    prefix, MLPs (the owner's document, 2.3):        P_K = W₂ tanh(W₁ R), P_V = W₄ tanh(W₃ R)
    P-tuning, MLP (PEFT's default):                  rows = W₃ relu(W₂ relu(W₁ R))
    P-tuning, LSTM (Liu et al. 2021, section 3):     rows = W₂ relu(W₁ LSTM(R)), both directions

Every W has a bias, R starts standard normal, and widths default to PEFT's. The owner's R is [l, d_r] with d_r < d:
`rows_size` is d_r. Deviation from PEFT: no dropout in the LSTM. Only the module's output is written at the end; the
module itself is dropped.
"""

import torch
from torch import Tensor, nn

from weft.methods.prefix.math import PrefixConfig, PrefixParams
from weft.methods.prompt.math import PromptParams
from weft.methods.protocol import BaseShape
from weft.methods.ptuning.math import Encoder, PtuningConfig


class PrefixMlp(nn.Module):
    """R [P, d_r] through one hidden layer to all layers' keys and values, or through one layer to each."""

    def __init__(self, config: PrefixConfig, base: BaseShape) -> None:
        super().__init__()
        width = base.num_kv_heads * base.head_dim
        hidden = config.encoder_hidden_size or width
        self.shape = (config.num_virtual_tokens, base.num_layers, 2, base.num_kv_heads, base.head_dim)
        rows_size = config.rows_size or width
        num_networks = 2 if config.separate else 1
        self.rows = nn.Parameter(torch.randn(config.num_virtual_tokens, rows_size))
        out = 2 // num_networks * base.num_layers * width
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(rows_size, hidden), nn.Tanh(), nn.Linear(hidden, out)) for _ in range(num_networks)
        )

    def forward(self) -> PrefixParams:
        made = [mlp(self.rows) for mlp in self.mlps]  # keys and values by layer, or keys, and values
        if len(made) == 1:
            return PrefixParams(made[0].view(self.shape))
        num_positions, num_layers, _, num_heads, head_dim = self.shape
        keys, values = (part.view(num_positions, num_layers, num_heads, head_dim) for part in made)
        return PrefixParams(torch.stack([keys, values], dim=2))


class PromptEncoder(nn.Module):
    """R [P, E] through two hidden layers, or as a sequence, read from both ends, then through one hidden layer."""

    def __init__(self, config: PtuningConfig, base: BaseShape) -> None:
        super().__init__()
        width = base.embedding_size
        hidden = config.encoder_hidden_size or width
        self.rows = nn.Parameter(torch.randn(config.num_virtual_tokens, width))
        self.lstm = None
        if config.encoder is Encoder.LSTM:
            self.lstm = nn.LSTM(width, hidden, num_layers=config.encoder_num_layers, bidirectional=True)
            layers = [nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width)]
        else:
            layers = [nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
            layers.append(nn.Linear(hidden, width))
        self.mlp = nn.Sequential(*layers)

    def forward(self) -> PromptParams:
        read: Tensor = self.rows if self.lstm is None else self.lstm(self.rows)[0]  # [P, E], or [P, 2 · hidden]
        return PromptParams(self.mlp(read))


def begin(config: object, base: BaseShape, generator: torch.Generator) -> nn.Module | None:
    """Return the untrained module that a method's config needs, or None if the parameters themselves are trained."""
    # torch's modules draw from the global generator, so seed it from ours for that time.
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        match config:
            case PrefixConfig(prefix_projection=True):
                return PrefixMlp(config, base)
            case PtuningConfig():
                return PromptEncoder(config, base)
            case _:
                return None
