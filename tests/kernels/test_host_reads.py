"""Operations that read a device's tensors on the host, or copy tensors there, are refused; others pass.

On a CPU, whose memory the host can read, every read counts. Tensors on "meta" are out of the host's reach, as on a GPU,
so copies between the two show there.
"""

from collections.abc import Callable

from weft.methods.bnb import Linear8bitLt

import numpy as np
import pytest
import torch
from torch import Tensor

from weft.kernels import host_reads
from weft.kernels.capture import NotCapturable

CPU, META = torch.device("cpu"), torch.device("meta")
X, AT, MASK = torch.randn(4, 3), torch.tensor([0, 2]), torch.tensor([True, False, True, True])
COUNTS = torch.tensor([1, 2, 1, 1])


def _written(change: Callable[[Tensor], object]) -> Tensor:
    mine = X.clone()
    change(mine)
    return mine


READS: dict[str, Callable[[], object]] = {
    "item": lambda: X.sum().item(),
    "float": lambda: float(X[0, 0]),
    "index": lambda: list(range(AT[1])),  # type: ignore[arg-type]
    "if": lambda: 1 if X.sum() > 0 else 0,
    "tolist": lambda: X.tolist(),
    "numpy": lambda: X.numpy(),
    "asarray": lambda: np.asarray(X),
    "cpu": lambda: X.cpu(),
    "to": lambda: X.to("cpu"),
    "to by name": lambda: X.to(device="cpu"),
    "format": lambda: f"{X[0, 0]:.2f}",
    "print": lambda: repr(X),
    "in": lambda: 1.0 in X,
    "equal": lambda: torch.equal(X, X),
    "allclose": lambda: torch.allclose(X, X),
    "nonzero": lambda: MASK.nonzero(),
    "where": lambda: torch.where(MASK),
    "argwhere": lambda: torch.argwhere(MASK),
    "mask": lambda: X[MASK],
    "bytes as mask": lambda: X[MASK.byte()],
    "masked_select": lambda: X.masked_select(X > 0),
    "written at a mask": lambda: _written(lambda mine: mine.__setitem__(MASK, torch.zeros(3, 3))),
    "added at a mask": lambda: X.index_put((MASK,), torch.zeros(()), accumulate=True),
    "unique": lambda: AT.unique(),
    "bincount": lambda: AT.bincount(),
    "repeat_interleave": lambda: X.repeat_interleave(COUNTS, 0),
    "slice": lambda: X[: AT[1]],
    "select": lambda: X[AT[1]],
    "arange": lambda: torch.arange(AT[1]),  # type: ignore[call-overload]
    "inverse": lambda: torch.linalg.inv(torch.eye(3)),
}
SENDS: dict[str, Callable[[], object]] = {
    "tensor": lambda: torch.tensor([1.0, 2.0]),
    "scalar tensor": lambda: torch.tensor(2.0),
    "as_tensor": lambda: torch.as_tensor([1.0]),
    "asarray": lambda: torch.asarray(np.ones(3)),
    "new_tensor": lambda: X.new_tensor([1.0]),
    "list as index": lambda: X[[0, 2]],
    "list in an index": lambda: X[:, [0, 2]],
    "array as index": lambda: X[np.array([0, 2])],
    "written at a list": lambda: _written(lambda mine: mine.__setitem__([0, 2], 1.0)),
}
STAYS: dict[str, Callable[[], object]] = {
    "arithmetic": lambda: 2 * X @ X.T + 1.0,
    "constants": lambda: torch.zeros(3) + torch.full((3,), 2.0) + torch.arange(3),
    "dtype": lambda: X.to(torch.bfloat16).float(),
    "device of another": lambda: X.to(AT.device),
    "index": lambda: X[AT],
    "index and slices": lambda: X[None, 1:, ..., AT],
    "embedding": lambda: torch.nn.functional.embedding(AT, X),
    "written": lambda: _written(lambda mine: mine.__setitem__((slice(None), 0), 1.0)),
    "written at an index": lambda: _written(lambda mine: mine.__setitem__(AT, torch.zeros(2, 3))),
    "filled at a mask": lambda: _written(lambda mine: mine.__setitem__(MASK, 0.0)),
    "masked_fill": lambda: X.masked_fill(X > 0, 0.0),
    "where": lambda: torch.where(X > 0, X, 0.0),
    "repeat_interleave of a known size": lambda: X.repeat_interleave(COUNTS, 0, output_size=5),
    "shapes": lambda: X.reshape(X.shape[0] * len(X[0]), -1) if X.numel() > 3 and X.is_floating_point() else X,
    "attention": lambda: torch.nn.functional.scaled_dot_product_attention(*(X[None, None],) * 3),
    "norm": lambda: torch.nn.functional.rms_norm(X, (3,)),
    "search": lambda: torch.searchsorted(COUNTS.cumsum(0), AT, right=True),
    "sort": lambda: X.sort(-1)[0].topk(2, -1),
    "as_tensor of one": lambda: torch.as_tensor(X),
}


