"""What depends on the machine: its platform, its C++ compiler, the order of its sums."""
