"""The soak's faults: drawn from a seed, done to the machines and servers, and undone."""

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from imagepipeline_tests.end_to_end.soak_machines import Clock, Disk, Host, Postgres, Redis, tell
from imagepipeline_tests.end_to_end.soak_provider import OUTAGES, Provider
from imagepipeline_tests.end_to_end.two_machines import Link

FIND_SECONDS = 5  # a decoder lives for a tenth of a second
# How often each fault occurs beside the others, and for how many seconds it lasts, at least and at
# most. A frozen machine comes back after its images were given to others.
ON_MACHINES = {
    "kill run": (14, 0, 0),
    "kill decoder": (8, 0, 0),
    "kill zygote": (4, 0, 0),
    "kill resident": (6, 0, 0),
    "kill worker": (5, 0, 0),
    "kill machine": (1, 0, 0),
    "stop run": (5, 3, 25),
    "stop decoder": (3, 1, 10),
    "stop zygote": (2, 1, 10),
    "stop resident": (4, 2, 20),
    "stop worker": (3, 5, 30),
    "freeze machine": (2, 55, 75),
    "move clock": (4, 10, 40),
}
ON_FIRST = {
    "kill supervisor": (2, 0, 0),
    "kill code-server": (4, 0, 0),
    "kill daemon": (4, 0, 0),
    "kill webserver": (3, 0, 0),
    "stop supervisor": (2, 2, 20),
    "stop code-server": (3, 2, 20),
    "stop daemon": (3, 2, 20),
    "stop webserver": (2, 2, 20),
}
ON_SECOND = {"cut network": (3, 5, 30)}
ON_SERVERS = {
    "kill redis": (4, 0, 0),
    "stop redis": (2, 3, 15),
    "crash postgres": (4, 0, 0),
    "down postgres": (2, 4, 15),
    "fill disk": (3, 8, 20),
    **{f"provider {outage}": (2, 4, 10) for outage in OUTAGES},
}
# Faults by which a machine can lose a run, or the answer to a call that it has made.
LOSING = ("run", "worker", "machine", "supervisor", "network")
JUMPS_SECONDS = (-3600, -30, 30)  # forward, what waits until a time waits for as much longer


@dataclass(frozen=True)
class Fault:
    """A fault that is planned: when it begins and how long it lasts, in seconds."""

    at: float
    kind: str
    target: str
    seconds: float


@dataclass
class Hit:
    """A fault that was done, by the monotonic clock."""

    kind: str
    target: str
    began: float
    ended: float

    def can_lose(self, machine: str, asked: float, answered: float) -> bool:
        """Whether it can be why a machine has lost the answer to a call."""
        is_near = self.began < answered + 10 and self.ended > asked - 1
        return is_near and self.target == machine and self.kind.endswith(LOSING)


def plan_faults(
    seed: int, count: int, seconds: float, hosts: Sequence[str], is_possible: Callable[[str], bool]
) -> list[Fault]:
    """Draws faults, evenly spread over some seconds."""
    rng = random.Random(seed)
    weights: dict[tuple[str, str], tuple[int, int, int]] = {}
    weights |= {(kind, host): one for host in hosts for kind, one in ON_MACHINES.items()}
    weights |= {(kind, hosts[0]): one for kind, one in ON_FIRST.items()}
    weights |= {(kind, hosts[1]): one for kind, one in ON_SECOND.items()}
    weights |= {(kind, _name_server(kind)): one for kind, one in ON_SERVERS.items()}
    choices = [choice for choice in weights if is_possible(choice[0])]
    faults = []
    for number in range(count):
        kind, target = rng.choices(choices, [weights[choice][0] for choice in choices])[0]
        _, least, most = weights[kind, target]
        at = (number + rng.random()) * seconds / count
        faults.append(Fault(at, kind, target, rng.uniform(least, most)))
    return faults


def _name_server(kind: str) -> str:
    first, second = kind.split(" ", 1)
    return "provider" if first == "provider" else second


@dataclass(frozen=True)
class World:
    """Everything that can be broken."""

    hosts: Mapping[str, Host]
    clocks: Mapping[str, Clock]
    links: Sequence[Link]
    postgres: Postgres
    redis: Redis
    disk: Disk
    provider: Provider


