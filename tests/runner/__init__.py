"""Tests of the room of that name; laws/ of several, house/ of the tree."""
