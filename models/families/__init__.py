"""Model families, each a description."""
