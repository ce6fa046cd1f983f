from baton.wire import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_STATE_UNSPECIFIED: _ClassVar[WorkerState]
    CONNECTING: _ClassVar[WorkerState]
    READY: _ClassVar[WorkerState]
    SUSPECT: _ClassVar[WorkerState]
    DEAD: _ClassVar[WorkerState]
    DRAINING: _ClassVar[WorkerState]
WORKER_STATE_UNSPECIFIED: WorkerState
CONNECTING: WorkerState
READY: WorkerState
SUSPECT: WorkerState
DEAD: WorkerState
DRAINING: WorkerState

class FleetWorker(_message.Message):
    __slots__ = ("info", "state", "load", "ledger", "silent_s", "in_flight", "index_blocks", "kept_apart")
    INFO_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    SILENT_S_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    INDEX_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KEPT_APART_FIELD_NUMBER: _ClassVar[int]
    info: _worker_pb2.WorkerInfo
    state: WorkerState
    load: _worker_pb2.WorkerLoad
    ledger: _worker_pb2.Ledger
    silent_s: float
    in_flight: int
    index_blocks: int
    kept_apart: _containers.RepeatedCompositeFieldContainer[KeptApart]
    def __init__(self, info: _Optional[_Union[_worker_pb2.WorkerInfo, _Mapping]] = ..., state: _Optional[_Union[WorkerState, str]] = ..., load: _Optional[_Union[_worker_pb2.WorkerLoad, _Mapping]] = ..., ledger: _Optional[_Union[_worker_pb2.Ledger, _Mapping]] = ..., silent_s: _Optional[float] = ..., in_flight: _Optional[int] = ..., index_blocks: _Optional[int] = ..., kept_apart: _Optional[_Iterable[_Union[KeptApart, _Mapping]]] = ...) -> None: ...

class KeptApart(_message.Message):
    __slots__ = ("peer", "difference")
    PEER_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    peer: str
    difference: str
    def __init__(self, peer: _Optional[str] = ..., difference: _Optional[str] = ...) -> None: ...

class FleetPair(_message.Message):
    __slots__ = ("prefill", "decode", "transport", "bytes_per_s", "refused")
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    prefill: str
    decode: str
    transport: str
    bytes_per_s: float
    refused: str
    def __init__(self, prefill: _Optional[str] = ..., decode: _Optional[str] = ..., transport: _Optional[str] = ..., bytes_per_s: _Optional[float] = ..., refused: _Optional[str] = ...) -> None: ...

class FleetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FleetStatus(_message.Message):
    __slots__ = ("router_id", "http_endpoint", "grpc_endpoint", "model", "workers", "pairs", "in_flight", "counters")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    HTTP_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    GRPC_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    http_endpoint: str
    grpc_endpoint: str
    model: str
    workers: _containers.RepeatedCompositeFieldContainer[FleetWorker]
    pairs: _containers.RepeatedCompositeFieldContainer[FleetPair]
    in_flight: int
    counters: _containers.RepeatedCompositeFieldContainer[_worker_pb2.Counter]
    def __init__(self, router_id: _Optional[str] = ..., http_endpoint: _Optional[str] = ..., grpc_endpoint: _Optional[str] = ..., model: _Optional[str] = ..., workers: _Optional[_Iterable[_Union[FleetWorker, _Mapping]]] = ..., pairs: _Optional[_Iterable[_Union[FleetPair, _Mapping]]] = ..., in_flight: _Optional[int] = ..., counters: _Optional[_Iterable[_Union[_worker_pb2.Counter, _Mapping]]] = ...) -> None: ...

class TraceRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class TraceAttempt(_message.Message):
    __slots__ = ("epoch", "route", "outcome")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    route: _worker_pb2.Route
    outcome: str
    def __init__(self, epoch: _Optional[int] = ..., route: _Optional[_Union[_worker_pb2.Route, _Mapping]] = ..., outcome: _Optional[str] = ...) -> None: ...

class RequestTrace(_message.Message):
    __slots__ = ("request_id", "attempts", "spans", "prompt_tokens", "cached_tokens", "output_tokens", "finished", "arrived_s", "zero_s", "total_s")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    ARRIVED_S_FIELD_NUMBER: _ClassVar[int]
    ZERO_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempts: _containers.RepeatedCompositeFieldContainer[TraceAttempt]
    spans: _containers.RepeatedCompositeFieldContainer[_worker_pb2.Span]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    finished: bool
    arrived_s: float
    zero_s: float
    total_s: float
    def __init__(self, request_id: _Optional[str] = ..., attempts: _Optional[_Iterable[_Union[TraceAttempt, _Mapping]]] = ..., spans: _Optional[_Iterable[_Union[_worker_pb2.Span, _Mapping]]] = ..., prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., finished: _Optional[bool] = ..., arrived_s: _Optional[float] = ..., zero_s: _Optional[float] = ..., total_s: _Optional[float] = ...) -> None: ...

class NewestRequest(_message.Message):
    __slots__ = ("count",)
    COUNT_FIELD_NUMBER: _ClassVar[int]
    count: int
    def __init__(self, count: _Optional[int] = ...) -> None: ...

class NewestTraces(_message.Message):
    __slots__ = ("traces",)
    TRACES_FIELD_NUMBER: _ClassVar[int]
    traces: _containers.RepeatedCompositeFieldContainer[RequestTrace]
    def __init__(self, traces: _Optional[_Iterable[_Union[RequestTrace, _Mapping]]] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class RequestRecord(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("worker_id", "on")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ON_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    on: bool
    def __init__(self, worker_id: _Optional[str] = ..., on: _Optional[bool] = ...) -> None: ...

class DrainProgress(_message.Message):
    __slots__ = ("worker_id", "draining", "requests", "leases", "drained", "peers")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    draining: bool
    requests: int
    leases: int
    drained: bool
    peers: int
    def __init__(self, worker_id: _Optional[str] = ..., draining: _Optional[bool] = ..., requests: _Optional[int] = ..., leases: _Optional[int] = ..., drained: _Optional[bool] = ..., peers: _Optional[int] = ...) -> None: ...
