"""Programs that are compiled once and kept, the shapes that they have, and the memory they take."""
