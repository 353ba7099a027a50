"""Named configurations: YAML files that `--config NAME` loads."""
