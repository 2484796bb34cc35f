"""The CPU stage: reads one group's pictures and resizes them for the model.

A picture that cannot be used makes its record a skipped row. Only a storage that cannot be read ends the run.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from odedit.backbones import PretrainedProcessor, load_processor
from odedit.data.images import ImageError
from odedit.data.made import completed
from odedit.data.records import RawRecord
from odedit.data.supervision import build_request
from odedit.errors import InputError, StorageError, one_sentence
from odedit.inputs.batch import REPHRASE_SLOTS, EditRequest, Picture, Probe
from odedit.runtime.addresses import masked
from pipeline.run_folder import staging
from pipeline.run_folder.rows import FAILED, SKIPPED, Row, base_row
from pipeline.workers.plan import Job
from pipeline.workers.request_cache import RequestCache


@dataclass(frozen=True)
class Prepared:
    """A prepared group.

    Attributes:
        group: Number of the group.
        records: Records of the requests, in the same order.
        requests: Edits with processed pictures.
        rows: Finished rows of the records that cannot be edited.
    """

    group: int
    records: tuple[RawRecord, ...]
    requests: tuple[EditRequest, ...]
    rows: tuple[Row, ...]


class Preparer:
    """Builds edit requests from staged records; holds the processor and the pool.

    Args:
        job: The run.
        cache: Cache of requests, shared with other runs of the same worker.
    """

    def __init__(self, job: Job, cache: RequestCache | None = None) -> None:
        self._job = job
        self._cache = cache if cache is not None else RequestCache(max_bytes=0)
        config = job.config
        self._supervision, self._locality = config.supervision, staging.reads_locality(config)
        if job.scored is not None:  # nothing is trained: the scored rephrases are read anyway
            self._supervision = replace(config.supervision, rephrases=1, rephrase_source="record", rephrase_noise=0.0)
            self._locality = False
        self._cache_key = (  # with the record, everything that a request depends on
            job.sources,
            self._supervision,
            self._locality,
            config.backbone.family,
            config.backbone.checkpoint,
            config.backbone.image_size,
        )
        family, checkpoint, size = config.backbone.family, config.backbone.checkpoint, config.backbone.image_size
        self._processor = load_processor(family, checkpoint, image_size=size)
        self._pool = staging.read_pool(job.workspace, job.sources)
        self._read_group = staging.GroupReader(job.workspace.records)

    def __call__(self, group: int) -> Prepared:
        """Prepares the group of that number. Raises StorageError if storage cannot be read."""
        records = self._read_group(group)
        edited: list[RawRecord] = []
        requests: list[EditRequest] = []
        rows: list[Row] = []
        shared: dict[str, Picture] = {}
        for record in records:
            prepared = self._request(record, shared)
            if isinstance(prepared, EditRequest):
                edited.append(record)
                requests.append(prepared)
            else:
                rows.append(prepared)
        return Prepared(group, tuple(edited), tuple(requests), tuple(rows))

    def _request(self, record: RawRecord, shared: dict[str, Picture]) -> EditRequest | Row:
        """The edit, or a row with the reason why there is none. Raises StorageError as `ImageReader.read` does."""
        config = self._job.config
        if record.problem:
            return base_row(record, config, SKIPPED, located(record, record.problem))
        key = (self._cache_key, record.edit_id, record.index, record.task)
        try:
            request = self._cache.get(key)
            if request is None:
                request = build_request(
                    record, self._job.sources.reader, self._supervision, self._pool, locality=self._locality
                )
                request = process(request, self._processor, shared)
                self._cache.put(key, request)
            return request
        except ImageError as error:
            return base_row(record, config, SKIPPED, located(record, str(error)))
        except InputError as error:
            return base_row(record, config, FAILED, str(error))
        except StorageError:
            raise
        except Exception as error:
            # An unexpected error in one record's data must not end the run.
            write_traceback(self._job, record.edit_id)
            return base_row(record, config, FAILED, located(record, one_sentence(error)))

    def calibration_requests(self, records: Iterable[RawRecord], problems: list[str]) -> Iterator[EditRequest]:
        """The usable records as requests with an edit, rephrases and a text-only question.

        Args:
            records: Records of the pool or of the run.
            problems: Extended by a sentence for each record that cannot be used.
        """
        supervision = replace(self._job.config.supervision, rephrases=1, locality_source="record", near_locality=False)
        shared: dict[str, Picture] = {}
        for record in records:
            # The locality picture is dropped below, so the edit's own picture stands in and no other picture is read.
            full = completed(record)
            bare = replace(record, fields={**full.fields, "m_loc": full.fields["image"], "probes": None})
            try:
                request = build_request(bare, self._job.sources.pool_reader, supervision)
                kept = {slot: request.supervision[slot] for slot in (*REPHRASE_SLOTS, "text_locality")}
                yield process(replace(request, supervision=kept, probes={}), self._processor, shared)
            except (ImageError, InputError) as error:
                problems.append(located(record, str(error)))


def process(request: EditRequest, processor: PretrainedProcessor, shared: dict[str, Picture]) -> EditRequest:
    """A copy of the request with its pictures resized for the model.

    Args:
        shared: Processed pictures by key, extended here; equal pictures become one object.
    """

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
    """A problem with the file and position of its record."""
    return f"{record.where}: {problem}"


def write_traceback(job: Job, name: str) -> None:
    """Writes the traceback of an unexpected error; the row has its message only."""
    write_note(job, name, masked(traceback.format_exc()))


def write_note(job: Job, name: str, text: str) -> None:
    """Writes a worker's message to a file in the run's `errors`, since its output is not shown."""
    with suppress(OSError):  # a full disk must not hide the error itself
        job.workspace.errors.make_folder()
        (job.workspace.errors / f"{name}.txt").write_bytes(text.encode("utf-8", errors="replace"))