class Injector:
    """Does planned faults one after the other, and undoes them when their time is over.

    Args:
        world: what it breaks.
        seed: for what is not planned, such as which of several processes it kills.
        is_unsafe: whether an image would fail as `poison` if its run were lost once more.
    """

    def __init__(self, world: World, seed: int, is_unsafe: Callable[[], bool]) -> None:
        self.hits: list[Hit] = []
        self.missed: Counter[str] = Counter()
        self._world = world
        self._random = random.Random(seed)
        self._is_unsafe = is_unsafe
        self._calm = threading.Event()
        self._busy: set[str] = set()
        self._threads: list[threading.Thread] = []
        self._began = time.monotonic()

    def run(self, faults: Sequence[Fault]) -> None:
        """Does all faults; returns when the last has begun."""
        self._began = time.monotonic()
        for fault in faults:
            self._calm.wait(max(0.0, fault.at - (time.monotonic() - self._began)))
            thread = threading.Thread(target=self._perform, args=(fault,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def calm(self) -> None:
        """Undoes everything."""
        self._calm.set()
        for thread in self._threads:
            thread.join()

    def count(self) -> dict[str, int]:
        """The number of faults that were done, by kind."""
        return dict(sorted(Counter(hit.kind for hit in self.hits).items()))

    def _perform(self, fault: Fault) -> None:
        # One at a time for each thing, but any number of processes of a machine.
        is_whole = (
            fault.kind.endswith(("machine", "clock")) or fault.target not in self._world.hosts
        )
        holds = f"{fault.target} {fault.kind.split()[-1]}" if not is_whole else fault.target
        if holds in self._busy or (fault.kind.endswith(LOSING) and self._is_unsafe()):
            self.missed[fault.kind] += 1
            return
        self._busy.add(holds)
        try:
            self._break(fault)
        except Exception as error:
            self._say(fault, f"could not be done: {type(error).__name__}: {error}")
            self.missed[fault.kind] += 1
        finally:
            self._busy.discard(holds)

    def _break(self, fault: Fault) -> None:
        verb, what = fault.kind.split(" ", 1)
        world = self._world
        if fault.target in world.hosts and what not in ("machine", "clock", "network"):
            self._break_process(fault, verb, what)
        elif fault.kind == "kill machine":
            with self._hit(fault):
                world.hosts[fault.target].kill()
        elif fault.kind == "freeze machine":
            with self._hit(fault):
                world.hosts[fault.target].freeze()
                self._calm.wait(fault.seconds)
                world.hosts[fault.target].thaw()
        elif fault.kind == "move clock":
            jump = self._random.choice(JUMPS_SECONDS)
            with self._hit(fault, f"by {jump} s"):
                world.clocks[fault.target].move(jump)
                self._calm.wait(fault.seconds)
                world.clocks[fault.target].move(0)
        elif fault.kind == "cut network":
            with self._hit(fault):
                for link in world.links:
                    link.cut()
                self._calm.wait(fault.seconds)
                for link in world.links:
                    link.mend()
        elif fault.target == "provider":
            with self._hit(fault):
                world.provider.outage = what
                self._calm.wait(fault.seconds)
                world.provider.outage = None
        else:
            self._break_server(fault, verb)

    def _break_process(self, fault: Fault, verb: str, kind: str) -> None:
        pid = self._find(self._world.hosts[fault.target], kind)
        if pid is None:
            self.missed[fault.kind] += 1
            return
        with self._hit(fault, f"process {pid}"):
            tell(signal.SIGKILL if verb == "kill" else signal.SIGSTOP, pid)
            if verb == "stop":
                self._calm.wait(fault.seconds)
                tell(signal.SIGCONT, pid)

    def _break_server(self, fault: Fault, verb: str) -> None:
        redis, postgres = self._world.redis, self._world.postgres
        with self._hit(fault):
            if fault.kind == "fill disk":
                self._world.disk.fill()
                self._calm.wait(fault.seconds)
                self._world.disk.free()
            elif fault.target == "redis":
                tell(signal.SIGKILL if verb == "kill" else signal.SIGSTOP, pid := redis.pid)
                if verb == "stop":
                    self._calm.wait(fault.seconds)
                    tell(signal.SIGCONT, pid)
            else:
                postgres.is_wanted = verb != "down"
                postgres.crash()
                self._calm.wait(fault.seconds)
                postgres.is_wanted = True

    def _find(self, host: Host, kind: str) -> int | None:
        """Waits for a process of a kind."""
        deadline = time.monotonic() + FIND_SECONDS
        zygotes = host.find("zygote") if kind == "decoder" else []
        while time.monotonic() < deadline and not self._calm.is_set():
            found = _list_children(zygotes) if kind == "decoder" else host.find(kind)
            if found:
                return self._random.choice(found)
            time.sleep(0.01 if kind == "decoder" else 0.5)
        return None

    @contextmanager
    def _hit(self, fault: Fault, detail: str = "") -> Iterator[None]:
        hit = Hit(fault.kind, fault.target, time.monotonic(), float("inf"))
        self.hits.append(hit)
        lasts = f"for {fault.seconds:.0f} s" if fault.seconds else ""
        self._say(fault, " ".join(filter(None, (detail, lasts))))
        try:
            yield
        finally:
            hit.ended = time.monotonic()

    def _say(self, fault: Fault, detail: str) -> None:
        seconds = time.monotonic() - self._began
        print(f"{seconds:7.1f} s  {fault.kind}: {fault.target} {detail}".rstrip(), flush=True)


def _list_children(parents: Sequence[int]) -> list[int]:
    """The children of processes, without a look at all others."""
    found = []
    for pid in parents:
        with suppress(OSError):
            found += Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]
