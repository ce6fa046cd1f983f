"""The gRPC front: Inference over generation.py, like HTTP, and Admin over fleet and traces. Protobuf on one side, core
and text on the other; errors leave as BatonErrors, which wire/server.py turns into statuses."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from baton.core.errors import InvalidRequest, NotFound
from baton.core.metrics import Metrics, rendered
from baton.core.request import FinishReason, SamplingParams
from baton.core.services import Dial
from baton.core.worker import Role, WorkerLoad
from baton.router.bookmark import Bookmark, Place
from baton.router.dispatch import Dispatcher
from baton.router.exposition import worker_samples
from baton.router.fleet import Fleet, WorkerView
from baton.router.generation import GenerateCall, Generation, Prompt, new_request_id, shown
from baton.router.limits import account_of
from baton.router.link import WorkerState
from baton.router.output import Delta, Usage
from baton.router.recorded import document
from baton.router.trace import RUNNING, TraceRecord
from baton.wire import admin_pb2, admin_pb2_grpc, codec, inference_pb2, inference_pb2_grpc

DEFAULT_MAX_TOKENS = 128
"""As proto/baton/wire/inference.proto documents it."""

DRAIN_TIMEOUT_S = 3.0
"""For a worker's answer. It answers at once, or something is wrong with it."""

OPTIONAL = ("temperature", "top_k", "top_p", "min_p", "seed", "frequency_penalty", "presence_penalty",
            "repetition_penalty", "logprobs")
"""Fields of Sampling whose absence means core's default."""

FINISH = {
    FinishReason.STOP: inference_pb2.GenerateResponse.STOP,
    FinishReason.LENGTH: inference_pb2.GenerateResponse.LENGTH,
}


