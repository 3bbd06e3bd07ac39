"""Callers who register concepts, and remember what they were promised."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np

from calls import Stub, array
from cdam.v1 import common_pb2, concept_pb2
from faults.callers import noise, raw_request
from processes import serving

LATENT = 128  # of the demo model


@dataclass
class Promises:
    """What was acknowledged.

    Attributes:
        concepts: The concepts, as the answers had them.
        versions: The newest version that was acknowledged, by name.
    """

    concepts: list[concept_pb2.Concept] = field(default_factory=list)
    versions: dict[str, int] = field(default_factory=dict)

    def note(self, concept: concept_pb2.Concept) -> None:
        """Remember an answer."""
        self.concepts.append(concept)
        self.versions[concept.name] = concept.version

    def broken(self, stub: Stub) -> list[str]:
        """What of it a server does not keep."""
        found = []
        for promised in self.concepts:
            request = concept_pb2.GetConceptRequest(id=promised.id)
            try:
                kept = stub.GetConcept(request, timeout=30).concept
            except grpc.RpcError as error:
                found.append(f"{promised.name} {promised.version}: {error.code().name}")
                continue
            if (kept.vector, kept.examples) != (promised.vector, promised.examples):
                found.append(f"{promised.name} {promised.version}: other content")
        for name, version in self.versions.items():
            request = concept_pb2.GetConceptRequest(name=name)
            newest = stub.GetConcept(request, timeout=30).concept.version
            # What was not acknowledged may be there, too: its answer was lost.
            if newest < version:
                found.append(f"{name}: version {newest}, not {version}")
        return found


def registration(name: str, seed: int, **spec: object) -> concept_pb2.ConceptRegisterRequest:
    """A registration like no other; every fourth is of two images, the others are of a vector."""
    fields = concept_pb2.ConceptSpec(name=name, **spec)  # type: ignore[arg-type]
    if seed % 4 == 0:
        return concept_pb2.ConceptRegisterRequest(spec=fields, examples=[_raw(2 * seed), _raw(2 * seed + 1)])
    values = np.random.default_rng(seed).standard_normal(LATENT).astype("<f4")
    fields.vector.CopyFrom(common_pb2.FloatTensor(shape=values.shape, data=values.tobytes()))
    return concept_pb2.ConceptRegisterRequest(spec=fields)


def register_until_it_fails(address: str, promises: Promises, names: int = 5) -> None:
    """Register, name by name in turn, until a call fails; each registration makes a new version."""
    with grpc.insecure_channel(address) as channel:
        stub = Stub(channel)
        while True:
            seed = random.getrandbits(60)
            try:
                answer = stub.ConceptRegister(registration(f"name-{seed % names}", seed, replace=True), timeout=30)
            except grpc.RpcError:
                return
            promises.note(answer.concept)


def kill_writing_servers(
    folder: Path, *flags: str, rounds: int, longest: float, environment: dict[str, str] | None = None
) -> tuple[Promises, list[str]]:
    """SIGKILL servers while a caller registers; what was promised in all rounds, and what of it the last server breaks.

    Args:
        folder: For logs.
        flags: Of the servers.
        rounds: Their number.
        longest: Seconds until the kill, at most.
        environment: Variables of the servers.
    """
    promises = Promises()
    for number in range(rounds):
        with serving(folder / f"log-{number}", *flags, environment=environment) as server:
            caller = threading.Thread(target=register_until_it_fails, args=(server.address, promises))
            caller.start()
            time.sleep(random.uniform(0.05, longest))
            server.process.kill()
            caller.join()
    with (
        serving(folder / "log-last", *flags, environment=environment) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        return promises, promises.broken(Stub(channel))


def seconds_until_noticed(here: str, there: str, rounds: int) -> list[float]:
    """How long after a new version was acknowledged by one server another still explained with the old one.

    Args:
        here: Address of the one.
        there: Address of the other.
        rounds: New versions.
    """
    found = []
    with grpc.insecure_channel(here) as one, grpc.insecure_channel(there) as other:
        request = raw_request(noise(0))
        request.targets[0].concept.name = "news"
        for seed in range(rounds):
            new = Stub(one).ConceptRegister(registration("news", 4 * seed + 1, replace=True), timeout=30).concept
            acknowledged = asked = time.monotonic()
            while Stub(other).Explain(request, timeout=30).targets[0].target.concept.id != new.id:
                asked = time.monotonic()
            found.append(asked - acknowledged)
    return found


def explained(stub: Stub, request: object) -> np.ndarray:
    """The scores of a request's only map."""
    (relevance,) = stub.Explain(request, timeout=30).maps
    return array(relevance.scores)


def _raw(seed: int) -> common_pb2.Image:
    pixels = noise(seed)
    height, width = pixels.shape[:2]
    return common_pb2.Image(raw=common_pb2.RawImage(height=height, width=width, channels=3, data=pixels.tobytes()))
