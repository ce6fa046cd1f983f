"""The configuration: one frozen tree, and the only reader of the environment.

A setting is named here and nowhere else: CLI help and the docs page are generated from this tree. Sources, later
wins: defaults, the YAML file, `--set a.b=c`. At most 80 settings.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from baton.core.errors import ConfigError

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
KVDtype = Literal["fp32", "bf16", "int8"]
TransportName = Literal["shm", "nixl", "tcp", "ucx", "nccl"]
PolicyName = Literal[
    "cost", "round_robin", "least_requests", "least_work", "prefix_affinity", "sglang", "llm_d", "dynamo", "lmetric"
]


def _fit_one_process(names: tuple[TransportName, ...]) -> tuple[TransportName, ...]:
    if len(set(names)) < len(names):
        raise ValueError("An entry is there twice")
    if {"nixl", "ucx"} <= set(names):
        raise ValueError("nixl and ucx each bring a UCX library of their own, and one process cannot hold both. "
                         "Keep one of them")
    return names


class _Tree(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Tree):
    name: str = Field(
        "smollm2-135m",
        description="Model to serve: a name `baton model pull` knows, a .gguf file, or a Hugging Face directory.",
    )
    served_name: str | None = Field(None, description="Name clients use; default: `name`, or the file's stem.")
    cache_dir: str | None = Field(
        None, description="Where pulled and converted models live; default: $BATON_CACHE or ~/.cache/baton."
    )


class EngineConfig(_Tree):
    block_size: Literal[16, 32, 48, 64] = Field(
        16, description="Tokens per KV block. Must be equal on all workers of a fleet."
    )
    num_blocks: Count | None = Field(None, description="KV blocks per worker; default: kv_memory_bytes / block bytes.")
    kv_memory_bytes: Count = Field(1 << 30, description="KV memory per worker when num_blocks is not set, in bytes.")
    max_model_len: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Longest prompt + output in tokens; default: the model's context, cut to what the pool holds."
    )
    threads: Count | None = Field(
        None, description="Compute threads per worker; default: the machine's cores, shared equally by the workers that a command starts. More threads than free cores is slower, not faster."
    )
    backend: Literal["auto", "host", "torch"] = Field(
        "auto", description="What computes: our C++ kernels (host), plain torch, or host with torch where it cannot be had."
    )
    quantization: Literal["auto", "fp32", "bf16", "int8", "int4"] = Field(
        "auto", description="Format of the weight matrices. auto: bf16 with the host kernels, fp32 in torch. int8: a scale per output channel; int4: per group of 32."
    )
    kv_dtype: KVDtype | None = Field(
        None, description="Element type of KV; int8 has a scale per token and head. Default: fp32 with fp32 weights, else bf16."
    )
    isa: Literal["auto", "amx", "avx512", "avx2", "scalar"] = Field(
        "auto", description="Instruction set of the host kernels; default: the CPU's best. Results differ in the last bits, so a fleet needs one."
    )

class PoolConfig(_Tree):
    replicas: Annotated[int, Field(ge=0, le=64)] = Field(1, description="Workers in this pool.")
    max_step_tokens: Count = Field(512, description="Token budget of one engine step.")
    max_chunk_tokens: Count = Field(512, description="Most prompt tokens of one sequence in one step.")
    max_sequences: Count = Field(64, description="Sequences running at once.")
    max_waiting: Count = Field(256, description="Requests queued before the worker refuses (RESOURCE_EXHAUSTED).")
    kv_dtype: KVDtype | None = Field(
        None, description="Element type of KV on these workers; default: engine.kv_dtype. Pools that differ need handoff.convert_kv."
    )


class HandoffConfig(_Tree):
    transports: Annotated[tuple[TransportName, ...], Field(min_length=1), AfterValidator(_fit_one_process)] = Field(
        ("shm", "nixl", "tcp"),
        description="Transports a worker offers, of shm, tcp, nixl, ucx and nccl (nixl or ucx, not both); which one a "
        "pair uses is measured.",
    )
    lease_ttl_s: Seconds = Field(10.0, description="A lease ends this long after its last renewal.")
    pull_timeout_s: Seconds = Field(
        5.0, description="Deadline of one pull; then its destination blocks are quarantined."
    )
    alive_interval_s: Seconds = Field(0.5, description="A lender without news says so this often.")
    peer_timeout_s: Seconds = Field(3.0, description="No sign of life for this long: the peer is lost.")
    stall_timeout_s: Seconds = Field(30.0, description="A worker that lives but completes no engine step for this long is given up by who waits for its KV, and gets no new requests. Longer than the longest step.")
    release_timeout_s: Seconds = Field(1.0, description="Deadline of a lease's release and renewal calls.")
    layer_parts: Count = Field(4, description="The last chunk of a prompt is published in so many parts, as its layers are done.")
    quarantine_poll_s: Seconds = Field(0.25, description="How often quarantined pulls are looked at.")
    quarantine_max_s: Seconds = Field(10.0, description="A pull quarantined for longer gets its peer fenced.")
    quarantine_cap: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="Share of the pool in quarantine above which peers are fenced at once."
    )
    probe_bytes: Count = Field(4 << 20, description="Bytes moved per transport in the measured handshake.")
    data_bind: str = Field("127.0.0.1", description="Address the tcp transport listens on.")
    convert_kv: bool = Field(
        False, description="Pair workers that store KV in different formats (fp32, bf16, int8): the reader converts, and "
        "the answer is near that of one worker alone, not equal to it."
    )
    strict: bool = Field(False, description="Make every fallback an error instead of a counter and a log line.")


PRIORITIES = ("high", "normal", "low")
"""Classes of requests. While one of a higher class waits, none of a lower one goes."""


class TenantConfig(_Tree):
    """One tenant's terms."""

    priority: Literal["high", "normal", "low"] = "normal"
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Its share of tokens against others of its class, while both wait."""
    requests_per_min: Count | None = None
    tokens_per_min: Count | None = None


class RouterConfig(_Tree):
    host: str = Field("127.0.0.1", description="Address the HTTP and gRPC servers bind.")
    http_port: Annotated[int, Field(ge=0, le=65_535)] = Field(8000, description="HTTP port; 0 takes a free one.")
    grpc_port: Annotated[int, Field(ge=0, le=65_535)] = Field(8001, description="gRPC port; 0 takes a free one.")
    request_timeout_s: Seconds = Field(600.0, description="Deadline of a request that names none.")
    max_attempts: Count = Field(8, description="Attempts of one request that failures may cost before it fails; a refusal costs none.")
    retry_ratio: Annotated[float, Field(ge=0, le=1)] = Field(0.2, description="Retry budget: retries per admitted request, over all requests. A retry beyond it waits.")
    retry_per_s: Annotated[float, Field(gt=0)] = Field(10.0, description="Retries per second that the budget always allows.")
    quarantine_s: Seconds = Field(600.0, description="A request aboard two crashed workers is failed, and its like refused for this long.")
    fetch_min_tokens: Annotated[int, Field(ge=0)] = Field(256, description="A worker pulls a prompt's cached prefix from another holder when that one has at least so many tokens more.")
    heartbeat_s: Seconds = Field(0.5, description="Workers report at least this often.")
    orphan_window_s: Seconds = Field(5.0, description="A worker works on for so long for a router whose stream broke, and remembers for so long what ended: the router, or another one, may go on from there.")
    suspect_s: Seconds = Field(1.5, description="A silent worker gets no new requests after this.")
    dead_s: Seconds = Field(3.0, description="A silent worker is dead after this; its requests go elsewhere.")
    policy: PolicyName = Field(
        "cost", description="How workers are chosen. cost is Baton's; the others are what it is compared with (docs/routing.md)."
    )
    local_prefill_max_tokens: Annotated[int, Field(ge=0)] = Field(
        64, description="Uncached suffixes up to this length are computed on the decode worker. Policy cost goes by prices instead; 0 tells it, too, to compute nothing there that a prefill worker could."
    )
    assumed_prefill_tokens_per_s: Annotated[float, Field(gt=0)] = Field(
        2000.0, description="Prefill speed priced until a worker has measured its own."
    )
    assumed_bandwidth_bytes_per_s: Annotated[float, Field(gt=0)] = Field(
        1e9, description="Pair bandwidth priced until a pair has measured its own."
    )
    client_buffer_tokens: Count = Field(
        4096, description="Undelivered tokens per request before a slow client is cancelled."
    )
    max_body_bytes: Count = Field(8 << 20, description="Largest HTTP body accepted.")
    max_inflight: Count = Field(512, description="Requests in the router at once; more get 429.")
    worker_queue_s: Seconds = Field(10.0, description="A request waits in the router, not on a worker, while every worker that could compute its prompt has so many seconds of others' prompts before it. Less is fairer and fits a tight limit on TTFT; more lets prices see the whole queue.")
    max_queued: Count = Field(256, description="Requests that may wait in the router for a worker with room; more get 429.")
    max_queue_wait_s: Seconds = Field(30.0, description="A request that would wait in the router for longer than this, or past its deadline, gets 429 at once.")
    tenants: dict[str, TenantConfig] = Field(
        {}, description="Terms by tenant, \"*\" for all others: priority (high, normal, low), weight, requests_per_min, tokens_per_min."
    )


class ClusterConfig(_Tree):
    pool: Literal["ray", "local"] = Field(
        "ray", description="Who runs the workers: Ray actors, or plain local processes."
    )
    ray_address: str | None = Field(None, description="Ray cluster to join; default: start one on this machine.")
    redis_url: str | None = Field(
        None, description="Redis or Valkey to use (redis://host:port/0, unix:///path); default: an embedded one."
    )
    worker_host: str = Field("127.0.0.1", description="Address workers bind and announce.")
    drain_timeout_s: Seconds = Field(30.0, description="A worker told to stop lets its requests move away for this long.")
    start_timeout_s: Seconds = Field(120.0, description="Longest wait for a worker to come up.")
    registry_poll_s: Seconds = Field(0.5, description="How often the registry is read for new workers.")


class Config(_Tree):
    model: ModelConfig = Field(default_factory=ModelConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    prefill: PoolConfig = Field(default_factory=PoolConfig)
    decode: PoolConfig = Field(default_factory=lambda: PoolConfig(max_step_tokens=256, max_chunk_tokens=128))
    handoff: HandoffConfig = Field(default_factory=HandoffConfig)
    router: RouterConfig = Field(default_factory=RouterConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)

    def engine_of(self, pool: PoolConfig) -> EngineConfig:
        """The engine of one pool's workers."""
        return self.engine.model_copy(update={"kv_dtype": pool.kv_dtype}) if pool.kv_dtype else self.engine


