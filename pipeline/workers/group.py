"""Base of the stateful workers: processes one group of records at a time, and writes its result file.

A group with a result file is finished; any other group is processed again, with the same outcome.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from odedit.data.records import RawRecord
from odedit.errors import one_sentence
from odedit.inputs.batch import EditRequest
from odedit.runtime.process import configure_process
from odedit.runtime.stages import stage
from pipeline.run_folder.rows import FAILED, PROGRESS_COLUMNS, Row, base_row, read_rows, write_part
from pipeline.workers.attempts import Ledger
from pipeline.workers.device_errors import end_if_device_is_lost, unless_out_of_memory
from pipeline.workers.plan import Job
from pipeline.workers.preparer import Prepared, located, write_traceback
from pipeline.workers.profile import LOADING
from pipeline.workers.width import WidthLimit


class GroupWorker(ABC):
    """Turns the requests of a group into result rows.

    A group is processed whole. After an error, or after crashes of its worker, its records are processed one by one, so
    that only the one that causes it becomes a failed row. When memory runs out, fewer records are processed at once.
    """

    def __init__(self, job: Job) -> None:
        configure_process(job.num_threads, job.device)
        self._job = job
        self._width_limit = WidthLimit(job.config.pipeline.at_once, job.device, job.memory_share)

    @abstractmethod
    def _load(self) -> None:
        """Loads what every group needs; called before each group's first attempt.

        Raises InputError for an error in the settings, which must not count against a record.
        """

    @abstractmethod
    def _process(self, records: Sequence[RawRecord], requests: Sequence[EditRequest]) -> list[Row]:
        """The rows of these records, at least one, in the same order."""

    def _left_out(self, prepared: Prepared) -> tuple[Prepared, list[Row]]:
        """The group without the records that are not processed, and the rows of these."""
        return prepared, []

    def __call__(self, prepared: Prepared) -> list[Row]:
        """Processes a group and writes its results, unless they exist; returns the columns that progress shows.

        Raises:
            OSError: Results cannot be written. No record is the cause, and the run can be resumed.
            InputError: The settings do not fit the model.
        """
        part = self._job.workspace.part(prepared.group)
        rows: Iterable[Row]
        if part.exists():
            rows = read_rows([part], PROGRESS_COLUMNS)
        else:
            try:
                kept, left_out = self._left_out(prepared)
                rows = sorted([*kept.rows, *left_out, *self._rows(kept)], key=lambda row: int(row["index"]))
                with stage("write results"):
                    write_part(part, rows)
            except OSError:
                # The worker survives, so the attempt must not count against the group's records.
                self._ledger(prepared.group).close()
                raise
            self._ledger(prepared.group).close()
        return [{name: row.get(name) for name in PROGRESS_COLUMNS} for row in rows]

    def _ledger(self, group: int) -> Ledger:
        path = self._job.workspace.attempts / f"group-{group:06d}.json"
        return Ledger(path, self._job.config.pipeline.max_attempts)

    def _rows(self, prepared: Prepared) -> list[Row]:
        if not prepared.requests:
            return []
        with stage(LOADING):
            self._load()  # before the first attempt: an error in the settings is not caused by a record
        ledger = self._ledger(prepared.group)
        if ledger.begin_whole():
            try:
                return self._within_memory(prepared.records, prepared.requests)
            except OSError:
                raise
            except Exception as error:
                end_if_device_is_lost(error)
                # The records are tried one by one below, which shows the one that caused the error.
                write_traceback(self._job, f"group-{prepared.group:06d}")
        return [
            self._alone(record, request, ledger)
            for record, request in zip(prepared.records, prepared.requests, strict=True)
        ]

    def _alone(self, record: RawRecord, request: EditRequest, ledger: Ledger) -> Row:
        if not ledger.begin_single(record.edit_id):
            tries = ledger.attempts(record.edit_id)
            message = (
                f"given up: its worker died in each of {tries} attempts (out of memory, or a crash in native code)."
            )
            return base_row(record, self._job.config, FAILED, located(record, message))
        try:
            row = self._within_memory([record], [request])[0]
        except OSError:
            raise
        except Exception as error:
            end_if_device_is_lost(error)
            write_traceback(self._job, record.edit_id)
            message = located(record, one_sentence(error))
            row = base_row(record, self._job.config, FAILED, message)
        # Not in a `finally`: if the process ends, the attempt must stay counted.
        ledger.end_single(record.edit_id)
        return row

    def _within_memory(self, records: Sequence[RawRecord], requests: Sequence[EditRequest]) -> list[Row]:
        """Processes a group. When memory runs out, halves the width, and at width 1 the group."""
        rows = unless_out_of_memory(lambda: self._process(records, requests), len(requests))
        if rows is not None:
            return rows
        if self._width_limit.halve(len(requests)):
            return self._within_memory(records, requests)
        # Memory ran out at width 1, so the size of this group is the cause; the next group starts at the initial width.
        self._width_limit.restore()
        middle = len(requests) // 2
        first = self._within_memory(records[:middle], requests[:middle])
        return first + self._within_memory(records[middle:], requests[middle:])
