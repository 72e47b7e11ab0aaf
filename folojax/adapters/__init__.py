"""Ways into folojax from other people's programs: one file for each, imported by nobody here."""
