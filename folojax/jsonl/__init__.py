"""Jobs from files: a request a line, a result a line, and what is done is not done again."""
