"""The life of requests: schedule, run, commit; snapshots, branches, weights and counts."""
