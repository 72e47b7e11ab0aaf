"""What is here needs four devices: `tests/laws/test_several_devices.py` runs it where there are."""

import jax

collect_ignore_glob = ["on_*.py"] if jax.device_count() < 4 else []
