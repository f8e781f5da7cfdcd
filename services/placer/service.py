"""The placer's gRPC service, and its turns at leading."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
from collections.abc import AsyncIterator
from typing import Any

import grpc
from prometheus_client import Counter, Gauge

from services.common.grpc_frame import StatusError
from services.common.process import Node
from services.common.queues import RequestQueue
from services.common.session import Election
from services.common.tasks import end_tasks
from services.common.telemetry import logger
from services.placer.announcer import Announcer
from services.placer.controller import Controller, DeposedError
from services.placer.decisions import Outcome, Plan
from services.placer.deploy import Deployer
from services.placer.lost_readers import LostReaders
from services.placer.mirrors import Mirrors
from services.placer.planning import Planning
from services.placer.published import group_record, reason_record
from services.placer.settings import PlacerSettings
from services.placer.snapshot import Snapshot, State
from warmserve.cluster.store import StoreUnavailableError
from warmserve.v1 import cluster_pb2, common_pb2, placement_pb2, placement_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]

_log = logger(__name__)
_ELECTED_S = 2.0  # longest time between being elected and leading
_LEADING = Gauge("warmserve_placer_leading", "1 while this placer leads")
_WAKES = Counter("warmserve_placer_wake_calls", "Calls of WakeModel, by the state answered", ["state"])
_DEPLOYS = Counter("warmserve_placer_deploy_calls", "Calls of DeployModel, by their end", ["outcome"])


class PlacementServicer(placement_pb2_grpc.PlacementServiceServicer):
    """See placement.proto. Only the leader answers."""

    def __init__(self, settings: PlacerSettings, node: Node, mirrors: Mirrors, planning: Planning) -> None:
        self._settings = settings
        self._node = node
        self._mirrors = mirrors
        self._planning = planning
        self._queue = RequestQueue(node.redis, node.keys)
        self._announcer = Announcer(mirrors, node.events, self._queue)
        self._deployer = Deployer(node.store, node.keys)
        self._controller: Controller | None = None
        self._elected = asyncio.Event()
        self._address = ""

    async def lead(self, address: str) -> None:
        """Campaigns, leads until the lease or the election is lost, and campaigns again, until node.stop is set."""
        self._address = address
        record = cluster_pb2.LeaderRecord(id=self._settings.id, address=address)
        election = Election(self._node.session, self._node.keys.placer_leader(), record)
        stopped = asyncio.create_task(self._node.stop.wait(), name="placer stops")
        while not stopped.done():
            campaign = asyncio.create_task(election.campaign(), name="campaign")
            await asyncio.wait({campaign, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not stopped.done():
                await self._lead(campaign.result(), stopped)
            await end_tasks([campaign])

    async def _lead(self, fence: int, stopped: asyncio.Task[bool]) -> None:
        node = self._node
        _log.info("leading", fence=fence)
        controller = Controller(
            self._settings, node.keys, node.store, self._queue, self._mirrors, self._planning, fence
        )
        work = [
            asyncio.create_task(node.session.lost.wait(), name="lease lost"),
            asyncio.create_task(controller.run(), name="controller"),
            asyncio.create_task(self._announcer.write(), name="announcer"),
            asyncio.create_task(self._announcer.drop_queues(), name="queues of undeployed models"),
            asyncio.create_task(self._lost_readers().run(), name="lost readers"),
        ]
        self._controller = controller
        self._elected.set()
        self._announcer.leading = True
        _LEADING.set(1)
        try:
            done, _ = await asyncio.wait([*work, stopped], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._controller = None
            self._elected.clear()
            self._announcer.leading = False
            _LEADING.set(0)
            await end_tasks(work)
            await controller.close()
        _log.info("no longer leading", fence=fence)
        for task in done:
            if not isinstance(task.exception(), DeposedError):
                task.result()  # raises what went wrong

    def _lost_readers(self) -> LostReaders:
        mirrors = self._mirrors

        def instances() -> set[str] | None:
            return {record.id for record in mirrors.instances.items.values()} if mirrors.instances.connected else None

        return LostReaders(self._queue, lambda: list(mirrors.models.items), instances)

    async def DeployModel(
        self, request: placement_pb2.DeployModelRequest, context: Context
    ) -> AsyncIterator[placement_pb2.DeployModelResponse]:
        """Deploys a model."""
        await self._leading()
        try:
            async for response in self._deployer.deploy(request.spec, self._mirrors.records()):
                if response.HasField("spec"):
                    self._announcer.deployed(response.spec)
                    _log.info("deployed", model=response.spec.name, source=response.spec.source)
                    _DEPLOYS.labels("deployed").inc()
                yield response
        except StatusError as error:
            _DEPLOYS.labels(error.code.name.lower()).inc()
            _log.info("not deployed", model=request.spec.name, status=error.code.name, error=error.message)
            raise

    async def WakeModel(
        self, request: placement_pb2.WakeModelRequest, context: Context
    ) -> placement_pb2.WakeModelResponse:
        """Sees to it that an instance is active or on its way."""
        controller = await self._leading()
        try:
            await self._know(request.model)
            snapshot, plan = await controller.wake(request.model, request.waiting_requests)
        except StoreUnavailableError as error:
            raise StatusError(grpc.StatusCode.UNAVAILABLE, str(error)) from error
        except DeposedError as error:
            raise self._not_leading() from error
        response = answer(request.model, snapshot, plan)
        if controller.advisory:
            response = advised(request.model, snapshot, response)
        response.group.CopyFrom(group_record(tuple(response.group.agent_ids), self._mirrors.agents.items))
        if not response.group.agent_ids:
            response.ClearField("group")
        _WAKES.labels(common_pb2.ReplicaState.Name(response.state).removeprefix("REPLICA_STATE_").lower()).inc()
        return response

    async def _know(self, model: str) -> None:
        """Raises StatusError NOT_FOUND, with the nearest names, where a model is not deployed."""
        deployed = self._mirrors.models
        if model in deployed.items:
            return
        if await self._node.store.get(self._node.keys.model(model), cluster_pb2.ModelSpec) is not None:
            await deployed.wait_for(lambda items: model in items)  # deployed a moment ago
            return
        near = difflib.get_close_matches(model, deployed.items, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise StatusError(grpc.StatusCode.NOT_FOUND, f"no model named {model!r} is deployed{hint}")

    async def _leading(self) -> Controller:
        """The leadership in progress. Raises StatusError where this placer stands by."""
        if self._controller is None and self._mirrors.leader_address in ("", self._address):
            # Elected, and etcd told others before it told us; or the lease has just been lost.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ELECTED_S):
                    await self._elected.wait()
        if self._controller is None:
            raise self._not_leading()
        return self._controller

    def _not_leading(self) -> StatusError:
        leader = self._mirrors.leader_address
        text = f"the leader is {leader}" if leader else "no placer leads at the moment; try again"
        return StatusError(grpc.StatusCode.FAILED_PRECONDITION, f"not the leader; {text}")


_ADVISORY = "the placer only advises (see warmctl plan advisory): nothing is woken; the plan says: "


def advised(
    model: str, snapshot: Snapshot, answered: placement_pb2.WakeModelResponse
) -> placement_pb2.WakeModelResponse:
    """The answer where the plan is not carried out: what is there serves, and what was ordered before still comes."""
    if any(r.model == model and r.state in (State.ACTIVE, State.WAKING) for r in snapshot.replicas):
        return answered
    reason = common_pb2.Reason(cause=common_pb2.CAUSE_OPERATOR, text=_ADVISORY + answered.reason.text)
    return placement_pb2.WakeModelResponse(state=common_pb2.REPLICA_STATE_COLD, reason=reason)


def answer(model: str, snapshot: Snapshot, plan: Plan) -> placement_pb2.WakeModelResponse:
    """What a plan means to those who wait for a model. The group's node is left out."""
    own = [replica for replica in snapshot.replicas if replica.model == model]
    outlook = next((o for o in plan.outlooks if o.model == model), None)
    reason = reason_record(outlook.reason) if outlook else common_pb2.Reason()
    for replica in own:
        if replica.state is State.ACTIVE:
            return placement_pb2.WakeModelResponse(
                state=common_pb2.REPLICA_STATE_ACTIVE,
                group=common_pb2.Group(agent_ids=replica.group),
                reason=reason,
                estimated_ms=0,
            )
    for replica in own:
        if replica.state is State.WAKING:
            response = placement_pb2.WakeModelResponse(
                state=common_pb2.REPLICA_STATE_WARMING, group=common_pb2.Group(agent_ids=replica.group), reason=reason
            )
            if snapshot.models[model].cold_load_measured:
                response.estimated_ms = (1 - replica.residency) * snapshot.models[model].cold_load_s * 1e3
            return response
    wake = plan.wakes.get(model)
    if wake is None or wake.outcome is Outcome.IMPOSSIBLE:
        return placement_pb2.WakeModelResponse(
            state=common_pb2.REPLICA_STATE_COLD, reason=reason_record(wake.reason) if wake else reason
        )
    resident = wake.outcome is Outcome.NOW and wake.found in (State.WARM, State.DRAINING)
    response = placement_pb2.WakeModelResponse(
        state=common_pb2.REPLICA_STATE_WARM if resident else common_pb2.REPLICA_STATE_WARMING,
        group=common_pb2.Group(agent_ids=wake.group),
        reason=reason_record(wake.reason),
    )
    if wake.estimated_s is not None:
        response.estimated_ms = wake.estimated_s * 1e3
    return response
