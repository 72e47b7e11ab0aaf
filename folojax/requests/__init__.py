"""What a user asks for and gets: sampling parameters, prompts, their checks, outputs."""
