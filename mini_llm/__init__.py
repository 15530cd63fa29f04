"""What is behind the programs of the root. README.md, "How it is laid out", says what each file has."""
