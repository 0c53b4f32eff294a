"""Running cases: inputs, check, timings; one row each, whatever goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gpu_layers.catalogue.case import Arrays
from profiling.cases import Case, InputMaker
from profiling.devices import Device
from profiling.implementations import (
    PEERS,
    Copy,
    Implementation,
    NotThereError,
    Ours,
    Part,
    bytes_of_a_call,
    error_ratio,
    expected,
    parts,
    roughly_equal,
)
from profiling.results import Row
from profiling.timing import Subject, measure

# Launches wait in a queue of some thousand; an array expression may take ten of them.
_MOST_CALLS = 32
_COLD = 4
# A piece of a case, and its results by name.
_Reference = tuple[Part, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Effort:
    """How much time goes into a case.

    Attributes
    ----------
    samples : int
        Of each implementation, at most.
    seconds : float
        For the samples of all implementations.
    """

    samples: int = 40
    seconds: float = 1.0


class DeviceLostError(RuntimeError):
    """The device does no more work; says from which case on.

    Attributes
    ----------
    row : Row
        Of that case.
    """

    def __init__(self, row: Row) -> None:
        super().__init__(f"the device does no more work since the case {row.case}")
        self.row = row


class Runner:
    """Runs cases on a device.

    Parameters
    ----------
    device : Device
    peers : sequence of Implementation classes
        What to time beside ours.
    effort : Effort
    block : int, optional
        Random numbers to draw.
    """

    def __init__(
        self,
        device: Device,
        peers: Sequence[type[Implementation]] = PEERS,
        effort: Effort | None = None,
        block: int | None = None,
    ) -> None:
        self._device, self._peers = device, peers
        self._effort = effort or Effort()
        self._maker = InputMaker(device) if block is None else InputMaker(device, block)

    def run(self, case: Case, skip: Callable[[type[Implementation]], str | None] = lambda peer: None) -> Row:
        """One row. What a peer cannot do, or an array that does not fit, is a note, not an end.

        Parameters
        ----------
        case : Case
        skip : callable
            The reason why a peer is left out of this case, or None.

        Raises
        ------
        DeviceLostError
            If the device does no more work after it.
        """
        buffers = self._buffers(case)
        self._device.release()
        try:
            fitting = case.fitting(int(0.9 * self._device.free_bytes()), buffers)
        except ValueError as error:
            return _row(case, notes=[f"not run: {error}"])
        row = _row(fitting)
        if fitting.asked:
            row.notes.append(f"reduced from {'x'.join(map(str, fitting.asked))}: too little memory")
        with self._device.activate():
            try:
                self._fill(row, fitting, buffers, skip)
            except Exception as error:  # an error of ours is a result too: the row says which
                row.correct = False
                row.notes.append(f"failed: {_short(error)}")
                if self._device.is_lost():
                    raise DeviceLostError(row) from error
        self._device.release()
        return row

    def _buffers(self, case: Case) -> int:
        """Sets of inputs, so many that the cache holds nothing of one when its turn comes again."""
        return max(2, -(-_COLD * self._device.l2_bytes // bytes_of_a_call(case)) + 1)

    def _fill(self, row: Row, case: Case, buffers: int, skip: Callable[[type[Implementation]], str | None]) -> None:
        inputs = [self._maker.inputs(case) for _ in range(buffers)]
        ours = Ours(case, self._device)
        references = [(part, expected(case, part, inputs[-1], ours.to_numpy)) for part in parts(case)]
        row.error = self._error(case, ours, inputs[-1], references)
        row.correct = row.error <= 1
        if not row.correct:
            row.notes.append(f"WRONG: {row.error:.3g} times the error that rounding allows; not timed")
            return
        subjects = [_subject(ours, inputs)]
        for peer in self._peers:
            reason = skip(peer)
            if reason is None:
                try:
                    subjects.append(self._peer(row, case, peer, inputs, references[0]))
                    continue
                except NotThereError as error:
                    reason = str(error)
                except Exception as error:  # whatever another library raises, the others are timed
                    reason = _short(error)
            row.missing[peer.name] = reason
        row.timings = measure(
            subjects,
            self._device.timer,
            buffers=buffers,
            calls=min(buffers, _MOST_CALLS),
            samples=self._effort.samples,
            seconds=self._effort.seconds,
        )
        row.notes += [
            f"{name}: the host was not ahead of the device" for name, timing in row.timings.items() if not timing.steady
        ]

    def _peer(
        self, row: Row, case: Case, peer: type[Implementation], inputs: list[Arrays], reference: _Reference
    ) -> Subject:
        implementation = peer(case, self._device)
        if not (case.operation.is_random or peer is Copy) and not _agrees(case, implementation, inputs[-1], reference):
            row.notes.append(f"{peer.name} gives other results")
        return _subject(implementation, inputs)

    def _error(self, case: Case, ours: Ours, inputs: Arrays, references: list[_Reference]) -> float:
        self._poison(case)
        results = ours.results(ours.prepare(inputs)())
        worst = 0.0
        for part, reference in references:
            for name, values in reference.items():
                actual = ours.to_numpy(part.take_result(name, results[name]))
                worst = max(worst, error_ratio(case, name, actual, values))
        return worst

    def _poison(self, case: Case) -> None:
        """Leave NaN in the memory that results are likely to get, so that what is not written is seen."""
        xp = self._device.xp
        count = -(-max(case.sizes.inputs, case.sizes.outputs) * case.sizes.itemsize // 4)
        arrays = [xp.full(count, float("nan"), "float32") for _ in range(2)]
        del arrays


def _agrees(case: Case, implementation: Implementation, inputs: Arrays, reference: _Reference) -> bool:
    results = implementation.results(implementation.prepare(inputs)())
    part, values = reference
    name = next(iter(values))
    return roughly_equal(case, implementation.to_numpy(part.take(results[name])), values[name])


def _subject(implementation: Implementation, inputs: list[Arrays]) -> Subject:
    calls = [implementation.prepare(arrays) for arrays in inputs]
    return Subject(implementation.name, lambda i: calls[i](), implementation.wait)


def _row(case: Case, notes: list[str] | None = None) -> Row:
    return Row(
        case=str(case),
        op=case.operation.name,
        direction=case.direction,
        dtype=case.dtype,
        shape=list(case.shape),
        channels_last=case.channels_last,
        floor_bytes=case.floor_bytes,
        torch_bytes=case.torch_bytes,
        asked=list(case.asked) if case.asked else None,
        notes=notes or [],
    )


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def copy_bandwidth(device: Device, size: int, effort: Effort) -> float:
    """GB/s, bytes read and written, of a large copy from device to device."""
    maker = InputMaker(device, block=min(size // 4, 2**24))
    sources = [maker.numbers((size // 4,), "float32") for _ in range(2)]
    pairs = [(device.xp.empty_like(source), source) for source in sources]
    subject = Subject("copy", lambda i: device.copy(*pairs[i]))
    timing = measure(
        [subject], device.timer, buffers=len(pairs), calls=4, samples=effort.samples, seconds=effort.seconds
    )["copy"]
    return 2 * size / timing.median / 1e3
