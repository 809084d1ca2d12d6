-- A lost attempt is tried again, but not before retry_time (microseconds; 0: at once).
ALTER TABLE jobs ADD COLUMN retry_time INTEGER NOT NULL DEFAULT 0;

-- Why a job is paused: PAUSE_REQUESTED rests until somebody resumes it, STORAGE_FULL until there is room.
ALTER TABLE jobs ADD COLUMN pause_reason TEXT NOT NULL DEFAULT '';

-- Events up to this sequence were compacted away; 0 for none.
ALTER TABLE jobs ADD COLUMN compacted_sequence INTEGER NOT NULL DEFAULT 0;

-- The slot an attempt holds. It is busy as long as its trainer lives, also across a restart of the server.
ALTER TABLE attempts ADD COLUMN slot INTEGER NOT NULL DEFAULT 0;

-- What a deleted job leaves for a while, so that its request is not carried out a second time.
CREATE TABLE tombstones (
    tenant TEXT NOT NULL DEFAULT 'default',
    request_id TEXT NOT NULL,
    request_sha256 TEXT NOT NULL,
    job_id TEXT NOT NULL,
    delete_time INTEGER NOT NULL,
    PRIMARY KEY (tenant, request_id)
) STRICT, WITHOUT ROWID;

CREATE INDEX jobs_by_end ON jobs (end_time) WHERE end_time > 0;

-- A page of the list is read from here in its order; without it every page sorts all jobs of the tenant.
CREATE INDEX jobs_by_id ON jobs (tenant, id);
