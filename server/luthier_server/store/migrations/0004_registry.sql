-- spec and resolved_spec are proto JSON, empty where no job of an older server tells them any more. parent_model: the
-- model that it goes on from. checkpoint: `job_...:step-200`, for a model that was registered from one.
ALTER TABLE models ADD COLUMN spec TEXT NOT NULL DEFAULT '';
ALTER TABLE models ADD COLUMN resolved_spec TEXT NOT NULL DEFAULT '';
ALTER TABLE models ADD COLUMN base_model_revision TEXT NOT NULL DEFAULT '';
ALTER TABLE models ADD COLUMN base_licence TEXT NOT NULL DEFAULT '';
ALTER TABLE models ADD COLUMN parent_model TEXT NOT NULL DEFAULT '';
ALTER TABLE models ADD COLUMN checkpoint TEXT NOT NULL DEFAULT '';
ALTER TABLE models ADD COLUMN description TEXT NOT NULL DEFAULT '';

UPDATE models SET parent_model = base_model WHERE base_model GLOB 'model_*' AND length(base_model) = 32;
UPDATE models SET spec = jobs.spec, resolved_spec = jobs.resolved_spec,
    base_model_revision = coalesce(json_extract(jobs.resolved_spec, '$.fineTune.baseModelRevision'), '')
    FROM jobs WHERE jobs.id = models.job_id;

-- A checkpoint becomes a model once.
CREATE UNIQUE INDEX models_by_checkpoint ON models (tenant, checkpoint) WHERE checkpoint != '';
CREATE INDEX models_by_parent ON models (tenant, parent_model) WHERE parent_model != '';

CREATE TABLE model_tags (
    tenant TEXT NOT NULL DEFAULT 'default',
    model_id TEXT NOT NULL REFERENCES models (id) ON DELETE CASCADE,
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (model_id, key)
) STRICT, WITHOUT ROWID;

CREATE INDEX model_tags_by_value ON model_tags (tenant, key, value, model_id);

-- Versions of a name are never given twice, also after a delete.
CREATE TABLE model_names (
    tenant TEXT NOT NULL DEFAULT 'default',
    name TEXT NOT NULL,
    last_version INTEGER NOT NULL,
    PRIMARY KEY (tenant, name)
) STRICT, WITHOUT ROWID;

CREATE TABLE model_versions (
    tenant TEXT NOT NULL DEFAULT 'default',
    name TEXT NOT NULL,
    version INTEGER NOT NULL,
    model_id TEXT NOT NULL REFERENCES models (id) ON DELETE CASCADE,
    create_time INTEGER NOT NULL,
    PRIMARY KEY (tenant, name, version),
    UNIQUE (model_id, name)
) STRICT, WITHOUT ROWID;

CREATE TABLE model_aliases (
    tenant TEXT NOT NULL DEFAULT 'default',
    name TEXT NOT NULL,
    alias TEXT NOT NULL,
    version INTEGER NOT NULL,
    PRIMARY KEY (tenant, name, alias),
    FOREIGN KEY (tenant, name, version) REFERENCES model_versions (tenant, name, version)
) STRICT, WITHOUT ROWID;

-- before: the number of the move that a rollback goes to, 0 for none. Versions that moves name may be deleted.
CREATE TABLE model_alias_moves (
    tenant TEXT NOT NULL DEFAULT 'default',
    name TEXT NOT NULL,
    alias TEXT NOT NULL,
    number INTEGER NOT NULL,
    version INTEGER NOT NULL,
    before INTEGER NOT NULL,
    time INTEGER NOT NULL,
    rollback INTEGER NOT NULL,
    PRIMARY KEY (tenant, name, alias, number),
    FOREIGN KEY (tenant, name, alias) REFERENCES model_aliases (tenant, name, alias) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;
