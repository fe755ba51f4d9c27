"""GenerationService: translates between proto and the application's own types, and does nothing else."""

from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import timedelta
from typing import Any, TypeVar

import grpc.aio
from google.protobuf.message import Message

from weft import __version__
from weft.adapters.registry import Version
from weft.api.access.principal import caller_scope
from weft.api.answer import GenerationEnd, GenerationPart
from weft.api.application import Application
from weft.api.composition import WeightedReference
from weft.api.interceptors import write
from weft.api.mixtures import GateBound, Steering
from weft.api.validation import ChatMessage, GenerationSpec
from weft.config import AdapterLimits, RequestLimits
from weft.engine.request import FinishReason, GateDetail, Gates, SampledToken, TokenLogprob
from weft.engine.token_ranges import OPEN, TokenRange
from weft.methods.catalog import KINDS
from weft.v1 import generation_pb2, generation_service_pb2, generation_service_pb2_grpc, model_pb2

Limits = TypeVar("Limits", model_pb2.AdapterLimits, model_pb2.RequestLimits)

_FINISH_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}


class GenerationServicer(generation_service_pb2_grpc.GenerationServiceServicer):
    """The part of the contract about text."""

    def __init__(self, application: Application) -> None:
        self._application = application
        self._tokenizer: Any = application.model.base.tokenizer
        self._write_timeout_s = application.config.server.stream_write_timeout_s

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.GenerateResponse:
        response = generation_pb2.GenerateResponse()
        async with aclosing(self._parts(request, context)) as parts:
            async for part in parts:
                response.text += part.text
                self._fill(response, request.options, part.tokens)
                if part.end is not None:
                    response.request_id = part.request_id
                    response.finish.CopyFrom(_finish(part.end, request.options))
        return response

    async def StreamGenerate(  # pyright: ignore[reportIncompatibleMethodOverride]  # gRPC takes this form too
        self, request: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Write to the stream directly; one more generator per message is measurably slower."""
        request_id = ""
        async with aclosing(self._parts(request, context)) as parts:
            async for part in parts:
                message = generation_pb2.StreamGenerateResponse()
                if not request_id:
                    message.request_id = request_id = part.request_id
                message.delta.text = part.text
                self._fill(message.delta, request.options, part.tokens)
                if part.end is not None:
                    message.finish.CopyFrom(_finish(part.end, request.options))
                await write(context, message, self._write_timeout_s)

    async def Tokenize(
        self, request: generation_service_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> generation_service_pb2.TokenizeResponse:
        application, kind = self._application, request.WhichOneof("input")
        with application.quotas.tokenize_calls.held():
            tokens = await application.requests.tokenize(
                request.text if kind == "text" else None, _messages(request.messages) if kind == "messages" else None
            )
            # There may be a million of them.
            return await application.work.tokenize(self._tokenized, tokens, request.pieces)

    def _tokenized(self, tokens: list[int], with_pieces: bool) -> generation_service_pb2.TokenizeResponse:
        pieces = self._tokenizer.convert_ids_to_tokens(tokens) if with_pieces else []
        return generation_service_pb2.TokenizeResponse(token_ids=tokens, pieces=pieces, num_tokens=len(tokens))

    async def GetModelInfo(
        self, request: generation_service_pb2.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> generation_service_pb2.GetModelInfoResponse:
        model = self._application.model
        base, config = model.base, self._application.config
        sites = base.shape.sites.values()
        by_shape = Counter((site.suffix, site.in_features, site.out_features) for site in sites)
        info = model_pb2.ModelInfo(
            model_name=base.shape.name,
            base_digest=base.shape.digest,
            quantization=base.quantization.value,
            dtype=model.dtype,
            device=base.device.type,
            max_model_len=base.max_model_len,
            vocab_size=base.vocab_size,
            num_layers=base.shape.num_layers,
            block_size=config.engine.block_size,
            has_chat_template=base.tokenizer.chat_template is not None,
            version=__version__,
            methods=sorted(KINDS),
            sites=[
                model_pb2.Site(suffix=suffix, in_features=size_in, out_features=size_out, num_modules=count)
                for (suffix, size_in, size_out), count in by_shape.items()
            ],
            adapter_limits=_limits(model_pb2.AdapterLimits, model.ingest.limits),
            request_limits=_limits(model_pb2.RequestLimits, config.requests),
            quantized_weight_bytes=model.weights.quantized,
            unquantized_weight_bytes=model.weights.unquantized,
        )
        return generation_service_pb2.GetModelInfoResponse(model=info)

    def _parts(
        self, request: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[GenerationPart, None]:
        return self._application.requests.generate(_spec(request), timeout_s=context.time_remaining())

    def _fill(
        self,
        message: generation_pb2.GenerateResponse | generation_pb2.Delta,
        options: generation_pb2.ResponseOptions,
        tokens: tuple[SampledToken, ...],
    ) -> None:
        if options.token_ids:
            message.token_ids.extend(token.token_id for token in tokens)
        if options.HasField("logprobs"):
            for token in tokens:
                own = TokenLogprob(token.token_id, token.logprob or 0.0)
                entry = message.logprobs.add()
                entry.token.CopyFrom(self._logprob(own))
                entry.top.extend(map(self._logprob, token.top))

    def _logprob(self, token: TokenLogprob) -> generation_pb2.TokenLogprob:
        piece = self._tokenizer.convert_ids_to_tokens(token.token_id) or ""
        return generation_pb2.TokenLogprob(token_id=token.token_id, piece=piece, logprob=token.logprob)


def _spec(request: generation_pb2.GenerateRequest) -> GenerationSpec:
    kind, target = request.WhichOneof("input"), request.WhichOneof("target")
    return GenerationSpec(
        scope=caller_scope(),
        request_id=request.request_id,
        text=request.text if kind == "text" else None,
        token_ids=list(request.token_ids.ids) if kind == "token_ids" else None,
        messages=_messages(request.messages) if kind == "messages" else None,
        adapter_id=request.adapter_id if target == "adapter_id" else None,
        composition=[
            WeightedReference(
                part.adapter_id,
                part.weight if part.HasField("weight") else 1.0,
                tuple(TokenRange(one.begin, one.end if one.HasField("end") else OPEN) for one in part.token_ranges),
            )
            for part in request.composition.adapters
        ]
        if target == "composition"
        else None,
        logprobs=request.options.logprobs if request.options.HasField("logprobs") else None,
        gate_detail=_gate_detail(request.options),
        steering=_steering(request.steering) if request.HasField("steering") else None,
        cache_salt=request.cache_salt,
        **_given(request.sampling),
        **_given(request.stopping),
    )


def _given(message: Message) -> dict[str, Any]:
    """Return the fields that are set, under whose names a GenerationSpec and a GateBound take them."""
    return {field.name: list(value) if field.is_repeated else value for field, value in message.ListFields()}


def _gate_detail(options: generation_pb2.ResponseOptions) -> GateDetail:
    if options.token_gates:
        return GateDetail.TOKENS
    return GateDetail.MEAN if options.gates else GateDetail.NONE


def _steering(steering: generation_pb2.Steering) -> Steering:
    bounds = [GateBound(**_given(bound)) for bound in steering.bounds]
    return Steering(list(steering.restrict), list(steering.mask), bounds)


def _messages(messages: generation_pb2.Messages) -> list[ChatMessage]:
    return [ChatMessage(message.role, message.content) for message in messages.messages]


def _finish(end: GenerationEnd, options: generation_pb2.ResponseOptions) -> generation_pb2.Finish:
    scope = caller_scope()
    finish = generation_pb2.Finish(
        finish_reason=_FINISH_REASONS[end.reason],
        usage=generation_pb2.Usage(
            prompt_tokens=end.request.num_prompt_tokens,
            completion_tokens=end.num_completion_tokens,
            cached_prompt_tokens=end.request.num_cached_tokens,
        ),
        seed=end.request.params.seed,
        effective_adapters=[
            generation_pb2.EffectiveAdapter(
                adapter_id=scope.shown(one.adapter_id), digest=one.digest, method=one.info.method, weight=weight
            )
            for one, weight, _ in end.adapters
        ],
    )
    if end.stop_string is not None:
        finish.stop_string = end.stop_string
    elif end.stop_token_id is not None:
        finish.stop_token_id = end.stop_token_id
    if end.gates is not None:
        finish.gates.extend(_gates(index, expert, end.gates) for index, expert in enumerate(end.experts))
    elif _gate_detail(options) is not GateDetail.NONE and not end.experts:
        finish.gates.extend(
            generation_pb2.AdapterGate(adapter_id=scope.shown(one.adapter_id), digest=one.digest, mean=mean)
            for one, _, mean in end.adapters
        )
    return finish


def _gates(index: int, expert: Version, gates: Gates) -> generation_pb2.AdapterGate:
    means = [layer[index] for layer in gates.mean]
    return generation_pb2.AdapterGate(
        adapter_id=caller_scope().shown(expert.adapter_id),
        digest=expert.digest,
        mean=sum(means) / len(means),
        layer_means=means,
        token_gates=gates.tokens[index] if gates.tokens else (),
    )


def _limits(kind: type[Limits], limits: AdapterLimits | RequestLimits) -> Limits:
    """Return the limits whose names the message has; a Duration is a number of seconds there, named so."""
    values: dict[str, Any] = {}
    for field in kind.DESCRIPTOR.fields:
        if field.message_type is None:
            values[field.name] = getattr(limits, field.name)
        elif (seconds := getattr(limits, f"{field.name}_s")) is not None:
            values[field.name] = timedelta(seconds=seconds)
    return kind(**values)
