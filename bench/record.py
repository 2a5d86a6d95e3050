"""What a run measured: its rows, and the JSON file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench import baselines
from bench.points import Label
from bench.schema import parsed
from gqa_cutlass.codegen.files import read_json, update, writing
from gqa_cutlass.errors import InputError

_ALLOWED = "JSON that `gqa-cutlass bench` wrote"


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A baseline's time at a point.

    Args:
        name: Label.
        micros: Microseconds per call.
        measured: In this run; otherwise recorded elsewhere, and scaled by the roofline.
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
        balanced: The same by a plan that was not told that lengths are about equal; None where that
            changes nothing, or they are not.
        dependent: The same where each step is launched as a dependent of the one before; None where
            that changes nothing.
        measured: Baselines measured in the same run, attention only.
        recorded_scaled: Baselines recorded elsewhere, attention only, scaled by the roofline.
        limit: What ours may take as a multiple of the roofline; None where the baselines are the
            measure.
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
    balanced: float | None = None
    dependent: float | None = None

    @property
    def label(self) -> Label:
        """What the point's name says."""
        return Label.of(self.point)

    @property
    def in_a_chain(self) -> float:
        """Ours where every kernel of the stream is launched as a dependent, if that pays."""
        return self.ours if self.dependent is None else self.dependent

    @property
    def num_bytes(self) -> int:
        """Bytes of K and V that a call reads."""
        return round(self.mib * 2**20)

    @property
    def per_token(self) -> float:
        """Microseconds per new token, of which a call has one per sequence."""
        return self.ours / self.label.batch

    def bandwidth(self, micros: float) -> float:
        """GB/s at which K and V are read by a call of so many microseconds."""
        return self.num_bytes / micros / 1e3

    @property
    def best_sdpa(self) -> Baseline | None:
        """The fastest SDPA backend of this run."""
        return _fastest(
            [baseline for baseline in self._measured() if baseline.name in baselines.SDPA]
        )

    @property
    def best_baseline(self) -> Baseline | None:
        """The fastest of all; what was measured here counts, and not its record elsewhere."""
        return _fastest(self.all_baselines)

    @property
    def best_shipped_baseline(self) -> Baseline | None:
        """As `best_baseline`, without kernels that were searched for point by point."""
        return _fastest(
            [
                baseline
                for baseline in self.all_baselines
                if baseline.name not in baselines.NOT_SHIPPED
            ]
        )

    @property
    def all_baselines(self) -> list[Baseline]:
        """What was measured here, and of the others what was recorded elsewhere."""
        return self._measured() + [
            Baseline(name=name, micros=micros, measured=False)
            for name, micros in self.recorded_scaled.items()
            if name not in self.measured
        ]

    def _measured(self) -> list[Baseline]:
        return [Baseline(name=n, micros=t, measured=True) for n, t in self.measured.items()]


def _fastest(candidates: Sequence[Baseline]) -> Baseline | None:
    return min(candidates, key=lambda baseline: baseline.micros, default=None)


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """Attention of whole prompts beside the decode step that follows them; microseconds per call.

    Args:
        point: Label; the prompts have as many tokens as the step attends.
        decode: One decode step, the append included.
        measured: Causal attention of the prompts, by backend.
    """

    point: str
    decode: float
    measured: dict[str, float]

    @property
    def label(self) -> Label:
        """What the point's name says."""
        return Label.of(self.point)

    @property
    def best(self) -> Baseline:
        """The fastest backend."""
        name = min(self.measured, key=self.measured.__getitem__)
        return Baseline(name=name, micros=self.measured[name], measured=True)

    @property
    def ratio(self) -> float:
        """How many decode steps the prompts take as long as."""
        return self.best.micros / self.decode

    @property
    def per_prompt_token(self) -> float:
        """Microseconds per token of the prompts."""
        return self.best.micros / (self.label.batch * self.label.tokens)

    @property
    def per_token(self) -> float:
        """Microseconds per new token of the decode step."""
        return self.decode / self.label.batch


@dataclass(frozen=True, kw_only=True)
class Featured:
    """A step with a feature beside the plain one; microseconds per call.

    Args:
        point: Label of what the feature attends.
        feature: Label.
        kernel: Name of the kernel with it.
        mib: MiB of K and V that a call reads.
        relative_error: By norm, against float32.
        ours: The step with the feature.
        plain: The step without it, over as many tokens as are seen.
        limit: Target: what it may take.
    """

    point: str
    feature: str
    kernel: str
    mib: float
    relative_error: float
    ours: float
    plain: float
    limit: float

    @property
    def label(self) -> Label:
        """What the point's name says."""
        return Label.of(self.point)