def settings() -> Iterator[tuple[str, Any, str]]:
    """(dotted name, default, description) of every setting, for help texts and the docs page."""
    defaults = Config()
    for section, field in Config.model_fields.items():
        tree = field.annotation
        assert isinstance(tree, type)
        assert issubclass(tree, BaseModel)
        for name, leaf in tree.model_fields.items():
            yield f"{section}.{name}", getattr(getattr(defaults, section), name), leaf.description or ""


def load(document: Mapping[str, Any] | None = None, overrides: Iterable[str] = ()) -> Config:
    """Build the tree from a parsed YAML document and `a.b=c` overrides (values are JSON, else plain text).

    Raises ConfigError naming the wrong setting and, for a typo, the nearest right one. Nothing is ignored.
    """
    merged = Config().model_dump(mode="json")
    for section, values in (document or {}).items():
        if section not in merged and not (isinstance(values, Mapping) and values):
            close = difflib.get_close_matches(str(section), merged, 1, 0.5)
            hint = f"Did you mean {close[0]!r}?" if close else f"There are {', '.join(merged)}."
            raise ConfigError(f"there is no section {section!r}. {hint}", str(section))
        if not isinstance(values, Mapping):
            raise ConfigError(f"{section} must hold settings, not {values!r}.{_nearest(section)}", str(section))
        for name, value in values.items():
            _put(merged, f"{section}.{name}", value)
    for item in overrides:
        dotted, sep, text = item.partition("=")
        if not sep:
            raise ConfigError(f"--set {item!r} is not of the form section.name=value.")
        _put(merged, dotted.strip(), _parse(text))
    try:
        return Config.model_validate(merged)
    except ValidationError as e:
        first = e.errors()[0]
        dotted = ".".join(str(p) for p in first["loc"][:2])
        what = first["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"{dotted} = {first['input']!r} is wrong: {what}. See `baton config show`.", dotted
        ) from None


