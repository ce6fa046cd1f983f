from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    STOP: _ClassVar[FinishReason]
    LENGTH: _ClassVar[FinishReason]
    CANCELLED: _ClassVar[FinishReason]
    ERROR: _ClassVar[FinishReason]

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    PREFILL: _ClassVar[Role]
    DECODE: _ClassVar[Role]

class LendMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LEND_MODE_UNSPECIFIED: _ClassVar[LendMode]
    COMPUTE: _ClassVar[LendMode]
    CACHED: _ClassVar[LendMode]
    TAKE_OVER: _ClassVar[LendMode]
FINISH_REASON_UNSPECIFIED: FinishReason
STOP: FinishReason
LENGTH: FinishReason
CANCELLED: FinishReason
ERROR: FinishReason
ROLE_UNSPECIFIED: Role
PREFILL: Role
DECODE: Role
LEND_MODE_UNSPECIFIED: LendMode
COMPUTE: LendMode
CACHED: LendMode
TAKE_OVER: LendMode

class SamplingParams(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop_token_ids", "ignore_eos", "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "logprobs")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    logit_bias: _containers.RepeatedCompositeFieldContainer[LogitBias]
    logprobs: int
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., frequency_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., logit_bias: _Optional[_Iterable[_Union[LogitBias, _Mapping]]] = ..., logprobs: _Optional[int] = ...) -> None: ...

class LogitBias(_message.Message):
    __slots__ = ("token_id", "bias")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    bias: float
    def __init__(self, token_id: _Optional[int] = ..., bias: _Optional[float] = ...) -> None: ...

class Choice(_message.Message):
    __slots__ = ("index", "delivered")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    DELIVERED_FIELD_NUMBER: _ClassVar[int]
    index: int
    delivered: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, index: _Optional[int] = ..., delivered: _Optional[_Iterable[int]] = ...) -> None: ...

class TopLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("logprob", "top")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    def __init__(self, logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ...) -> None: ...