class InferenceFront(inference_pb2_grpc.InferenceServicer):
    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    async def Generate(self, request: inference_pb2.GenerateRequest,
                       context: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:
        with self._generation.refusals_counted():
            self._check_model(request.model)
            call = _call(request, context.time_remaining(), dict(context.invocation_metadata() or ()))
            resumed = Bookmark.parse(request.resume, "resume") if request.resume else None
            if resumed is not None and request.request_id not in ("", resumed.request_id):
                raise InvalidRequest("resume is of another request than request_id names. Leave that out.", "resume")
        request_id = resumed.request_id if resumed is not None else request.request_id or new_request_id("gen")
        job = await self._generation.prepare(call, request_id, resumed)
        bookmark = resumed or Bookmark(request_id, 0, [Place() for _ in job.request.choices])
        has_all = all(place.ended for place in bookmark.places)
        bookmark.where = lambda: self._generation.whereabouts(request_id)
        async with aclosing(self._generation.run(job)) as deltas:
            async for delta in deltas:
                place = bookmark.places[delta.choice]
                if place.ended and (has_all or not delta.last):
                    continue  # its reader has that; the usage only with the end of all
                finish = None if place.ended else delta.finish
                place.opened, place.said, place.ended = True, delta.finish is not None, delta.finish is not None
                place.num_tokens += len(delta.token_ids)
                yield inference_pb2.GenerateResponse(
                    request_id=request_id, text=delta.text, token_ids=delta.token_ids, choice=delta.choice,
                    finish_reason=FINISH[finish] if finish else None,
                    usage=_usage(delta.usage) if delta.last else None, logprobs=self._scored(delta),
                    bookmark=str(bookmark))

    def _scored(self, delta: Delta) -> list[inference_pb2.ScoredPosition]:
        def scored(token_id: int, logprob: float) -> inference_pb2.ScoredToken:
            spelled = self._generation.codec.spelled(token_id)
            return inference_pb2.ScoredToken(token_id=token_id, logprob=logprob, bytes=spelled)

        if not delta.logprobs:
            return []
        return [
            inference_pb2.ScoredPosition(chosen=scored(token_id, known.logprob), top=[scored(*t) for t in known.top])
            for token_id, known in zip(delta.token_ids, delta.logprobs, strict=True)]

    async def Tokenize(self, request: inference_pb2.TokenizeRequest, context: Any) -> inference_pb2.TokenizeResponse:
        self._check_model(request.model)
        return inference_pb2.TokenizeResponse(token_ids=await self._generation.tokenize(request.text))

    async def Detokenize(self, request: inference_pb2.DetokenizeRequest,
                         context: Any) -> inference_pb2.DetokenizeResponse:
        self._check_model(request.model)
        text = self._generation.detokenize(request.token_ids, request.skip_special_tokens)
        return inference_pb2.DetokenizeResponse(text=text)

    async def ListModels(self, request: inference_pb2.ListModelsRequest,
                         context: Any) -> inference_pb2.ListModelsResponse:
        card = self._generation.codec.card
        model = inference_pb2.Model(
            name=self._generation.served_name, max_model_len=self._generation.max_model_len(),
            vocab_size=card.vocab_size, eos_token_ids=card.eos_token_ids)
        return inference_pb2.ListModelsResponse(models=[model])

    def _check_model(self, name: str) -> None:
        if name:
            self._generation.check_model(name)


def _call(request: inference_pb2.GenerateRequest, call_deadline_s: float | None,
          metadata: Mapping[str, Any]) -> GenerateCall:
    which = request.WhichOneof("prompt")
    if which is None:
        raise InvalidRequest("the request has no prompt. Set text or token_ids.", "prompt")
    prompt: Prompt = request.text if which == "text" else tuple(request.token_ids.ids)
    wire = request.sampling
    chosen = {name: getattr(wire, name) for name in OPTIONAL if wire.HasField(name)}
    sampling = SamplingParams(stop_token_ids=tuple(wire.stop_token_ids), ignore_eos=wire.ignore_eos,
                              logit_bias=tuple(wire.logit_bias.items()), **chosen)
    deadlines = [s for s in (request.timeout_s or None, call_deadline_s) if s is not None]
    return GenerateCall(
        prompt, sampling, wire.max_tokens if wire.HasField("max_tokens") else None,
        default_max_tokens=DEFAULT_MAX_TOKENS, stop=tuple(wire.stop), tenant=request.tenant,
        account=account_of(request.tenant, metadata.get("authorization", "")), session=request.session,
        timeout_s=min(deadlines, default=None), n=wire.n if wire.HasField("n") else 1,
        priority=request.priority)


def _usage(usage: Usage) -> inference_pb2.Usage:
    return inference_pb2.Usage(prompt_tokens=usage.prompt_tokens, cached_tokens=usage.cached_tokens,
                               output_tokens=usage.output_tokens)


@dataclass(frozen=True, slots=True)
class Identity:
    """How this router is known, for Status."""

    router_id: str
    http_endpoint: str
    grpc_endpoint: str
    model: str


class AdminFront(admin_pb2_grpc.AdminServicer):
    def __init__(self, fleet: Fleet, dispatcher: Dispatcher, metrics: Metrics, dial: Dial,
                 identity: Callable[[], Identity]) -> None:
        """`identity` is asked at each call: the ports are known only once both servers listen."""
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._dial = dial
        self._identity = identity

    async def Status(self, request: admin_pb2.FleetStatusRequest, context: Any) -> admin_pb2.FleetStatus:
        who = self._identity()
        workers = self._fleet.workers()
        samples = [*self._metrics.rendered(), *(
            (rendered(name, labels), value) for name, labels, value in worker_samples(await self._fleet.statuses()))]
        counters = [{"name": name, "value": value} for name, value in samples]
        return admin_pb2.FleetStatus(
            router_id=who.router_id, http_endpoint=who.http_endpoint, grpc_endpoint=who.grpc_endpoint, model=who.model,
            workers=[_worker(view) for view in workers], pairs=_pairs(workers),
            in_flight=self._dispatcher.num_inflight, counters=counters)

    async def Trace(self, request: admin_pb2.TraceRequest, context: Any) -> admin_pb2.RequestTrace:
        return _trace(self._record(request.request_id))

    async def Newest(self, request: admin_pb2.NewestRequest, context: Any) -> admin_pb2.NewestTraces:
        return admin_pb2.NewestTraces(traces=map(_trace, self._dispatcher.traces.recent(request.count)))

    async def Explain(self, request: admin_pb2.ExplainRequest, context: Any) -> admin_pb2.RequestRecord:
        return admin_pb2.RequestRecord(json=json.dumps(document(self._record(request.request_id))))

    def _record(self, request_id: str) -> TraceRecord:
        """Of that request; empty: the newest that has ended."""
        dispatcher, traces = self._dispatcher, self._dispatcher.traces
        if request_id:
            record = dispatcher.running(request_id) or traces.get(request_id)
        else:
            record = next(iter(traces.recent(1)), None)
        if record is None and (why := traces.why_refused(request_id)) is not None:
            raise NotFound(f"request {shown(request_id)} has no trace, for it was not let in: {why}", "request_id")
        if record is None:
            asked = f"request {shown(request_id)}" if request_id else "any request"
            raise NotFound(f"no trace of {asked}: those that run and the newest finished ones are kept.", "request_id")
        return record

    async def Drain(self, request: admin_pb2.DrainRequest, context: Any) -> admin_pb2.DrainProgress:
        views = {view.info.worker_id: view for view in self._fleet.workers()}
        view = views.get(request.worker_id)
        if view is None:
            raise NotFound(f"there is no worker {shown(request.worker_id)}; this router knows "
                           f"{', '.join(views) or 'none'}.", "worker_id")
        worker = self._dial(view.info)
        status = await (worker.drain(request.on, DRAIN_TIMEOUT_S) if request.HasField("on")
                        else worker.status(DRAIN_TIMEOUT_S))
        peers = sum(other.info.role is view.info.role and other.state is WorkerState.READY
                    for other in views.values() if other is not view)
        return _progress(request.worker_id, status.load, view.num_requests, peers)


def _progress(worker_id: str, load: WorkerLoad, ours: int, peers: int) -> admin_pb2.DrainProgress:
    """`ours`: requests of this router there; one that just arrived is not in the worker's own count yet."""
    requests = max(load.num_running + load.num_waiting, ours)
    return admin_pb2.DrainProgress(
        worker_id=worker_id, draining=load.draining, requests=requests, leases=load.num_lent_out, peers=peers,
        drained=load.draining and not requests and not load.num_lent_out)


def _worker(view: WorkerView) -> admin_pb2.FleetWorker:
    return admin_pb2.FleetWorker(
        info=codec.INFO.encode(view.info), state=view.state.name,
        load=codec.LOAD.encode(view.load), ledger=codec.LEDGER.encode(view.ledger) if view.ledger else None,
        silent_s=view.silent_s, in_flight=view.num_requests, index_blocks=view.indexed_blocks,
        kept_apart=[admin_pb2.KeptApart(peer=peer, difference=why) for peer, why in view.refused])


def _pairs(workers: tuple[WorkerView, ...]) -> list[admin_pb2.FleetPair]:
    pairs = []
    for decode in (w for w in workers if w.info.role is Role.DECODE):
        measured = {peer: (transport, rate) for peer, transport, rate in decode.pairs}
        refused = dict(decode.refused)
        for prefill in (w for w in workers if w.info.role is Role.PREFILL):
            name = prefill.info.worker_id
            transport, rate = measured.get(name, ("", 0.0))
            pairs.append(admin_pb2.FleetPair(prefill=name, decode=decode.info.worker_id, transport=transport,
                                             bytes_per_s=rate, refused=refused.get(name, "")))
    return pairs


def _trace(record: TraceRecord) -> admin_pb2.RequestTrace:
    attempts = [admin_pb2.TraceAttempt(epoch=a.epoch, route=codec.ROUTE.encode(a.route), outcome=a.outcome)
                for a in record.attempts]
    return admin_pb2.RequestTrace(
        request_id=record.request_id, attempts=attempts, spans=[codec.SPAN.encode(s) for s in record.timeline.spans],
        prompt_tokens=record.num_prompt_tokens, cached_tokens=record.cached_tokens,
        output_tokens=record.num_output_tokens, finished=record.outcome != RUNNING, arrived_s=record.arrived_s,
        zero_s=record.zero_s, total_s=record.total_s)
