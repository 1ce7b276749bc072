"""The patches that are on a checkpoint on disk: their record, the clean bytes, and changing them safely in place."""
