-- reading and lineage are proto JSON; empty in rows of older servers, and lineage where a dataset was made of none.
ALTER TABLE datasets ADD COLUMN reading TEXT NOT NULL DEFAULT '';
ALTER TABLE datasets ADD COLUMN source TEXT NOT NULL DEFAULT '';
ALTER TABLE datasets ADD COLUMN lineage TEXT NOT NULL DEFAULT '';
ALTER TABLE datasets ADD COLUMN warnings INTEGER NOT NULL DEFAULT 0;

ALTER TABLE models ADD COLUMN training_dataset TEXT NOT NULL DEFAULT '';
ALTER TABLE models ADD COLUMN validation_dataset TEXT NOT NULL DEFAULT '';

-- What the structural check found: a serialized DatasetReport. asked: the reading that was asked for, as proto JSON; the
-- same bytes, asked for in the same way, need no second check.
CREATE TABLE dataset_reports (
    dataset_id TEXT NOT NULL PRIMARY KEY REFERENCES datasets (id) ON DELETE CASCADE,
    tenant TEXT NOT NULL DEFAULT 'default',
    asked TEXT NOT NULL,
    report BLOB NOT NULL
) STRICT, WITHOUT ROWID;

-- What checks for base models found, one a (base model, tokenization, length): serialized TokenReports.
CREATE TABLE token_reports (
    dataset_id TEXT NOT NULL REFERENCES datasets (id) ON DELETE CASCADE,
    key TEXT NOT NULL,
    tenant TEXT NOT NULL DEFAULT 'default',
    report BLOB NOT NULL,
    create_time INTEGER NOT NULL,
    PRIMARY KEY (dataset_id, key)
) STRICT, WITHOUT ROWID;
