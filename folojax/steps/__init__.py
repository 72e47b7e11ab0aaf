"""The pure functions of a step, and the programs that they are compiled into."""