@dataclass(frozen=True, kw_only=True)
class Served:
    """A step as servers run it; microseconds per call.

    Args:
        point: Label.
        kind: Which part of the serving points.
        mib: MiB of K and V that a call reads.
        kernel: Name of our kernel.
        launch: How it was launched.
        relative_error: By norm, against float32.
        floor: A kernel that only reads the same bytes.
        ours: By a call that says nothing of its lengths.
        told: The same by calls that do, by what they say; where that changes the launch.
        measured: Baselines measured in the same run, attention only.
        recorded: Baselines recorded elsewhere over lengths of the same distribution.
        recorded_floor: The floor there.
        limit: Target: what ours may take; None where nothing is to compare with.
    """

    point: str
    kind: str
    mib: float
    kernel: str
    launch: str
    relative_error: float
    floor: float
    ours: float
    told: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    recorded: dict[str, float] = field(default_factory=dict)
    recorded_floor: float | None = None
    limit: float | None = None

    @property
    def label(self) -> Label:
        """What the point's name says."""
        return Label.of(self.point)

    @property
    def over_floor(self) -> float:
        """What ours takes, as a multiple of the floor."""
        return self.ours / self.floor

    @property
    def met(self) -> bool:
        """Whether it takes no longer than it may."""
        return self.limit is None or self.ours <= self.limit

    @property
    def best_recorded(self) -> float | None:
        """What the fastest baseline took elsewhere, as a multiple of the floor there."""
        if self.recorded_floor is None or not self.recorded:
            return None
        return min(self.recorded.values()) / self.recorded_floor


@dataclass(frozen=True, kw_only=True)
class Merged:
    """Parts merged; microseconds per call.

    Args:
        merge: Label.
        mib: MiB that a call reads and writes.
        relative_error: By norm, against float32.
        ours: `merge_states`.
        operators: PyTorch's operators.
        floor: A kernel that only reads as many bytes.
        limit: Target: what ours may take, as a multiple of the floor.
    """

    merge: str
    mib: float
    relative_error: float
    ours: float
    operators: float
    floor: float
    limit: float

    @property
    def over_floor(self) -> float:
        """What ours takes, as a multiple of the floor."""
        return self.ours / self.floor


@dataclass(frozen=True, kw_only=True)
class Record:
    """A run.

    Args:
        run: GPU, driver, compiler, torch, date, clocks and commit.
        rows: The grid.
        ragged: Points whose sequences differ in length.
        prefill: Attention of whole prompts, for comparison.
        features: Steps with features, beside plain ones.
        merges: Parts merged.
        serving: Steps as servers run them.
        host: Microseconds of host time per call, by contender.
    """

    run: dict[str, str]
    rows: list[Row]
    ragged: list[Row] = field(default_factory=list)
    prefill: list[Prefill] = field(default_factory=list)
    features: list[Featured] = field(default_factory=list)
    merges: list[Merged] = field(default_factory=list)
    serving: list[Served] = field(default_factory=list)
    host: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read what `save` wrote, now or before prompts, features and merges were measured.

        Raises:
            InputError: It is no such file.
        """
        found = read_json("bench: record", path, _ALLOWED)
        try:
            file: _File = parsed(_File, found, "the record")
            for row in (*file.microseconds, *file.ragged):
                Label.of(row.point)
            for prompts in file.prefill:
                Label.of(prompts.point)
                if not prompts.measured:
                    raise ValueError(f"the record: {prompts.point}: no prefill was measured")
            for featured in file.features:
                Label.of(featured.point)
            for served in file.serving:
                Label.of(served.point)
        except ValueError as wrong:
            raise InputError(
                f"bench: record: got {path}, which is none ({wrong}); allowed: {_ALLOWED}."
            ) from wrong
        return cls(
            run=file.run, rows=file.microseconds, ragged=file.ragged, prefill=file.prefill,
            features=file.features, merges=file.merges, serving=file.serving,
            host=file.host_microseconds,
        )  # fmt: skip

    def save(self, path: Path) -> None:
        """Write JSON.

        Raises:
            OutputError: The file system refuses.
        """
        with writing("bench: --out", path.parent):
            update(path.parent, {path.name: self.as_json()})

    def as_json(self) -> str:
        """What `save` writes."""
        file = _File(
            run=self.run, recorded_scaled=baselines.SOURCE, host_microseconds=self.host,
            microseconds=self.rows, ragged=self.ragged, prefill=self.prefill,
            features=self.features, merges=self.merges, serving=self.serving,
        )  # fmt: skip
        return json.dumps(asdict(file), indent=1) + "\n"


@dataclass(frozen=True, kw_only=True)
class _File:
    """A record as JSON has it."""

    run: dict[str, str]
    recorded_scaled: dict[str, str]
    host_microseconds: dict[str, float]
    microseconds: list[Row]
    ragged: list[Row]
    prefill: list[Prefill] = field(default_factory=list)
    features: list[Featured] = field(default_factory=list)
    merges: list[Merged] = field(default_factory=list)
    serving: list[Served] = field(default_factory=list)
