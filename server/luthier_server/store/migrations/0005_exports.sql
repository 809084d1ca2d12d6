-- What a job takes up while it runs: jobs wait for those of their own lane alone.
ALTER TABLE jobs ADD COLUMN lane TEXT NOT NULL DEFAULT 'device';
ALTER TABLE attempts ADD COLUMN lane TEXT NOT NULL DEFAULT 'device';

CREATE INDEX jobs_by_lane ON jobs (tenant, lane, state, id);

-- The export that came out of a job, and the one that an attempt makes; empty where none does.
ALTER TABLE jobs ADD COLUMN export_id TEXT NOT NULL DEFAULT '';
ALTER TABLE attempts ADD COLUMN export_id TEXT NOT NULL DEFAULT '';

-- model_id is a model's id or a checkpoint's name; task is proto JSON with every default; files is a serialized
-- DownloadManifest and proof an ExportProof.
CREATE TABLE exports (
    id TEXT NOT NULL PRIMARY KEY,
    tenant TEXT NOT NULL DEFAULT 'default',
    model_id TEXT NOT NULL,
    job_id TEXT NOT NULL,
    task TEXT NOT NULL,
    files BLOB NOT NULL,
    proof BLOB NOT NULL,
    size_bytes INTEGER NOT NULL,
    destination_uri TEXT NOT NULL,
    create_time INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX exports_by_model ON exports (tenant, model_id, id);
