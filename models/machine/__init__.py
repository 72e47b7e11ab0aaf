"""What depends on the machine: its C++ compiler, the order of its sums."""
