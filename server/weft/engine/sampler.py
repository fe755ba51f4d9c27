"""Sample tokens from logits, each request by its own parameters and its own random numbers.

Filters apply in the order of Hugging Face: repetition penalty, temperature, top-k, top-p (of what top-k left), min-p.
Then one draw inverts the cumulative distribution at the request's next uniform number. There is one draw per token and
no shared generator, so a seed gives the same tokens whatever else is in the batch, even after a preemption.

The requests' parameters are gathered on the host and go to the logits' device in one piece; the chosen tokens come back
in one piece. In between, the host does not wait for the device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from weft.engine.request import Request, SampledToken, TokenLogprob
from weft.kernels.device import IN_PLACE, Transfer

_NOT_FINITE = -1  # instead of a token
_LARGEST = torch.finfo(torch.float32).max


class SamplingTensors(NamedTuple):
    """Sampling parameters of a step's requests as tensors. Cells count along the flattened logits [B · V]."""

    seen: Tensor  # int64 [N]: cells of tokens with a penalty
    penalties: Tensor  # float32 [N]
    held: Tensor  # int64 [N]: cells of stop tokens that cannot be drawn yet
    drawing: Tensor  # int64 [D]: rows that are drawn, in order; the others take the largest
    filters: Tensor  # float32 [4, D]: temperature, top-k (V for none), top-p, min-p
    uniform: Tensor  # float64 [D]: each drawn row's random number in [0, 1)
    asked: Tensor  # int64 [A]: rows whose log-probabilities are returned


@torch.inference_mode()
def sample(logits: Tensor, requests: Sequence[Request], transfer: Transfer = IN_PLACE) -> list[SampledToken | None]:
    """Return the next token of each request; None if its row of `logits` [B, V] is not finite.

    transfer: the way to the logits' device.
    """
    finite = (logits * 0).sum(-1) == 0  # [B]; inf · 0 and nan · 0 are nan: five times faster than isfinite
    host = _sampling_tensors(requests, logits.shape[-1])
    if host is None:
        largest = logits.float().argmax(-1)  # in bfloat16 it takes four times as long
        tokens = transfer.to_host(torch.where(finite, largest, _NOT_FINITE))
        return [None if token == _NOT_FINITE else SampledToken(token) for token in tokens.tolist()]
    sampling = SamplingTensors(*transfer.to_device(host))
    raw = logits = logits.float()
    if len(sampling.seen):
        logits = _penalize_repetition(logits, sampling.seen, sampling.penalties)
    if len(sampling.held):
        logits = logits.clone(memory_format=torch.contiguous_format)
        logits.view(-1).index_fill_(0, sampling.held, float("-inf"))
    chosen = logits.argmax(-1)  # [B]
    if len(sampling.drawing):
        drawn = logits if len(sampling.drawing) == len(logits) else logits[sampling.drawing]
        chosen = chosen.index_copy(0, sampling.drawing, _draw(drawn, sampling.filters, sampling.uniform))
    made = [torch.where(finite, chosen, _NOT_FINITE).int()]
    if len(sampling.asked):
        num_top = max(request.params.logprobs or 0 for request in requests)
        made.append(_logprobs(raw[sampling.asked], chosen[sampling.asked], num_top).view(-1))
    tokens, *logged = transfer.to_host(torch.cat(made)).split([len(part) for part in made])
    logprobs = _read_logprobs(logged[0].view(len(host.asked), -1), host.asked.tolist(), requests) if logged else {}
    return [
        None if token == _NOT_FINITE else SampledToken(token, *logprobs.get(row, (None, ())))
        for row, token in enumerate(tokens.tolist())
    ]


