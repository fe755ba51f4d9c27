"""AdapterService: translates between proto and the application's own types."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from weft.adapters.identifiers import AdapterId, AdapterReference, check_digest, name_of, tenant_of
from weft.adapters.registry import AdapterState, Change, Version
from weft.api.access.principal import caller_scope
from weft.api.application import Application
from weft.api.lifecycle import Outcome, Registered, Registration
from weft.api.memory import Residence
from weft.api.servicers.upload import Messages, Upload, check_files, discard
from weft.errors import AdapterNotFound, AdapterUnusable, InvalidRequest, WeftError, draining_error
from weft.methods.catalog import KINDS
from weft.v1 import adapter_pb2, adapter_service_pb2_grpc
from weft.v1 import adapter_service_pb2 as pb

_PAGE_SIZE_DEFAULT, _PAGE_SIZE_MAX = 100, 1000
_SHOWN_AT_ONCE = 100  # without giving way on the event loop, about 2 ms
_STATES = {state: adapter_pb2.AdapterState.Value(f"ADAPTER_STATE_{state.name}") for state in AdapterState}
_RESIDENCES = {place: adapter_pb2.AdapterResidency.Value(f"ADAPTER_RESIDENCY_{place.name}") for place in Residence}
_OUTCOMES = {one: pb.RegisterOutcome.Value(f"REGISTER_OUTCOME_{one.name}") for one in Outcome}
_CHANGES = {change: pb.AdapterChange.Value(f"ADAPTER_CHANGE_{change.name}") for change in Change}


class AdapterServicer(adapter_service_pb2_grpc.AdapterServiceServicer):
    """The part of the contract about adapters."""

    def __init__(self, application: Application) -> None:
        self._work = application.work
        self._lifecycle = application.lifecycle
        self._base_model = application.model.base.shape.name
        self._limits, self._server = application.config.adapters, application.config.server
        self._quotas = application.quotas
        # Nothing is read from a waiting upload, so gRPC's flow control holds its bytes back at the client.
        self._receiving = asyncio.Semaphore(self._server.uploads_max)

    async def RegisterAdapter(self, request: pb.RegisterAdapterRequest, context: Any) -> pb.RegisterAdapterResponse:
        wanted = self._registration(request)
        if request.HasField("content_digest"):
            check_digest(request.content_digest, field="content_digest", reason="CHECKSUM_INVALID")
            wanted = replace(wanted, content_digest=request.content_digest)
        with self._quotas.register_calls.held():
            version, outcome = await self._lifecycle.register_from(replace(wanted, source=request.source))
        return pb.RegisterAdapterResponse(adapter=self._adapter(version), outcome=_OUTCOMES[outcome])

    async def UploadAdapter(self, request_iterator: Messages, context: Any) -> pb.UploadAdapterResponse:
        try:
            with self._lifecycle.tenant_quotas.upload(caller_scope().tenant), self._quotas.uploads.held():
                async with self._receiving:
                    version, outcome = await self._upload(request_iterator)
        except WeftError:
            most, idle_s = self._limits.file_bytes_max, self._server.upload_idle_timeout_s
            await discard(request_iterator, bytes_max=most, timeout_s=idle_s)
            raise
        return pb.UploadAdapterResponse(adapter=self._adapter(version), outcome=_OUTCOMES[outcome])

    async def UnregisterAdapter(
        self, request: pb.UnregisterAdapterRequest, context: Any
    ) -> pb.UnregisterAdapterResponse:
        adapter_id = self._adapter_id(request.adapter_id)
        _check_enum("mode", request.mode, pb.UnregisterMode)
        timeout_s = self._server.unregister_timeout_default_s
        if request.HasField("timeout"):
            timeout_s = request.timeout.seconds + request.timeout.nanos / 1e9
            rule, most = "must be 0 or more seconds", self._server.unregister_timeout_max_s
            if not 0 <= timeout_s <= most:
                raise InvalidRequest.rule("TIMEOUT_INVALID", "timeout", rule, limit=most, given=timeout_s)
        try:
            with self._quotas.register_calls.held():
                removed = await self._lifecycle.unregister(
                    adapter_id,
                    cancel=request.mode == pb.UNREGISTER_MODE_CANCEL,
                    timeout_s=timeout_s,
                    expected_digest=request.expected_digest if request.HasField("expected_digest") else None,
                )
        except AdapterNotFound:
            if not request.allow_missing:
                raise
            return pb.UnregisterAdapterResponse()
        return pb.UnregisterAdapterResponse(
            freed_device_bytes=removed.freed.device_bytes,
            freed_host_bytes=removed.freed.host_bytes,
            freed_kv_blocks=removed.freed.kv_blocks,
            cancelled_requests=removed.cancelled_requests,
        )

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: Any) -> pb.GetAdapterResponse:
        reference = caller_scope().reference(request.adapter_id, base_model=self._base_model)
        version = self._lifecycle.registry.require(reference)
        return pb.GetAdapterResponse(adapter=self._adapter(version))

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Any) -> pb.ListAdaptersResponse:
        _check_enum("state", request.state, adapter_pb2.AdapterState)
        if request.method and request.method not in KINDS:
            known = ", ".join(sorted(KINDS))
            raise InvalidRequest.rule("METHOD_UNKNOWN", "method", "is not a method", limit=known, given=request.method)
        scope, after = caller_scope(), AdapterId("")
        if request.page_token:
            try:
                after = scope.adapter_id(request.page_token)
            except InvalidRequest:
                rule = "is not one that this server gave"
                raise InvalidRequest.rule("PAGE_TOKEN_INVALID", "page_token", rule, given=request.page_token) from None
        size = min(request.page_size or _PAGE_SIZE_DEFAULT, _PAGE_SIZE_MAX)
        states = [state for state, number in _STATES.items() if request.state in (0, number)]
        matching = (
            version
            for version in self._lifecycle.registry.after(after)
            if scope.includes(version.adapter_id)
            and version.state in states
            and (not request.method or version.info.method == request.method)
        )
        page = list(itertools.islice(matching, size + 1))
        following = scope.shown(page[size - 1].adapter_id) if len(page) > size else ""
        response = pb.ListAdaptersResponse(next_page_token=following)
        for index, version in enumerate(page[:size], 1):
            response.adapters.append(self._adapter(version))
            if index % _SHOWN_AT_ONCE == 0:
                await asyncio.sleep(0)
        return response

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Any) -> pb.LoadAdapterResponse:
        _check_enum("residency", request.residency, adapter_pb2.AdapterResidency)
        pin = request.pin if request.HasField("pin") else None
        to_host = request.residency == adapter_pb2.ADAPTER_RESIDENCY_HOST
        if request.residency == adapter_pb2.ADAPTER_RESIDENCY_DISK or (to_host and pin):
            rule, given = "must be DEVICE, or HOST without a pin", adapter_pb2.AdapterResidency.Name(request.residency)
            raise InvalidRequest.rule("RESIDENCY_INVALID", "residency", rule, given=given)
        adapter_id = self._adapter_id(request.adapter_id)
        with self._quotas.load_calls.held():
            version = await self._lifecycle.memory.load(adapter_id, to_device=not to_host, pin=pin)
        return pb.LoadAdapterResponse(adapter=self._adapter(version))

    async def UnloadAdapter(self, request: pb.UnloadAdapterRequest, context: Any) -> pb.UnloadAdapterResponse:
        _check_enum("residency", request.residency, adapter_pb2.AdapterResidency)
        if request.residency == adapter_pb2.ADAPTER_RESIDENCY_DEVICE:
            raise InvalidRequest.rule("RESIDENCY_INVALID", "residency", "must be HOST or DISK", given="DEVICE")
        keep_host = request.residency == adapter_pb2.ADAPTER_RESIDENCY_HOST
        with self._quotas.load_calls.held():
            version = await self._lifecycle.memory.unload(self._adapter_id(request.adapter_id), keep_host=keep_host)
        return pb.UnloadAdapterResponse(adapter=self._adapter(version))

    async def LiftQuarantine(self, request: pb.LiftQuarantineRequest, context: Any) -> pb.LiftQuarantineResponse:
        expected = request.expected_digest if request.HasField("expected_digest") else None
        version = await self._lifecycle.lift_quarantine(self._adapter_id(request.adapter_id), expected)
        return pb.LiftQuarantineResponse(adapter=self._adapter(version))

    async def WatchAdapters(
        self, request: pb.WatchAdaptersRequest, context: Any
    ) -> AsyncIterator[pb.WatchAdaptersResponse]:
        response, scope = pb.WatchAdaptersResponse, caller_scope()
        with self._quotas.watches.held(), self._lifecycle.watches.watching() as watch:
            registry = self._lifecycle.registry
            for version in registry:  # as it is now; what changes from now on is in the watch
                if scope.includes(version.adapter_id) and registry.current(version.adapter_id) is version:
                    yield response(change=pb.ADAPTER_CHANGE_EXISTING, adapter=self._adapter(version))
            yield response(change=pb.ADAPTER_CHANGE_SYNCED)
            while (event := await watch.next()) is not None:
                change, version = event
                if scope.includes(version.adapter_id):
                    yield response(change=_CHANGES[change], adapter=self._adapter(version))
        raise draining_error()

    async def _upload(self, messages: Messages) -> Registered:
        upload = Upload(
            messages,
            self._work,
            idle_timeout_s=self._server.upload_idle_timeout_s,
            bytes_per_s_min=self._server.upload_bytes_per_s_min,
        )
        header = await upload.header()
        wanted = self._registration(header)
        check_files(header, self._limits)
        with self._quotas.staging_bytes.held(sum(file.size_bytes for file in header.files)):
            async with self._lifecycle.upload() as staging:
                await upload.receive(header, staging)
                return await self._lifecycle.register_upload(wanted, staging)

    def _adapter_id(self, value: str) -> AdapterId:
        return caller_scope().adapter_id(value, base_model=self._base_model)

    def _registration(self, request: pb.RegisterAdapterRequest | pb.UploadHeader) -> Registration:
        adapter_id = self._adapter_id(request.adapter_id)
        expected = request.expected_digest if request.HasField("expected_digest") else None
        if expected:
            check_digest(expected, field="expected_digest")
        return Registration(
            adapter_id=adapter_id,
            replace=request.replace,
            expected_digest=expected,
            pin=request.pin,
            validate_only=request.validate_only,
        )

    def _adapter(self, version: Version) -> adapter_pb2.Adapter:
        info, place = version.info, self._lifecycle.memory.place_of(version.digest)
        scope, tenant = caller_scope(), tenant_of(version.adapter_id)
        adapter = adapter_pb2.Adapter(
            adapter_id=scope.shown(version.adapter_id),
            digest=version.digest,
            method=info.method,
            state=_STATES[version.state],
            state_reason=version.state_reason,
            residency=_RESIDENCES[place],
            pinned=version.pinned,
            size_bytes=info.size_bytes,
            resident_bytes=0 if place is Residence.DISK else info.packed_bytes,
            rank=info.rank,
            num_virtual_tokens=info.num_virtual_tokens,
            invocation_tokens=info.invocation_tokens,
            modules=info.modules,
            num_parameters=info.num_parameters,
            in_flight_requests=len(version.leases),
            base_model_name=info.base_model_name,
            trained_quantization=info.trained_held_as,
            draining_versions=[
                adapter_pb2.DrainingVersion(digest=old.digest, in_flight_requests=len(old.leases))
                for old in self._lifecycle.registry.versions(version.adapter_id)[1:]
            ],
            experts=[self._expert(expert, tenant) for expert in info.experts],
        )
        adapter.create_time.FromMilliseconds(round(version.create_time_s * 1e3))
        if version.last_used_time_s is not None:
            adapter.last_used_time.FromMilliseconds(round(version.last_used_time_s * 1e3))
        return adapter

    def _expert(self, expert: AdapterReference, tenant: str) -> adapter_pb2.Expert:
        try:
            version = self._lifecycle.registry.require_expert(expert, tenant=tenant)
            adapter_id, available = name_of(version.adapter_id), True
        except AdapterUnusable:
            adapter_id, available = expert.adapter_id, False
        return adapter_pb2.Expert(digest=expert.digest or "", adapter_id=adapter_id, available=available)


def _check_enum(field: str, value: int, enum: Any) -> None:
    if value not in enum.values():
        raise InvalidRequest.rule("ENUM_UNKNOWN", field, "is not a value of its enum", given=value)
