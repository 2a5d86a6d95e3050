"""What a run measured: its rows, and the JSON file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import peers


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A peer's time at a point.

    Args:
        name: Label.
        micros: Microseconds per call.
        measured: In this run; otherwise recorded elsewhere, and scaled by the floor.
    """

    name: str
    micros: float
    measured: bool

    def __str__(self) -> str:
        return self.name if self.measured else f"{self.name} (recorded)"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One point; times are microseconds per call.

    Args:
        point: Label.
        mib: MiB of K and V that a call reads.
        kernel: Name of our kernel.
        launch: How it was launched.
        source_digest: Digest of its source.
        num_splits: Parts that a sequence is cut into.
        relative_error: By norm, against float32.
        floor: A kernel that only reads the same bytes.
        ours: One decode step, the append included.
        measured: Peers measured in the same run, attention only.
        recorded_scaled: Peers recorded elsewhere, attention only, scaled by the floor.
        limit: What ours may take as a multiple of the floor; None where the peers are the measure.
    """

    point: str
    mib: float
    kernel: str
    launch: str
    source_digest: str
    num_splits: int
    relative_error: float
    floor: float
    ours: float
    measured: dict[str, float] = field(default_factory=dict)
    recorded_scaled: dict[str, float] = field(default_factory=dict)
    limit: float | None = None

    @property
    def best_sdpa(self) -> Peer | None:
        """The fastest SDPA backend of this run."""
        return _fastest([peer for peer in self._measured() if peer.name in peers.SDPA])

    @property
    def best_peer(self) -> Peer | None:
        """The fastest peer of all; what was measured here counts and not its record elsewhere."""
        return _fastest(self._peers())

    @property
    def best_shipped_peer(self) -> Peer | None:
        """As `best_peer`, without kernels that were searched for point by point."""
        return _fastest([peer for peer in self._peers() if peer.name not in peers.NOT_SHIPPED])

    def _peers(self) -> list[Peer]:
        return self._measured() + [
            Peer(name=name, micros=micros, measured=False)
            for name, micros in self.recorded_scaled.items()
            if name not in self.measured
        ]

    def _measured(self) -> list[Peer]:
        return [Peer(name=n, micros=t, measured=True) for n, t in self.measured.items()]


def _fastest(candidates: Sequence[Peer]) -> Peer | None:
    return min(candidates, key=lambda peer: peer.micros, default=None)


@dataclass(frozen=True, kw_only=True)
class Record:
    """A run.

    Args:
        run: GPU, driver, compiler, torch, date and clocks.
        rows: The grid.
        ragged: Points whose sequences differ in length.
        host: Microseconds of host time per call, by contender.
    """

    run: dict[str, str]
    rows: list[Row]
    ragged: list[Row] = field(default_factory=list)
    host: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read what `save` wrote."""
        found = json.loads(path.read_text())
        rows, ragged = ([Row(**row) for row in found[key]] for key in ("microseconds", "ragged"))
        return cls(run=found["run"], rows=rows, ragged=ragged, host=found["host_microseconds"])

    def save(self, path: Path) -> None:
        """Write JSON."""
        content = {
            "run": self.run,
            "recorded_scaled": peers.SOURCE,
            "host_microseconds": self.host,
            "microseconds": [asdict(row) for row in self.rows],
            "ragged": [asdict(row) for row in self.ragged],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