def _name(case: object) -> str | None:
    return case if isinstance(case, str) else None


@pytest.mark.parametrize(("name", "function"), [*READS.items(), *SENDS.items()], ids=_name)
def test_what_needs_the_host_is_refused(name: str, function: Callable[[], object]) -> None:
    with torch.inference_mode(), pytest.raises(NotCapturable, match=r"test_host_reads\.py:\d+"):
        host_reads.prove(function, CPU)


@pytest.mark.parametrize(("name", "function"), STAYS.items(), ids=_name)
def test_what_stays_on_the_device_passes(name: str, function: Callable[[], object]) -> None:
    with torch.inference_mode():
        host_reads.prove(function, CPU)
    with torch.no_grad():
        host_reads.prove(function, CPU)


def test_after_a_proof_nobody_watches() -> None:
    with pytest.raises(NotCapturable):
        host_reads.prove(lambda: X.tolist(), CPU)
    assert len(X.tolist()) == 4
    assert AT[0].item() == 0


def test_an_error_that_is_caught_counts() -> None:
    def careful() -> object:
        try:
            return X.sum().item()
        except Exception:
            return 0.0

    with pytest.raises(NotCapturable, match="scalar"):
        host_reads.prove(careful, CPU)


def test_an_error_of_the_function_comes_out_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        host_reads.prove(lambda: 1 // 0, CPU)


MOVES: dict[str, Callable[[Tensor], object]] = {
    "to by name": lambda there: there.to("cpu"),
    "to": lambda there: there.to(CPU),
    "to another's place": lambda there: there.to(X),
    "cpu": lambda there: there.cpu(),
    "tolist": lambda there: there.tolist(),
    "copied here": lambda there: torch.empty(4, 3).copy_(there),
    "copied there": lambda there: there.copy_(X),
    "sent": lambda there: X.to(there.device),
    "sent to another's place": lambda there: X.to(there),
    "index": lambda there: there[AT],
    "index beside a slice": lambda there: there[:, AT],
    "written at an index": lambda there: there.index_put((AT,), torch.zeros((), device=there.device)),
    "numbers": lambda there: there + torch.tensor([1.0], device=there.device),
    "list": lambda there: there[[0, 1]],
    "if": lambda there: bool(there.sum() > 0),
}
OF_THE_HOST: dict[str, Callable[[Tensor], object]] = {
    "index": lambda there: there[torch.zeros(2, dtype=torch.int64, device=there.device)],
    "one number": lambda there: there * torch.tensor(2.0),  # taken when it is said
    "reads of its own": lambda there: there + len(X.tolist()) + X.sum().item(),
    "branches of its own": lambda there: there[: int(AT[1])] if X[MASK].sum() > -99 else there,
    "makes of its own": lambda there: (torch.tensor([1.0, 2.0]).cpu(), there)[1],
    "to itself": lambda there: there.to(torch.bfloat16).to(there.device),
    "filled at a mask": lambda there: there.index_put(
        (torch.zeros(4, dtype=torch.bool, device=there.device),), torch.tensor(0.0)
    ),
}


@pytest.mark.parametrize("moves", MOVES.values(), ids=MOVES)
def test_what_moves_between_host_and_device_is_refused(moves: Callable[[Tensor], object]) -> None:
    """Among them an index that lies on the host."""
    with torch.inference_mode(), pytest.raises(NotCapturable):
        host_reads.prove(lambda: moves(torch.empty(4, 3, device=META)), META)


@pytest.mark.parametrize("stays", OF_THE_HOST.values(), ids=OF_THE_HOST)
def test_what_the_host_does_with_its_own_passes(stays: Callable[[Tensor], object]) -> None:
    with torch.inference_mode():
        host_reads.prove(lambda: stays(torch.empty(4, 3, device=META)), META)


@pytest.mark.parametrize(("threshold", "reads"), [(6.0, True), (0.0, False)])
def test_kernels_that_are_written_in_python_are_looked_into(threshold: float, reads: bool) -> None:
    """bitsandbytes checks on the host for outliers, inside an operation of its own, unless that is switched off."""
    linear = Linear8bitLt(64, 32, bias=False, has_fp16_weights=False, threshold=threshold).to("cpu").eval()
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        linear(x)
        if reads:
            with pytest.raises(NotCapturable, match="is_nonzero"):
                host_reads.prove(lambda: linear(x), CPU)
        else:
            host_reads.prove(lambda: linear(x), CPU)
