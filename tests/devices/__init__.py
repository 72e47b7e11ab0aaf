"""Cases for processes of four devices: `tests/laws/test_several_devices.py` runs them."""