def _put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    section, _, name = dotted.partition(".")
    if section not in tree or name not in tree[section]:
        raise ConfigError(f"there is no setting {dotted!r}.{_nearest(dotted)}", dotted)
    tree[section][name] = value


def _nearest(dotted: str) -> str:
    """A hint: the section's own setting first, then one that reads alike as a whole, then that name elsewhere."""
    section, _, name = dotted.rpartition(".")
    names = [n for n, _, _ in settings()]
    own = {n.partition(".")[2]: n for n in names if n.startswith(f"{section}.")}
    anywhere = {n.partition(".")[2]: n for n in reversed(names)}
    whole = dict(zip(names, names, strict=True))
    for text, known, cutoff in ((name, own, 0.6), (dotted, whole, 0.8), (name, anywhere, 0.6)):
        if close := difflib.get_close_matches(text, known, 1, cutoff):
            return f" Did you mean {known[close[0]]!r}?"
    return " `baton config show` lists them all."


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


# ---- the environment ---------------------------------------------------------------------------------------------


def config_path() -> str | None:
    """$BATON_CONFIG: the YAML file used when --config is not given."""
    return os.environ.get("BATON_CONFIG") or None


def data_dir() -> Path | None:
    """$BATON_DATA: public traces and the like, for tests and benches. None where it does not exist."""
    path = Path(os.environ.get("BATON_DATA", "../shared"))
    return path if path.is_dir() else None


