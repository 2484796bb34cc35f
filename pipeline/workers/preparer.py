"""The CPU stage: reads one group's pictures, resizes them for the model, and says what is wrong with a record.

A picture that cannot be used makes its record a skipped row; nothing here ends a run but a storage that stays away.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from odedit.backbones import PretrainedProcessor, load_processor
from odedit.data.images import ImageError
from odedit.data.records import RawRecord
from odedit.data.supervision import build_request
from odedit.errors import InputError, StorageError, one_sentence
from odedit.inputs.batch import REPHRASE_SLOTS, EditRequest, Picture, Probe
from odedit.runtime.addresses import masked
from pipeline.run_folder import rows as results
from pipeline.run_folder import staging
from pipeline.workers.plan import Job
from pipeline.workers.request_cache import RequestCache


@dataclass(frozen=True)
class Prepared:
    """A group on its way to the model.

    Attributes:
        group: Its number.
        records: Records of the requests, in the same order.
        requests: Edits with processed pictures, as plain fields that serialise without surprises.
        rows: Finished rows of the records that are not edited.
    """

    group: int
    records: tuple[RawRecord, ...]
    requests: tuple[EditRequest, ...]
    rows: tuple[results.Row, ...]


class Preparer:
    """Builds edit requests from staged records; holds the processor and the pool.

    Args:
        cache: Requests that other runs of the same worker have prepared.
    """

    def __init__(self, job: Job, cache: RequestCache | None = None) -> None:
        self._job = job
        self._cache = cache if cache is not None else RequestCache(max_bytes=0)
        config = job.config
        self._locality = staging.reads_locality(config)
        # What a request is made from, beside the record itself.
        self._made_from = (
            job.sources,
            config.supervision,
            self._locality,
            config.backbone.family,
            config.backbone.checkpoint,
        )
        self._processor = load_processor(job.config.backbone.family, job.config.backbone.checkpoint)
        self._pool = staging.read_pool(job.workspace, job.sources)
        self._read_group = staging.GroupReader(job.workspace.records)

    def __call__(self, group: int) -> Prepared:
        records = self._read_group(group)
        kept: list[RawRecord] = []
        requests: list[EditRequest] = []
        rows: list[results.Row] = []
        shared: dict[str, Picture] = {}
        for record in records:
            made = self._request(record, shared)
            if isinstance(made, EditRequest):
                kept.append(record)
                requests.append(made)
            else:
                rows.append(made)
        return Prepared(group, tuple(kept), tuple(requests), tuple(rows))

    def _request(self, record: RawRecord, shared: dict[str, Picture]) -> EditRequest | results.Row:
        """The edit, or the row that says why there is none. Raises StorageError as `ImageReader.read` does."""
        config = self._job.config
        if record.problem:
            return results.base_row(record, config, results.SKIPPED, located(record, record.problem))
        key = (self._made_from, record.edit_id, record.index, record.task)
        try:
            request = self._cache.get(key)
            if request is None:
                request = build_request(
                    record, self._job.sources.reader, config.supervision, self._pool, locality=self._locality
                )
                request = process(request, self._processor, shared)
                self._cache.put(key, request)
            return request
        except ImageError as error:
            return results.base_row(record, config, results.SKIPPED, located(record, str(error)))
        except InputError as error:
            return results.base_row(record, config, results.FAILED, str(error))
        except StorageError:
            raise
        except Exception as error:
            # Whatever a record's data can provoke must cost this record only.
            write_traceback(self._job, record.edit_id)
            return results.base_row(record, config, results.FAILED, located(record, one_sentence(error)))

    def calibration_requests(self, records: Iterable[RawRecord], problems: list[str]) -> Iterator[EditRequest]:
        """Edits, rephrases and text-only questions of those records of the pool, or else of the run, that can be used.

        Args:
            problems: Takes a sentence for each record that cannot.
        """
        supervision = replace(self._job.config.supervision, locality_source="record", near_locality=False)
        shared: dict[str, Picture] = {}
        for record in records:
            # The record's own locality stands in for none: nothing is drawn from the pool, no further picture read.
            bare = replace(record, fields={**record.fields, "m_loc": record.fields["image"], "probes": None})
            try:
                request = build_request(bare, self._job.sources.pool_reader, supervision)
                kept = {slot: request.supervision[slot] for slot in (*REPHRASE_SLOTS, "text_locality")}
                yield process(replace(request, supervision=kept, probes={}), self._processor, shared)
            except (ImageError, InputError) as error:
                problems.append(located(record, str(error)))


def process(request: EditRequest, processor: PretrainedProcessor, shared: dict[str, Picture]) -> EditRequest:
    """The request with each distinct picture as the model takes it; equal pictures are one object."""

    def processed(probe: Probe) -> Probe:
        if probe.picture is None:
            return probe
        key = probe.picture.key
        if key not in shared:
            shared[key] = processor.process(probe.picture)
        return replace(probe, picture=shared[key])

    def each(probes: Mapping[str, Probe]) -> dict[str, Probe]:
        return {name: processed(probe) for name, probe in probes.items()}

    return replace(
        request,
        edit=processed(request.edit),
        supervision=each(request.supervision),
        probes=each(request.probes),
        meta=dict(request.meta),
    )


def located(record: RawRecord, problem: str) -> str:
    return f"{record.where}: {problem}"


def write_traceback(job: Job, name: str) -> None:
    """Keeps the whole story of an unexpected error for a developer; the row has its one sentence."""
    write_note(job, name, masked(traceback.format_exc()))


def write_note(job: Job, name: str, text: str) -> None:
    """Keeps what a worker has to say besides its rows; nobody sees what it prints."""
    with suppress(OSError):  # a full disk must not hide the error itself
        job.workspace.errors.make_folder()
        (job.workspace.errors / f"{name}.txt").write_bytes(text.encode("utf-8", errors="replace"))
