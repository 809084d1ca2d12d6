CREATE TABLE meta (
    key TEXT NOT NULL PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

INSERT INTO meta (key, value) VALUES ('history_id', lower(hex(randomblob(16))));

-- spec and resolved_spec are proto JSON, error and progress proto bytes; times are microseconds since the epoch.
CREATE TABLE jobs (
    id TEXT NOT NULL PRIMARY KEY,
    tenant TEXT NOT NULL DEFAULT 'default',
    state INTEGER NOT NULL,
    spec TEXT NOT NULL,
    resolved_spec TEXT NOT NULL,
    request_id TEXT,
    request_sha256 TEXT NOT NULL,
    error BLOB NOT NULL DEFAULT x'',
    progress BLOB NOT NULL DEFAULT x'',
    attempt INTEGER NOT NULL DEFAULT 0,
    retries INTEGER NOT NULL DEFAULT 0,
    last_sequence INTEGER NOT NULL DEFAULT 0,
    model_id TEXT NOT NULL DEFAULT '',
    create_time INTEGER NOT NULL,
    start_time INTEGER NOT NULL DEFAULT 0,
    end_time INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;

CREATE UNIQUE INDEX jobs_by_request ON jobs (tenant, request_id) WHERE request_id IS NOT NULL;
CREATE INDEX jobs_by_state ON jobs (tenant, state, id);

CREATE TABLE job_labels (
    tenant TEXT NOT NULL DEFAULT 'default',
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    PRIMARY KEY (tenant, key, value, job_id)
) STRICT, WITHOUT ROWID;

CREATE TABLE job_datasets (
    tenant TEXT NOT NULL DEFAULT 'default',
    dataset_id TEXT NOT NULL,
    job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    PRIMARY KEY (tenant, dataset_id, job_id)
) STRICT, WITHOUT ROWID;

-- One trainer's life. spool_offset: bytes of its spool that are ingested. outcome: its last report, proto bytes.
CREATE TABLE attempts (
    tenant TEXT NOT NULL DEFAULT 'default',
    job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    spool_offset INTEGER NOT NULL DEFAULT 0,
    reports INTEGER NOT NULL DEFAULT 0,
    reason TEXT NOT NULL,
    resume_from TEXT NOT NULL DEFAULT '',
    model_id TEXT NOT NULL,
    devices TEXT NOT NULL DEFAULT '',
    pid INTEGER NOT NULL DEFAULT 0,
    outcome BLOB NOT NULL DEFAULT x'',
    start_time INTEGER NOT NULL,
    end_time INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (job_id, number)
) STRICT, WITHOUT ROWID;

CREATE INDEX attempts_open ON attempts (job_id) WHERE end_time = 0;

-- payload is a whole JobEvent: a page of a watch is payloads one after the other.
CREATE TABLE events (
    job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    sequence INTEGER NOT NULL,
    tenant TEXT NOT NULL DEFAULT 'default',
    payload BLOB NOT NULL,
    PRIMARY KEY (job_id, sequence)
) STRICT, WITHOUT ROWID;

CREATE TABLE checkpoints (
    tenant TEXT NOT NULL DEFAULT 'default',
    job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    step INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    directory TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    create_time INTEGER NOT NULL,
    PRIMARY KEY (job_id, step, attempt)
) STRICT, WITHOUT ROWID;

CREATE TABLE datasets (
    id TEXT NOT NULL PRIMARY KEY,
    tenant TEXT NOT NULL DEFAULT 'default',
    name TEXT NOT NULL,
    version INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    row_count INTEGER NOT NULL,
    format INTEGER NOT NULL,
    create_time INTEGER NOT NULL,
    UNIQUE (tenant, name, version)
) STRICT, WITHOUT ROWID;

CREATE INDEX datasets_by_sha256 ON datasets (sha256);

-- Versions of a name are never given twice, also after a delete.
CREATE TABLE dataset_names (
    tenant TEXT NOT NULL DEFAULT 'default',
    name TEXT NOT NULL,
    last_version INTEGER NOT NULL,
    PRIMARY KEY (tenant, name)
) STRICT, WITHOUT ROWID;

CREATE TABLE models (
    id TEXT NOT NULL PRIMARY KEY,
    tenant TEXT NOT NULL DEFAULT 'default',
    name TEXT NOT NULL,
    job_id TEXT NOT NULL,
    base_model TEXT NOT NULL,
    adaptation TEXT NOT NULL,
    step INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL,
    metrics TEXT NOT NULL DEFAULT '{}',
    create_time INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