class SampledToken(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: TokenLogprob
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[_Union[TokenLogprob, _Mapping]] = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("request_id", "prompt", "sampling", "choices", "tenant", "deadline_s", "session", "priority")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt: _containers.RepeatedScalarFieldContainer[int]
    sampling: SamplingParams
    choices: _containers.RepeatedCompositeFieldContainer[Choice]
    tenant: str
    deadline_s: float
    session: str
    priority: int
    def __init__(self, request_id: _Optional[str] = ..., prompt: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., choices: _Optional[_Iterable[_Union[Choice, _Mapping]]] = ..., tenant: _Optional[str] = ..., deadline_s: _Optional[float] = ..., session: _Optional[str] = ..., priority: _Optional[int] = ...) -> None: ...

class KVLayout(_message.Message):
    __slots__ = ("num_layers", "num_kv_heads", "head_dim", "block_size", "dtype")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    def __init__(self, num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., block_size: _Optional[int] = ..., dtype: _Optional[str] = ...) -> None: ...

class TransportAdvert(_message.Message):
    __slots__ = ("name", "advert")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADVERT_FIELD_NUMBER: _ClassVar[int]
    name: str
    advert: bytes
    def __init__(self, name: _Optional[str] = ..., advert: _Optional[bytes] = ...) -> None: ...

class Capability(_message.Message):
    __slots__ = ("model", "model_fingerprint", "layout", "max_model_len", "num_blocks", "eos_token_ids", "numerics", "hash_version", "protocol_versions", "handoff_versions", "features", "transports")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    HASH_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    model: str
    model_fingerprint: str
    layout: KVLayout
    max_model_len: int
    num_blocks: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    numerics: str
    hash_version: int
    protocol_versions: _containers.RepeatedScalarFieldContainer[int]
    handoff_versions: _containers.RepeatedScalarFieldContainer[int]
    features: _containers.RepeatedScalarFieldContainer[str]
    transports: _containers.RepeatedCompositeFieldContainer[TransportAdvert]
    def __init__(self, model: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., layout: _Optional[_Union[KVLayout, _Mapping]] = ..., max_model_len: _Optional[int] = ..., num_blocks: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., numerics: _Optional[str] = ..., hash_version: _Optional[int] = ..., protocol_versions: _Optional[_Iterable[int]] = ..., handoff_versions: _Optional[_Iterable[int]] = ..., features: _Optional[_Iterable[str]] = ..., transports: _Optional[_Iterable[_Union[TransportAdvert, _Mapping]]] = ...) -> None: ...

class WorkerInfo(_message.Message):
    __slots__ = ("worker_id", "boot_id", "role", "address", "capability")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    CAPABILITY_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    boot_id: str
    role: Role
    address: str
    capability: Capability
    def __init__(self, worker_id: _Optional[str] = ..., boot_id: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., address: _Optional[str] = ..., capability: _Optional[_Union[Capability, _Mapping]] = ...) -> None: ...

class PairBandwidth(_message.Message):
    __slots__ = ("peer", "transport", "bytes_per_s")
    PEER_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    peer: str
    transport: str
    bytes_per_s: float
    def __init__(self, peer: _Optional[str] = ..., transport: _Optional[str] = ..., bytes_per_s: _Optional[float] = ...) -> None: ...

class StepModel(_message.Message):
    __slots__ = ("step_s", "token_s", "pair_s", "row_s", "context_s", "num_prefill_steps", "num_decode_steps")
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    PAIR_S_FIELD_NUMBER: _ClassVar[int]
    ROW_S_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_S_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFILL_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODE_STEPS_FIELD_NUMBER: _ClassVar[int]
    step_s: float
    token_s: float
    pair_s: float
    row_s: float
    context_s: float
    num_prefill_steps: int
    num_decode_steps: int
    def __init__(self, step_s: _Optional[float] = ..., token_s: _Optional[float] = ..., pair_s: _Optional[float] = ..., row_s: _Optional[float] = ..., context_s: _Optional[float] = ..., num_prefill_steps: _Optional[int] = ..., num_decode_steps: _Optional[int] = ...) -> None: ...

class WorkerLoad(_message.Message):
    __slots__ = ("queued_prefill_tokens", "num_running", "num_waiting", "context_tokens", "available_blocks", "total_blocks", "steps", "oldest_waiting_s", "draining", "num_lent_out", "model", "queued_prefill_pairs", "chunk_tokens", "num_arriving")
    QUEUED_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    OLDEST_WAITING_S_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    NUM_LENT_OUT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    QUEUED_PREFILL_PAIRS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ARRIVING_FIELD_NUMBER: _ClassVar[int]
    queued_prefill_tokens: int
    num_running: int
    num_waiting: int
    context_tokens: int
    available_blocks: int
    total_blocks: int
    steps: int
    oldest_waiting_s: float
    draining: bool
    num_lent_out: int
    model: StepModel
    queued_prefill_pairs: int
    chunk_tokens: int
    num_arriving: int
    def __init__(self, queued_prefill_tokens: _Optional[int] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., context_tokens: _Optional[int] = ..., available_blocks: _Optional[int] = ..., total_blocks: _Optional[int] = ..., steps: _Optional[int] = ..., oldest_waiting_s: _Optional[float] = ..., draining: _Optional[bool] = ..., num_lent_out: _Optional[int] = ..., model: _Optional[_Union[StepModel, _Mapping]] = ..., queued_prefill_pairs: _Optional[int] = ..., chunk_tokens: _Optional[int] = ..., num_arriving: _Optional[int] = ...) -> None: ...

class Ledger(_message.Message):
    __slots__ = ("quarantined", "lent", "active", "cached", "free")
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    LENT_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    quarantined: int
    lent: int
    active: int
    cached: int
    free: int
    def __init__(self, quarantined: _Optional[int] = ..., lent: _Optional[int] = ..., active: _Optional[int] = ..., cached: _Optional[int] = ..., free: _Optional[int] = ...) -> None: ...

class CostTerm(_message.Message):
    __slots__ = ("name", "seconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    seconds: float
    def __init__(self, name: _Optional[str] = ..., seconds: _Optional[float] = ...) -> None: ...

class PricedAlternative(_message.Message):
    __slots__ = ("name", "cost_s", "terms")
    NAME_FIELD_NUMBER: _ClassVar[int]
    COST_S_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    name: str
    cost_s: float
    terms: _containers.RepeatedCompositeFieldContainer[CostTerm]
    def __init__(self, name: _Optional[str] = ..., cost_s: _Optional[float] = ..., terms: _Optional[_Iterable[_Union[CostTerm, _Mapping]]] = ...) -> None: ...

class Route(_message.Message):
    __slots__ = ("decode", "prefill", "spares", "holder", "cost_s", "terms", "reason", "alternatives")
    DECODE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    SPARES_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    COST_S_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    decode: str
    prefill: WorkerInfo
    spares: _containers.RepeatedCompositeFieldContainer[WorkerInfo]
    holder: WorkerInfo
    cost_s: float
    terms: _containers.RepeatedCompositeFieldContainer[CostTerm]
    reason: str
    alternatives: _containers.RepeatedCompositeFieldContainer[PricedAlternative]
    def __init__(self, decode: _Optional[str] = ..., prefill: _Optional[_Union[WorkerInfo, _Mapping]] = ..., spares: _Optional[_Iterable[_Union[WorkerInfo, _Mapping]]] = ..., holder: _Optional[_Union[WorkerInfo, _Mapping]] = ..., cost_s: _Optional[float] = ..., terms: _Optional[_Iterable[_Union[CostTerm, _Mapping]]] = ..., reason: _Optional[str] = ..., alternatives: _Optional[_Iterable[_Union[PricedAlternative, _Mapping]]] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("name", "start_s", "end_s", "detail", "worker", "marks")
    NAME_FIELD_NUMBER: _ClassVar[int]
    START_S_FIELD_NUMBER: _ClassVar[int]
    END_S_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    MARKS_FIELD_NUMBER: _ClassVar[int]
    name: str
    start_s: float
    end_s: float
    detail: str
    worker: str
    marks: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, name: _Optional[str] = ..., start_s: _Optional[float] = ..., end_s: _Optional[float] = ..., detail: _Optional[str] = ..., worker: _Optional[str] = ..., marks: _Optional[_Iterable[float]] = ...) -> None: ...

class LeaseCall(_message.Message):
    __slots__ = ("lease_id", "release")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    release: bool
    def __init__(self, lease_id: _Optional[str] = ..., release: _Optional[bool] = ...) -> None: ...

class StatusCall(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainCall(_message.Message):
    __slots__ = ("on",)
    ON_FIELD_NUMBER: _ClassVar[int]
    on: bool
    def __init__(self, on: _Optional[bool] = ...) -> None: ...

class Counter(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("info", "load", "ledger", "counters")
    INFO_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    info: WorkerInfo
    load: WorkerLoad
    ledger: Ledger
    counters: _containers.RepeatedCompositeFieldContainer[Counter]
    def __init__(self, info: _Optional[_Union[WorkerInfo, _Mapping]] = ..., load: _Optional[_Union[WorkerLoad, _Mapping]] = ..., ledger: _Optional[_Union[Ledger, _Mapping]] = ..., counters: _Optional[_Iterable[_Union[Counter, _Mapping]]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("router_id", "running")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    running: _containers.RepeatedCompositeFieldContainer[Resume]
    def __init__(self, router_id: _Optional[str] = ..., running: _Optional[_Iterable[_Union[Resume, _Mapping]]] = ...) -> None: ...

class NextIndex(_message.Message):
    __slots__ = ("choice", "index")
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    choice: int
    index: int
    def __init__(self, choice: _Optional[int] = ..., index: _Optional[int] = ...) -> None: ...

class Resume(_message.Message):
    __slots__ = ("request_id", "epoch", "asked", "next_indexes")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    NEXT_INDEXES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    asked: bytes
    next_indexes: _containers.RepeatedCompositeFieldContainer[NextIndex]
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., asked: _Optional[bytes] = ..., next_indexes: _Optional[_Iterable[_Union[NextIndex, _Mapping]]] = ...) -> None: ...

class TakeFrom(_message.Message):
    __slots__ = ("worker", "epoch")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    worker: WorkerInfo
    epoch: int
    def __init__(self, worker: _Optional[_Union[WorkerInfo, _Mapping]] = ..., epoch: _Optional[int] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("request", "route", "epoch", "take_from", "crashes_left")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TAKE_FROM_FIELD_NUMBER: _ClassVar[int]
    CRASHES_LEFT_FIELD_NUMBER: _ClassVar[int]
    request: Request
    route: Route
    epoch: int
    take_from: TakeFrom
    crashes_left: int
    def __init__(self, request: _Optional[_Union[Request, _Mapping]] = ..., route: _Optional[_Union[Route, _Mapping]] = ..., epoch: _Optional[int] = ..., take_from: _Optional[_Union[TakeFrom, _Mapping]] = ..., crashes_left: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("request_id", "epoch", "reason")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    reason: str
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class UpMessage(_message.Message):
    __slots__ = ("hello", "submit", "cancel", "resume")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    submit: Submit
    cancel: Cancel
    resume: Resume
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., resume: _Optional[_Union[Resume, _Mapping]] = ...) -> None: ...

class TokenChunk(_message.Message):
    __slots__ = ("request_id", "epoch", "first_index", "token_ids", "finish", "error_code", "error_message", "cached_tokens", "spans", "choice", "logprobs", "lost_lenders")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOST_LENDERS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    first_index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish: FinishReason
    error_code: str
    error_message: str
    cached_tokens: int
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    choice: int
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    lost_lenders: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., first_index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., finish: _Optional[_Union[FinishReason, str]] = ..., error_code: _Optional[str] = ..., error_message: _Optional[str] = ..., cached_tokens: _Optional[int] = ..., spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ..., choice: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ..., lost_lenders: _Optional[_Iterable[str]] = ...) -> None: ...

class KVEvents(_message.Message):
    __slots__ = ("seq", "stored", "removed")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    seq: int
    stored: _containers.RepeatedScalarFieldContainer[bytes]
    removed: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, seq: _Optional[int] = ..., stored: _Optional[_Iterable[bytes]] = ..., removed: _Optional[_Iterable[bytes]] = ...) -> None: ...

class KVSnapshot(_message.Message):
    __slots__ = ("seq", "hashes")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    seq: int
    hashes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, seq: _Optional[int] = ..., hashes: _Optional[_Iterable[bytes]] = ...) -> None: ...

class StepMessage(_message.Message):
    __slots__ = ("boot_id", "load", "chunks", "kv_events", "snapshot", "ledger", "taken", "pair_bandwidth")
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    KV_EVENTS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    PAIR_BANDWIDTH_FIELD_NUMBER: _ClassVar[int]
    boot_id: str
    load: WorkerLoad
    chunks: _containers.RepeatedCompositeFieldContainer[TokenChunk]
    kv_events: _containers.RepeatedCompositeFieldContainer[KVEvents]
    snapshot: KVSnapshot
    ledger: Ledger
    taken: _containers.RepeatedScalarFieldContainer[int]
    pair_bandwidth: _containers.RepeatedCompositeFieldContainer[PairBandwidth]
    def __init__(self, boot_id: _Optional[str] = ..., load: _Optional[_Union[WorkerLoad, _Mapping]] = ..., chunks: _Optional[_Iterable[_Union[TokenChunk, _Mapping]]] = ..., kv_events: _Optional[_Iterable[_Union[KVEvents, _Mapping]]] = ..., snapshot: _Optional[_Union[KVSnapshot, _Mapping]] = ..., ledger: _Optional[_Union[Ledger, _Mapping]] = ..., taken: _Optional[_Iterable[int]] = ..., pair_bandwidth: _Optional[_Iterable[_Union[PairBandwidth, _Mapping]]] = ...) -> None: ...

class LentBlock(_message.Message):
    __slots__ = ("index", "block_id", "generation", "digest", "num_tokens")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    BLOCK_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    index: int
    block_id: int
    generation: int
    digest: bytes
    num_tokens: int
    def __init__(self, index: _Optional[int] = ..., block_id: _Optional[int] = ..., generation: _Optional[int] = ..., digest: _Optional[bytes] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class Shard(_message.Message):
    __slots__ = ("rank", "worker_id", "boot_id", "token_start", "token_end")
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_END_FIELD_NUMBER: _ClassVar[int]
    rank: int
    worker_id: str
    boot_id: str
    token_start: int
    token_end: int
    def __init__(self, rank: _Optional[int] = ..., worker_id: _Optional[str] = ..., boot_id: _Optional[str] = ..., token_start: _Optional[int] = ..., token_end: _Optional[int] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("lease_id", "request_id", "epoch", "ttl_s", "shards")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    request_id: str
    epoch: int
    ttl_s: float
    shards: _containers.RepeatedCompositeFieldContainer[Shard]
    def __init__(self, lease_id: _Optional[str] = ..., request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., ttl_s: _Optional[float] = ..., shards: _Optional[_Iterable[_Union[Shard, _Mapping]]] = ...) -> None: ...

class RunningAttempt(_message.Message):
    __slots__ = ("router_id", "epoch", "choice")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    epoch: int
    choice: int
    def __init__(self, router_id: _Optional[str] = ..., epoch: _Optional[int] = ..., choice: _Optional[int] = ...) -> None: ...

class PrefillCall(_message.Message):
    __slots__ = ("request", "epoch", "reader", "held_blocks", "lease_ttl_s", "mode", "running", "holder", "router_id")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    READER_FIELD_NUMBER: _ClassVar[int]
    HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEASE_TTL_S_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    request: Request
    epoch: int
    reader: str
    held_blocks: int
    lease_ttl_s: float
    mode: LendMode
    running: RunningAttempt
    holder: WorkerInfo
    router_id: str
    def __init__(self, request: _Optional[_Union[Request, _Mapping]] = ..., epoch: _Optional[int] = ..., reader: _Optional[str] = ..., held_blocks: _Optional[int] = ..., lease_ttl_s: _Optional[float] = ..., mode: _Optional[_Union[LendMode, str]] = ..., running: _Optional[_Union[RunningAttempt, _Mapping]] = ..., holder: _Optional[_Union[WorkerInfo, _Mapping]] = ..., router_id: _Optional[str] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("lease",)
    LEASE_FIELD_NUMBER: _ClassVar[int]
    lease: Lease
    def __init__(self, lease: _Optional[_Union[Lease, _Mapping]] = ...) -> None: ...

class Published(_message.Message):
    __slots__ = ("lease_id", "rank", "blocks", "span", "last", "layers")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SPAN_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    rank: int
    blocks: _containers.RepeatedCompositeFieldContainer[LentBlock]
    span: Span
    last: bool
    layers: Layers
    def __init__(self, lease_id: _Optional[str] = ..., rank: _Optional[int] = ..., blocks: _Optional[_Iterable[_Union[LentBlock, _Mapping]]] = ..., span: _Optional[_Union[Span, _Mapping]] = ..., last: _Optional[bool] = ..., layers: _Optional[_Union[Layers, _Mapping]] = ...) -> None: ...

class Layers(_message.Message):
    __slots__ = ("start", "end")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("index", "choice", "token")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    index: int
    choice: int
    token: SampledToken
    def __init__(self, index: _Optional[int] = ..., choice: _Optional[int] = ..., token: _Optional[_Union[SampledToken, _Mapping]] = ...) -> None: ...

class Alive(_message.Message):
    __slots__ = ("steps",)
    STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: int
    def __init__(self, steps: _Optional[int] = ...) -> None: ...

class ChoiceState(_message.Message):
    __slots__ = ("index", "output", "logprobs", "next_draw", "finish", "grammar", "draft")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    NEXT_DRAW_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    index: int
    output: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    next_draw: int
    finish: FinishReason
    grammar: bytes
    draft: bytes
    def __init__(self, index: _Optional[int] = ..., output: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ..., next_draw: _Optional[int] = ..., finish: _Optional[_Union[FinishReason, str]] = ..., grammar: _Optional[bytes] = ..., draft: _Optional[bytes] = ...) -> None: ...

class HandoffState(_message.Message):
    __slots__ = ("version", "request_id", "epoch", "num_prompt_tokens", "num_computed_tokens", "cached_tokens", "spans", "tenant", "sampling", "choices", "deadline_s", "converted")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    CONVERTED_FIELD_NUMBER: _ClassVar[int]
    version: int
    request_id: str
    epoch: int
    num_prompt_tokens: int
    num_computed_tokens: int
    cached_tokens: int
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    tenant: str
    sampling: SamplingParams
    choices: _containers.RepeatedCompositeFieldContainer[ChoiceState]
    deadline_s: float
    converted: bool
    def __init__(self, version: _Optional[int] = ..., request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., num_prompt_tokens: _Optional[int] = ..., num_computed_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ..., tenant: _Optional[str] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., choices: _Optional[_Iterable[_Union[ChoiceState, _Mapping]]] = ..., deadline_s: _Optional[float] = ..., converted: _Optional[bool] = ...) -> None: ...

class PrefillEvent(_message.Message):
    __slots__ = ("accepted", "published", "first_token", "alive", "handoff_state")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_STATE_FIELD_NUMBER: _ClassVar[int]
    accepted: Accepted
    published: Published
    first_token: FirstToken
    alive: Alive
    handoff_state: HandoffState
    def __init__(self, accepted: _Optional[_Union[Accepted, _Mapping]] = ..., published: _Optional[_Union[Published, _Mapping]] = ..., first_token: _Optional[_Union[FirstToken, _Mapping]] = ..., alive: _Optional[_Union[Alive, _Mapping]] = ..., handoff_state: _Optional[_Union[HandoffState, _Mapping]] = ...) -> None: ...

class ReleaseAnswer(_message.Message):
    __slots__ = ("good", "reason")
    GOOD_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    good: bool
    reason: str
    def __init__(self, good: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...