def cache_dir(config: ModelConfig | None = None) -> Path:
    """Where models are kept: model.cache_dir, $BATON_CACHE, ~/.cache/baton."""
    chosen = (config and config.cache_dir) or os.environ.get("BATON_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "baton"


def compiler() -> str | None:
    """$CXX: the C++ compiler of the host library, instead of the first that is found."""
    return os.environ.get("CXX") or None


def child_env(threads: int) -> dict[str, str]:
    """Environment of a worker process: ours, plus one OpenMP team of the stated size (barriers on contended cores
    cost 50x) and quiet libraries. Values the user set win."""
    ours = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "NIXL_LOG_LEVEL": "ERROR",
        "UCX_WARN_UNUSED_ENV_VARS": "n",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # else a peer that dies or freezes ends our process, too
        "TORCH_NCCL_ENABLE_MONITORING": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**ours, **os.environ}


def apply_network_env(config: Config) -> None:
    """A worker that is reached over loopback opens no other port: UCX would listen on every interface it finds.
    Before nixl is loaded. A value the user set wins."""
    hosts = (config.handoff.data_bind, config.cluster.worker_host)
    if all(host.startswith("127.") or host in {"localhost", "::1"} for host in hosts):
        os.environ.setdefault("UCX_NET_DEVICES", "lo")


def apply_child_env(threads: int) -> None:
    """The same, for a process that was started by somebody else (a Ray actor), before it imports torch."""
    for name, value in child_env(threads).items():
        os.environ.setdefault(name, value)
