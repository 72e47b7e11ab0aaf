"""The command `folojax`."""
