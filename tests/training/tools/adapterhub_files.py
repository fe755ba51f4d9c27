"""Bottleneck adapters as AdapterHub's `adapters` library saves them, and the networks that they are."""

from collections.abc import Mapping
from typing import Any

import torch
from tests.methods.textbook_bottleneck import Network
from torch import Tensor

KINDS: dict[str, tuple[dict[str, Any], str]] = {  # config beyond the defaults of that library, and the form it means
    "double_seq_bn": (
        {"mh_adapter": True, "output_adapter": True, "non_linearity": "swish", "reduction_factor": 16},
        "serial",
    ),
    "seq_bn": (
        {
            "mh_adapter": False,
            "output_adapter": True,
            "non_linearity": "relu",
            "reduction_factor": {"0": 4, "default": 8},
            "original_ln_before": True,
        },
        "sum",
    ),
    "par_bn": (
        {
            "mh_adapter": False,
            "output_adapter": True,
            "non_linearity": "relu",
            "reduction_factor": 2,
            "is_parallel": True,
            "scaling": 4.0,
            "init_weights": "mam_adapter",
        },
        "residual",
    ),
    "ln_before": (
        {
            "mh_adapter": True,
            "output_adapter": True,
            "non_linearity": "gelu",
            "reduction_factor": {"1": 6.5},
            "ln_before": True,
            "leave_out": [0],
        },
        "serial",
    ),
}
_HUB_DEFAULTS: dict[str, Any] = {
    "original_ln_before": False,
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "init_weights": "bert",
    "is_parallel": False,
    "scaling": 1.0,
    "use_gating": False,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "cross_adapter": False,
    "leave_out": [],
    "dropout": 0.0,
    "phm_layer": False,
    "phm_dim": 4,
    "phm_bias": True,
    "stochastic_depth": 0.0,
}


def made(kind: str, layers: str) -> tuple[dict[str, Any], dict[str, Tensor], Mapping[tuple[int, str], Network]]:
    """Config and tensors as that library saves them, and the networks they are."""
    inner = {**_HUB_DEFAULTS, **KINDS[kind][0]}
    torch.manual_seed(5)
    tensors: dict[str, Tensor] = {}
    networks: dict[tuple[int, str], Network] = {}
    activation = {"swish": "silu"}.get(inner["non_linearity"], inner["non_linearity"])
    for layer in {0, 1} - set(inner["leave_out"]):
        factor = inner["reduction_factor"]
        if isinstance(factor, dict):
            factor = factor.get(str(layer), factor.get("default"))
        for place, sublayer, is_there in (
            ("attention_adapters", "attention", inner["mh_adapter"]),
            ("output_adapters", "mlp", inner["output_adapter"]),
        ):
            if not is_there:
                continue
            network = Network(64, int(64 // factor), activation, has_norm=inner["ln_before"])
            for parameter in network.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
            network.scaling = inner["scaling"]
            networks[layer, sublayer] = network
            prefix = f"{layers}.{layer}.{place}.adapters.reverse"
            matrix = "adapter_down.1" if inner["ln_before"] else "adapter_down.0"
            names = {"down": [matrix], "up": ["adapter_up"], "norm": ["adapter_down.0", "adapter_norm_before"]}
            for name, parameter in network.state_dict().items():
                module, _, part = name.partition(".")
                tensors.update({f"{prefix}.{hub_name}.{part}": parameter for hub_name in names[module]})
    config = {
        "config": inner,
        "hidden_size": 64,
        "model_class": "LlamaAdapterModel",
        "model_name": "somewhere/else",
        "model_type": "llama",
        "name": "reverse",
        "version": "adapters.1.3.0",
    }
    return config, tensors, networks
