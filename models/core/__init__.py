"""The decoder that every family is a description of, and its parts."""
