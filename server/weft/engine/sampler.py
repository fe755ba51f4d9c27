"""From logits to tokens, each request by its own parameters and its own random numbers.

Order of the filters, as Hugging Face applies them: repetition penalty, temperature, top-k, top-p (of what top-k left),
min-p; then one draw by inverting the cumulative distribution at the request's next uniform number. One draw per token
and no shared generator: a seed gives the same tokens whatever else is in the batch, also after a preemption.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from weft.engine.request import Request, SampledToken, TokenLogprob

_LARGEST = torch.finfo(torch.float32).max


def sample(logits: Tensor, requests: Sequence[Request]) -> list[SampledToken | None]:
    """The next token of each request; None where its row of `logits` [B, V] is not finite."""
    logits = logits.float()
    finite = torch.isfinite(logits).all(-1)
    raw = logits
    logits = _penalize_repetition(logits, requests)
    logits = _hold_back_stops(logits, requests)
    chosen = logits.argmax(-1)  # [B]
    drawing = [row for row, request in enumerate(requests) if request.params.temperature > 0]
    if drawing:
        rows = torch.tensor(drawing, device=logits.device)
        chosen[rows] = _draw(logits[rows], [requests[row] for row in drawing])
    tokens = chosen.tolist()
    logprobs = _logprobs(raw, chosen, requests)
    return [
        SampledToken(token, *logprobs.get(row, (None, ()))) if ok else None
        for row, (token, ok) in enumerate(zip(tokens, finite.tolist(), strict=True))
    ]


def _penalize_repetition(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Divide positive and multiply negative logits of tokens seen in prompt or output (Keskar et al. 2019, CTRL)."""
    penalized = [row for row, request in enumerate(requests) if request.params.repetition_penalty != 1.0]
    if penalized:
        logits = logits.clone()
    for row in penalized:
        request = requests[row]
        penalty = request.params.repetition_penalty
        seen = torch.tensor(sorted({*request.prompt_token_ids, *request.output}), device=logits.device)
        values = logits[row, seen]
        changed = torch.where(values > 0, values / penalty, values * penalty)
        logits[row, seen] = changed.clamp(-_LARGEST, _LARGEST)
    return logits


def _hold_back_stops(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Keep stop tokens from being drawn while a request has fewer than min_new_tokens."""
    held = [row for row, request in enumerate(requests) if len(request.output) < request.params.min_new_tokens]
    if held:
        logits = logits.clone()
        for row in held:
            logits[row, sorted(requests[row].params.stop_token_ids)] = float("-inf")
    return logits


def _draw(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """One token per row of `logits` [B, V]; the row's uniform number is taken from its request."""
    device = logits.device

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    params = [request.params for request in requests]
    # From the largest down: dividing by a small temperature must not overflow.
    scaled = (logits - logits.amax(-1, keepdim=True)) / column([p.temperature for p in params])
    probabilities, tokens = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)  # [B, V]
    vocab_size = logits.shape[-1]
    keep = torch.arange(vocab_size, device=device) < column([p.top_k or vocab_size for p in params])
    left = probabilities * keep
    reached = left.cumsum(-1, dtype=torch.float64)  # float32 would cut the tail of a large vocabulary
    keep &= reached - left < column([p.top_p for p in params]) * reached[:, -1:]
    keep &= probabilities >= column([p.min_p for p in params]) * probabilities[:, :1]
    keep[:, 0] = True
    cumulative = (probabilities * keep).cumsum(-1, dtype=torch.float64)
    uniform = torch.tensor([request.random.random() for request in requests], dtype=torch.float64, device=device)
    index = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
    last_kept = keep.sum(-1, keepdim=True) - 1  # kept tokens are a prefix of the sorted row
    return tokens.gather(-1, index.minimum(last_kept))[:, 0]


def _logprobs(
    logits: Tensor, chosen: Tensor, requests: Sequence[Request]
) -> dict[int, tuple[float, tuple[TokenLogprob, ...]]]:
    """By row, for requests that ask: the chosen token's log-probability and the alternatives."""
    rows = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
    if not rows:
        return {}
    logprobs = logits[rows].log_softmax(-1)
    count = max(requests[row].params.logprobs or 0 for row in rows)
    values, tokens = logprobs.topk(count, -1) if count else (logprobs[:, :0], chosen[rows][:, None][:, :0])
    own = logprobs.gather(-1, chosen[rows][:, None])[:, 0].tolist()
    result = {}
    for i, (row, value_row, token_row) in enumerate(zip(rows, values.tolist(), tokens.tolist(), strict=True)):
        wanted = requests[row].params.logprobs or 0
        top = tuple(map(TokenLogprob, token_row[:wanted], value_row[:wanted]))
        result[row] = (own[i], top)
    return result