def _sampling_tensors(requests: Sequence[Request], vocab_size: int) -> SamplingTensors | None:
    """Gather the parameters; None if every request takes the largest logit and needs nothing else."""
    seen: list[int] = []
    penalties: list[float] = []
    held: list[int] = []
    drawing: list[tuple[int, Request]] = []
    asked: list[int] = []
    for row, request in enumerate(requests):
        params = request.params
        if params.repetition_penalty != 1.0:
            tokens = {*request.prompt_token_ids, *request.output}
            seen += [row * vocab_size + token for token in tokens]
            penalties += [params.repetition_penalty] * len(tokens)
        if len(request.output) < params.min_new_tokens:
            held += [row * vocab_size + token for token in params.stop_token_ids]
        if params.temperature > 0:
            drawing.append((row, request))
        if params.logprobs is not None:
            asked.append(row)
    if not (seen or held or drawing or asked):
        return None
    drawn = [request.params for _, request in drawing]
    filters = [[p.temperature, float(p.top_k or vocab_size), p.top_p, p.min_p] for p in drawn]
    return SamplingTensors(
        seen=torch.tensor(seen, dtype=torch.int64),
        penalties=torch.tensor(penalties, dtype=torch.float32),
        held=torch.tensor(held, dtype=torch.int64),
        drawing=torch.tensor([row for row, _ in drawing], dtype=torch.int64),
        filters=torch.tensor(filters, dtype=torch.float32).view(len(drawn), 4).T.contiguous(),
        uniform=torch.tensor([request.random.random() for _, request in drawing], dtype=torch.float64),
        asked=torch.tensor(asked, dtype=torch.int64),
    )


def _penalize_repetition(logits: Tensor, seen: Tensor, penalties: Tensor) -> Tensor:
    """Divide positive and multiply negative logits of tokens in the prompt or the output (Keskar et al. 2019, CTRL)."""
    logits = logits.clone(memory_format=torch.contiguous_format)
    values = logits.view(-1)[seen]
    changed = torch.where(values > 0, values / penalties, values * penalties)
    logits.view(-1).index_copy_(0, seen, changed.clamp(-_LARGEST, _LARGEST))
    return logits


def _draw(logits: Tensor, filters: Tensor, uniform: Tensor) -> Tensor:
    """Draw one token per row of `logits` [D, V]."""
    temperature, top_k, top_p, min_p = filters[..., None]  # [D, 1] each
    # Subtract the largest first, because dividing by a small temperature must not overflow.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    probabilities, tokens = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)  # [D, V]
    keep = torch.arange(logits.shape[-1], device=logits.device) < top_k
    left = probabilities * keep
    reached = left.cumsum(-1, dtype=torch.float64)  # float32 would cut the tail of a large vocabulary
    keep &= reached - left < top_p * reached[:, -1:]
    keep &= probabilities >= min_p * probabilities[:, :1]
    keep[:, 0] = True
    cumulative = (probabilities * keep).cumsum(-1, dtype=torch.float64)
    index = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
    last_kept = keep.sum(-1, keepdim=True) - 1  # kept tokens are a prefix of the sorted row
    return tokens.gather(-1, index.minimum(last_kept))[:, 0]


def _logprobs(logits: Tensor, chosen: Tensor, num_top: int) -> Tensor:
    """Return from rows [A, V] the log-probabilities of the chosen tokens and of the best, and the best tokens.

    In int32 [A, 1 + 2 · num_top]; the bits of a log-probability are those of a float32.
    """
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(-1, chosen[:, None])
    values, tokens = logprobs.topk(num_top, -1)
    return torch.cat([torch.cat([own, values], 1).view(torch.int32), tokens.int()], 1)


def _read_logprobs(
    logged: Tensor, asked: Sequence[int], requests: Sequence[Request]
) -> dict[int, tuple[float, tuple[TokenLogprob, ...]]]:
    """Return, by row, the chosen token's log-probability and the alternatives, for requests that ask for them."""
    num_values = 1 + logged.shape[1] // 2
    values, tokens = logged[:, :num_values].view(torch.float32).tolist(), logged[:, num_values:].tolist()
    result = {}
    for row, (own, *best), alternatives in zip(asked, values, tokens, strict=True):
        wanted = requests[row].params.logprobs or 0
        result[row] = (own, tuple(map(TokenLogprob, alternatives[:wanted], best[:wanted])))
    return result
